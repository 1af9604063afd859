"""Locks of files, so that one process writes at a time, where the system and the file system have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

#: The lock file in a bank's folder. It is never deleted, since a process that waits for the lock has it open.
LOCK = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, so that no other process changes its index between our reading and writing it."""
    path = folder / LOCK
    try:
        file: IO[bytes] = path.open("ab")
    except PermissionError:  # another user's, in a folder that both may write to
        if not path.exists():
            raise
        file = path.open("rb")
    with file:
        lock_file(file, wait=True)
        yield


def lock_file(file: IO[bytes], wait: bool) -> None:
    """Lock a file until it is closed.

    Raises:
        BlockingIOError: another has locked it, and ``wait`` is False.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows has no such locks, nor have some file systems
        pass
