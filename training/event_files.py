"""A record as TensorBoard's curves, by the writer of the package `tensorboard`, which only who asks for them needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
# Ends the names of our files, so that others in the folder are left alone.
_SUFFIX = ".record"


class EventFile:
    """Every number of a record as a curve of TensorBoard's; the whole record in one file.

    A start of a run that goes on writes the record again, as it now is, and removes the files that former starts wrote
    here: steps that were done again after a checkpoint stand in it once. Its first event tells an open TensorBoard to
    forget what it has read before.

    Args:
        run_dir: the run directory; the file goes into its `tensorboard/`.
    """

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir / FOLDER
        former = list(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
        self._writer = SummaryWriter(str(folder), purge_step=0, filename_suffix=_SUFFIX)
        self._writer.flush()
        for path in former:
            path.unlink(missing_ok=True)

    def log(self, line: Mapping[str, Any]) -> None:
        """Appends one line of the record; what is null in it is left out."""
        for key, value in line.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, line["step"])
        self._writer.flush()

    def finish(self) -> None:
        """Closes the file."""
        self._writer.close()
