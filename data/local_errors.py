"""Errors of this machine, which say nothing about the data: they end a run and are never counted as bad samples."""

from __future__ import annotations

import errno

import numpy as np

from data.shards import DataError

_OPEN_FILES = "raise the limit of open files (ulimit -n), or lower data.num_workers"
_DISK = "make room on the disk, or choose another folder"
_LARGE = "allow larger files (ulimit -f), or choose a folder on a file system that holds them"
_RIGHTS = "give this user the right to read the files and to write the folder"
_MEMORY = "lower data.num_workers, data.num_lanes or data.shuffle_window, or ask for more memory"
_REMEDIES = {
    errno.EMFILE: _OPEN_FILES,
    errno.ENFILE: _OPEN_FILES,
    errno.ENOMEM: _MEMORY,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOSPC: _DISK,
    errno.EDQUOT: _DISK,
    errno.EFBIG: _LARGE,
}
# More than a decoder asks for at once for an ordinary image.
_PROBE_BYTES = 64 * 1024 * 1024


def raise_if_local(error: BaseException, what: str) -> None:
    """Raises DataError with the remedy if an error is the machine's; returns if the file or its bytes are at fault.

    A decoder's MemoryError may be either: bogus sizes in a header ask for the impossible. It is the machine's if 64
    MiB cannot be had either.

    Args:
        error: what was raised.
        what: the file or sample that was wanted.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and _is_about_memory(error) and _memory_is_short():
        number = errno.ENOMEM
    if number in _REMEDIES:
        said = error.strerror if isinstance(error, OSError) and error.strerror else "Cannot allocate memory"
        raise DataError(
            f"{what} cannot be used: {said}; expected that this machine lets it; {_REMEDIES[number]}"
        ) from error


def line_of(error: BaseException, place: object) -> str:
    """Returns what a program says of an error, in one line: of one of the machine's, the file and the remedy.

    Args:
        error: what was raised.
        place: where the program writes, for errors that name no file.
    """
    try:
        raise_if_local(error, str(getattr(error, "filename", None) or place))
    except DataError as mendable:
        error = mendable
    return " ".join(str(error).split())


def _is_about_memory(error: BaseException) -> bool:
    # torch reports a failed allocation as a RuntimeError.
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


def _memory_is_short() -> bool:
    try:
        np.empty(_PROBE_BYTES, dtype=np.uint8)
    except MemoryError:
        return True
    return False
