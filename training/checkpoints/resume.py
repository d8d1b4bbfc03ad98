"""Which checkpoint a start goes on from, and the run put back from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from runtime.distributed import Process
from training.checkpoints.files import CheckpointError, describe
from training.checkpoints.saved_run import SavedRun, read_saved_run, restore
from training.checkpoints.store import find_latest_checkpoint, settle_on
from training.step import TrainingStep

logger = logging.getLogger(__name__)


class Resumption:
    """The newest checkpoint of a run that can be read; `put_back` goes to an older one where it does not fit.

    Making one is collective.

    Args:
        root: the run's `checkpoints` directory.
        process: this process.

    Attributes:
        saved: what the run goes on from; None where there is no checkpoint.

    Raises:
        CheckpointError: checkpoints are there and none is usable; on all ranks alike, nothing was changed.
    """

    def __init__(self, root: Path, process: Process) -> None:
        self._root = root
        self._process = process
        self._spoiled: dict[str, str] = {}
        self.saved = self._find()

    def put_back(
        self, training_step: TrainingStep, use_position: Callable[[SavedRun], None]
    ) -> SavedRun | None:
        """Puts the state back and returns what the run goes on from; older ones follow on refusal. Collective.

        Only once all of it fits is anything on the disk marked.

        Args:
            training_step: takes engine, estimator, counts and guard over.
            use_position: takes the data position over; refuses it with a ValueError.

        Raises:
            CheckpointError: no checkpoint fits; on all ranks alike.
        """
        while self.saved is not None:
            # Equal on all ranks: they compare the same names and shapes with the same files.
            problem = self._try(self.saved, training_step, use_position)
            problems = [found for found in self._process.all_gather_object(problem) if found is not None]
            if not problems:
                break
            self._spoiled[self.saved.checkpoint.name] = problems[0]
            self.saved = self._find()
        if self.saved is not None:
            if self._process.is_main:
                settle_on(self.saved.checkpoint)
            logger.info("continuing from %s: %d steps done", self.saved.checkpoint, self.saved.progress.step)
        return self.saved

    def _try(
        self, saved: SavedRun, training_step: TrainingStep, use_position: Callable[[SavedRun], None]
    ) -> str | None:
        try:
            use_position(saved)
            restore(saved, training_step, self._process)
        except ValueError as error:
            return describe(error)
        return None

    def _find(self) -> SavedRun | None:
        read: dict[Path, SavedRun] = {}

        def inspect(checkpoint: Path) -> list[str]:
            try:
                read[checkpoint] = read_saved_run(checkpoint, self._process)
            except (CheckpointError, OSError) as error:
                return [" ".join(str(error).split())]
            return []

        found = find_latest_checkpoint(self._root, self._process, inspect, self._spoiled)
        return None if found is None else read[found]
