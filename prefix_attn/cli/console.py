"""Where the command line writes: results on stdout; progress, warnings and errors on stderr."""

import sys
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from io import TextIOWrapper

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

#: The exit code of a command that Ctrl-C ended, as shells have it.
INTERRUPTED = 130


def show_any_text() -> None:
    """From now on, characters that the encoding of stdout or stderr lacks are written as escapes, and stop nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(label: str, style: str, message: str) -> None:
    """One line on stderr, ``label: message``, however long the message and whatever brackets it holds."""
    err.print(Text.assemble((f"{label}: ", style), " ".join(message.split())), soft_wrap=True)


def warn(message: str) -> None:
    say("warning", "bold yellow", message)


def table(title: str, *headings: str, numbers: Container[int] = ()) -> Table:
    """A table without rows, in the style of all commands; the columns ``numbers`` are aligned on the right."""
    columns = [Column(heading, justify="right" if i in numbers else "left") for i, heading in enumerate(headings)]
    return Table(*columns, title=title, title_justify="left", title_style="bold")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Within, Python's warnings are lines of ours: of what they tell a user, the place in the code is no part."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: warn(str(message))
        yield


def error_line(error: Exception) -> str:
    """What an exception says, in one line; of an error of the system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
