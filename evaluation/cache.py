"""Lists what evaluation keeps of features on the disk, and frees it.

    python -m evaluation.cache [DIR]
    python -m evaluation.cache [DIR] --prune [--unused-days 30]

DIR is `features.cache_dir`. `--prune` removes features that no evaluation has read for so many days (0: all of them)
and what killed evaluations left half-written. Nothing else is touched: a file counts when its name and its header are
those that evaluation writes. Features that are asked for again are extracted again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evaluation.config import FeaturesConfig
from runtime.program import UserError, run_program

_FEATURES = re.compile(r"[^.].*-[0-9a-f]{16}\.safetensors")
_UNFINISHED = re.compile(r"\..*-[0-9a-f]{16}\.safetensors\..*(tmp|part-\d{5})")
# An evaluation that still writes has touched its file within this time.
_ABANDONED_S = 24 * 3600
_DAY_S = 24 * 3600
_LARGEST_HEADER = 2**20


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache.

    Attributes:
        path: where it lies.
        bytes: its size.
        used_days_ago: since an evaluation read or wrote it.
        about: encoder and split, as its header names them; empty for what was never finished.
    """

    path: Path
    bytes: int
    used_days_ago: float
    about: str


def find_cached(directory: Path) -> list[CachedFile]:
    """Returns what evaluation wrote into a directory, the largest first.

    Raises:
        UserError: no such directory.
    """
    if not directory.is_dir():
        raise UserError(
            f"DIR is {str(directory)!r}; expected a directory of cached features; pass features.cache_dir"
        )
    now, found = time.time(), []
    for path in directory.iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        state = path.stat()
        unfinished = _UNFINISHED.fullmatch(path.name) is not None
        about = "" if unfinished else _read_about(path)
        if unfinished and now - state.st_mtime < _ABANDONED_S:
            continue
        if unfinished or about is not None:
            found.append(CachedFile(path, state.st_size, (now - state.st_mtime) / _DAY_S, about or ""))
    return sorted(found, key=lambda file: file.bytes, reverse=True)


def _read_about(path: Path) -> str | None:
    """Returns encoder and split from a feature file's header; None for a file that evaluation did not write."""
    if _FEATURES.fullmatch(path.name) is None:
        return None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, _LARGEST_HEADER))
    try:
        about = json.loads(json.loads(header)["__metadata__"]["about"])
        return f"{about['encoder']['spec']} {about['split']}"
    except (ValueError, KeyError, TypeError):
        return None


def main(arguments: list[str]) -> int:
    """Returns the exit code of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", nargs="?", default=FeaturesConfig().cache_dir, metavar="DIR")
    parser.add_argument("--prune", action="store_true", help="remove what has not been used")
    parser.add_argument("--unused-days", type=float, default=30.0, help="days without use (default 30)")
    options = parser.parse_args(arguments)
    if not 0 <= options.unused_days < math.inf:
        raise UserError(f"--unused-days is {options.unused_days}; expected at least 0; set --unused-days")
    found = find_cached(Path(options.directory))
    removed = [
        file
        for file in found
        if options.prune and (not file.about or file.used_days_ago >= options.unused_days)
    ]
    for file in found:
        word = "removed" if file in removed else "kept" if options.prune else "found"
        what = file.about or "unfinished"
        print(
            f"{word}  {file.bytes / 2**30:8.3f} GiB  {file.used_days_ago:5.1f} days  {what}  {file.path.name}"
        )
        if file in removed:
            file.path.unlink(missing_ok=True)
    total, freed = (sum(file.bytes for file in files) / 2**30 for files in (found, removed))
    print(f"{len(found)} files, {total:.3f} GiB" + (f"; freed {freed:.3f} GiB" if options.prune else ""))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
