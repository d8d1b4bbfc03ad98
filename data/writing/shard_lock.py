"""One start at a time writes a split: the second waits, and then finds what the first has written.

The lock is `flock`'s, on a file among the records: the system, and with NFS its server, lets it go when the holder and
the processes that write for it are gone, however they ended. Nobody has to judge whether a holder is alive.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator

from data.writing.shard_records import make_records_folder

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(directory: str, what: str) -> Iterator[bool]:
    """Waits until no other process holds a part of a folder of shards, and holds it inside the block.

    Args:
        directory: the folder; made if missing.
        what: the part, which no caller of this one holds already.

    Yields:
        Whether it is held: not on a file system without locks.
    """
    path = make_records_folder(directory) / f"{what}.lock"
    # Forked writers inherit the descriptor, and with it the lock. NFS wants one for writing.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(descriptor, directory)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        logger.info("%s: waiting for %s, which writes there", directory, holder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning(
            "%s: the file system has no locks (%s); two starts that write there at once are not kept apart",
            directory,
            error.strerror,
        )
        return False
    with contextlib.suppress(OSError):  # a full disk: the name is for people
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}".encode(), 0)
    return True
