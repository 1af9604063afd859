"""Compare a patched model with a replicated prefix in a plain cache: the slow way whose meaning nobody doubts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from prefix_attn.bank import PrefixBank
from prefix_attn.errors import PrefixAttnError, UnsupportedModel

TOKENS = 5

#: Largest difference of logits allowed, relative to the largest logit. Low precisions differ by order of summation.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify_against_replica(model: Any, bank: PrefixBank, hook: Any) -> None:
    """Raise `UnsupportedModel` unless each task's logits equal those of a cache that holds its prefix.

    Args:
        model: patched with the bank.
        hook: its decoder's hook, whose fallback for calls without tasks is borrowed meanwhile.

    Raises:
        PrefixAttnError: the bank is empty, so that there is nothing to compare.
    """
    if not len(bank):
        raise PrefixAttnError("verify: expected a bank with at least one task; add one, or patch with verify=False")
    device = model.device
    tokens = (torch.arange(TOKENS, device=device) * 7 + 3)[None] % model.config.get_text_config().vocab_size
    was_training, was = model.training, hook.implementation
    model.eval()
    hook.implementation = "eager"  # the family's own formula: in transformers 5.17 gemma2's sdpa leaves out the softcap
    try:
        with torch.no_grad():
            for name in bank.names:
                got = model(input_ids=tokens, task_ids=[name], use_cache=False).logits
                expected = _with_replica(model, bank, name, tokens)
                check_close(model, name, got, expected)
    finally:
        model.train(was_training)
        hook.implementation = was


def check_close(model: Any, name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise `UnsupportedModel` unless the logits of task ``name`` agree with the replica's."""
    error, largest = float((got - expected).abs().max()), float(expected.abs().max())
    if not error <= TOLERANCE[got.dtype] * max(largest, 1.0):
        raise UnsupportedModel(
            f"{type(model).__name__}: for task {name!r} the logits differ by {error:.1e} from those of a replicated "
            f"prefix (largest logit {largest:.1e}); unpatched, and please report the family"
        )


def _with_replica(model: Any, bank: PrefixBank, name: str, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the family's own formula with the prefix in the cache."""
    task = int(bank.task_ids([name]))
    cache = DynamicCache(config=model.config)
    m = bank.prefix_len(name)
    for i in range(bank.num_layers if m else 0):
        prefix = bank.layer(i)
        start, _ = prefix.spans[task]
        cache.update(prefix.k[None, :, start : start + m], prefix.v[None, :, start : start + m], i)
    positions = torch.arange(m, m + tokens.shape[1], device=tokens.device)[None]
    mask = torch.ones((1, m + tokens.shape[1]), dtype=torch.long, device=tokens.device)
    logits: torch.Tensor = model(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache
    ).logits
    return logits
