"""Attention over packed rows, as continuous batching lays them out: all tokens of all requests in one row.

transformers gives queries ``[1, heads, tokens, D]`` and, from its paged cache, keys ``[1, heads, keys, D]``, request
after request, without padding. Requests with about as many queries and keys, by the powers of two of their numbers, are
gathered into one padded batch, so that at most half of the queries is padding, and half of the keys, or SHORT of them.
Queries are aligned on the right and keys on the left, as ``kv_len`` of `prefix_attention` wants them. Where the C++
kernel runs, on a CPU, it reads each row's keys where they lie, and only queries are gathered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefix_attn.attention import prefix_attention, reads_in_place
from prefix_attn.errors import UnsupportedModel
from prefix_attn.plan import BatchPlan
from prefix_attn.types import PrefixKV

#: Requests of up to so many keys are one group: few groups cost less than their padding.
SHORT = 256


class PackedRequest(NamedTuple):
    """One request's share of a step: its task id, tokens seen before, and query tokens now."""

    task: int
    past: int
    q_len: int


class _Group(NamedTuple):
    """Requests that run as one padded batch of R rows; all tensors on the device, of dtype int64 unless said."""

    task_ids: Tensor  # int32 [R]
    kv_len: Tensor  # int32 [R]
    queries: Tensor  # [R, max_q]; where in the packed row, padding repeats the request's first
    keys: Tensor  # [R, max_k]
    slots: Tensor  # [n]; the real queries among the R * max_q
    places: Tensor  # [n]; and where they belong
    plan: BatchPlan


@dataclass
class PackedRows:
    """Whose tokens are where in one packed step.

    Attributes:
        requests: in the order of their tokens.
        lens: prefix lengths of the bank, int32 ``[tasks]``.
        cache: the engine's paged cache.
    """

    requests: Sequence[PackedRequest]
    lens: Tensor
    cache: Any
    _groups: dict[int | None, list[_Group]] = field(default_factory=dict, init=False, repr=False)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix: PrefixKV,
        kwargs: dict[str, Any],
        **options: Any,
    ) -> Tensor:
        """One layer's attention ``[1, q_heads, tokens, D]``.

        The keys are those of the paged cache, or, until transformers 5.23, new ones, and the cache is in ``kwargs``.
        """
        layer: Any = module
        sliding = self.cache.layer_to_allocator[layer.layer_idx].layer_type == "sliding_attention"
        window = layer.config.sliding_window if sliding else None
        if kwargs.get("sliding_window") != window and kwargs.get("sliding_window") is not None:
            raise UnsupportedModel(
                f"{type(module).__name__}: the layer slides over {kwargs['sliding_window']} tokens, but its cache over "
                f"{window}"
            )
        if "cache" in kwargs:
            key, value = self.cache.update(key, value, layer.layer_idx, kwargs)
        out = torch.empty_like(query[0].transpose(0, 1))  # [tokens, q_heads, D]
        for group in self._grouped(window, query.device):
            queries, kv_start, kv_len = _gathered(query, group.queries), None, group.kv_len
            # Not under a window, which would count the keys in front of a row's as its padding.
            if window is None and reads_in_place(queries, key, value):
                kv_start = group.keys[:, 0].int()
                kv_len = kv_start + group.kv_len
                k, v = (x.expand(len(queries), -1, -1, -1) for x in (key, value))
            else:
                k, v = _gathered(key, group.keys), _gathered(value, group.keys)
            part = prefix_attention(
                queries, k, v, prefix, group.task_ids, kv_start=kv_start, kv_len=kv_len, window=window,
                plan=group.plan, **options,
            )  # fmt: skip
            out[group.places] = part.transpose(1, 2).flatten(0, 1)[group.slots]
        return out.transpose(0, 1)[None]

    def _grouped(self, window: int | None, device: torch.device) -> list[_Group]:
        """The groups for layers that keep all keys, or those a window still shows."""
        if window not in self._groups:
            kept = [r.past if window is None else min(r.past, window - 1) for r in self.requests]
            lengths = [past + r.q_len for past, r in zip(kept, self.requests, strict=True)]
            alike: dict[tuple[int, int], list[int]] = defaultdict(list)
            for i, r in enumerate(self.requests):
                if r.q_len:  # none: of one token and several sequences, which the engine keeps for their own steps
                    alike[(r.q_len - 1).bit_length(), (max(lengths[i], SHORT) - 1).bit_length()].append(i)
            first_q, first_k = ([0, *accumulate(x)] for x in ([r.q_len for r in self.requests], lengths))
            self._groups[window] = [self._group(rows, first_q, first_k, lengths, device) for rows in alike.values()]
        return self._groups[window]

    def _group(
        self, rows: list[int], first_q: list[int], first_k: list[int], lengths: list[int], device: torch.device
    ) -> _Group:
        q_lens, k_lens = [self.requests[i].q_len for i in rows], [lengths[i] for i in rows]
        max_q, max_k = max(q_lens), max(k_lens)
        slots = [row * max_q + max_q - n + j for row, n in enumerate(q_lens) for j in range(n)]
        places = [first_q[i] + j for i, n in zip(rows, q_lens, strict=True) for j in range(n)]
        on_device: Callable[..., Tensor] = lambda x: torch.tensor(x).to(device, non_blocking=True)  # noqa: E731
        queries = on_device([first_q[i] for i in rows])[:, None].repeat(1, max_q)
        queries.view(-1)[on_device(slots)] = on_device(places)
        own = torch.arange(max_k, device=device)
        keys = on_device([first_k[i] for i in rows])[:, None] + own.clamp(max=on_device(k_lens)[:, None] - 1)
        task_ids = on_device([self.requests[i].task for i in rows]).int()
        return _Group(
            task_ids, on_device(k_lens).int(), queries, keys, on_device(slots), on_device(places),
            BatchPlan(task_ids, self.lens),
        )  # fmt: skip


def _gathered(packed: Tensor, index: Tensor) -> Tensor:
    """``[1, heads, tokens, D]`` at ``index [R, n]`` as ``[R, heads, n, D]``."""
    tokens = packed[0].transpose(0, 1)  # [tokens, heads, D], as they lie in the cache: whole rows are copied
    return tokens.index_select(0, index.flatten()).view(*index.shape, *tokens.shape[1:]).transpose(1, 2)
