"""Which keys of a row a tile of queries sees, and into which tiles of keys they are cut.

Tiles that every query sees in full take no mask, those at the edges do. Tiles that no query sees are not visited.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def split_span(lo, hi, full_lo, full_hi, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Tiles of ``lo .. hi``, in this order: ``(left, full, right)``, where only the full ones need no mask.

    Those to the left and right are of BLOCK_E, of which BLOCK_N is a multiple.
    """
    left = tl.cdiv(tl.maximum(tl.minimum(full_lo, hi) - lo, 0), BLOCK_E)
    full = tl.maximum(full_hi - lo - left * BLOCK_E, 0) // BLOCK_N
    return left, full, tl.maximum(tl.cdiv(hi - lo - left * BLOCK_E - full * BLOCK_N, BLOCK_E), 0)


@triton.jit
def visible_span(begin, end, first_query, last_query, window, CAUSAL: tl.constexpr):
    """Keys of ``begin .. end`` that some query sees, ``lo .. hi``, and that all see, ``full_lo .. full_hi``.

    The queries are those at positions ``first_query .. last_query``, both included.
    """
    lo = begin
    full_lo = begin
    if window is not None:
        lo = tl.maximum(begin, first_query - window + 1)
        full_lo = tl.maximum(begin, last_query - window + 1)
    hi = end
    full_hi = end
    if CAUSAL:
        hi = tl.minimum(end, last_query + 1)
        full_hi = tl.minimum(end, first_query + 1)
    return lo, tl.maximum(hi, lo), full_lo, full_hi


@triton.jit
def split_row(first, last, own_start, own_end, prefix_len, window, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_E: tl.constexpr):  # fmt: skip
    """What the queries at ``first .. last`` of a row see: ``(prefix, own)``, each ``(lo, hi, left, full, right)``.

    Keys ``lo .. hi`` are the tiles of `split_span`, side by side from lo.
    """
    lo, hi, full_lo, full_hi = visible_span(0, prefix_len, first + prefix_len, last + prefix_len, window, False)
    left, full, right = split_span(lo, hi, full_lo, full_hi, BLOCK_N, BLOCK_E)
    own_lo, own_hi, own_full_lo, own_full_hi = visible_span(own_start, own_end, first, last, window, CAUSAL)
    own_left, own_full, own_right = split_span(own_lo, own_hi, own_full_lo, own_full_hi, BLOCK_N, BLOCK_E)
    return (lo, hi, left, full, right), (own_lo, own_hi, own_left, own_full, own_right)


@triton.jit
def full_tile(n, prefix, own, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Whether the n-th full tile of a row (`split_row`) is of its own keys, and the tile's first key."""
    is_own = n >= prefix[3]
    start = tl.where(is_own, own[0] + own[2] * BLOCK_E, prefix[0] + prefix[2] * BLOCK_E)
    return is_own, start + tl.where(is_own, n - prefix[3], n) * BLOCK_N


@triton.jit
def edge_tile(n, prefix, own, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Whether the n-th tile of a row that needs a mask is of its own keys, and the tile's first key."""
    prefix_edges = prefix[2] + prefix[4]
    is_own = n >= prefix_edges
    n = tl.where(is_own, n - prefix_edges, n)
    # Left edges come first; what lies to their right is beyond the full tiles.
    beyond = tl.where(n >= tl.where(is_own, own[2], prefix[2]), tl.where(is_own, own[3], prefix[3]), 0)
    return is_own, tl.where(is_own, own[0], prefix[0]) + n * BLOCK_E + beyond * BLOCK_N
