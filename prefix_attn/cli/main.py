"""The command ``prefix-attn``: its subcommands, and how their errors are shown."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefix_attn.cli import bank, bench, console
from prefix_attn.cli.demo import demo
from prefix_attn.cli.doctor import doctor
from prefix_attn.cli.generate import generate
from prefix_attn.cli.serve import serve
from prefix_attn.cli.train import train
from prefix_attn.errors import PrefixAttnError


class Commands(TyperGroup):
    """Shows what the package or the system refuses as one line, with exit code 2; a traceback means a bug."""

    def invoke(self, ctx: Any) -> Any:
        console.show_any_text()
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of our output left; typer ends quietly
        except (PrefixAttnError, OSError) as error:
            console.say("error", "bold red", console.error_line(error))
            raise typer.Exit(2) from error


def show_version(wanted: bool) -> None:
    if wanted:
        from prefix_attn import __version__

        console.out.print(f"prefix-attn {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve many prefix-tuned tasks from one model: each task's prefix is held once, and a batch may mix tasks.

    See it work, in ten seconds:

        prefix-attn demo

    Answer a file of requests of several tasks:

        prefix-attn generate --model MODEL --adapter sum=adapters/sum \\
            --input requests.jsonl --output answers.jsonl

    Serve them over HTTP:

        prefix-attn serve --model MODEL --adapter sum=adapters/sum

    Every command explains itself with `--help`.
    """


app.command()(demo)
app.command()(generate)
app.command()(serve)
app.command()(train)
app.command()(doctor)
app.add_typer(bank.app, name="bank")
app.add_typer(bench.app, name="bench")
