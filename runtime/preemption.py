"""A scheduler's warning that this process will be stopped, as a flag that is read at the step boundary.

SLURM warns with a signal before it takes a node away: SIGUSR2 when the batch script asks for it
(`--signal=USR2@300`, and on preemption where the site sends it), SIGTERM on `scontrol requeue`, `scancel` and at
the time limit. Saving inside a signal handler corrupts files and hangs collectives, so the handler here raises a
flag and returns; the trainer asks all ranks at the end of the step whether any of them was warned
(`Process.agree_any`), saves, and leaves with `EXIT_PREEMPTED`.

Imports no torch: the flag is installed before the slow imports, because until then the default action of these
signals is to kill the process.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

# SIGUSR2 and not SIGUSR1 is the signal to ask a scheduler for: NCCL has been seen to catch SIGUSR1
# (NVIDIA/nccl#704). SIGUSR1 is listened to all the same, for sites that send nothing else.
DEFAULT_SIGNALS = ("USR2", "TERM", "USR1")


class PreemptionFlag:
    """Raised by the first warning signal, and then stays raised; further signals change nothing.

    `install` sets the handlers for the rest of the process; as a context manager, the former ones come back at the
    end. A program installs: the first rank that has left makes the scheduler send SIGTERM to the others, which
    would turn the exit code of a rank that is still tearing down from 75 into 143. A second SIGTERM does not kill
    either: the save that the first one asked for may still be running, and the scheduler has SIGKILL for the
    impatient case. Not collective: one rank may be warned alone, the caller must agree the flag across ranks.

    Args:
        signals: names without "SIG", such as "USR2".

    Raises:
        ValueError: a name is no signal of this platform, or one that no process can catch.
    """

    def __init__(self, signals: Sequence[str] = DEFAULT_SIGNALS) -> None:
        self._signals = tuple(_signal_by_name(name) for name in signals)
        self._former: dict[signal.Signals, Any] = {}
        self._owner_pid = os.getpid()
        self._signal_name: str | None = None
        self._raised_at: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether a warning has arrived in this process."""
        return self._signal_name is not None

    @property
    def signal_name(self) -> str | None:
        """The first warning signal, such as "SIGUSR2"; None before any."""
        return self._signal_name

    @property
    def seconds_since(self) -> float:
        """Seconds since the first warning, for a log line about how much of the grace time is spent; 0 before."""
        return 0.0 if self._raised_at is None else time.monotonic() - self._raised_at

    def __enter__(self) -> PreemptionFlag:
        """Installs the handlers until the end of the block; see `install`."""
        return self.install()

    def install(self) -> PreemptionFlag:
        """Sets the handlers and returns this flag.

        Raises:
            RuntimeError: called outside the main thread, where Python installs no handlers, or twice.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("PreemptionFlag is installed in a thread; install it in the main thread")
        if self._former:
            raise RuntimeError("PreemptionFlag is installed twice; leave it first")
        self._owner_pid = os.getpid()
        for number in self._signals:
            self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the former handlers back."""
        put_back(self._former)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked child (a loader worker) inherits this handler; its copy of the flag is nobody's.
        if self._signal_name is None and os.getpid() == self._owner_pid:
            self._raised_at = time.monotonic()
            self._signal_name = signal.Signals(number).name


def put_back(former: Mapping[signal.Signals, Any]) -> None:
    """Sets the handlers that `signal.signal` returned, by signal."""
    for number, handler in former.items():
        # None stands for a handler that was not installed from Python and cannot be put back from it.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ignore_preemption_signals(signals: Sequence[str] = DEFAULT_SIGNALS) -> None:
    """Makes this process deaf to the warning signals: for loader workers, as their first act.

    A scheduler signals every process of a step. A worker that dies of the warning takes the step down in which
    the trainer would have saved: torch gives its workers a SIGTERM handler that ends them, and a spawned worker
    has the default action, which is death, for the others. Workers end with their loader, not by signals.
    """
    for name in signals:
        signal.signal(_signal_by_name(name), signal.SIG_IGN)


def _signal_by_name(name: str) -> signal.Signals:
    known = signal.Signals.__members__.get(f"SIG{name.removeprefix('SIG')}")
    if known is None or known in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(
            f"preemption signal is {name!r}; expected a signal that can be caught, such as USR2 or TERM; "
            "pass names without SIG"
        )
    return known
