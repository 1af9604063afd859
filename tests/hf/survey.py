"""Which types of the installed transformers the patch serves: every one is built tiny, patched and compared.

    python -m tests.hf.survey --write docs/models.md     # all types; interrupted, it goes on where it stopped
    python -m tests.hf.survey --only llama --only jamba
    old/bin/python -m tests.hf.survey --results build/old.jsonl     # then --older build/old.jsonl tells it on the page

The types are the causal LMs, and those that read images and text, which get text only. The reference is the family's
own eager formula over a plain cache that holds the prefix, one row at a time, at the positions that its own generate
gives, moved by the prefix; and PEFT where it supports the family. A mode of generate is left out only where the family
fails in it without the patch.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import prefix_attn as pa
from prefix_attn.bank.unsupported import NO_PLACE
from prefix_attn.hf.decoder import decoder_of
from prefix_attn.hf.verify import replicated
from tests.hf.conftest import LENGTHS, TASKS, padded_inputs
from tests.hf.shrink import CAUSAL, IMAGE_TEXT, tiny_random_model
from tests.hf.survey_page import Result, page

#: Largest error allowed, relative to the largest logit: a hundred roundings of float32.
TOLERANCE = 2e-5
NEW_TOKENS = 5
SECONDS = 120
#: Families whose positions start at 0 behind a cache, unless they are given.
FORGET_THE_CACHE = ("bamba",)
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}

#: In every mode.
GENERATE = {
    "max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": -1, "output_logits": True, "output_scores": True,
    "return_dict_in_generate": True,
}  # fmt: skip


class Wrong(Exception):
    """A comparison that failed."""


def examine(model_type: str, images: bool = False) -> Result:
    """Build, patch and compare one type; ``images``: its class that reads images and text, not its causal LM."""
    result = Result(model_type, images=images)
    class_name = (IMAGE_TEXT if images else CAUSAL)[model_type]
    try:
        model = tiny_random_model(model_type, class_name)
        reference = copy.deepcopy(model)
    except Exception as error:
        known = NO_PLACE.get(getattr(transformers, class_name).config_class.model_type)
        result.status = "refused" if known else "untested"
        result.reason = f"{model_type}: {known}" if known else f"cannot be built here: {_line(error)}"
        return result
    _set_eager(reference)
    try:
        bank = random_bank(model)
        result.attended = f"{len(bank.geometry.attending)} of {bank.num_layers}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pa.patch(model, bank)
            compare(model, reference, bank, result)
    except pa.PrefixAttnError as refusal:
        result.status, result.reason = "refused", _line(refusal)
    except Wrong as wrong:
        result.reason = str(wrong)
    except Exception as error:
        result.reason = f"crashed: {_line(error)}"
    else:
        slow = [str(warning.message) for warning in caught if issubclass(warning.category, pa.SlowModel)]
        result.status, result.reason = ("slow", slow[0]) if slow else ("exact", "")
    return result


def random_bank(model: Any) -> pa.PrefixBank:
    """Three tasks of different lengths; seeded."""
    bank = pa.PrefixBank.for_model(model)
    for seed, (name, m) in enumerate(LENGTHS.items()):
        rng = torch.Generator().manual_seed(seed)
        bank.add(name, [
            (torch.randn(layer.kv_heads, m, layer.head_dim, generator=rng),
             torch.randn(layer.kv_heads, m, layer.v_head_dim, generator=rng))
            for layer in bank.geometry.layers
        ])  # fmt: skip
    return bank


def compare(model: Any, reference: Any, bank: pa.PrefixBank, result: Result) -> None:
    """Fill in the result's errors; raise `Wrong` at the first that is too large."""
    replica = Replica(reference, bank)
    inputs = padded_inputs()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours = model(**inputs, task_ids=TASKS).logits
        without = model(**inputs).logits
    for row, task in enumerate(TASKS):
        ids, mask = inputs["input_ids"][row : row + 1], inputs["attention_mask"][row : row + 1]
        theirs = replica.logits(task, ids, mask)[0]
        _record(result, "forward", ours[row][real[row]], theirs[real[row]])
        if task is not None and (ours[row] - without[row])[real[row]].abs().max() < 1e-2 * theirs.abs().max():
            raise Wrong(f"the prefix of {task} changes nothing")
    for name, options in MODES.items():
        generated = _generate(model, reference, name, inputs, options, result)
        if generated is None:
            continue
        try:
            _compare_generated(generated, replica, TASKS, options, name, result)
        except Wrong:
            if not _wrong_unpatched(replica, options, name):
                raise
            del result.errors[name]
            result.absent[name] = "the family's own differs from what its logits say, unpatched and without a prefix"
    _compare_with_peft(reference, bank, inputs, ours, result)


def _generate(model: Any, reference: Any, name: str, inputs: Any, options: Any, result: Result) -> Any:
    """The patched model's output; None where the family cannot do it unpatched either."""
    try:
        return model.generate(**inputs, **GENERATE, **options, task_ids=TASKS)
    except pa.PrefixAttnError as refusal:
        if name == "greedy":
            raise
        result.absent[name] = f"refused: {_line(refusal)}"
        return None
    except Exception as error:
        try:
            reference.generate(**inputs, **GENERATE, **options)
        except Exception as its_own:
            result.absent[name] = _line(its_own)
            return None
        raise Wrong(f"{name}: {_line(error)}") from error


def _wrong_unpatched(replica: Replica, options: Any, name: str) -> bool:
    """Whether the family fails the same comparison by itself."""
    out = copy.deepcopy(replica.model).generate(**padded_inputs(), **GENERATE, **options)
    try:
        _compare_generated(out, replica, [None] * len(TASKS), options, name, Result(""))
    except Wrong:
        return True
    return False


def _compare_generated(
    out: Any, replica: Replica, tasks: list[str | None], options: Any, name: str, result: Result
) -> None:
    """Each step's logits, or each beam's score, against the replica, fed in the same steps."""
    copies = options.get("num_return_sequences", 1)
    tokens = out.sequences
    mask = padded_inputs()["attention_mask"].repeat_interleave(copies, 0)
    mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], dim=1)
    for row in range(len(tokens)):
        i = row // copies
        theirs = replica.steps(i, tasks[i], tokens[row : row + 1], mask[row : row + 1])
        if copies == 1:
            _record(result, name, torch.stack([logits[row] for logits in out.logits]), theirs)
        else:
            chosen = tokens[row, -NEW_TOKENS:, None]
            score = theirs.log_softmax(-1).gather(1, chosen).mean()  # length penalty 1
            _record(result, name, out.sequences_scores[row], score)


class Replica:
    """The family's own formula with a row's prefix in a plain cache."""

    def __init__(self, model: Any, bank: pa.PrefixBank) -> None:
        self.model = model
        self.bank = bank

    def logits(self, task: str | None, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[1, len, vocab]`` of one padded row, at the family's own positions."""
        m = 0 if task is None else self.bank.prefix_len(task)
        positions = self._positions_without_cache(tokens, mask)
        options = {} if positions is None else {"position_ids": positions + m}
        return self._forward(tokens, torch.cat([mask.new_ones(1, m), mask], dim=1), self._cache(task), options)

    def _positions_without_cache(self, tokens: Tensor, mask: Tensor) -> Tensor | None:
        """Position ids that a body makes for the decoder inside it; None where the decoder counts what is cached."""
        if self.model.config.model_type in FORGET_THE_CACHE:
            return torch.arange(tokens.shape[1])[None]
        seen: list[Tensor | None] = []
        handle = decoder_of(self.model).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
        )
        with torch.no_grad():
            self.model(input_ids=tokens, attention_mask=mask)
        handle.remove()
        return seen[0]

    def steps(self, row: int, task: str | None, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits ``[NEW_TOKENS, vocab]`` from which generate chose the last tokens of a row of the padded batch."""
        m = 0 if task is None else self.bank.prefix_len(task)
        mask = torch.cat([mask.new_ones(1, m), mask], dim=1)
        cache, begin, steps = self._cache(task), 0, []
        ends = range(tokens.shape[1] - NEW_TOKENS, tokens.shape[1])
        for end, positions in zip(ends, self.positions, strict=True):
            options = {} if positions is None else {"position_ids": positions[..., row : row + 1, :] + m}
            steps.append(self._forward(tokens[:, begin:end], mask[:, : m + end], cache, options)[0, -1])
            begin = end
        return torch.stack(steps)

    @cached_property
    def positions(self) -> list[Tensor | None]:
        """Position ids ``[..., rows, tokens]`` that generate gives the model at each step; None where it gives none."""
        seen = []

        def note(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
            positions = kwargs.get("position_ids")
            seen.append(None if positions is None else positions.expand(*positions.shape[:-2], len(TASKS), -1).clone())

        model = copy.deepcopy(self.model)  # some keep something of the last sequence
        model.register_forward_pre_hook(note, with_kwargs=True)
        model.generate(**padded_inputs(), **GENERATE)
        return seen

    def _forward(self, tokens: Tensor, mask: Tensor, cache: DynamicCache, options: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            out = self.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **options)
        logits: Tensor = out.logits
        return logits

    def _cache(self, task: str | None) -> DynamicCache:
        """A cache as the family makes it, holding the prefix in the layers that attend."""
        if task is None:
            return DynamicCache(config=self.model.config)
        return replicated(self.model, self.bank, task)


def _compare_with_peft(
    reference: Any, bank: pa.PrefixBank, inputs: dict[str, Tensor], ours: Tensor, result: Result
) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    kinds = set(bank.geometry.layers)
    if len(kinds) != 1:
        result.absent["PEFT"] = "layers differ in shape"
        return
    kv_heads, head_dim, v_head_dim = kinds.pop()
    if head_dim != v_head_dim:
        result.absent["PEFT"] = "keys and values differ in head dim"
        return
    real = inputs["attention_mask"].bool()
    errors = []
    try:
        for row, task in enumerate(TASKS):
            if task is None:
                continue
            prefix = torch.stack([torch.stack(kv) for kv in bank.key_values(task)])  # [layers, 2, heads, m, D]
            config = PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=prefix.shape[3], num_layers=len(prefix),
                token_dim=kv_heads * head_dim, num_attention_heads=kv_heads, num_transformer_submodules=1,
            )  # fmt: skip
            peft_model = get_peft_model(copy.deepcopy(reference), config).eval()
            with torch.no_grad():
                weight = peft_model.prompt_encoder["default"].embedding.weight
                weight.copy_(prefix.permute(3, 0, 1, 2, 4).reshape(weight.shape))
                theirs = peft_model(**{name: x[row : row + 1] for name, x in inputs.items()}).logits[0]
            errors.append((ours[row][real[row]], theirs[real[row]]))
    except Exception as error:
        result.absent["PEFT"] = f"PEFT fails itself: {_line(error)}"
        return
    for pair in errors:
        _record(result, "PEFT", *pair)


def _record(result: Result, name: str, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    result.errors[name] = max(error, result.errors.get(name, 0.0))
    if not error <= TOLERANCE:
        raise Wrong(f"{name}: relative error {error:.1e}")


def _set_eager(model: Any) -> None:
    try:
        model.set_attn_implementation("eager")
    except ValueError:
        return  # a family without choice


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, pa.PrefixAttnError) else f"{type(error).__name__}: {text}"[:200]


def _in_child(model_type: str, images: bool, queue: Any) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    queue.put(asdict(examine(model_type, images)))


def survey(
    todo: list[tuple[str, bool]], seconds: int = SECONDS, done: Callable[[Result], None] = lambda _: None
) -> list[Result]:
    """Examine each type in a process of its own, so that a crash or a hang costs one type."""
    _in_parent()
    context = multiprocessing.get_context("fork")
    results = []
    progress = tqdm(todo)
    for model_type, images in progress:
        progress.set_postfix_str(model_type)
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(model_type, images, queue))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            result = Result(model_type, images=images, reason=f"no answer in {seconds} s")
        elif queue.empty():
            result = Result(model_type, images=images, reason=f"the process died with {child.exitcode}")
        else:
            result = Result(**queue.get())
        done(result)
        results.append(result)
    return results


def _in_parent() -> None:
    """Import what every child needs, once."""
    import peft  # noqa: F401

    torch.set_num_threads(1)
    tiny_random_model("llama").generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2, num_beams=2)


def load(path: Path) -> dict[tuple[str, bool], Result]:
    """Kept results, by type and whether of images; the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(result.model_type, result.images): result for result in (Result(**json.loads(line)) for line in lines)}


def main(
    only: Annotated[list[str] | None, typer.Option(help="Examine these types only, again.")] = None,
    results: Annotated[Path, typer.Option(help="Where results are kept between runs.")] = Path("build/survey.jsonl"),
    fresh: Annotated[bool, typer.Option(help="Forget kept results.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the table of all kept results here.")] = None,
    older: Annotated[
        list[Path] | None, typer.Option(help="Results of an older transformers, to be told on the page.")
    ] = None,
    seconds: Annotated[int, typer.Option(help="Time limit of one type.")] = SECONDS,
) -> None:
    """Examine all types of the installed transformers; exit with 1 if one is neither right nor refused."""
    results.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        results.unlink(missing_ok=True)
    known = load(results)
    every = [*((t, False) for t in CAUSAL), *((t, True) for t in IMAGE_TEXT)]
    todo = [key for key in every if (key[0] in only if only else key not in known)]

    def keep(result: Result) -> None:
        with results.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")

    survey(todo, seconds, keep)
    known = {key: result for key, result in load(results).items() if key in every}
    if write is not None:
        write.parent.mkdir(exist_ok=True)
        write.write_text(page(known.values(), ["forward", *MODES, "PEFT"], [load(x).values() for x in older or ()]))
    failed = [result for result in known.values() if result.status == "failed"]
    for result in failed:
        print(f"{result.model_type}: {result.reason}")
    print(", ".join(f"{n} {status}" for status, n in Counter(r.status for r in known.values()).items()))
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
