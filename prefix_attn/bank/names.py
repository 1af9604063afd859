"""Task names: a name is also a file name, so it may not leave its folder."""

from __future__ import annotations

from collections.abc import Iterable

from prefix_attn.errors import IncompatiblePrefix

MAX_BYTES = 200

#: Choices that a message lists.
MAX_CHOICES = 20

#: What the name of a prefix's file ends with.
SUFFIX = ".safetensors"


def check_name(name: object) -> str:
    """Return the name, or raise `IncompatiblePrefix` saying what is wrong with it."""
    if not isinstance(name, str) or not name:
        raise IncompatiblePrefix(f"name: expected a non-empty string, got {name!r}")
    if "/" in name or "\\" in name or ".." in name or name.startswith("."):
        raise IncompatiblePrefix(f"name: expected no '/', '\\', '..' or leading dot, as in a file name, got {name!r}")
    if not name.isprintable():
        raise IncompatiblePrefix(f"name: expected printable characters only, got {name!r}")
    if len(name.encode()) > MAX_BYTES:
        raise IncompatiblePrefix(f"name: expected at most {MAX_BYTES} bytes, got {len(name)} characters")
    return name


def check_file(file: object) -> str:
    """Return the name of a prefix's file in a bank's folder; `IncompatiblePrefix` for one of another kind, or place."""
    if not isinstance(file, str) or not file.isprintable() or "/" in file or "\\" in file or file.startswith("."):
        raise IncompatiblePrefix(f"file: expected the name of a file in the bank's folder, got {file!r}")
    if not file.endswith(SUFFIX):
        raise IncompatiblePrefix(f"file: expected a prefix file, *{SUFFIX}, got {file!r}; the index is damaged")
    return file


def choices(names: Iterable[object]) -> str:
    """A list of names for a message, cut off where there are many."""
    names = list(names)
    more = len(names) - MAX_CHOICES
    return str(names) if more <= 0 else f"{names[:MAX_CHOICES]} and {more} more"
