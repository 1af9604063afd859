"""The GPU benchmark turns Triton's interpreter off for its process; here that must not outlive a test."""

import os

import pytest


@pytest.fixture(autouse=True)
def _interpreter_setting_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
