"""Which kernels the Triton backend gives a call to, and why; from shapes and host-known lengths, never from the device.

Inline decode reads a prefix once per row, mostly from the L2 cache, while own keys come from memory; grouped decode
reads it once per tile of rows, and pays with float32 partial results, a second launch and, where the caller gave none,
a plan. All are counted in bytes of memory traffic, which is what limits decode:

    own, re-read, once = batch * n, batch * m, tasks * m, each times 2 * kv_heads * D * e
    saved    = (own + re-read) / L2_SPEED - (own + once)
    partials = 2 * 4 * D * q_heads * q_len * batch * (1 + ceil(m / CHUNK))          written, then read
    price    = partials + LAUNCH_BYTES * (1 [+ PLAN_LAUNCHES])

with n own keys a row and m the longest prefix, both cut to the window. Grouped if saved > price: a short prefix is read
from the cache while memory is busy with own keys, so there is nothing to save. Where it is unknown how many tasks the
rows have (`BatchPlan.distinct`), a bank of at least as many tasks as the batch has rows says nothing about sharing (all
rows may have one task, or each its own); then grouped only if price <= BET * re-read: a wrong guess costs little.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from prefix_attn.types import AttentionCall

#: Query rows per kv head (q_len * group) up to which a row is decoded; more make tiles worth a prefill.
DECODE_ROWS = 64

#: How much faster the L2 cache is than memory, for programs that read both.
L2_SPEED = 1.65

#: What memory could have moved in the time that grouped decode takes for a second launch and longer programs, at the
#: 4.3e12 B/s of an H200. With these two, at the 84 points of benchmarks/results/nvidia-h200 where both ways were timed,
#: what is chosen is 0.1% slower than the faster way in the geometric mean, and 3.6% at worst (`benchmarks.fit_regime`).
LAUNCH_BYTES = 3.5e-6 * 4.3e12

#: What it costs to compute a plan, in LAUNCH_BYTES: an operator and two launches, 50 us on a slow host (not measured on
#: a GPU yet).
PLAN_LAUNCHES = 15

#: Keys of a prefix chunk where the prefix is long.
CHUNK = 2048

#: Share of the time of reading every row's prefix that may be lost where sharing is a guess.
BET = 0.02


class Regime(NamedTuple):
    """``prefill``, ``inline`` or ``grouped``, and the reason."""

    name: str
    why: str
    sizes: tuple[float, ...] = ()  # what `why` is formatted with, only when `reason` is read

    @property
    def reason(self) -> str:
        return self.why.format(*self.sizes)


def use_decode(q_len: int, group: int) -> bool:
    """Whether a call goes to the decode kernel: its rows fit one tile, or are one query."""
    return q_len == 1 or q_len * group <= DECODE_ROWS


def choose(call: AttentionCall) -> Regime:
    """The regime of a call; costs a few multiplications and no synchronisation."""
    (batch, q_heads, q_len, head_dim), (_, kv_heads, own_keys, _) = call.q.shape, call.k.shape
    group = q_heads // kv_heads
    if not use_decode(q_len, group):
        return Regime("prefill", "{} queries a row, {} rows per kv head, fill tiles", sizes=(q_len, q_len * group))
    if call.batch_invariant:
        return Regime("inline", "batch_invariant: a row is decoded as if it were alone")
    longest = call.prefix.expected_max_len
    # Compiled code must not depend on which rows share a prefix.
    distinct = None if call.plan is None or torch.compiler.is_compiling() else call.plan.distinct
    tasks = call.prefix.num_tasks if distinct is None else distinct
    if batch < 2 or longest == 0 or tasks == 0:
        return Regime("inline", "one row has nobody to share with" if batch < 2 else "no row has a prefix")
    m, n = (x if call.window is None else min(x, call.window) for x in (longest, own_keys))
    token = 2 * kv_heads * head_dim * call.q.element_size()
    reread = batch * m * token
    partials = 8 * head_dim * q_heads * q_len * batch * (1 + -(-m // CHUNK))
    price = partials + LAUNCH_BYTES * (1 if call.plan is not None else 1 + PLAN_LAUNCHES)
    why = "{} rows, {} tasks, prefixes up to {} tokens: "
    if tasks >= batch and distinct is None:
        grouped = price <= BET * reread
        why += "who shares is unknown, and grouping costs {:.1%} of reading a prefix per row"
        sizes: tuple[float, ...] = (batch, tasks, m, price / reread)
    else:
        saved = saved_bytes(batch * n * token, reread, tasks * m * token)
        grouped = saved > price
        if saved <= 0:
            why = "prefixes up to {} tokens come from the cache while {} own keys are read"
            return Regime("inline", why, sizes=(m, n))
        why += "grouping saves about {:.1f} MB of traffic and costs {:.1f} MB"
        sizes = (batch, tasks, m, saved / 1e6, price / 1e6)
    return Regime("grouped" if grouped else "inline", why, sizes)


def saved_bytes(own: float, reread: float, once: float) -> float:
    """``saved`` of the module's docstring; negative where memory takes longer for its bytes than the cache for all."""
    return (own + reread) / L2_SPEED - (own + once)
