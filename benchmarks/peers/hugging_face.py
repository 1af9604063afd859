"""What transformers does for prefix tuning: the cache holds the prefix once per row, and each step copies it all.

A dynamic cache concatenates the new keys to the old ones at every layer and step, then calls the model's attention
function; with a prefix in the cache, prefill also carries a mask ``[B, 1, n, m + n]``, which rules the flash kernels
out. The concatenation is done here, and transformers' own functions are called: each version does what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from .interface import Peer
from .problem import Problem
from .sdpa import lower_right_mask

#: Eager attention repeats keys and values for every query head; larger than this, in bytes, would take all the time.
MAX_REPEATED_GPU, MAX_REPEATED_CPU = 10**10, 5 * 10**8


class HuggingFace(Peer):
    """One layer's cache update and attention, by transformers' SDPA or its eager function."""

    replicates = True

    def __init__(self, implementation: str = "sdpa") -> None:
        self.eager = implementation == "eager"
        self.name = "hugging face, eager" if self.eager else "hugging face, concatenation"
        self.version = f"transformers {transformers.__version__}"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        on_gpu, (k, _) = problem.q.is_cuda, problem.replica
        repeated = 2 * problem.point.group * k.numel() * k.element_size()
        if self.eager and repeated > (MAX_REPEATED_GPU if on_gpu else MAX_REPEATED_CPU):
            raise ValueError(f"not timed: keys repeated for every query head take {repeated / 1e9:.1f} GB")
        return layer_step(problem, problem.q, *problem.replica, mask=problem.replica_mask, eager=self.eager)


def layer_step(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, eager: bool = False
) -> Callable[[], Tensor]:
    """A layer's step for the rows of q: all but the newest keys lie in its cache, the newest are appended.

    Args:
        q: ``[rows, H, Q, D]``.
        k, v: ``[rows, kv_heads, keys, D]``, the newest last.
        mask: bool ``[rows, 1, Q, keys]``; by default each query sees all keys up to its own.
    """
    new, keys = problem.point.q_len, k.shape[2]
    cached, fresh = ([x[:, :, part].contiguous() for x in (k, v)] for part in (slice(None, -new), slice(-new, None)))
    if mask is None and new > 1:  # one new token sees everything, and unpadded batches carry no mask
        mask = lower_right_mask(new, keys, q.device).expand(q.shape[0], 1, -1, -1).contiguous()
    attention: Callable[..., Any] = sdpa_attention_forward
    if eager:
        attention = eager_attention_forward
        mask = None if mask is None else q.new_zeros(()).where(mask, torch.finfo(q.dtype).min)
    module = SimpleNamespace(num_key_value_groups=problem.point.group, is_causal=True, training=False)
    scaling = q.shape[3] ** -0.5

    def step() -> Tensor:
        k, v = (torch.cat([old, x], dim=-2) for old, x in zip(cached, fresh, strict=True))
        out: Tensor = attention(module, q, k, v, mask, scaling=scaling)[0]  # [rows, Q, H, D]
        return out.transpose(1, 2)

    return step
