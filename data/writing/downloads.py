"""Official archives: fetched with their hash compared, or taken from where the user put them; read as named bytes."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
import urllib.request
import zipfile
from pathlib import Path

from data.local_errors import raise_if_local
from data.shards import DataError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 120


def fetch_archive(url: str, md5: str, cache_dir: str) -> Path:
    """Returns an archive's path in a folder, after fetching it where it is not there yet.

    It gets its name by a rename after its MD5 (the hash that its makers publish) was compared, so that half a file is
    never used.

    Raises:
        DataError: it cannot be fetched, or is another file.
    """
    path = Path(cache_dir) / url.rsplit("/", 1)[-1]
    if path.is_file() and _md5(path) == md5:
        return path
    logger.info("fetching %s", url)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        found = _md5(temporary)
        if found != md5:
            raise OSError(f"MD5 {found} arrived; expected {md5}")
        temporary.replace(path)
    except OSError as error:
        raise_if_local(error, str(path))
        raise DataError(
            f"{url} cannot be fetched ({' '.join(str(error).split())}); expected a network on which it can be; copy "
            f"the archive to {path}, or pass its path or its unpacked folder with --archive"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


class Archive:
    """Files by their names below the folder that holds a marker file; of a folder, a zip or a tar, packed or not.

    Nothing is unpacked to disk. A tar is read into memory as a whole; a folder or a zip is read file by file.

    Args:
        path: the folder or the archive.
        marker: a file that stands in the set's own folder, such as `wnids.txt`.

    Raises:
        DataError: no such file, not an archive, or without the marker.
    """

    def __init__(self, path: str, marker: str) -> None:
        self.path = Path(path)
        self._contents: dict[str, bytes] = {}
        self._zip: tuple[int, zipfile.ZipFile] | None = None
        try:
            names = self._list()
        except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise_if_local(error, path)
            raise DataError(
                f"--archive {path} cannot be read ({' '.join(str(error).split())}); expected the official archive or "
                "its unpacked folder; fetch it again"
            ) from error
        found = sorted((name for name in names if name.rsplit("/", 1)[-1] == marker), key=len)
        if not found:
            raise DataError(
                f"--archive {path} holds no {marker}; expected the official archive or its unpacked folder; pass that"
            )
        self._prefix = found[0][: -len(marker)]
        self.names = sorted(name[len(self._prefix) :] for name in names if name.startswith(self._prefix))

    def read(self, name: str) -> bytes:
        """Returns a file's content.

        Raises:
            KeyError: there is no such file.
            OSError: it cannot be read.
        """
        full = self._prefix + name
        if self._contents:
            return self._contents[full]
        if self.path.is_dir():
            return (self.path / full).read_bytes()
        return self._open_zip().read(full)

    def _list(self) -> list[str]:
        if self.path.is_dir():
            return [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        if zipfile.is_zipfile(self.path):
            return [name for name in self._open_zip().namelist() if not name.endswith("/")]
        with tarfile.open(self.path) as tar:
            for member in tar:
                if member.isreg() and (file := tar.extractfile(member)) is not None:
                    self._contents[member.name] = file.read()
        return list(self._contents)

    def _open_zip(self) -> zipfile.ZipFile:
        # Forked writers inherit the descriptor and its position: each process opens its own.
        if self._zip is None or self._zip[0] != os.getpid():
            self._zip = (os.getpid(), zipfile.ZipFile(self.path))
        return self._zip[1]
