"""Where tests run: on the GPU if there is one, else kernels run in Triton's interpreter on the CPU."""

import os

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

for size in ("COLUMNS", "LINES"):  # pytest-xdist sets them, and a console would keep to them
    os.environ.pop(size, None)

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from prefix_attn.kernels.launch import kept_layout  # noqa: E402  (which asks for TRITON_INTERPRET)


@pytest.fixture(autouse=True)
def nothing_known_of_layouts() -> None:
    """What one test replaces, or finds in its environment, no other test's calls remember."""
    kept_layout.cache_clear()


class FailuresAtOnce:
    """Says what failed when it fails: a run that is cut short never comes to its summary."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"FAILED {report.nodeid}\n{report.longreprtext}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CUT_SHORT") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(config))
