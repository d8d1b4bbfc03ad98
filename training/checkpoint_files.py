"""One checkpoint on disk: names, layout, and the steps of writing, publishing and pruning it.

Nothing here is collective: `training/checkpoint.py` says which rank does what, and when all of them agree.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.faults import reach
from runtime.files import fsync_directory, fsync_file, sha256_of, write_atomically

logger = logging.getLogger(__name__)

MANIFEST_NAME = "MANIFEST.json"
COMMIT_NAME = "COMMIT"
# Rank 0 leaves this in a checkpoint that failed its check, so that pruning never counts it as a good one.
REJECTED_NAME = "REJECTED"
MANIFEST_SCHEMA = 1
_STEP_DIRECTORY = re.compile(r"step-(\d{8,})")

WriteFunction = Callable[[Path], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and is one line."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: path relative to it, size, SHA-256 and the rank that wrote it."""

    path: str
    bytes: int
    sha256: str
    rank: int


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended: `path` of the committed checkpoint, or `error` in one line (the run goes on)."""

    step: int
    path: Path | None
    error: str | None = None


@dataclass
class Part:
    """What one rank wrote, or why it could not."""

    entries: list[FileEntry] = field(default_factory=list)
    error: str | None = None
    # A full or failing disk must not end a run; a bug in a writer must.
    is_disk_error: bool = False


def checkpoint_path(root: Path, step: int) -> Path:
    """Returns where the checkpoint after `step` updates lives."""
    return root / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Returns the step that a checkpoint directory's name says.

    Raises:
        CheckpointError: the name is not `step-` and eight digits.
    """
    match = _STEP_DIRECTORY.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"checkpoint is {checkpoint}; expected a directory named step-00000000")
    return int(match.group(1))


def list_committed(root: Path) -> list[Path]:
    """Returns the checkpoints under `root` that have a COMMIT, newest step first; contents unchecked."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP_DIRECTORY.fullmatch(path.name)]
    return sorted((path for path in found if (path / COMMIT_NAME).is_file()), key=step_of, reverse=True)


def prune_checkpoints(root: Path, newest: Path, keep_last: int, keep_every: int) -> None:
    """Deletes what is neither among the newest `keep_last` nor kept by `keep_every`. Call on rank 0 only.

    Checkpoints that failed their check are not counted among the `keep_last`. `newest`, the one just
    committed, always stays. A failure to delete is a warning: it must not end a run.
    """
    committed = list_committed(root)
    good = [path for path in committed if not (path / REJECTED_NAME).exists() and path != newest]
    kept = {newest, *good[: keep_last - 1]}
    if keep_every > 0:
        kept.update(path for path in good if step_of(path) % keep_every == 0)
    leftovers = [path for path in root.glob("step-*") if path.is_dir() and path not in kept]
    for path in leftovers:
        try:
            # Without COMMIT a half deleted directory cannot be taken for a checkpoint.
            (path / COMMIT_NAME).unlink(missing_ok=True)
            shutil.rmtree(path)
        except OSError as error:
            logger.warning("cannot delete old checkpoint %s: %s", path, describe(error))


def list_unfinished(root: Path) -> list[Path]:
    """Returns what killed runs left: temporary directories, and checkpoints without a COMMIT."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.glob("step-*") if not (path / COMMIT_NAME).exists())


def open_temporary(root: Path, step: int, world_size: int) -> tuple[int, Path] | SaveOutcome:
    """Returns (step, temporary directory with one directory per rank), or how the save ended already.

    A good checkpoint of this step is never replaced: the same run would write the same bytes again.
    """
    final = checkpoint_path(root, step)
    if (final / COMMIT_NAME).is_file() and not (final / REJECTED_NAME).exists():
        return SaveOutcome(step, final)
    temporary = root / f"{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            logger.warning("removing %s, which an earlier run left unfinished", temporary)
            shutil.rmtree(temporary)
        temporary.mkdir()
        for rank in range(world_size):
            _rank_directory(temporary, rank).mkdir()
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        return SaveOutcome(step, None, f"rank 0: {describe(error)}")
    return step, temporary


def write_part(temporary: Path, step: int, rank: int, write: WriteFunction) -> Part:
    """Calls the writer, then flushes and hashes every file it left."""
    directory = _rank_directory(temporary, rank)
    reach("save_begin", step, rank)
    write(directory)
    reach("save_written", step, rank)
    entries = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
            continue
        fsync_file(path)
        relative = path.relative_to(directory).as_posix()
        entries.append(FileEntry(relative, path.stat().st_size, sha256_of(path), rank))
    fsync_directory(directory)
    reach("save_hashed", step, rank)
    return Part(entries)


def publish(
    root: Path, step: int, temporary: Path, parts: list[Part], facts: Mapping[str, Any]
) -> SaveOutcome:
    """Turns the ranks' files into a committed checkpoint, or removes them and says why not. Rank 0 only."""
    failures = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error is not None]
    final = checkpoint_path(root, step)
    try:
        if failures:
            raise OSError(errno.EIO, "; ".join(failures))
        entries = [entry for part in parts for entry in part.entries]
        _move_together(temporary, entries, len(parts))
        manifest = json.dumps(
            {
                "schema": MANIFEST_SCHEMA,
                "step": step,
                "world_size": len(parts),
                "facts": dict(facts),
                "files": [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.path)],
            },
            indent=1,
        )
        write_atomically(temporary / MANIFEST_NAME, manifest)
        reach("save_manifest", step, 0)
        if final.exists():
            # Never finished, or failed its check (`open_temporary` keeps a good one).
            (final / COMMIT_NAME).unlink(missing_ok=True)
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_directory(root)
        reach("save_renamed", step, 0)
        write_atomically(final / COMMIT_NAME, hashlib.sha256(manifest.encode()).hexdigest() + "\n")
    except (OSError, TypeError, ValueError) as error:  # the latter two: facts that are no JSON
        shutil.rmtree(temporary, ignore_errors=True)
        if final.exists() and not (final / COMMIT_NAME).exists():
            shutil.rmtree(final, ignore_errors=True)
        return SaveOutcome(step, None, "; ".join(failures) or f"rank 0: {describe(error)}")
    reach("save_committed", step, 0)
    return SaveOutcome(step, final)


def load_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns MANIFEST.json of a committed checkpoint after checking it against COMMIT.

    Raises:
        CheckpointError: one of the two is missing, damaged, or does not match the other or the directory.
    """
    try:
        committed = (checkpoint / COMMIT_NAME).read_text().strip()
        content = (checkpoint / MANIFEST_NAME).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"COMMIT or MANIFEST.json cannot be read in {checkpoint}: {error}") from error
    if hashlib.sha256(content).hexdigest() != committed:
        raise CheckpointError(f"{MANIFEST_NAME} does not match {COMMIT_NAME} in {checkpoint}")
    manifest = json.loads(content)
    if manifest["schema"] != MANIFEST_SCHEMA:
        raise CheckpointError(
            f"{MANIFEST_NAME} of {checkpoint} has schema {manifest['schema']}; expected {MANIFEST_SCHEMA}; "
            f"load it with the version of this project that wrote it"
        )
    if manifest["step"] != step_of(checkpoint):
        raise CheckpointError(f"{checkpoint} holds step {manifest['step']}: the directory was renamed")
    return manifest


def read_files(checkpoint: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns (what is wrong with the list of files, the entries of MANIFEST.json)."""
    try:
        files = load_manifest(checkpoint)["files"]
    except CheckpointError as error:
        return [str(error)], []
    listed = {entry["path"] for entry in files} | {MANIFEST_NAME, COMMIT_NAME, REJECTED_NAME}
    found = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    # Network file systems keep deleted files as ".nfs..." for a while.
    foreign = sorted(name for name in found - listed if not Path(name).name.startswith(".nfs"))
    return [f"{name} is not in {MANIFEST_NAME}" for name in foreign], files


def check_file(checkpoint: Path, entry: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with one file of a checkpoint, naming it; None if every byte is as written."""
    path = checkpoint / entry["path"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{entry['path']} has {size} bytes, expected {entry['bytes']}"
        if sha256_of(path) != entry["sha256"]:
            return f"{entry['path']} does not match its SHA-256"
    except OSError as error:
        return f"{entry['path']} cannot be read: {error.strerror}"
    return None


def mark_rejected(checkpoint: Path, problems: list[str]) -> None:
    """Leaves a note in a checkpoint that failed its check: pruning does not count it as a good one."""
    try:
        (checkpoint / REJECTED_NAME).write_text("\n".join(problems) + "\n")
    except OSError as error:
        logger.warning("cannot mark %s as rejected: %s", checkpoint, error)


def describe(error: BaseException) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _move_together(temporary: Path, entries: list[FileEntry], world_size: int) -> None:
    """Moves every rank's files side by side and checks that exactly the announced ones are there."""
    seen: dict[str, int] = {MANIFEST_NAME: 0, COMMIT_NAME: 0, REJECTED_NAME: 0}
    for entry in entries:
        if entry.path in seen:
            raise OSError(
                errno.EEXIST,
                f"ranks {seen[entry.path]} and {entry.rank} both wrote {entry.path}",
            )
        seen[entry.path] = entry.rank
        target = temporary / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        (_rank_directory(temporary, entry.rank) / entry.path).rename(target)
    for rank in range(world_size):
        shutil.rmtree(_rank_directory(temporary, rank))
    sizes = {
        path.relative_to(temporary).as_posix(): path.stat().st_size
        for path in temporary.rglob("*")
        if path.is_file()
    }
    announced = {entry.path: entry.bytes for entry in entries}
    if sizes != announced:
        wrong = sorted(set(sizes.items()) ^ set(announced.items()))
        raise OSError(
            errno.EIO, f"{len(announced)} files announced, {len(sizes)} found; first: {wrong[0][0]}"
        )
    for directory in [path for path in temporary.rglob("*") if path.is_dir()]:
        fsync_directory(directory)


def _rank_directory(temporary: Path, rank: int) -> Path:
    return temporary / f".rank-{rank:05d}"
