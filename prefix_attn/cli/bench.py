"""``prefix-attn bench``: the benchmarks, and what can be said of their results."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from prefix_attn.cli import console
from prefix_attn.cli.options import DeviceOption
from prefix_attn.errors import PrefixAttnError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Time this project's attention beside others on your machine, after checking that every result is right."
    "\n\nBegin with `prefix-attn bench all --quick`: two minutes, on a GPU if there is one, else on the CPU.",
)

Quick = Annotated[
    bool, typer.Option("--quick", help="A few points of each suite, into a -quick file; two minutes for all.")
]
Budget = Annotated[float | None, typer.Option(min=1, metavar="SECONDS", help="Stop by then; names what is left out.")]
Against = Annotated[
    str | None,
    typer.Option(metavar="PEER", help="Time only this peer (part of its name), print only ratios, store nothing."),
]
Output = Annotated[Path, typer.Option(help="Folder for results; a file is added to, never overwritten.")]

SUITES = {
    "decode": "One query a row, over prefixes of many lengths, batches of many sizes.",
    "prefill": "All of a prompt's queries at once.",
    "mixed": "One batch of rows over one task to as many as rows, dealt evenly or not.",
    "generate": "A whole model through `generate`: tokens/s, time to the first token and memory, against PEFT.",
    "all": "Every suite, one after another.",
}

DETAILS = """

Attention is compared with the formula in float64, generation with PEFT, before it is timed; a wrong result is shown
and carries no time.
Providers take turns, so their **ratios** can be trusted more than their times: above 1, prefix_attn is faster. "of
floor" is the time that moving the bytes, or doing the products, must take at the rates measured at the start, over the
time taken.

    prefix-attn bench {suite} --quick

    prefix-attn bench {suite} --against peft

Exit code: 0; 1 if a result of prefix_attn was wrong; 2 if nothing could run; 130 after Ctrl-C, which keeps what was
measured.
"""


def _command(suite: str) -> Callable[..., None]:
    def bench(
        quick: Quick = False,
        budget: Budget = None,
        against: Against = None,
        device: DeviceOption = "auto",
        output: Output = Path("benchmarks/results"),
    ) -> None:
        run([name for name in SUITES if name != "all"] if suite == "all" else [suite],
            quick, budget, against, device, output)  # fmt: skip

    bench.__doc__ = SUITES[suite] + DETAILS.format(suite=suite)
    return bench


for name in SUITES:
    app.command(name)(_command(name))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A results file, JSON lines.")],
    new: Annotated[Path, typer.Argument(help="Another, with some of the same points.")],
) -> None:
    """How many times faster each point became from one results file to another.

    For instance:

        prefix-attn bench compare benchmarks/results/DEVICE/OLD.jsonl benchmarks/results/DEVICE/NEW.jsonl

    Shows the geometric mean and the worst case too, and those of the peers: as much as they changed, the machine did.
    """
    from prefix_attn.benchmarks.changes import Results, changes

    with console.warnings_as_lines():
        before, after = Results.read(old), Results.read(new)
    for part in changes(before, after):
        console.out.print(part)


@app.command()
def plot(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Results files; by default the latest of each device, quick runs left out."),
    ] = None,
    figures: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("benchmarks/figures"),
) -> None:
    """Draw figures from results files, and from nothing else.

    For instance:

        prefix-attn bench plot

        prefix-attn bench plot benchmarks/results/DEVICE/FILE.jsonl --figures /tmp

    Needs matplotlib: `pip install 'prefix-attn[bench]'`.
    """
    if find_spec("matplotlib") is None:
        raise PrefixAttnError("bench plot: needs matplotlib, which is not installed: pip install 'prefix-attn[bench]'")
    from prefix_attn.benchmarks.plot import draw, latest

    with console.warnings_as_lines():
        written = draw(results or latest(Path("benchmarks/results")), figures)
    for path in written:
        console.out.print(Text(str(path)), soft_wrap=True)


def run(
    suites: list[str], quick: bool, budget: float | None, against: str | None, device_name: str, output: Path
) -> None:
    with console.err.status("Loading torch, and finding out what this machine sustains"):
        from prefix_attn.benchmarks import run as benchmarks
        from prefix_attn.benchmarks import tables
        from prefix_attn.benchmarks.peers import Peft
        from prefix_attn.cli.models import device_of

    device = device_of(device_name)
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device: expected auto, cpu, cuda, cuda:1, ..., got {device_name!r}")
    peers = None
    if against is not None:
        peers = benchmarks.only_against(against, device)
        if not peers:
            names = ", ".join(repr(peer.name) for peer in benchmarks.peers_for(device) if not peer.ours)
            raise typer.BadParameter(f"--against: expected (part of) one of {names}, got {against!r}")
        if not any(isinstance(peer, Peft) for peer in peers) and "generate" in suites:
            suites = [suite for suite in suites if suite != "generate"]
            if not suites:
                raise typer.BadParameter(f"--against: PEFT is the only peer that generate has, got {against!r}")
            console.warn("generate is left out: PEFT is the only peer it has")
    with console.warnings_as_lines():
        outcome = benchmarks.run(suites, device, quick, budget, None if against is not None else output, peers)
    show = tables.ratios if against is not None else tables.everything
    for part in show(outcome):
        console.out.print(part)
    if outcome.interrupted:
        raise typer.Exit(console.INTERRUPTED)
    if not outcome.measured:
        raise typer.Exit(2)
    if outcome.failed:
        raise typer.Exit(1)
