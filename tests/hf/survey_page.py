"""What the survey found, and the page that tells it: docs/models.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import transformers

HEAD = """\
# Model families

With transformers {version}:

- of {causal} causal-LM types {causal_statuses};
- of {images} other types that read images and text (`AutoModelForImageTextToText`), given text only:
  {images_statuses}.

The largest error of any comparison is {worst:.0e} of the largest logit, in float32.

Made by `python -m tests.hf.survey --fresh --write docs/models.md`; run it again after a new release of transformers.
It builds each type from a tiny config with random weights, patches it with three prefixes of different lengths, and
runs a left-padded batch that mixes them with a row without prefix: one forward pass, greedy generation with a growing
and with a static cache, and beams. Each row is compared with the family's own eager formula over a plain cache that
holds the row's prefix, fed in the same steps; and the forward pass with PEFT.

- **exact**: the prefix is stored once, and attention over it is the fused operation.
- **slow**: correct, but with a copy of the prefix in every row's cache, as PEFT does it; `pa.patch` gives a `SlowModel`
  warning.
- **refused**: `pa.patch` or `PrefixBank.for_model` raises `UnsupportedModel` with the reason.

A prefix works beside images that leave the mask causal (`tests/hf/test_images.py`: llava, qwen2_vl, qwen3_vl). Where
their tokens see each other (gemma3), or text attends to them in layers of their own (mllama), a pass with images is
refused. Audio is not tested.
"""

TABLE = """
Layers: how many of all layers keep keys and values, in front of which a prefix can stand. A number in brackets is the
reason, below the table, why a type is slow or a comparison is missing.

"""
STATUSES = ("exact", "slow", "refused", "untested", "failed")
SERVED = ("exact", "slow")


@dataclass
class Result:
    """What became of one type.

    Attributes:
        images: whether it is the class that reads images and text, not the causal LM.
        status: "exact", "slow", "refused", "untested" (not built), or "failed" (neither right nor refused: our bug).
        reason: why it is not exact, as `pa.patch` says it.
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
    def why_slow(self) -> str:
        """The reason in the warning, without the class it is about."""
        return self.reason.split(": ", 2)[2]

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def page(results: Iterable[Result], comparisons: Sequence[str], older: Iterable[Iterable[Result]] = ()) -> str:
    """The page about all results, in Markdown; ``older``: those of each older transformers."""
    results = sorted(results, key=lambda result: result.model_type)
    causal, images = ([r for r in results if r.images == images] for images in (False, True))
    head = HEAD.format(
        version=results[0].version, causal=len(causal), causal_statuses=_statuses(causal), images=len(images),
        images_statuses=_statuses(images), worst=max(r.worst for r in results),
    )  # fmt: skip
    others = "".join(_comparison(results, list(x)) for x in older)
    return (
        f"{head}{others}\n## Causal language models\n{_section(causal, comparisons)}"
        f"\n## Vision-language models, text only\n{_section(images, comparisons)}"
    )


def _section(results: Sequence[Result], comparisons: Sequence[str]) -> str:
    """The table of those that are served, the notes it refers to, and the others with their reasons."""
    lines = [f"{TABLE}| type | | layers | {' | '.join(comparisons)} |", "|---|---|--:|" + "--:|" * len(comparisons)]
    notes: dict[str, int] = {}

    def note(reason: str) -> str:
        return f"[{notes.setdefault(reason, len(notes) + 1)}]"

    for r in results:
        if r.status not in SERVED:
            continue
        status = f"slow {note(r.why_slow)}" if r.status == "slow" else r.status
        cells = [
            f"{r.errors[name]:.0e}" if name in r.errors else note(r.absent.get(name, "not reached"))
            for name in comparisons
        ]
        lines.append(f"| {r.model_type} | {status} | {r.attended} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {_cell(reason)}" for reason, number in notes.items())]
    for status in STATUSES:
        rows = [f"| {r.model_type} | {_cell(r.reason)} |" for r in results if r.status == status]
        if rows and status not in SERVED:
            lines += ["", f"### {status.capitalize()}", "", "| type | reason |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _statuses(results: Sequence[Result]) -> str:
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status] or status == "failed")


def _comparison(results: Sequence[Result], older: Sequence[Result]) -> str:
    """What an older transformers gave."""
    status = {(r.model_type, r.images): r.status for r in results}
    changed = [
        f"{r.model_type} ({r.status})" for r in older if status.get((r.model_type, r.images), r.status) != r.status
    ]
    causal, images = ([r for r in older if r.images == images] for images in (False, True))
    return (
        f"\nWith transformers {older[0].version}: of its {len(causal)} causal-LM types {_statuses(causal)};\nof its "
        f"{len(images)} others {_statuses(images)}.\n"
        f"Types whose result there differs from the one above: {', '.join(changed) or 'none'}.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
