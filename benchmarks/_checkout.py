"""Files of an earlier commit of this repository, for a contestant that is our own past."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_ROOMS = ("benchmarks", "prototypes")


def unpack_commit(commit: str, directory: Path) -> Path | None:
    """Writes benchmarks and prototypes of a commit to a folder and returns it; None where git does not know it.

    Args:
        commit: of this repository.
        directory: existing, empty.
    """
    try:
        archive = subprocess.run(
            ["git", "archive", commit, *_ROOMS], cwd=_ROOT, capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(directory, filter="data")
    return directory
