"""T5's relative position bias as the short table that `prefix_attention` takes.

T5 adds to each score a learned number that depends on the head and on the distance ``key - query``, sorted into
buckets; all distances from ``max_distance`` on fall into one bucket. So the bias of any two positions, a prefix's
included, is an entry of ``[heads, 2 * max_distance + 1]``.

Source: arXiv:1910.10683, section 2.1.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from prefix_attn.errors import UnsupportedModel


def bias_table(attention: Any, device: torch.device) -> Tensor:
    """The biases of an attention layer that holds T5's embedding: ``[heads, 2R + 1]``, entry ``R + distance``.

    Args:
        device: that of the stack's input (the embedding itself may be offloaded until it is called).
    """
    reach = attention.relative_attention_max_distance
    buckets = _buckets(attention, torch.arange(-reach, reach + 1, device=device))
    table: Tensor = attention.relative_attention_bias(buckets).T.contiguous()  # kernels gather along a head
    return table


def check_buckets(attention: Any) -> None:
    """Raise `UnsupportedModel` unless distances past ``max_distance`` share the buckets of plus and minus that."""
    reach = attention.relative_attention_max_distance
    far = torch.tensor([reach, reach + 1, 2 * reach, 100 * reach, 2**20])
    for distances in (far, -far):
        buckets = _buckets(attention, distances)
        if not bool((buckets == buckets[0]).all()):
            raise UnsupportedModel(
                f"{type(attention).__name__}: expected one bucket for all distances past "
                f"relative_attention_max_distance = {reach}, got several"
            )


def _buckets(attention: Any, distances: Tensor) -> Tensor:
    options = {
        "bidirectional": not attention.is_decoder, "num_buckets": attention.relative_attention_num_buckets,
        "max_distance": attention.relative_attention_max_distance,
    }  # fmt: skip
    function = attention._relative_position_bucket
    takes = inspect.signature(function).parameters  # UMT5's knows the options itself
    buckets: Tensor = function(distances, **{name: x for name, x in options.items() if name in takes})
    return buckets
