"""Checkpoints that are whole or absent, and whose every byte is checked before use.

Layout, drawn once:

    checkpoints/
      step-00000090/            complete
        MANIFEST.json           every file with bytes and SHA-256; step, world size, facts of the run
        COMMIT                  the SHA-256 of MANIFEST.json; the last file that is written
        teacher/ ...            what the writers wrote
      step-00000100.tmp/        being written, or left by a killed run
        .rank-00000-KEY/ ...    each rank writes into a directory of its own, the key being this save's

A save: rank 0 makes the temporary directory and announces its path and step; each rank writes, flushes and
hashes its files; all ranks exchange what they wrote; rank 0 moves the files together, checks their count and
sizes, writes MANIFEST.json and COMMIT, flushes, renames, and only then deletes old checkpoints. A load
takes the newest checkpoint with a COMMIT whose hashes pass on all ranks. A pointer such as DeepSpeed's
`latest` is never trusted: it can name a checkpoint that was still being written. "None there" and "there, but none
usable" are different answers: the first begins a run, the second is an error that touches nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from training.checkpoints.files import (
    REJECTED_NAME,
    CheckpointError,
    Part,
    SaveOutcome,
    check_file,
    describe,
    list_checkpoints,
    list_unfinished,
    mark_rejected,
    open_temporary,
    prune_checkpoints,
    publish,
    read_files,
    write_part,
)

logger = logging.getLogger(__name__)

WriteFunction = Callable[[Path], None]


class Peers(Protocol):
    """What a save needs of `runtime.distributed.Process`: plain-value collectives among all ranks."""

    @property
    def rank(self) -> int:
        """This process's index."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    def broadcast_object(self, value: Any) -> Any:
        """Returns rank 0's value. Collective."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns every rank's value in rank order. Collective."""

    def agree_any(self, flag: bool) -> bool:
        """Returns whether any rank's flag is true. Collective."""


def save_checkpoint(
    root: Path,
    step: int,
    write: WriteFunction,
    process: Peers,
    *,
    keep_last: int = 2,
    keep_every: int = 0,
    facts: Mapping[str, Any] | None = None,
) -> SaveOutcome:
    """Writes one checkpoint and returns once it is committed or given up. Collective.

    `write(directory)` is called on every rank with an empty directory of its own; the files of all ranks end
    up side by side in the checkpoint, so two ranks must not write the same relative path. It must contain no
    collective: where one rank's disk is full the others would wait for it. Gather first, then save.

    Args:
        root: the run's `checkpoints` directory; rank 0's value counts.
        step: number of optimizer updates done; equal on all ranks.
        write: writes this rank's files.
        process: the ranks.
        keep_last: how many of the newest committed checkpoints stay (at least 1; 2 survive a bad disk block).
        keep_every: additionally keep every checkpoint whose step is a multiple; 0 keeps none.
        facts: JSON-able facts for MANIFEST.json (configuration hash, engine, samples seen).

    Returns:
        The outcome, equal on all ranks. A disk error on any rank (ENOSPC, EIO, quota) is an outcome with
        `error`: nothing of the new checkpoint is left, the old ones stay, training can go on.

    Raises:
        RuntimeError: a writer failed for another reason than its disk, on any rank; raised on all ranks.
    """
    store = CheckpointStore(root, process, keep_last=keep_last, keep_every=keep_every)
    outcome = store.save(step, write, facts)
    assert outcome is not None
    return outcome


class CheckpointStore:
    """The checkpoints of one run: saves them, in the background by choice, and prunes old ones.

    With `asynchronous`, `save` returns after the temporary directory is agreed and a thread of each rank
    writes and hashes; `poll`, called by every rank at each step boundary, publishes once all ranks are done.
    The writer must then own what it writes (CPU copies), because training goes on changing the originals.
    `on_saved` is called on rank 0 with step and path of every published checkpoint, and `read_scores` before old ones
    are deleted: of the checkpoints that have a score, by step, the best stays.

    Attributes:
        newest_step: step of the newest whole checkpoint, the one that the run continued or the last one that was
            published; None while there is none. Equal on all ranks.
    """

    def __init__(
        self,
        root: Path,
        process: Peers,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = False,
        newest_step: int | None = None,
        on_saved: Callable[[int, Path], None] | None = None,
        read_scores: Callable[[], Mapping[int, float]] | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; expected at least 1; set checkpoint.keep_last")
        if keep_every < 0:
            raise ValueError(f"keep_every is {keep_every}; expected 0 or more; set checkpoint.keep_every")
        self._root = root
        self._process = process
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._on_saved = on_saved
        self._read_scores = read_scores
        self.newest_step = newest_step
        self._pending: _PendingSave | None = None

    @property
    def pending_step(self) -> int | None:
        """The step that a background save is writing; None while there is none. Equal on all ranks."""
        return None if self._pending is None else self._pending.step

    def save(
        self, step: int, write: WriteFunction, facts: Mapping[str, Any] | None = None
    ) -> SaveOutcome | None:
        """Saves and returns the outcome, or None where a background save has begun. Collective.

        An unfinished background save is completed first, so that saves never overlap. See `save_checkpoint`.
        """
        if self._pending is not None:
            self.finish()
        process = self._process
        opened = process.broadcast_object(
            open_temporary(self._root, step, process.world_size) if process.rank == 0 else None
        )
        if isinstance(opened, SaveOutcome):
            return self._report(opened)
        agreed_step, temporary, key = opened
        if process.agree_any(step != agreed_step):
            raise RuntimeError(f"rank {process.rank} saves step {step} while rank 0 saves step {agreed_step}")
        self._pending = _PendingSave(agreed_step, temporary, key, write, process.rank, dict(facts or {}))
        self._pending.start(background=self._asynchronous)
        return None if self._asynchronous else self.finish()

    def poll(self) -> SaveOutcome | None:
        """Publishes a background save that all ranks have written; None while there is none. Collective."""
        if self._pending is None or self._process.agree_any(not self._pending.is_written()):
            return None
        return self.finish()

    def finish(self) -> SaveOutcome | None:
        """Waits for a background save and publishes it; None if there is none. Collective."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        part = pending.wait()
        parts: list[Part] = self._process.all_gather_object(part)
        outcome = None
        if self._process.rank == 0:
            outcome = publish(self._root, pending.step, pending.temporary, pending.key, parts, pending.facts)
        outcome = self._process.broadcast_object(outcome)
        for rank, failed in enumerate(parts):
            if failed.error is not None and not failed.is_disk_error:
                raise RuntimeError(f"checkpoint of step {pending.step} failed on rank {rank}: {failed.error}")
        if outcome.path is not None and self._process.rank == 0:
            scores = {} if self._read_scores is None else self._read_scores()
            prune_checkpoints(self._root, outcome.path, self._keep_last, self._keep_every, scores)
            if self._on_saved is not None:
                self._on_saved(outcome.step, outcome.path)
        return self._report(outcome)

    def _report(self, outcome: SaveOutcome) -> SaveOutcome:
        if outcome.path is not None:
            self.newest_step = outcome.step
        if self._process.rank == 0:
            if outcome.error is None:
                logger.info("checkpoint of step %d saved: %s", outcome.step, outcome.path)
            else:
                logger.error(
                    "checkpoint of step %d NOT saved: %s; older checkpoints stay, the run goes on",
                    outcome.step,
                    outcome.error,
                )
        return outcome


class _PendingSave:
    """One rank's side of a save between the agreement on its path and its publication."""

    def __init__(
        self, step: int, temporary: Path, key: str, write: WriteFunction, rank: int, facts: dict[str, Any]
    ) -> None:
        self.step = step
        self.temporary = temporary
        self.key = key
        self.facts = facts
        self._write = write
        self._rank = rank
        self._part = Part()
        self._thread: threading.Thread | None = None

    def start(self, background: bool) -> None:
        if background:
            # Not a daemon: a run that ends while writing waits for its files.
            self._thread = threading.Thread(target=self._run, name=f"checkpoint-{self.step}")
            self._thread.start()
        else:
            self._run()

    def is_written(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Part:
        if self._thread is not None:
            self._thread.join()
        return self._part

    def _run(self) -> None:
        try:
            self._part = write_part(self.temporary, self._rank, self.key, self._write)
        except OSError as error:
            self._part = Part(error=describe(error), is_disk_error=True)
        except Exception as error:  # told to all ranks by `finish`, which raises
            logger.exception("rank %d could not write its part of step %d", self._rank, self.step)
            self._part = Part(error=describe(error))


def find_latest_checkpoint(
    root: Path,
    process: Peers,
    inspect: Callable[[Path], list[str]] | None = None,
    spoiled: Mapping[str, str] | None = None,
) -> Path | None:
    """Returns the newest usable checkpoint; None only where no directory has a checkpoint's name. Collective.

    Rank 0 lists the candidates; each is checked by all ranks together (rank r hashes every W-th file), so all
    ranks return the same path. What is passed over is logged, one line a checkpoint with file and reason. Nothing on
    the disk changes: `settle_on` marks what was passed over, once it is known that the run goes on.

    Args:
        root: the run's `checkpoints` directory.
        process: the ranks.
        inspect: returns what keeps a checkpoint whose bytes are as written from being used by this rank; not
            collective.
        spoiled: name to reason of checkpoints that turned out unusable after an earlier call.

    Raises:
        CheckpointError: checkpoints are there and none of them is usable, or they cannot be listed; on all ranks.
    """
    listed = process.broadcast_object(_list_for_all(root) if process.rank == 0 else None)
    if isinstance(listed, str):
        raise CheckpointError(listed)
    for candidate in listed:
        known = (spoiled or {}).get(candidate.name)
        problems = find_problems(candidate, process) if known is None else [known]
        if not problems and inspect is not None:
            found = process.all_gather_object(inspect(candidate))
            problems = list(dict.fromkeys(problem for part in found for problem in part))
        if not problems:
            if process.rank == 0:
                logger.info("newest whole checkpoint: %s, all hashes pass", candidate)
            return candidate
        if process.rank == 0:
            logger.error("passing over checkpoint %s: %s", candidate, "; ".join(problems[:4]))
    if listed:
        raise CheckpointError(
            f"{root} holds {len(listed)} checkpoint(s) and none can be used, for the reasons above; expected a whole "
            "one; nothing was changed; mend the cause and start again, or set run.name to begin a new run"
        )
    return None


def _list_for_all(root: Path) -> list[Path] | str:
    """Returns the candidates, newest first, or in words why they cannot be listed."""
    try:
        if unfinished := list_unfinished(root):
            logger.warning("passing over unfinished saves: %s", ", ".join(path.name for path in unfinished))
        return list_checkpoints(root)
    except OSError as error:
        return (
            f"{root} cannot be listed ({error.strerror}); expected the run's checkpoints; nothing was changed; mend "
            "the cause and start again"
        )


def settle_on(chosen: Path) -> None:
    """Marks what is newer than the checkpoint that a run goes on from as rejected. Call on rank 0 only.

    Pruning then counts none of it as a good one, and a save of the same step replaces it. A mark on the chosen one,
    left by a start that could not read it, is removed.
    """
    try:
        for checkpoint in list_checkpoints(chosen.parent):
            if checkpoint == chosen:
                (checkpoint / REJECTED_NAME).unlink(missing_ok=True)
                return
            mark_rejected(checkpoint)
    except OSError as error:
        logger.warning("cannot mark what was passed over in %s: %s", chosen.parent, describe(error))


def check_checkpoint(checkpoint: Path, process: Peers) -> None:
    """Returns if every byte of a checkpoint that the user named is as written. Collective.

    Raises:
        CheckpointError: on all ranks alike, naming the first bad files.
    """
    problems = find_problems(checkpoint, process)
    if problems:
        raise CheckpointError(f"checkpoint {checkpoint} cannot be used: {'; '.join(problems[:4])}")


def find_problems(checkpoint: Path, process: Peers) -> list[str]:
    """Returns what is wrong with a checkpoint, one line per file; empty if nothing is. Collective.

    The same list on all ranks. Reads every byte once, split among the ranks.
    """
    problems, files = process.broadcast_object(read_files(checkpoint) if process.rank == 0 else None)
    mine = [
        problem
        for entry in files[process.rank :: process.world_size]
        if (problem := check_file(checkpoint, entry)) is not None
    ]
    return problems + [problem for part in process.all_gather_object(mine) for problem in part]
