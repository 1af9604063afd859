"""Bytes of a bank, counted, not estimated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes of a bank's prefixes on its device.

    Attributes:
        tasks: bytes of keys and values per task, over all layers.
        total: their sum.
        allocated: bytes of every tensor the bank holds: padding to 16 tokens, space of removed tasks, room to grow
            and the tables of starts and lengths included.
    """

    tasks: dict[str, int]
    total: int
    allocated: int

    def __str__(self) -> str:
        rows = [*self.tasks.items(), ("total", self.total), ("allocated", self.allocated)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {readable(size):>10}" for name, size in rows)


def readable(size: int) -> str:
    """``size`` bytes in the largest binary unit that keeps it at least 1."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
