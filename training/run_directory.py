"""The run directory: held by one job at a time, and claimed by one configuration once a first step is done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.config import config_to_dict, config_to_yaml, read_yaml
from runtime.directory_lock import SILENT_AFTER_S, DirectoryHeldError, DirectoryLock
from runtime.distributed import Process
from runtime.files import write_atomically
from runtime.program import UserError
from training.checkpoints.files import list_committed
from training.config import PretrainConfig
from training.config_difference import describe_difference

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
_ASK_AGAIN_S = 1.0


class RunDirectory:
    """A run directory that this job holds. Made by `held_run_directory`.

    Attributes:
        path: the directory.
        made_with: what `config.yaml` held at the start; None where no run has claimed the directory yet.
    """

    def __init__(self, config: PretrainConfig, path: Path, process: Process, lock: DirectoryLock) -> None:
        self.path = path
        self._config = config
        self._process = process
        self._lock = lock
        found = process.broadcast_object(self._read() if process.is_main else None)
        if isinstance(found, str):
            raise ValueError(found)
        self.made_with: dict[str, Any] | None = found
        if found is not None and process.is_main and config.run.adopt:
            former = found.get("run", {}).get("name")
            if former != config.run.name:
                logger.warning(
                    "run.adopt: %s was made as %r and goes on as %r", path, former, config.run.name
                )

    def confirm(self) -> None:
        """Returns if this job still holds the directory. Collective; before anything in it is replaced.

        Raises:
            UserError: another job has taken it over while this one was paused; on all ranks.
        """
        problem = self._process.broadcast_object(self._confirm() if self._process.is_main else None)
        if problem is not None:
            raise UserError(f"{problem}; this job ends without writing any more")

    def _confirm(self) -> str | None:
        try:
            self._lock.confirm()
        except DirectoryHeldError as error:
            return f"{error}; expected one job a run directory"
        except FileNotFoundError:
            return f"run directory {self.path} is gone; expected nobody to move or delete it under a run; set run.name"
        except OSError as error:
            return _unwritable(self.path, error)
        return None

    def claim(self) -> None:
        """Writes `config.yaml`: from now on the directory is this configuration's. Rank 0 only.

        Raises:
            UserError: it cannot be written.
        """
        try:
            write_atomically(self.path / CONFIG_NAME, config_to_yaml(self._config))
        except OSError as error:
            raise UserError(_unwritable(self.path, error)) from error

    def _read(self) -> dict[str, Any] | str | None:
        """Returns what the directory was made with, or in words why this configuration may not go on in it."""
        config, path = self._config, self.path / CONFIG_NAME
        try:
            if not config.run.resume and (saved := list_committed(self.path / "checkpoints")):
                # A good checkpoint is never overwritten: the old run's would stay and be taken for the new run's.
                return (
                    f"run.resume is False, but run directory {self.path} holds checkpoints up to {saved[0].name}; "
                    "expected a run directory without checkpoints; set run.name to a new name"
                )
            if not path.exists():
                return None
            made_with = read_yaml(str(path))
        except OSError as error:
            return f"run directory {self.path} cannot be read ({error.strerror}); set run.output_dir"
        except ValueError as error:
            return str(error)
        return describe_difference(self.path, made_with, config_to_dict(config)) or made_with


@contextmanager
def held_run_directory(config: PretrainConfig, path: Path, process: Process) -> Iterator[RunDirectory]:
    """Makes the run directory, holds it until the block's end and checks that it is this configuration's. Collective.

    Rank 0 holds it for all ranks. Nothing in it is changed but the lock: what refuses another configuration,
    `config.yaml`, is written by `RunDirectory.claim`.

    Raises:
        ValueError: the directory is held by another job, belongs to another configuration, or cannot be written; on
            all ranks.
    """
    lock = DirectoryLock(path)
    try:
        _acquire(path, process, lock)
        yield RunDirectory(config, path, process, lock)
    finally:
        lock.release()


def _acquire(path: Path, process: Process, lock: DirectoryLock) -> None:
    """Waits, with all ranks, until the directory is held or a living holder has shown itself."""
    told = False
    while True:
        answer = process.broadcast_object(_try_acquire(path, lock) if process.is_main else None)
        if isinstance(answer, str):
            raise ValueError(answer)
        if answer:
            return
        if process.is_main and not told:
            told = True
            logger.warning(
                "run directory %s is held by %s: taking it over unless that shows a sign of life within %d s",
                path,
                lock.waits_for,
                SILENT_AFTER_S,
            )
        time.sleep(_ASK_AGAIN_S)


def _try_acquire(path: Path, lock: DirectoryLock) -> bool | str:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return lock.try_acquire()
    except DirectoryHeldError as error:
        return str(error)
    except OSError as error:
        return _unwritable(path, error)


def _unwritable(path: Path, error: OSError) -> str:
    return f"run directory {path} cannot be written ({error.strerror}); expected a place to write; set run.output_dir"
