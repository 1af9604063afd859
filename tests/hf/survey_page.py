"""What the survey found, and the page that tells it: docs/models.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import transformers

HEAD = """\
# Model families

Every causal-LM type of transformers {version}, {count} in all: {statuses}. The largest error of any
comparison is {worst:.0e} of the largest logit, in float32.

Made by `python -m tests.hf.survey --fresh --write docs/models.md`; run it again after a new release of transformers.
It builds each type from a tiny config with random weights, patches it with three prefixes of different lengths, and
runs a left-padded batch that mixes them with a row without prefix: one forward pass, greedy generation with a growing
and with a static cache, and beams. Each row is compared with the family's own eager formula over a plain cache that
holds the row's prefix, fed in the same steps; and the forward pass with PEFT.

- **exact**: the prefix is stored once, and attention over it is the fused operation.
- **slow**: right, but with a copy of the prefix in every row's cache, as PEFT does it; `pa.patch` gives a `SlowModel`
  warning.
- **refused**: `pa.patch` or `PrefixBank.for_model` raises `UnsupportedModel` with the reason.

Text only: what images or sound change in a mask is refused.
"""

SERVED = """
## Exact and slow

Layers: those that keep keys and values a prefix can stand in front of, of all. A number in brackets is the reason,
below the table, why a comparison is missing.

"""


@dataclass
class Result:
    """What became of one type.

    Attributes:
        images: whether it is the class that reads images and text, not the causal LM.
        status: "exact", "slow", "refused", or "failed" (neither right nor refused: a bug of ours).
        reason: why it is not exact.
        errors: largest error of each comparison, relative to the largest logit.
        absent: comparisons that the family, or PEFT, does not allow, and why.
        attended: layers with a prefix, of all layers.
        version: of transformers.
    """

    model_type: str
    images: bool = False
    status: str = "failed"
    reason: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    attended: str = ""
    version: str = transformers.__version__

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def page(results: Iterable[Result], comparisons: Sequence[str], older: Iterable[Result] = ()) -> str:
    """The page about all results, in Markdown; ``older``: those of an older transformers."""
    results = sorted(results, key=lambda result: result.model_type)
    served = [r for r in results if r.status in ("exact", "slow")]
    lines = [
        HEAD.format(
            version=results[0].version, count=len(results), worst=max((r.worst for r in served), default=0.0),
            statuses=_statuses(results),
        ) + _comparison(results, list(older)) + SERVED + f"| type | | layers | {' | '.join(comparisons)} |",
        "|---|---|--:|" + "--:|" * len(comparisons),
    ]  # fmt: skip
    reasons: dict[str, int] = {}
    for r in served:
        cells = [
            f"{r.errors[name]:.0e}" if name in r.errors
            else f"[{reasons.setdefault(r.absent.get(name, 'not reached'), len(reasons) + 1)}]"
            for name in comparisons
        ]  # fmt: skip
        lines.append(f"| {r.model_type} | {r.status} | {r.attended} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {_cell(reason)}" for reason, number in reasons.items())]
    for status in ("refused", "failed"):
        rows = [f"| {r.model_type} | {_cell(r.reason)} |" for r in results if r.status == status]
        if rows:
            lines += ["", f"## {status.capitalize()}", "", "| type | reason |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _statuses(results: Sequence[Result]) -> str:
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in ("exact", "slow", "refused", "failed"))


def _comparison(results: Sequence[Result], older: Sequence[Result]) -> str:
    """What an older transformers gave, where that was asked for."""
    if not older:
        return ""
    status = {result.model_type: result.status for result in results}
    changed = [f"{r.model_type} ({r.status})" for r in older if status.get(r.model_type, r.status) != r.status]
    return (
        f"\nOn transformers {older[0].version}, which has {len(older)} of these types: {_statuses(older)}. Classed "
        f"otherwise there: {', '.join(changed) or 'none'}.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
