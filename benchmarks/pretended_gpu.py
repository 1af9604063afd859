"""An H200 as far as the host can tell: Triton compiles for it, and goes through all of a launch, which does nothing.

For processes of their own, where kernels are not interpreted: what Triton knows of its device, it never forgets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: ``(grid, number of the compiled kernel, arguments)``, as Triton hands them to a GPU's driver.
OnLaunch = Callable[[tuple[int, int, int], int, tuple[Any, ...]], None]


def pretend(on_launch: OnLaunch | None = None, multiprocessors: int = 132) -> None:
    """Make Triton and `prefix_attn.kernels` take tensors on the CPU for ones on an H200, from now on."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.driver import driver

    from prefix_attn.kernels import chunks, config, decode, device

    shared_memory, kernels = config.SHARED_MEMORY["sm_90"], 0

    class Pretended(DriverBase):  # type: ignore[misc]
        class utils:
            load_binary = staticmethod(lambda *_: ("module", 0, 32, 0, 1024))
            get_device_properties = staticmethod(lambda device: {"max_shared_mem": shared_memory})
            unload_module = staticmethod(lambda module: None)

        def launcher_cls(self, source: Any, metadata: Any) -> Any:
            nonlocal kernels
            kernel, kernels = kernels, kernels + 1

            def launch(
                x: int, y: int, z: int, stream: int, function: int, packed: Any, about: Any, enter: Any, leave: Any,
                *arguments: Any,
            ) -> None:  # fmt: skip
                if enter is not None:
                    enter(about)
                if on_launch is not None:
                    on_launch((x, y, z), kernel, arguments)
                if leave is not None:
                    leave(about)

            return launch

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        map_python_to_cpp_type = staticmethod(str)

    Pretended.__abstractmethods__ = frozenset()
    driver.set_active(Pretended())
    modules: tuple[Any, ...] = (config, chunks, decode)
    for module in modules:
        module.multiprocessors = lambda device: multiprocessors
    modules[0].target_of = lambda device: "sm_90"
    device.interpreting = lambda: True
