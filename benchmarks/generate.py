"""Mixed-task generation through ``model.generate``: the patched model against PEFT, which takes one task a batch.

PEFT's fair figure is the batch grouped by task, run group by group; ours is the batch as it is. Both run in this
process, taking turns, on the same weights, prefixes and prompts, and must agree before they are timed: in their first
logits, and in float32 in every token.

Decode time is ``t(new tokens) - t(1 token)``, so that reading prompts is not counted in it; the time to the first token
is ``t(1 token)``, until the last row has it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import prefix_attn as pa
from prefix_attn.hf.verify import TOLERANCE

from .memory import allocated_at_once
from .peers import OURS
from .record import Environment, GenerationRow, package_version
from .suites import Generation
from .timing import first_line

PEFT = "peft, grouped by task"
MAX_REPEATS = 5

#: Tokens of each row, ``[rows, prompt + new]``, and the logits of each row's first new token, ``[rows, vocabulary]``.
Answer = tuple[Tensor, Tensor]


def run_generations(
    points: Sequence[Generation], device: torch.device, environment: Environment, seconds: float,
    keep: Callable[[Iterable[GenerationRow]], None],
) -> list[str]:  # fmt: skip
    """Measure points until the time is up, handing their rows over as they come; what was left out."""
    deadline = time.monotonic() + seconds
    left_out: list[str] = []
    model, made = None, ""
    for i, point in enumerate(tqdm(points, desc="generate", unit="point", disable=None)):
        left = deadline - time.monotonic()
        if left <= 0:
            left_out.append(f"generate left out for want of time: {', '.join(map(str, points[i:]))}")
            break
        if made != point.model:
            model = None  # its memory goes before the next is made
            model = MODELS[point.model](max(p.prefix_tokens + p.prompt_tokens + p.new_tokens for p in points), device)
            made = point.model
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, about PEFT
                share = left * work(point) / sum(map(work, points[i:]))
                rows = Comparison(model, point, environment).rows(share)
        except torch.OutOfMemoryError:
            left_out.append(f"generate left out for want of memory: {point}")
            continue
        finally:
            pa.unpatch(model)
            gc.collect()
        keep(rows)
        for row in rows:
            if row.failed:
                tqdm.write(f"{row.provider} at {point}: {row.status}")
    return left_out


def work(point: Generation) -> int:
    """What a point's time goes by: PEFT takes as many steps for every task."""
    return point.tasks * point.new_tokens


def gpt2_sized(positions: int, device: torch.device) -> Any:
    """GPT-2's shape (12 layers, 12 heads of 64, 124M parameters), float32, with room for the prefix."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    end = 50256
    config = GPT2Config(n_positions=max(positions, 1024), bos_token_id=end, eos_token_id=end, pad_token_id=end)
    return GPT2LMHeadModel(config).to(device).eval()


def llama_3_8b_shaped(positions: int, device: torch.device) -> Any:
    """Llama-3-8B's shape (32 layers, 32 heads of 128 over 8 kv heads), bfloat16, 16 GB made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=max(positions, 8192), rope_theta=500000.0,
        bos_token_id=128000, eos_token_id=128001, pad_token_id=128001,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


#: Random weights of a known shape, by name.
MODELS: dict[str, Callable[[int, torch.device], Any]] = {"GPT-2": gpt2_sized, "Llama-3-8B": llama_3_8b_shaped}


def random_prefixes(bank: pa.PrefixBank, tasks: int, m: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Normal keys and values of ``m`` tokens for each task, ``[layers, 2, kv_heads, m, head_dim]``, by name."""
    layers = bank.geometry.layers
    shape = (len(layers), 2, layers[0].kv_heads, m, layers[0].head_dim)
    return {f"task{t}": torch.randn(shape, generator=rng, device=bank.device, dtype=bank.dtype) for t in range(tasks)}


class Comparison:
    """Both providers at one point."""

    def __init__(self, model: Any, point: Generation, environment: Environment) -> None:
        self.model, self.point = model, point
        self.device = model.device
        rng = torch.Generator(self.device).manual_seed(point.prefix_tokens)
        self.bank = pa.PrefixBank.for_model(model)
        prefixes = random_prefixes(self.bank, point.tasks, point.prefix_tokens, rng)
        size = (point.rows, point.prompt_tokens)
        self.prompts = torch.randint(0, model.config.eos_token_id, size, generator=rng, device=self.device)
        self.task_of = [f"task{row % point.tasks}" for row in range(point.rows)]
        for name, x in prefixes.items():
            self.bank.add(name, [(k, v) for k, v in x])
        self.peft = with_peft(model, prefixes)
        members = {name: [row for row in range(point.rows) if self.task_of[row] == name] for name in prefixes}
        self.groups = {name: rows for name, rows in members.items() if rows}
        self.run = {OURS: self.patched, PEFT: self.grouped}
        self.answers: dict[str, Answer] = {}
        self.template = GenerationRow(
            provider="", version="", dtype=str(model.dtype).removeprefix("torch."), status="", failed=False,
            environment=environment, **asdict(point),
        )  # fmt: skip

    def prepare(self, name: str) -> None:
        """Patch the model for ours, undo it for PEFT: once per model in a server's life, and not timed."""
        if name == OURS:
            pa.patch(self.model, self.bank)
        else:
            pa.unpatch(self.model)

    def patched(self, new: int) -> Answer:
        """The batch as it is."""
        return self._generate(self.model, self.prompts, new, task_ids=self.task_of)

    def grouped(self, new: int) -> Answer:
        """One batch after another, each of one task."""
        tokens = self.prompts.new_empty(self.point.rows, self.point.prompt_tokens + new)
        logits: Tensor | None = None
        for name, rows in self.groups.items():
            self.peft.set_adapter(name)
            tokens[rows], some = self._generate(self.peft, self.prompts[rows], new)
            logits = some.new_empty(self.point.rows, some.shape[1]) if logits is None else logits
            logits[rows] = some
        assert logits is not None, "a batch has at least one row"
        return tokens, logits

    def _generate(self, model: Any, prompts: Tensor, new: int, **options: Any) -> Answer:
        if self.point.cache == "static":
            options["cache_implementation"] = "static"
        out = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return out.sequences, out.logits[0]

    def rows(self, seconds: float) -> list[GenerationRow]:
        """One row per provider; those that fail or disagree carry no time."""
        start = time.monotonic()
        rows = {name: self._tried(name) for name in self.run}
        usable = [name for name, row in rows.items() if row.status == "ok"]
        if len(usable) == len(self.run):
            wrong = self._disagreement()
            if wrong is not None:
                return [replace(row, status=f"wrong: {wrong}", failed=True) for row in rows.values()]
        elapsed = time.monotonic() - start  # all tokens once and a few once: about what a round takes
        repeats = max(1, min(MAX_REPEATS, int((seconds - elapsed) / max(elapsed, 1e-3))))
        times = self._times(usable, repeats)
        return [self._timed(row, *times[name]) if name in times else row for name, row in rows.items()]

    def _tried(self, name: str) -> GenerationRow:
        """The provider's row after a run that warms it up: its memory, or why it cannot run."""
        version = pa.__version__ if name == OURS else f"peft {package_version('peft')}"
        row = replace(self.template, provider=name, version=version)
        held, at_once = self._held(name)
        try:
            self.prepare(name)
            self.answers[name] = self.run[name](self.point.new_tokens)
            few = self.point.new_tokens if self.device.type == "cuda" else 2  # two tokens show it; more take time
            allocated = allocated_at_once(lambda: self.run[name](few), self.device)
        except torch.OutOfMemoryError:
            return replace(row, status="skipped: out of memory", failed=name == OURS)
        except Exception as e:  # whatever a provider raises is its answer to this point
            return replace(row, status=f"refused: {type(e).__name__}: {first_line(e)}", failed=name == OURS)
        resident = self.bank.memory_usage.allocated if name == OURS else self._adapters()
        return replace(row, status="ok", prefix_bytes=held, prefix_bytes_at_once=at_once,
                       peak_bytes=resident + allocated)  # fmt: skip

    def _held(self, name: str) -> tuple[int, int]:
        """Bytes of prefix: over the whole batch, and at once.

        Ours is the bank. PEFT keeps its adapters, and copies each row's prefix into the cache of the row's group.
        """
        bank = self.bank.memory_usage.total
        if name == OURS:
            return bank, bank
        copy = bank // self.point.tasks
        largest = max(map(len, self.groups.values()))
        return self._adapters() + copy * self.point.rows, self._adapters() + copy * largest

    def _adapters(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.peft.prompt_encoder.parameters())

    def _disagreement(self) -> str | None:
        """What differs between the providers' answers, if too much does."""
        (ours, logits), (theirs, expected) = (self.answers[name] for name in (OURS, PEFT))
        difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE[self.model.dtype] * max(largest, 1.0):
            return f"first logits differ by {difference:.1e} (largest {largest:.1e})"
        if self.model.dtype == torch.float32 and not torch.equal(ours, theirs):
            return f"{int((ours != theirs).any(dim=1).sum())} of {self.point.rows} rows differ in their tokens"
        return None

    def _times(self, names: Sequence[str], repeats: int) -> dict[str, tuple[list[float], list[float]]]:
        """For each provider, seconds to one token and to all, one of each for every repeat; they take turns."""
        rng = random.Random(0)
        times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
        for _ in range(repeats):
            for name in rng.sample(list(names), len(names)):
                self.prepare(name)
                for new, found in zip((1, self.point.new_tokens), times[name], strict=True):
                    begin = time.perf_counter()
                    self.run[name](new)
                    if self.device.type == "cuda":
                        torch.cuda.synchronize(self.device)
                    found.append(time.perf_counter() - begin)
        return times

    def _timed(self, row: GenerationRow, first: list[float], all_of_them: list[float]) -> GenerationRow:
        decode = [whole - one for whole, one in zip(all_of_them, first, strict=True)]
        if min(decode) <= 0:
            return replace(row, status="no time: one token took as long as all; the machine is busy")
        tokens = self.point.rows * (self.point.new_tokens - 1)
        rates = sorted(tokens / x for x in decode)
        fifths = statistics.quantiles(rates, n=5, method="inclusive") if len(rates) > 1 else rates * 4
        one = statistics.median(first)
        return replace(
            row, repeats=len(rates), decode_tokens_per_s=statistics.median(rates), decode_p20=fifths[0],
            decode_p80=fifths[3], first_token_s=one,
            prefill_tokens_per_s=self.point.rows * self.point.prompt_tokens / one,
        )  # fmt: skip


def with_peft(model: Any, prefixes: dict[str, Tensor]) -> Any:
    """The same prefixes, each ``[layers, 2, kv_heads, m, head_dim]``, as PEFT adapters on the same model."""
    from peft import PrefixTuningConfig, get_peft_model

    wrapped: Any = None
    for name, key_values in prefixes.items():
        layers, _, kv_heads, m, head_dim = key_values.shape
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=m, num_layers=layers,
                                    token_dim=kv_heads * head_dim, num_attention_heads=kv_heads,
                                    num_transformer_submodules=1)  # fmt: skip
        if wrapped is None:
            wrapped = get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        with torch.no_grad():
            wrapped.prompt_encoder[name].embedding.weight.copy_(key_values.permute(3, 0, 1, 2, 4).reshape(m, -1))
        wrapped.peft_config[name].inference_mode = True
    return wrapped.eval()
