"""Shards behind an address: fetched with retries into a bounded folder, checked, and used from there.

Any address that fsspec opens will do (`s3://`, `gs://`, `https://`, `memory://`, with the package that it needs).
`pipe:COMMAND`, in which `{}` stands for the file's name, runs a shell command and is refused unless
`data.allow_pipe` is set. A fetched file enters the folder under a temporary name and gets its own after its size and
SHA-256 were compared with the manifest, so that processes can share the folder and half a file is never used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

import fsspec
from fsspec.utils import get_protocol

from data.config import DataConfig
from data.local_errors import raise_if_local
from data.shards import INDEX_DTYPE, MANIFEST_NAME, DataError, Manifest, Shard, load_manifest

logger = logging.getLogger(__name__)

_NUM_TRIES = 6
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 8.0
_PIPE_TIMEOUT_S = 600

Check = Callable[[Path], None]


# Asking again would not help.
_PERMANENT = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


class _TransferError(OSError):
    """What arrived is not what was asked for."""


def is_remote(address: str) -> bool:
    """Returns whether an address names something other than a local path."""
    return re.match(r"^[a-z][a-z0-9+.-]*:", address) is not None


@dataclass(frozen=True)
class ShardCache:
    """A bounded local folder of the files behind one address.

    Attributes:
        address: the folder's address, or a `pipe:` command.
        directory: the local folder.
        max_bytes: bound of the shards in it; the ones used longest ago go first.
        wait: sleeps between tries.
    """

    address: str
    directory: str
    max_bytes: int
    wait: Callable[[float], None] = time.sleep

    def open(self, shard: Shard) -> BufferedReader:
        """Returns a shard, open for reading; fetches it first where it is not there.

        Raises:
            DataError: it could not be had after several tries.
        """
        path = self._path_of(shard.name, shard.sha256)
        for _ in range(_NUM_TRIES):
            try:
                os.utime(path)
                return path.open("rb")
            except FileNotFoundError:
                # Also when another process made room between the two lines: an open file outlives its name.
                check = partial(_compare, num_bytes=shard.bytes, sha256=shard.sha256)
                self.fetch(shard.name, check, sha256=shard.sha256)
                self._make_room(keep=path.name)
        raise DataError(
            f"{path} disappeared {_NUM_TRIES} times; expected data.cache_gib to hold a shard for every loader "
            "process; set data.cache_gib"
        )

    def fetch(self, name: str, check: Check, *, sha256: str = "") -> Path:
        """Returns a file's local path after fetching it, with retries that wait longer and longer.

        Args:
            name: of the file, below the address and below the local folder.
            check: raises OSError if what arrived is not the file.
            sha256: becomes part of the local name: a set that was written again never meets its old shards.

        Raises:
            DataError: it could not be had, never arrived whole, or its name leads out of the folder.
        """
        final = self._path_of(name, sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(8)}.tmp")
        reason = ""
        for attempt in range(_NUM_TRIES):
            if attempt:
                self.wait(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)))
            try:
                self._transfer(name, temporary)
                check(temporary)
                temporary.replace(final)
                return final
            # Stores raise exceptions of their own packages, which have no common ancestor but this one.
            except Exception as error:
                _raise_if_own(error, self.directory)
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if isinstance(error, _PERMANENT):
                    break
                logger.warning("%s of %s, try %d: %s", name, self.address, attempt + 1, reason)
            finally:
                temporary.unlink(missing_ok=True)
        raise DataError(
            f"{name} of {self.address} could not be fetched in {attempt + 1} tries ({reason}); expected a file that "
            "arrives whole; look at the store, or set data.shards to a copy"
        )

    def _path_of(self, name: str, sha256: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(
                f"the manifest of {self.address} lists {name!r}; expected a file below that address; write the "
                "manifest beside its tars"
            )
        path = Path(self.directory) / name
        return path.with_name(f"{sha256[:16]}-{path.name}") if sha256 else path

    def _transfer(self, name: str, target: Path) -> None:
        with target.open("wb") as file:
            if self.address.startswith("pipe:"):
                command = self.address.removeprefix("pipe:").replace("{}", shlex.quote(name))
                subprocess.run(command, shell=True, check=True, stdout=file, timeout=_PIPE_TIMEOUT_S)
                return
            with fsspec.open(f"{self.address.rstrip('/')}/{name}", "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)

    def _make_room(self, keep: str) -> None:
        """Removes the shards used longest ago until the rest fits."""
        shards = []
        for path in Path(self.directory).rglob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            shards.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.max_bytes:
                return
            if path.name != keep:
                path.unlink(missing_ok=True)
                total -= size


def open_shards(config: DataConfig) -> tuple[Manifest, ShardCache | None]:
    """Returns the manifest of a configuration's shards, and the cache through which to read them if they are remote.

    Raises:
        DataError: the address cannot be read, or is a `pipe:` that is not allowed.
    """
    address = config.written_shards
    if not is_remote(address):
        return load_manifest(address, config.split), None
    if address.startswith("pipe:") and not config.allow_pipe:
        raise DataError(
            f"data.shards is {address!r}, which runs a shell command; expected a folder or an address; set "
            "data.allow_pipe=true if you trust it"
        )
    _require_protocol(address)
    folder = hashlib.sha256(address.encode()).hexdigest()[:16]
    cache = ShardCache(address, str(Path(config.cache_dir) / folder), int(config.cache_gib * 1024**3))
    # Small, and the one file that nothing else vouches for: fetched anew in every run.
    cache.fetch(MANIFEST_NAME, _require_json)
    manifest = load_manifest(cache.directory, config.split)
    if manifest.index_path:
        size = manifest.first_ids[-1] * INDEX_DTYPE.itemsize
        cache.fetch(manifest.index_path, partial(_compare, num_bytes=size, sha256=manifest.index_sha256))
    return manifest, cache


def _require_protocol(address: str) -> None:
    if address.startswith("pipe:"):
        return
    try:
        fsspec.get_filesystem_class(get_protocol(address))
    except ImportError as error:
        raise DataError(
            f"data.shards is {address!r}, which needs a package: {error}; install it, or set data.shards to a copy"
        ) from error
    except ValueError as error:
        raise DataError(
            f"data.shards is {address!r}; expected a folder, or an address of a protocol that fsspec knows, such as "
            "s3://bucket/folder; set data.shards"
        ) from error


def _raise_if_own(error: Exception, directory: str) -> None:
    """Raises DataError for an error of this machine: stores deny access too, so that must name the local folder."""
    denied = isinstance(error, PermissionError) and not str(error.filename or "").startswith(directory)
    if not denied:
        raise_if_local(error, f"the cache {directory} (data.cache_dir)")


def _require_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise _TransferError(f"{path.stat().st_size} bytes arrived that are no JSON document") from error


def _compare(path: Path, *, num_bytes: int, sha256: str) -> None:
    size = path.stat().st_size
    if size != num_bytes:
        raise _TransferError(f"{size} bytes arrived; expected {num_bytes}")
    if sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise _TransferError(f"SHA-256 {found[:12]}... arrived; expected {sha256[:12]}...")
