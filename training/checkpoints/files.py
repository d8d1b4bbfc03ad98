"""One checkpoint on disk: names, layout, and the steps of writing, publishing and pruning it.

Nothing here is collective: `training/checkpoints/store.py` says which rank does what, and when all of them agree.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.files import fsync_directory, fsync_file, sha256_of, write_atomically

logger = logging.getLogger(__name__)

MANIFEST_NAME = "MANIFEST.json"
COMMIT_NAME = "COMMIT"
# Rank 0 leaves this in a checkpoint that failed its check, so that pruning never counts it as a good one.
REJECTED_NAME = "REJECTED"
MANIFEST_SCHEMA = 1
_DIGITS = re.compile(r"step-([0-9]{8,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEMPORARY_SUFFIX = ".tmp"

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
        CheckpointError: the name is not the one that `checkpoint_path` gives a step (`step-000000080` is not).
    """
    match = _DIGITS.fullmatch(checkpoint.name)
    if match is None or checkpoint_path(checkpoint.parent, int(match[1])).name != checkpoint.name:
        raise CheckpointError(f"checkpoint is {checkpoint}; expected a directory named step-00000000")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """Returns the directories under `root` that are named as checkpoints, newest step first; contents unchecked.

    Raises:
        OSError: the directory cannot be read; a missing one holds none.
    """
    return sorted((path for path in _own_directories(root) if _is_step(path)), key=step_of, reverse=True)


def list_committed(root: Path) -> list[Path]:
    """Returns the checkpoints under `root` that have a COMMIT, newest step first; contents unchecked."""
    return [path for path in list_checkpoints(root) if (path / COMMIT_NAME).is_file()]


def list_unfinished(root: Path) -> list[Path]:
    """Returns the temporary directories that killed runs left."""
    return sorted(path for path in _own_directories(root) if not _is_step(path))


def prune_checkpoints(
    root: Path, newest: Path, keep_last: int, keep_every: int, scores: Mapping[int, float]
) -> None:
    """Deletes what neither `keep_last`, `keep_every` nor `scores` (the best, by step) keep. Call on rank 0 only.

    Checkpoints that failed their check are not counted among the `keep_last`. `newest`, the one just committed, always
    stays, and so does every directory with a name that no save gives it: a copy under a name of its own, or under that
    of another step. Of equal scores the earlier stays. A failure to delete is a warning: it must not end a run.
    """
    try:
        own = [path for path in _own_directories(root) if not _is_copy(path)]
        good = [
            p for p in list_committed(root) if p in own and not (p / REJECTED_NAME).exists() and p != newest
        ]
        kept = {newest, *good[: keep_last - 1]}
        if keep_every > 0:
            kept.update(path for path in good if step_of(path) % keep_every == 0)
        scored = [path for path in (newest, *good) if step_of(path) in scores]
        kept.update(sorted(scored, key=lambda path: (-scores[step_of(path)], step_of(path)))[:1])
        leftovers = [path for path in own if path not in kept]
    except OSError as error:
        logger.warning("cannot look for old checkpoints in %s: %s", root, describe(error))
        return
    for path in leftovers:
        try:
            _delete(path)
        except OSError as error:
            logger.warning("cannot delete old checkpoint %s: %s", path, describe(error))


def open_temporary(root: Path, step: int, world_size: int) -> tuple[int, Path, str] | SaveOutcome:
    """Returns (step, temporary directory, key of the ranks' directories in it), or how the save ended already.

    A good checkpoint of this step is never replaced: the same run would write the same bytes again. The key is
    new with every save: a rank of a killed start that is still writing finds its directory gone, not another's.
    """
    final = checkpoint_path(root, step)
    temporary = _temporary_path(final)
    key = secrets.token_hex(4)
    try:
        if _is_copy(final):
            aside = final.with_name(f"{final.name}-copy-{key}")
            logger.warning("%s is the copy of another step; it is moved to %s", final, aside.name)
            final.rename(aside)
        if (final / COMMIT_NAME).is_file() and not (final / REJECTED_NAME).exists():
            return SaveOutcome(step, final)
        root.mkdir(parents=True, exist_ok=True)
        if temporary.exists():
            logger.warning("removing %s, which an earlier run left unfinished", temporary)
            shutil.rmtree(temporary)
        temporary.mkdir()
        for rank in range(world_size):
            _rank_directory(temporary, rank, key).mkdir()
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        return SaveOutcome(step, None, f"rank 0: {describe(error)}")
    return step, temporary, key


def write_part(temporary: Path, rank: int, key: str, write: WriteFunction) -> Part:
    """Calls the writer, then flushes and hashes every file it left."""
    directory = _rank_directory(temporary, rank, key)
    write(directory)
    entries = []
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
            continue
        fsync_file(path)
        relative = path.relative_to(directory).as_posix()
        entries.append(FileEntry(relative, path.stat().st_size, sha256_of(path), rank))
    fsync_directory(directory)
    return Part(entries)


def publish(
    root: Path, step: int, temporary: Path, key: str, parts: list[Part], facts: Mapping[str, Any]
) -> SaveOutcome:
    """Turns the ranks' files into a committed checkpoint, or removes them and says why not. Rank 0 only.

    COMMIT is written before the renaming, so that a directory with a checkpoint's name is a whole one from its first
    moment; one without COMMIT was damaged later, and nobody takes it for a save that never came to its end.
    """
    failures = [f"rank {rank}: {part.error}" for rank, part in enumerate(parts) if part.error is not None]
    final = checkpoint_path(root, step)
    try:
        if failures:
            raise OSError(errno.EIO, "; ".join(failures))
        entries = [entry for part in parts for entry in part.entries]
        _move_together(temporary, entries, len(parts), key)
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
        write_atomically(temporary / COMMIT_NAME, hashlib.sha256(manifest.encode()).hexdigest() + "\n")
        if final.exists():
            _delete(final)  # it failed its check (`open_temporary` keeps a good one)
        temporary.rename(final)
        fsync_directory(root)
    except (OSError, TypeError, ValueError) as error:  # the latter two: facts that are no JSON
        shutil.rmtree(temporary, ignore_errors=True)
        if (final / COMMIT_NAME).is_file() and not (final / REJECTED_NAME).exists():
            return SaveOutcome(step, final)  # only the flush of the renaming failed
        return SaveOutcome(step, None, "; ".join(failures) or f"rank 0: {describe(error)}")
    return SaveOutcome(step, final)


def load_manifest(checkpoint: Path) -> dict[str, Any]:
    """Returns MANIFEST.json of a committed checkpoint after checking it against COMMIT, and its shape.

    Raises:
        CheckpointError: one of the two is missing, damaged, or does not match the other or the directory.
    """
    try:
        committed = (checkpoint / COMMIT_NAME).read_text().strip()
        content = (checkpoint / MANIFEST_NAME).read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or describe(error)) if isinstance(error, OSError) else "no text"
        raise CheckpointError(f"COMMIT or MANIFEST.json of {checkpoint} cannot be read: {reason}") from error
    if hashlib.sha256(content).hexdigest() != committed:
        raise CheckpointError(f"{MANIFEST_NAME} does not match {COMMIT_NAME} in {checkpoint}")
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} of {checkpoint} is no JSON: {describe(error)}") from error
    problem = _find_shape_problem(manifest)
    if problem is not None:
        raise CheckpointError(f"{MANIFEST_NAME} of {checkpoint} {problem}")
    if manifest["step"] != step_of(checkpoint):
        raise CheckpointError(f"{checkpoint} holds step {manifest['step']}: the directory was renamed")
    return manifest


def _find_shape_problem(manifest: Any) -> str | None:
    """Returns what keeps a JSON value from being a manifest; a right hash says nothing about its shape."""
    if not isinstance(manifest, dict):
        return "is no JSON object"
    schema = manifest.get("schema")
    if type(schema) is not int or schema != MANIFEST_SCHEMA:
        return (
            f"has schema {schema!r:.40}; expected {MANIFEST_SCHEMA}; load it with the version of this project that "
            "wrote it"
        )
    if type(manifest.get("step")) is not int or not isinstance(manifest.get("facts"), dict):
        return "lacks its step or its facts"
    files = manifest.get("files")
    if not isinstance(files, list) or not files:
        return "lists no files"
    for entry in files:
        if not isinstance(entry, dict) or not _is_inside(entry.get("path")):
            return f"lists {entry!r:.60}, which is no file of a checkpoint"
        digest = entry.get("sha256")
        if (
            type(entry.get("bytes")) is not int
            or not isinstance(digest, str)
            or not _SHA256.fullmatch(digest)
        ):
            return f"lists {entry['path']!r:.60} without its size or SHA-256"
    return None


def _is_inside(path: Any) -> bool:
    """Whether a manifest's path stays inside its checkpoint."""
    if not isinstance(path, str) or not path or "\0" in path:
        return False
    return not PurePosixPath(path).is_absolute() and ".." not in PurePosixPath(path).parts


def read_files(checkpoint: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns (what is wrong with the list of files, the entries of MANIFEST.json)."""
    try:
        files = load_manifest(checkpoint)["files"]
        found = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    except CheckpointError as error:
        return [str(error)], []
    except OSError as error:
        return [f"{checkpoint} cannot be listed: {error.strerror}"], []
    listed = {entry["path"] for entry in files} | {MANIFEST_NAME, COMMIT_NAME, REJECTED_NAME}
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


def mark_rejected(checkpoint: Path) -> None:
    """Leaves a note in a checkpoint that was passed over: pruning does not count it as a good one."""
    try:
        (checkpoint / REJECTED_NAME).write_text("passed over; the reason is in console.log\n")
    except OSError as error:
        logger.warning("cannot mark %s as rejected: %s", checkpoint, error)


def describe(error: BaseException) -> str:
    """Returns an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _own_directories(root: Path) -> list[Path]:
    """Returns the directories under `root` with a name that a save gives: `step-%08d`, and the same with `.tmp`.

    Whatever else lies there, a copy with a suffix or a link, is somebody's own: it is neither loaded nor deleted.
    """
    try:
        entries = list(root.iterdir())
    except FileNotFoundError:
        return []
    stems = [(path, path.with_name(path.name.removesuffix(_TEMPORARY_SUFFIX))) for path in entries]
    return [p for p, stem in stems if _is_step(stem) and not p.is_symlink() and p.is_dir()]


def _is_step(path: Path) -> bool:
    try:
        step_of(path)
    except CheckpointError:
        return False
    return True


def _is_copy(path: Path) -> bool:
    """Whether a directory with a checkpoint's name says that it holds another step: somebody's copy of that one."""
    try:
        step = json.loads((path / MANIFEST_NAME).read_bytes())["step"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False  # damaged, or no checkpoint yet
    return type(step) is int and _is_step(path) and step != step_of(path)


def _temporary_path(final: Path) -> Path:
    return final.with_name(final.name + _TEMPORARY_SUFFIX)


def _delete(path: Path) -> None:
    """Deletes a checkpoint or what is left of one; from the first moment on it has no checkpoint's name."""
    if _is_step(path):
        temporary = _temporary_path(path)
        if temporary.exists():
            # Of a save of this very step: the one that replaces `path`, or one that a killed run left.
            (path / COMMIT_NAME).unlink(missing_ok=True)
        else:
            path = path.rename(temporary)
    shutil.rmtree(path)


def _move_together(temporary: Path, entries: list[FileEntry], world_size: int, key: str) -> None:
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
        (_rank_directory(temporary, entry.rank, key) / entry.path).rename(target)
    for rank in range(world_size):
        shutil.rmtree(_rank_directory(temporary, rank, key))
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


def _rank_directory(temporary: Path, rank: int, key: str) -> Path:
    return temporary / f".rank-{rank:05d}-{key}"
