"""A text as a prefix: the model's own keys and values."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from prefix_attn import ContextOverflow, IncompatiblePrefix
from prefix_attn.bank import PrefixBank
from prefix_attn.bank.tokens import tokenised
from tests.bank.models import FAMILIES, prefix_tuned, quiet_peft, read, same_bits, state, tiny


class Letters:
    """One token per letter; 1 opens a text."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        letters = [3 + ord(letter) % 60 for letter in text if letter.isalpha()]
        return {"input_ids": [1, *letters] if add_special_tokens else letters}


class Opened(Letters):
    """Reads a BOS that a chat template wrote."""

    bos_token, bos_token_id = "^", 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        written = [1] * text.startswith("^")
        return {"input_ids": written + super().__call__(text, add_special_tokens)["input_ids"]}


TEXT = "You are a patient support agent"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_cache(family: str, special: bool) -> None:
    model = tiny(family)
    bank = PrefixBank.for_model(model)
    bank.add_text("support", Letters(), TEXT, model, add_special_tokens=special)
    ids = torch.tensor([Letters()(TEXT, special)["input_ids"]])
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
    assert bank.lengths == [ids.shape[1]]  # longer than the sliding window of 8, and whole
    for (k, v), layer in zip(read(bank, "support"), cache.layers, strict=True):
        assert torch.equal(k, layer.keys[0])
        assert torch.equal(v, layer.values[0])


def test_continues_as_the_full_text_would() -> None:
    model = tiny()
    bank = PrefixBank.for_model(model)
    bank.add_text("support", Letters(), TEXT, model)
    prompt, question = torch.tensor([Letters()(TEXT)["input_ids"]]), torch.tensor([[7, 8, 9]])
    cache = DynamicCache([(k[None], v[None]) for k, v in read(bank, "support")])
    with torch.no_grad():
        short = model(question, past_key_values=cache).logits
        full = model(torch.cat([prompt, question], 1)).logits[:, -3:]
    torch.testing.assert_close(short, full, rtol=0, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    """Neither dropout nor use_cache=False nor the mode of single modules changes the result, and all are restored."""
    model = tiny("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    expected = PrefixBank.for_model(model)
    expected.add_text("a", Letters(), TEXT, model)
    model.train()
    model.transformer.h[0].eval()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    bank = PrefixBank.for_model(model)
    bank.add_text("a", Letters(), TEXT, model)
    assert state(bank) == state(expected)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


def test_a_wrapped_model_runs_without_its_adapter() -> None:
    quiet_peft()
    model = tiny()
    bank = PrefixBank.for_model(model)
    bank.add_text("plain", Letters(), TEXT, model)
    bank.add_text("wrapped", Letters(), TEXT, prefix_tuned(model))
    for (k, v), (wrapped_k, wrapped_v) in zip(read(bank, "plain"), read(bank, "wrapped"), strict=True):
        assert torch.equal(k, wrapped_k)
        assert torch.equal(v, wrapped_v)


@pytest.mark.parametrize(
    ("text", "special", "error", "words"),
    [
        ("", True, IncompatiblePrefix, "text: expected a non-empty string"),
        (None, True, IncompatiblePrefix, "text: expected a non-empty string"),
        (["a"], True, IncompatiblePrefix, "text: expected a non-empty string"),
        ("123", False, IncompatiblePrefix, "makes none of '123'"),
        ("x" * 63, True, ContextOverflow, "text: expected at most 63 prefix tokens, got 64"),
        ("x" * 500, True, ContextOverflow, "got 501"),
    ],
)
def test_bad_texts(text: object, special: bool, error: type[Exception], words: str) -> None:
    model = tiny()
    bank = PrefixBank.for_model(model)
    bank.add_text("support", Letters(), TEXT, model)
    before = state(bank)
    with pytest.raises(error, match=words):
        bank.add_text("other", Letters(), text, model, add_special_tokens=special)  # type: ignore[arg-type]
    with pytest.raises(IncompatiblePrefix, match="remove it first"):
        bank.add_text("support", Letters(), "abc", model)
    assert state(bank) == before
    bank.add_text("full", Letters(), "x" * 62, model)
    assert bank.prefix_len("full") == 63


@pytest.mark.parametrize(
    ("text", "options", "opened"),
    [
        ("ab", {}, True), ("^ab", {}, True), ("ab", {"opens": False}, False), ("^ab", {"opens": False}, False),
        ("ab", {"special": False}, False), ("^ab", {"special": False}, True),
        ("^ab", {"special": False, "opens": False}, False),
    ],
)  # fmt: skip
def test_one_bos_at_most(text: str, options: dict[str, bool], opened: bool) -> None:
    letters = Letters()("ab", False)["input_ids"]
    assert tokenised(Opened(), text, **options) == [1] * opened + letters


def test_a_text_from_a_chat_template_is_opened_once() -> None:
    model = tiny()
    bank = PrefixBank.for_model(model)
    bank.add_text("plain", Opened(), TEXT, model)
    bank.add_text("templated", Opened(), f"^{TEXT}", model)
    assert same_bits(read(bank, "templated"), read(bank, "plain"))


def test_another_model_is_refused() -> None:
    bank = PrefixBank.for_model(tiny())
    with pytest.raises(IncompatiblePrefix, match="weights"):
        bank.add_text("support", Letters(), TEXT, tiny(seed=1))
    assert len(bank) == 0


def test_autocast_outside_does_not_matter() -> None:
    model = tiny()
    bank = PrefixBank.for_model(model)
    bank.add_text("plain", Letters(), TEXT, model)
    with torch.autocast("cpu", torch.bfloat16):
        bank.add_text("inside", Letters(), TEXT, model)
    for plain, inside in zip(bank.key_values("plain"), bank.key_values("inside"), strict=True):
        assert all(map(torch.equal, plain, inside))
