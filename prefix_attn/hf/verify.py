"""Compare a patched model with a replicated prefix in a plain cache: the slow way whose meaning nobody doubts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import DynamicCache

from prefix_attn.bank import PrefixBank
from prefix_attn.bank.cache_argument import cache_name
from prefix_attn.bank.forward import FAILURES, cached_kv, device_of_inputs, device_type, evaluating
from prefix_attn.bank.geometry import LayerKV
from prefix_attn.errors import PrefixAttnError, UnsupportedModel
from prefix_attn.hf.positions import counts_otherwise, takes_positions
from prefix_attn.hf.sources import Sources, fill

TOKENS = 5
PREFIX_TOKENS = 4

#: Largest difference of logits allowed, relative to the largest logit. Low precisions differ by order of summation;
#: there the median over tokens counts, since a rounding can also send a token to another expert.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify_a_text(model: Any, hook: Any) -> None:
    """Find out which prefix each attention call reads, and raise `UnsupportedModel` unless a text as a prefix is exact.

    The prefix is the model's own keys and values for a few tokens.

    Args:
        model: being patched.
        hook: its hook; gets the sources, and for a while a bank with that prefix.
    """
    tokens = some_tokens(model, PREFIX_TOKENS + TOKENS)
    key_values = cached_kv(model, tokens[:, :PREFIX_TOKENS])
    bank, hook.bank = hook.bank, PrefixBank(hook.bank.base)
    hook.strict = True
    try:
        hook.sources = Sources(model, key_values, hook.record)
        hook.sources.attach()
        hook.bank.add("text", of_all_heads(hook.bank, key_values))
        verify_against_replica(model, hook.bank, hook)
    except PrefixAttnError:
        raise
    except FAILURES as error:
        raise UnsupportedModel(
            f"{type(model).__name__}: fails when a text is its prefix ({type(error).__name__}: {error})"
        ) from error
    finally:
        hook.bank, hook.strict = bank, False


def verify_against_replica(model: Any, bank: PrefixBank, hook: Any) -> None:
    """Raise `UnsupportedModel` unless each task's logits equal those of a cache that holds its prefix.

    Args:
        model: patched with the bank.
        hook: its decoder's hook, whose fallback for calls without tasks is borrowed meanwhile.
    """
    tokens = some_tokens(model, TOKENS)
    was = hook.implementation
    hook.implementation = "eager"  # the family's own formula: in transformers 5.17 gemma2's sdpa leaves out the softcap
    try:
        with torch.no_grad(), evaluating(model), _autocast_within(model) as lower:
            for name, positions in product(bank.names, _kinds_of_positions(model, tokens)):
                got = model(input_ids=tokens, task_ids=[name], use_cache=False, **positions).logits
                expected = _with_replica(model, bank, name, tokens, positions)
                dtype = lower[0] if lower else got.dtype
                check_close(model, name, got.to(dtype), expected.to(dtype))
    finally:
        hook.implementation = was


def check_close(model: Any, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `UnsupportedModel` unless the logits of task ``name`` agree with the replica's."""
    of_tokens, largest = (got - expected).abs().amax(dim=-1), float(expected.abs().max())
    dtype = torch.bfloat16 if _quantised(model) else got.dtype
    exact = dtype in (torch.float32, torch.float64)
    error = float(of_tokens.max() if exact else of_tokens.median())
    if not error <= TOLERANCE[dtype] * max(largest, 1.0):
        raise UnsupportedModel(
            f"{type(model).__name__}: for task {name!r} the logits differ by {error:.1e} from those of a replicated "
            f"prefix (largest logit {largest:.1e}); please report the family"
        )


def _quantised(model: Any) -> bool:
    """Whether weights are, and with them perhaps activations, whose steps are those of no float dtype."""
    return any(p.dtype.itemsize == 1 or is_traceable_wrapper_subclass(p) for p in model.parameters())


@contextmanager
def _autocast_within(model: Any) -> Iterator[list[torch.dtype]]:
    """The dtype of autocast in each pass from now on, if any: accelerate wraps a model's forward in it."""
    seen: list[torch.dtype] = []

    def look(body: Any, args: Any) -> None:
        if torch.is_autocast_enabled(device_type(body)):
            seen.append(torch.get_autocast_dtype(device_type(body)))

    handle = model.base_model.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _kinds_of_positions(model: Any, tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Keywords: positions as generate gives them, and, where the family counts in its own way, none.

    (A family that counts slots by itself is not asked: some forget those in the cache.)
    """
    if not takes_positions(model):
        return [{}]
    given = {"position_ids": torch.arange(tokens.shape[1], device=tokens.device)[None]}
    return [given, {}] if counts_otherwise(model) else [given]


def _with_replica(
    model: Any, bank: PrefixBank, name: str, tokens: torch.Tensor, positions: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Logits of the family's own formula with the prefix in the cache."""
    m = bank.prefix_len(name)
    mask = torch.ones((1, m + tokens.shape[1]), dtype=torch.long, device=tokens.device)
    behind = {key: x + m for key, x in positions.items()}
    cache = replicated(model, bank, name)
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=mask, **{cache_name(model): cache}, **behind).logits
    return logits


def replicated(model: Any, bank: PrefixBank, name: str) -> DynamicCache:
    """A cache of one row, of the kind the family itself makes, that holds a task's prefix."""
    cache = DynamicCache(config=model.config)
    fill(cache, [bank.key_values(name)])
    return cache


def of_all_heads(bank: PrefixBank, key_values: Sequence[LayerKV]) -> list[LayerKV]:
    """Heads of every process of a tensor-parallel model, as `PrefixBank.add` takes them: copies of this one's."""
    size = bank.base.shard.size
    return [(k.repeat(size, 1, 1), v.repeat(size, 1, 1)) for k, v in key_values]


def some_tokens(model: Any, count: int) -> torch.Tensor:
    """Some tokens ``[1, count]``."""
    vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
    return (torch.arange(count, device=device_of_inputs(model)) * 7 + 3)[None] % vocab_size
