"""What is started from here finds the GPU by itself."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_accelerator_is_inherited() -> Iterator[None]:
    """The suite's own choice, the CPU, is not theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_ACCELERATOR", raising=False)
        yield
