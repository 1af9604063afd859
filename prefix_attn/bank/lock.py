"""One process at a time writes: locks of files, where the system and the file system have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

#: The file in a bank's folder that who writes there holds. It stays: who waits for it has it open.
LOCK = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within, nobody else is within for the same folder: what is read of its index there, is still so when written."""
    path = folder / LOCK
    try:
        file: IO[bytes] = path.open("ab")
    except PermissionError:  # another user's, in a folder that both may write to
        file = path.open("rb")
    with file:
        hold(file, wait=True)
        yield


def hold(file: IO[bytes], wait: bool) -> None:
    """Hold a file until it is closed.

    Raises:
        BlockingIOError: another holds it, and ``wait`` is False.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows has no such locks, nor have some file systems
        pass
