"""Exit codes and the frame in which both programs run: a user's mistake is one line, a fault a traceback."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 130  # a shell's own number for Ctrl-C
EXIT_PREEMPTED = 75  # sysexits' EX_TEMPFAIL: the state is saved, please start the same command again
# What a disk refuses and its user can mend.
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)

logger = logging.getLogger(__name__)


class UserError(ValueError):
    """Something that the user can mend, found outside a configuration; the message is one line."""


class Fault(RuntimeError):
    """Something that no option mends and one line explains: exit code 1, the traceback in the log at debug level."""


def run_program(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Returns the exit code of `main`, turning a user's mistake into one line on stderr and exit code 2.

    `ValueError` is this repository's word for "what the user can mend" while a program is being set up, and a disk
    that is full or not ours to use is a mistake too; once training runs, `main` itself lets only `UserError` through
    and everything else is a fault (exit code 1, with its traceback). The traceback of a mistake goes to the log at
    debug level.

    One rank of several that fails does not return: its process ends at once, without the interpreter's orderly end
    and without a collective. Leaving a process group can wait for ranks that wait for this one; when the process is
    gone, its peers' connections break and the launcher ends them.
    """
    code = _run(main, arguments)
    if code in (EXIT_DONE, EXIT_PREEMPTED) or os.environ.get("WORLD_SIZE", "1") == "1":
        return code
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    # Not where somebody has chosen otherwise: a shell makes its background jobs ignore it.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        return main(arguments)
    except (ValueError, Fault) as error:
        return _explain(str(error), EXIT_FAULT if isinstance(error, Fault) else EXIT_USER_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            what = f"{error.filename or 'a file'} cannot be read or written ({error.strerror})"
            return _explain(
                f"{what}; expected room and rights there; make room, or set another place", EXIT_USER_MISTAKE
            )
        if logging.getLogger().handlers:
            logger.exception("a fault ends this process")
        else:
            traceback.print_exc()
        return EXIT_FAULT


def _explain(text: str, code: int) -> int:
    logger.debug("what one line explains, with its traceback", exc_info=True)
    rank = os.environ.get("RANK", "0")
    prefix = "error: " if rank == "0" else f"error on rank {rank}: "
    print(prefix + " ".join(text.split()), file=sys.stderr, flush=True)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ends the process where it is importing, which most of its first seconds go into; else raises KeyboardInterrupt.

    Inside an import that exception becomes whatever the libraries in between make of it, in thirty lines.
    """
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            print("interrupted", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def faults_unless(*users_mistakes: type[ValueError]) -> Iterator[None]:
    """Inside this block a `ValueError` is a fault, with its traceback, unless it is one of `users_mistakes`.

    So is what a disk refuses: the code says whether a scheduler tries again.

    Raises:
        RuntimeError: in the place of any other ValueError, and of such an OSError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        is_refused = isinstance(error, OSError) and error.errno in _REFUSED
        if isinstance(error, (UserError, *users_mistakes)) or (isinstance(error, OSError) and not is_refused):
            raise
        raise RuntimeError(f"fault: {error}") from error
