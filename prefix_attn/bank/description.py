"""What ``print(bank)`` shows: the tasks with their tokens and bytes, and what the bank was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefix_attn.bank.memory import readable
from prefix_attn.bank.uses import BANK_LOCK

if TYPE_CHECKING:
    from prefix_attn.bank.bank import PrefixBank


def describe(bank: PrefixBank) -> str:
    """A line for the bank, one for each task, and one for what sliding windows hide."""
    with BANK_LOCK:
        usage, names = bank.memory_usage, bank.names
        tokens = {name: _tokens(bank, name) for name in names}
    kinds = bank.base.geometries.items()
    layers = str(bank.geometry) if len(kinds) == 1 else "; ".join(f"{part}: {kind}" for part, kind in kinds)
    shard = bank.base.shard
    held = f"rank {shard.rank} of {shard.size}, " if shard.size > 1 else ""
    count = f"{len(names)} task{'' if len(names) == 1 else 's'}"
    head = (
        f"PrefixBank({count}, {layers}, {str(bank.dtype).removeprefix('torch.')} on {bank.base.placement}, {held}"
        f"{readable(usage.total)} of {readable(usage.allocated)})"
    )
    width = max(map(len, names), default=0)
    rows = [f"  {name:{width}}  {tokens[name]} tokens  {readable(usage.tasks[name])}" for name in names]
    hides = [f"  {bank.sliding_window.describe(bank.num_layers)}"] if bank.sliding_window else []
    return "\n".join([head, *rows, *hides])


def _tokens(bank: PrefixBank, name: str) -> str:
    """A task's tokens, part by part where there are several."""
    if len(bank.parts) == 1:
        return f"{bank.prefix_len(name):>6}"
    return " + ".join(f"{bank.prefix_len(name, part):>4} {part}" for part in bank.parts)
