"""Files that are whole or absent: atomic writes, flushed directories, streamed SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Large enough that the loop costs nothing beside SHA-256 itself (about 1-2 GB/s with SHA extensions).
READ_CHUNK_BYTES = 8 * 1024 * 1024


@contextmanager
def ordinary_mode(path: Path) -> Iterator[None]:
    """Gives the file that is written inside the permissions of any new file, as the umask has them.

    safetensors writes files that nobody else may read, beside a README that everybody may.
    """
    with path.open("ab") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    yield
    path.chmod(mode)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes `content` so that a reader, or a run after a crash, sees the old file or the new one, whole.

    Writes to a temporary name in the same directory, flushes it to the disk, renames it over `path` and flushes
    the directory. Not collective: one process writes one path.

    Args:
        path: the final file; its directory must exist.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: the disk is full or not writable; it names `path`, which is untouched, and the temporary file is gone.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # which would hide the reason
            temporary.unlink()
        error.filename = str(path)  # a write names none, and opening the temporary one
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Flushes the names in `directory` to the disk: without it, a rename can be lost in a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flushes the content of `path`, whoever wrote it, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content as 64 hexadecimal digits, reading it in chunks.

    Raises:
        OSError: the file is missing or unreadable.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
