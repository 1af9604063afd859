"""Which tasks are in use: one that is removed meanwhile keeps its prefix until the last who uses it is done."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

#: Held while any bank is changed, or its memory lent. (One for all banks: a bank of its own lock could not be copied.)
BANK_LOCK = threading.RLock()


class Uses:
    """How many users each task id has; take BANK_LOCK around every call."""

    def __init__(self) -> None:
        self._users: Counter[int] = Counter()
        self._leaving: set[int] = set()

    def begin(self, tasks: Iterable[int]) -> None:
        """One more user of each task."""
        self._users.update(tasks)

    def end(self, tasks: Iterable[int]) -> list[int]:
        """One user less of each; returns those that wait for nobody any more."""
        self._users.subtract(tasks)
        self._users = +self._users
        done = [task for task in self._leaving if not self._users[task]]
        self._leaving.difference_update(done)
        return done

    def leave(self, task: int) -> bool:
        """Whether a removed task has no user; if it has, `end` will name it."""
        if self._users[task]:
            self._leaving.add(task)
        return task not in self._leaving
