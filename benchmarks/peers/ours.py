"""This project's kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import prefix_attn as pa

from .interface import Peer
from .problem import Problem


class Ours(Peer):
    """`prefix_attention` over the shared prefixes."""

    ours = True
    version = pa.__version__

    def __init__(self, name: str = "prefix_attn", backend: str = "triton") -> None:
        self.name = name
        self.backend = backend

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = pa.prefix_attention(
                problem.q, problem.k, problem.v, problem.prefix, problem.task_ids, backend=self.backend
            )
            assert isinstance(out, Tensor)
            return out

        return call


class OwnKeysOnly(Ours):
    """The same kernels on the rows' own keys alone: the difference to `Ours` is the cost of a prefix."""

    with_prefix = False

    def __init__(self, name: str = "prefix_attn without prefix", backend: str = "triton") -> None:
        super().__init__(name, backend)

    def prepare(self, problem: Problem) -> Callable[[], Tensor]:
        return super().prepare(problem.without_prefix)
