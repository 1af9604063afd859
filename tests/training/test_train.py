"""`train`: many tasks in one batch, each as if alone; on the shipped example, where learning shows in seconds."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import prefix_attn as pa
from prefix_attn.hf.wiring import bank_of
from prefix_attn.string_tasks.tasks import TASKS, draw_input, prompt_without_instruction
from prefix_attn.training import Example, Loss, TrainablePrefixes, Trained, loop, train
from prefix_attn.training.examples import NOT_SCORED, TokenisedExample, split
from tests.hf.shrink import tiny_random_model
from tests.hf.survey import random_bank
from tests.hf.test_text import EXAMPLE


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    folder = EXAMPLE / "model"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_an_answer_is_tokenised_as_it_follows_its_prompt() -> None:
    """Alone, this tokenizer puts a space in front of a text."""
    vocabulary = [(name, -1.0) for name in ("<unk>", "▁cat", "▁dog", "dog", ":", "▁")]
    model = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    for answer, expected in (("dog", "dog"), (" dog", "▁dog")):
        row = TokenisedExample.of(0, Example("a", "cat:", answer), tokenizer, None, None)
        assert tokenizer.convert_ids_to_tokens(row.ids.tolist()) == ["▁cat", ":", expected]
        assert row.labels.tolist() == [NOT_SCORED, NOT_SCORED, row.ids[2]]


def test_a_bos_that_a_chat_template_wrote_is_not_doubled(base: tuple[Any, Any]) -> None:
    plain, templated = (
        TokenisedExample.of(0, Example("a", prompt, "AB"), base[1], None, None) for prompt in ("ab>", "<bos>ab>")
    )
    assert templated.ids.tolist() == plain.ids.tolist()
    assert templated.labels.tolist() == plain.labels.tolist()


def test_equal_rows_are_trained_on_or_held_out(base: tuple[Any, Any]) -> None:
    lines = [Example("a", f"{letter}>", answer) for letter in "abcde" for answer in ("x", "y")]
    rows = [TokenisedExample.of(i, line, base[1], None, None) for i, line in enumerate(lines * 5)]
    training, scored = split(rows, 0.3, random.Random(0))
    assert (len(training), len(scored)) == (35, 15)
    sides = [{(*row.ids.tolist(), *row.labels.tolist()) for row in side} for side in (training, scored)]
    assert not sides[0] & sides[1]
    assert split(rows[::10], 0.3, random.Random(0))[1] == [], "one example, however often, is trained on"


def examples(count: int, *names: str) -> list[Example]:
    """Training lines of tasks, without the instruction."""
    lines = []
    for task in TASKS:
        rng = random.Random(task.name)
        for _ in range(count if task.name in names else 0):
            text = draw_input(task, rng, held_out=False)
            lines.append(Example(task.name, prompt_without_instruction(text), task.solve(text)))
    return lines


def quick(base: tuple[Any, Any], lines: list[Example], **options: Any) -> Trained:
    return train(*base, lines, **{"tokens": 8, "epochs": 1, "progress": False} | options)


def same(a: Trained, b: Trained, task: str) -> bool:
    pairs = zip(a.key_values[task], b.key_values[task], strict=True)
    return all(torch.equal(x, y) for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True))


def test_two_tasks_learn_together(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    trained = quick(base, examples(400, "vowels", "rot13"), epochs=6, batch_size=16)
    assert model.training
    assert all(p.requires_grad and torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert bank_of(model) is None
    model.eval()
    for task in ("vowels", "rot13"):
        start, best = loss_of(trained, task, 0).held_out, loss_of(trained, task, trained.best[task].epoch).held_out
        assert start is not None
        assert best is not None
        assert best < 0.1 < 5 < start
        assert best == min(x.held_out for x in trained.losses if x.task == task and x.held_out is not None)
    bank = pa.PrefixBank.for_model(model)
    trained.add_to(bank)
    pa.patch(model, bank)
    inputs = tokenizer(["hotel>", "hotel>"], return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**inputs, task_ids=["vowels", "rot13"], max_new_tokens=8, do_sample=False)
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == ["hotel>2", "hotel>ubgry"]
    pa.unpatch(model)


def loss_of(trained: Trained, task: str, epoch: int) -> Loss:
    return next(loss for loss in trained.losses if (loss.task, loss.epoch) == (task, epoch))


def steady(optimizer: Any, **_: Any) -> Any:
    """A rate that does not depend on the number of steps."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


@pytest.mark.parametrize("projection", [None, 16])
def test_a_task_learns_as_if_it_were_alone(
    base: tuple[Any, Any], projection: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batches of one task, with and without rows of another beside them."""
    alone, mixed = examples(32, "sort"), examples(32, "sort", "upper")

    def eight_of_each(rows: list[Any], size: int) -> list[list[Any]]:
        tasks = [[row for row in rows if row.task == task] for task in ("sort", "upper")]
        return [[row for of_task in tasks for row in of_task[i : i + 8]] for i in range(0, 32 if rows else 0, 8)]

    monkeypatch.setattr(random.Random, "shuffle", lambda self, x: None)
    monkeypatch.setattr(loop, "_batches", eight_of_each)
    options = {"projection": projection, "held_out": 0, "epochs": 2, "batch_size": 8}
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", steady)
    one, two = quick(base, alone, **options), quick(base, mixed, **options)
    assert one.best["sort"].epoch == 2
    for ours, theirs in zip(one.key_values["sort"], two.key_values["sort"], strict=True):
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


def test_the_same_seed_gives_the_same_prefixes(base: tuple[Any, Any]) -> None:
    lines = examples(40, "sort", "upper")
    state = torch.get_rng_state()
    first, again, other = (quick(base, lines, seed=seed) for seed in (1, 1, 2))
    assert same(first, again, "sort")
    assert not same(first, other, "sort")
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are not touched"


def test_a_start_is_trained_further(base: tuple[Any, Any]) -> None:
    lines = examples(100, "vowels")
    once = quick(base, lines, epochs=4, held_out=0.2)
    twice = quick(base, lines, epochs=1, held_out=0.2, start=once.key_values, learning_rate=1e-9)
    best = loss_of(once, "vowels", once.best["vowels"].epoch)
    assert loss_of(twice, "vowels", 0).held_out == pytest.approx(best.held_out, rel=1e-3)


def test_what_happens_after_each_epoch(base: tuple[Any, Any]) -> None:
    """Nothing is held out: the latest prefix counts, and there is a loss of training alone."""
    seen = []
    trained = quick(
        base,
        examples(20, "sort"),
        epochs=3,
        held_out=0,
        after_epoch=lambda so_far: seen.append(so_far.best["sort"].epoch),
    )
    assert seen == [1, 2, 3]
    assert [(x.epoch, x.held_out, x.training is None) for x in trained.losses] == [
        (0, None, True), (1, None, False), (2, None, False), (3, None, False),
    ]  # fmt: skip


def test_a_batch_without_a_task_does_not_move_it(base: tuple[Any, Any]) -> None:
    model, _ = base
    start = {name: [(torch.randn(2, 3, 32), torch.randn(2, 3, 32)) for _ in range(4)] for name in "ab"}
    prefixes = TrainablePrefixes(model, start)
    for parameter in prefixes.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    loop._keep_apart(prefixes, {"a": torch.zeros(())})
    norms = [sum(p.grad.square().sum() for p in prefixes.parameters_of("a")).sqrt()]
    assert norms[0] == pytest.approx(loop.LARGEST_NORM, rel=1e-4)
    assert all(p.grad is None for p in prefixes.parameters_of("b"))


@pytest.mark.parametrize("projection", [None, 16])
def test_what_is_returned_has_the_loss_that_is_claimed(
    base: tuple[Any, Any], projection: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here that of the start, which is good, and which a far too high rate makes worse."""
    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", steady)
    bank = pa.PrefixBank.for_model(base[0])
    bank.load("vowels", EXAMPLE / "adapters" / "vowels")
    start = {"vowels": bank.key_values("vowels")}
    trained = quick(base, examples(40, "vowels"), epochs=2, start=start, learning_rate=30.0, projection=projection)
    assert loss_of(trained, "vowels", 0).held_out < 0.1 < loss_of(trained, "vowels", 2).held_out
    assert trained.best["vowels"].epoch == 0
    for ours, theirs in zip(trained.key_values["vowels"], start["vowels"], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_modes_that_are_on_outside_do_not_matter(base: tuple[Any, Any]) -> None:
    lines = examples(20, "sort")
    expected = quick(base, lines, epochs=2)
    with torch.no_grad():
        assert same(quick(base, lines, epochs=2), expected, "sort")
    with torch.inference_mode():
        assert same(quick(base, lines, epochs=2), expected, "sort")
    with torch.autocast("cpu", torch.bfloat16):
        lower = quick(base, lines, epochs=8, learning_rate=1e-2)
    assert lower.best["sort"].epoch > 0
    assert loss_of(lower, "sort", 8).training < loss_of(lower, "sort", 1).training - 1


def test_what_the_callback_must_leave_alone(base: tuple[Any, Any]) -> None:
    model, _ = base
    lines = examples(4, "sort")
    for change in (lambda _: model.train(), lambda _: pa.unpatch(model)):
        with pytest.raises(pa.PrefixAttnError, match="after_epoch: expected to find the model as it was"):
            quick(base, lines, after_epoch=change)
        assert bank_of(model) is None
        model.eval()


def test_add_to_changes_all_or_nothing(base: tuple[Any, Any]) -> None:
    trained = quick(base, examples(4, "sort", "upper"))
    bank = pa.PrefixBank.for_model(base[0])
    bank.add("sort", trained.key_values["sort"])
    with pytest.raises(pa.IncompatiblePrefix, match=r"expected none of \['sort'\] in it"):
        trained.add_to(bank)
    assert bank.names == ["sort"]
    bank.remove("sort")
    trained.add_to(bank)
    assert [bank.source(name) for name in bank.names] == ["trained"] * 2
    small = pa.PrefixBank.for_model(base[0], reserve=(1, 64))
    with pytest.raises(pa.ShapeError):
        trained.add_to(small)
    assert small.names == []


def test_padding_behind_a_row_needs_no_positions(base: tuple[Any, Any]) -> None:
    """A long prefix before a short text, beside a short prefix before a long one."""
    shape = (base[0].config.num_key_value_heads, 40, base[0].config.head_dim)
    start = {"long": [(torch.zeros(shape), torch.zeros(shape))] * base[0].config.num_hidden_layers}
    lines = [Example("long", "abc>", "abc"), Example("short", "a" * 40 + ">", "b")] * 2
    together = quick(base, lines, start=start, held_out=0, batch_size=4)
    alone = quick(base, lines[::2], start=start, held_out=0, batch_size=2)
    assert together.best["long"].training == pytest.approx(alone.best["long"].training, rel=1e-4)


def test_small_gradients_of_a_model_in_float16(base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of long answers would vanish; here the loss is made small."""
    norms: dict[torch.dtype, list[torch.Tensor]] = {}
    row_losses, keep_apart = loop.row_losses, loop._keep_apart
    monkeypatch.setattr(loop, "row_losses", lambda *args, **options: 1e-6 * row_losses(*args, **options))
    for dtype in (torch.float32, torch.float16):
        found = norms[dtype] = []
        monkeypatch.setattr(
            loop, "_keep_apart", lambda *args, found=found: found.append(keep_apart(*args)) or found[-1]
        )
        model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model", dtype=dtype)
        quick((model, base[1]), examples(8, "sort"), projection=None, held_out=0)
    assert float(norms[torch.float16][0]) == pytest.approx(float(norms[torch.float32][0]), rel=0.02)


def test_float16_trains_as_float32_does(base: tuple[Any, Any]) -> None:
    """The first scales of the loss may be too high: those steps are not taken."""
    losses = []
    for dtype in (torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "model", dtype=dtype)
        losses.append(quick((model, base[1]), examples(40, "sort"), batch_size=8).best["sort"].held_out)
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_gradient_that_is_no_number_is_an_error(base: tuple[Any, Any]) -> None:
    def break_last(module: Any, given: Any, taken: Any) -> Any:
        steps.append(1)
        return (given[0] * float("inf"),) if len(steps) == 2 else None

    steps: list[int] = []
    handle = base[0].model.norm.register_full_backward_hook(break_last)
    try:
        with pytest.raises(pa.PrefixAttnError, match="a gradient in epoch 1 is nan; lower the learning rate"):
            quick(base, examples(8, "sort"), batch_size=4, held_out=0)
    finally:
        handle.remove()
    assert len(steps) == 2


def test_layers_that_pass_no_gradient_on_are_an_error(base: tuple[Any, Any]) -> None:
    """As some quantised ones do, without a word."""
    handle = base[0].model.norm.register_full_backward_hook(lambda module, given, taken: (torch.zeros_like(given[0]),))
    try:
        with pytest.raises(pa.UnsupportedModel, match="no gradient reaches the prefixes"):
            quick(base, examples(8, "sort"))
    finally:
        handle.remove()


def test_a_family_that_counts_from_padding_learns_at_the_positions_it_is_served_at() -> None:
    """RoBERTa's forward begins at padding_idx + 1, and transformers' generate at 0."""
    model = tiny_random_model("roberta")
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    bank = random_bank(model)
    pa.patch(model, bank)
    labels = torch.full_like(ids[0], NOT_SCORED)
    labels[-1] = ids[0, -1]
    loss = loop.row_losses(model, [TokenisedExample("nine", ids[0], labels)], torch.device("cpu"), task_ids=["nine"])
    out = model.generate(
        input_ids=ids[:, :-1], attention_mask=torch.ones_like(ids[:, :-1]), task_ids=["nine"], max_new_tokens=1,
        do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = -out.logits[0].log_softmax(-1)[0, ids[0, -1]]
    torch.testing.assert_close(loss[0], expected)


def test_a_held_out_loss_that_is_no_number_is_an_error(base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Means, "means", lambda self: {"sort": float("nan")})
    with pytest.raises(pa.PrefixAttnError, match="the held-out loss of task 'sort' is nan"):
        quick(base, examples(10, "sort"))


def test_refusals(base: tuple[Any, Any]) -> None:
    lines = examples(4, "sort")
    with pytest.raises(pa.IncompatiblePrefix, match="at least one, got none"):
        quick(base, [])
    with pytest.raises(pa.ShapeError, match="epochs: expected an integer of at least 1, got 0"):
        quick(base, lines, epochs=0)
    with pytest.raises(pa.ShapeError, match=r"tokens: expected an integer of at least 1, got 4\.0"):
        quick(base, lines, tokens=4.0)
    with pytest.raises(pa.ShapeError, match="a share from 0 to below 1, got 1"):
        quick(base, lines, held_out=1)
    for rate in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(pa.ShapeError, match="learning_rate: expected None or a positive"):
            quick(base, lines, learning_rate=rate)
    with pytest.raises(pa.ShapeError, match="projection: expected None or a width of at least 1, got 0"):
        quick(base, lines, projection=0)
    with pytest.raises(pa.UnknownTask, match=r"tasks that have examples \(\['sort'\]\), got \['srot'\]"):
        quick(base, lines, start={"srot": []})
    with pytest.raises(pa.IncompatiblePrefix, match=r"got none for \['sort'\]"):
        quick(base, lines, start={"sort": []})
    with pytest.raises(pa.IncompatiblePrefix, match=r"examples\[0\]: expected task, prompt, answer"):
        quick(base, [{"task": "sort", "prompt": "b>"}])
    with pytest.raises(pa.IncompatiblePrefix, match=r"examples\[0\]: .* to be strings"):
        quick(base, [Example("sort", ["b>"], "b")])
    with pytest.raises(pa.IncompatiblePrefix, match="name"):
        quick(base, [Example("a/b", "b>", "b")])
    with pytest.raises(pa.ContextOverflow, match=r"examples\[4\]: .* exceed the 56 positions that the"):
        quick(base, [*lines, Example("sort", "a" * 50 + ">", "a" * 20)])
    with pytest.raises(pa.PrefixAttnError, match=r"(the loss|a gradient) in epoch 1 is nan; lower the learning rate"):
        quick(base, examples(200, "sort"), learning_rate=1e30, projection=None)
    assert bank_of(base[0]) is None
