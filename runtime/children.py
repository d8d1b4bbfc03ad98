"""Programs that this one starts and waits for: what would end it asks them to end first."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any

from runtime.preemption import put_back


class Children:
    """Runs programs, several at once from threads; inside its block no signal leaves one of them behind.

    SIGTERM, SIGHUP and SIGINT reach them as SIGTERM, on which our programs save, and nothing is started any more; a
    signal that is ignored, as under nohup, stays so. The block is entered in the main thread.

    Attributes:
        stopped_by: the first such signal; None before any.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self._running: list[subprocess.Popen] = []
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Children:
        """Sets the handlers until the end of the block."""
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._stop)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the former handlers back."""
        put_back(self._former)

    def run(self, command: Sequence[str], **options: Any) -> int:
        """Returns the exit code of a program that has ended; `options` are those of `subprocess.Popen`."""
        # A group of its own: the terminal sends Ctrl-C and its end to a whole group, and would kill what is to save.
        with subprocess.Popen(command, process_group=0, **options) as child:
            self._running.append(child)
            if self.stopped_by is not None:  # while this one was being started
                child.terminate()
            code = child.wait()
        self._running.remove(child)
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number)
        for child in list(self._running):
            child.terminate()
