"""Logging: rank 0 to the terminal, every rank to its own file once the run directory is known."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from runtime.program import UserError

_FORMAT = "%(asctime)s %(levelname).1s %(name)s | %(message)s"


def set_up_logging(rank: int, level: int = logging.INFO) -> None:
    """Sends this process's log to stderr: from rank 0 everything at `level`, from others only errors.

    Args:
        rank: this process's rank; its number stands in front of lines of ranks other than 0.
        level: the level of rank 0's terminal.
    """
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.DEBUG)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(level if rank == 0 else logging.ERROR)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    terminal.setFormatter(logging.Formatter(prefix + _FORMAT, "%H:%M:%S"))
    root.addHandler(terminal)
    # Libraries speak up only when something is wrong.
    for name in (
        "PIL",
        "matplotlib",
        "urllib3",
        "filelock",
        "DeepSpeed",
        "torch",
        "fsspec",
        "asyncio",
        "numba",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)


def add_log_file(path: Path, rank: int) -> None:
    """Appends rank 0's log, debug level included, to `path`; other ranks write beside it, by number.

    Raises:
        UserError: rank 0's cannot be opened.
    """
    target = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
    try:
        handler = _LogFile(target, delay=rank != 0)
    except OSError as error:
        raise UserError(
            f"{target} cannot be opened ({error.strerror}); expected a file that this user may write; mend its "
            "permissions, or set run.output_dir"
        ) from error
    handler.setLevel(logging.DEBUG if rank == 0 else logging.WARNING)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: said once on stderr, in one line instead of a traceback for each line."""

    _is_told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Says what cannot be written, once."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._is_told:
            self._is_told = True
            print(f"{self.baseFilename} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
