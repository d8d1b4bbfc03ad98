"""Many open files in a bounded number of descriptors: a lane each, whatever `ulimit -n` says."""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from io import BufferedReader

# Half of what a process may open is left to torch's pipes and shared memory, the console, checkpoints and sockets.
_SHARE = 2
_MOST = 512
_LEAST = 2


def most_open_files() -> int:
    """Returns how many shards a process should hold open at once under its limit of open files."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        return _MOST
    return max(_LEAST, min(_MOST, soft // _SHARE))


class FilePool:
    """Hands out files of which at most `limit` are open; the one read longest ago is closed, and opened again by need.

    Args:
        limit: of files open at once.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: OrderedDict[PooledFile, BufferedReader] = OrderedDict()

    def open(self, opener: Callable[[], BufferedReader]) -> PooledFile:
        """Returns a file; the opener may be called again later, and must give the same bytes."""
        return PooledFile(self, opener)

    @property
    def num_open(self) -> int:
        """How many are open now."""
        return len(self._open)

    def acquire(self, file: PooledFile) -> BufferedReader:
        """Returns the open file behind a pooled one, at its position."""
        found = self._open.get(file)
        if found is None:
            while len(self._open) >= self.limit:
                oldest, handle = self._open.popitem(last=False)
                oldest.position = handle.tell()
                handle.close()
            found = file.opener()
            found.seek(file.position)
            self._open[file] = found
        else:
            self._open.move_to_end(file)
        return found

    def release(self, file: PooledFile) -> None:
        """Closes the open file behind a pooled one."""
        handle = self._open.pop(file, None)
        if handle is not None:
            handle.close()


class PooledFile:
    """A binary file to read, whose descriptor the pool may take away between two calls.

    Attributes:
        opener: opens it.
        position: where it stands while it is closed.
    """

    def __init__(self, pool: FilePool, opener: Callable[[], BufferedReader]) -> None:
        self._pool = pool
        self.opener = opener
        self.position = 0

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes."""
        return self._pool.acquire(self).read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position and returns it."""
        return self._pool.acquire(self).seek(offset, whence)

    def tell(self) -> int:
        """Returns the position."""
        return self._pool.acquire(self).tell()

    def close(self) -> None:
        """Closes it."""
        self._pool.release(self)

    def __enter__(self) -> PooledFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
