"""Shared set-up: shapes in signatures are checked, threads are few, nothing leaks into the home directory."""

import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# For tests that import DeepSpeed themselves; the programs that they start decide by `run.device`, whatever this says.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", ".hypothesis")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
# Public functions of these rooms state their shapes; under pytest every call is checked. But for the kernel's: Triton
# compiles a function's own source and names, not those of what checks it.
_modules = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for room in ("models", "prototypes", "evaluation")
    for path in sorted((ROOT / room).rglob("*.py"))
    if path.stem not in ("__init__", "triton_e_step")
]
_hook = install_import_hook(_modules, "beartype.beartype")

settings.register_profile("suite", deadline=None, print_blob=True)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_before():
    """A program run inside a test sets up its log; its handlers would write into the next test's closed stream."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for handler in [handler for handler in handlers if handler not in root.handlers]:
        root.addHandler(handler)
    root.setLevel(level)


@pytest.fixture
def record_property(record_property):
    """Figures as plain numbers: a tensor or a NumPy scalar does not cross to the process of xdist that reports."""
    return lambda name, value: record_property(name, value if isinstance(value, str) else float(value))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, none is visible")
    for item in items:
        if "gpu" in item.keywords or "/tests/gpu/" in item.path.as_posix():
            item.add_marker(skip)
