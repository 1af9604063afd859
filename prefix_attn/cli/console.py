"""Where the command line writes: results on stdout; progress, warnings and errors on stderr."""

from rich.console import Console
from rich.text import Text

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def say(label: str, style: str, message: str) -> None:
    """One line on stderr, ``label: message``, however long the message and whatever brackets it holds."""
    err.print(Text.assemble((f"{label}: ", style), " ".join(message.split())), soft_wrap=True)


def warn(message: str) -> None:
    say("warning", "bold yellow", message)


def error_line(error: Exception) -> str:
    """What an exception says, in one line; of an error of the system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())
