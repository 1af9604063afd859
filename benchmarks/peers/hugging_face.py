"""What transformers does for prefix tuning: the cache holds the prefix once per row, and each step copies it all.

A dynamic cache concatenates the new keys to the old ones at every layer and step, then calls SDPA; with a prefix in
the cache, prefill also carries a mask ``[B, 1, n, m + n]``, which rules the flash kernels out. The cache's own
concatenation is done here, and its own attention function is called, so that each version does what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .interface import Peer
from .problem import Problem
from .sdpa import lower_right_mask


class HuggingFace(Peer):
    """One layer's cache update and attention."""

    name = "hugging face, concatenation"
    replicates = True

    def __init__(self) -> None:
        self.version = f"transformers {transformers.__version__}"

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        q, new = problem.q, problem.point.q_len
        cached, fresh = (
            [x[:, :, part].contiguous() for x in problem.replica] for part in (slice(None, -new), slice(-new, None))
        )
        keys = cached[0].shape[2] + new
        mask = None  # one new token sees everything, and unpadded batches carry no mask
        if new > 1:
            mask = lower_right_mask(new, keys, q.device).expand(q.shape[0], 1, -1, -1).contiguous()
        module = SimpleNamespace(num_key_value_groups=problem.point.group, is_causal=True)

        def call() -> Tensor:
            k, v = (torch.cat([old, x], dim=-2) for old, x in zip(cached, fresh, strict=True))
            out: Tensor = sdpa_attention_forward(module, q, k, v, mask)[0]  # [B, Q, H, D]
            return out.transpose(1, 2)

        return call
