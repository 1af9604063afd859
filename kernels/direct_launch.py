"""Launches that repeat, without asking Triton each time which compiled kernel they want.

Triton inspects every argument of a launch to find the kernel that was compiled for such arguments: 48 us for decode's
more than 60, on the host of an H200. Where all but the tensors is fixed, its choice can change only with their dtypes,
with which of them are None, and with addresses that are no multiples of 16. For each combination Triton is asked once;
after that its own launcher gets the arguments, tensors as addresses.

On AMD GPUs it also checks whether a tensor's storage is larger than 2 GiB, and compiles other loads: there it is always
asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs
from triton.runtime.driver import driver


class Launcher:
    """A launch of one kernel but for its tensors.

    Args:
        grid: programs along axis 0.
        arguments: every argument that is no tensor, Triton's own options among them.

    It belongs to one kernel and one device, that of its first call.
    """

    def __init__(self, grid: int, arguments: dict[str, Any]) -> None:
        self.grid, self.arguments = (grid, 1, 1), arguments
        self._kernel: Any = None
        self._direct: dict[tuple[torch.dtype | None, ...], Callable[[list[int | None]], None]] = {}

    def __call__(self, kernel: Any, tensors: dict[str, Tensor | None]) -> None:
        """Launch ``kernel`` on the current device and stream; ``tensors`` by name, in the order of its parameters."""
        key = tuple([None if x is None else x.dtype for x in tensors.values()])
        addresses = [None if x is None else x.data_ptr() for x in tensors.values()]
        aligned = reduce(or_, filter(None, addresses), 0) % 16 == 0
        direct = self._direct.get(key) if aligned and kernel is self._kernel else None
        if direct is not None:
            direct(addresses)
            return
        compiled = kernel[self.grid](**tensors, **self.arguments)
        # A kernel that is interpreted, or replaced by a test, is no JITFunction.
        if aligned and isinstance(kernel, JITFunction) and torch.version.hip is None:
            self._kernel = kernel
            self._direct[key] = self._launch(kernel.arg_names, compiled, list(tensors))

    def _launch(self, names: list[str], compiled: Any, tensors: list[str]) -> Callable[[list[int | None]], None]:
        """A launch of the compiled kernel that takes the addresses of the tensors."""
        assert names[: len(tensors)] == tensors, "tensors come in the order of the kernel's parameters"
        others = [self.arguments[name] for name in names[len(tensors) :]]
        run, function, metadata, hooks = compiled.run, compiled.function, compiled.packed_metadata, knobs.runtime
        device, watched = driver.active.get_current_device(), compiled[self.grid]

        def launch(addresses: list[int | None]) -> None:
            if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler's
                watched(*addresses, *others)
                return
            stream = driver.active.get_current_stream(device)
            run(*self.grid, stream, function, metadata, None, None, None, *addresses, *others)

        return launch
