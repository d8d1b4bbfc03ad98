"""Which code on which machine: plain facts that stand in every results file, checkpoint and model card."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "timm", "transformers", "accelerate")


def collect_provenance() -> dict[str, Any]:
    """Returns commit, versions and hardware; no environment variable and no host name: nothing private."""
    return {
        "commit": find_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "hardware": describe_hardware(),
    }


def find_commit() -> str:
    """Returns the commit of this checkout, with `-dirty` where tracked files differ; `unknown` without git.

    A run directory's code snapshot carries the commit it was taken from in a file `COMMIT_ID`.
    """
    root = Path(__file__).resolve().parent.parent
    snapshot = root / "COMMIT_ID"
    if snapshot.is_file():
        return snapshot.read_text().strip()
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def describe_hardware() -> str:
    """Returns the GPU's name, or the CPU's with the cores that this process may use."""
    import torch

    if torch.cuda.is_initialized():  # a run on the CPU leaves visible GPUs alone, and is none on a GPU
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU {_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
