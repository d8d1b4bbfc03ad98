"""What is started from here finds the GPU by itself."""

import pytest


@pytest.fixture(autouse=True)
def no_accelerator_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's own choice, the CPU, is not theirs."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
