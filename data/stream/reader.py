"""Encoded samples out of tars, in order, with an answer for every sample that the manifest promised.

webdataset reads the tars. What it does not notice (a cut file, a changed header) is noticed here: a sample that the
manifest lists and the tar no longer yields comes back as a `Failure`, so that seen + failed is always the
manifest's count.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from data.local_errors import raise_if_local
from data.members import EncodedSample, split_name
from data.shards import DataError, Manifest, Shard, load_index
from data.stream.open_files import FilePool, PooledFile, most_open_files
from data.stream.remote import ShardCache

logger = logging.getLogger(__name__)

_GZIP_MAGIC = b"\x1f\x8b"
_JUMP_SAMPLES = 4  # a gap wider than this is jumped by the index; narrower, reading on is as fast

# What tarfile and webdataset raise on damaged tars, duplicate members and failing disks.
READ_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    AssertionError,
    IndexError,
    TypeError,
    MemoryError,
)

# What a shared file system answers while a server fails over. Skipping the sample instead would change the order.
_TRANSIENT = frozenset(
    (
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.ECONNRESET,
    )
)
_WAITS_S = (0.5, 1.0, 2.0, 4.0)


ReadableFile = BinaryIO | BufferedReader | PooledFile


@dataclass(frozen=True)
class Failure:
    """A sample that could not be had, by name, and why."""

    name: str
    reason: str


class ShardReader:
    """Reads samples of a manifest's shards.

    With an index, a damaged sample costs itself only: reading goes on at the next one, and one flipped bit is
    noticed. Without one, a tar is read up to its damage. Either way a sample's fate depends on the shard alone, not
    on where reading began. A shared file system that answers with an error is asked again, four times. At a shard's
    end its samples and bytes are compared with the manifest.

    Args:
        manifest: the split.
        verify_hash: compare each shard's SHA-256 with the manifest before its first use.
        cache: through which remote shards are had (and compared as they arrive); None for local ones.
    """

    def __init__(
        self, manifest: Manifest, *, verify_hash: bool = False, cache: ShardCache | None = None
    ) -> None:
        self.manifest = manifest
        self._cache = cache
        self._verify_hash = verify_hash
        self._verified: set[int] = set()
        self._first_ids = manifest.first_ids
        self._files = FilePool(most_open_files())
        self._index = load_index(manifest)

    def read(
        self, shard_index: int, ordinals: range | NDArray[np.int64]
    ) -> Iterator[tuple[int, EncodedSample | Failure]]:
        """Yields (ordinal, sample or failure) for every ordinal asked for, in order, repeats included.

        Args:
            shard_index: which shard of the manifest.
            ordinals: numbers of samples inside the tar, never descending.
        """
        wanted: Sequence[int] = ordinals if isinstance(ordinals, range) else ordinals.tolist()
        done = num_waits = 0
        while done < len(wanted):
            reason = ""
            try:
                for ordinal, sample in self._read_run(shard_index, wanted[done:]):
                    done += 1
                    yield ordinal, sample
            except READ_ERRORS as error:
                if isinstance(error, DataError):
                    raise
                raise_if_local(error, self.manifest.path_of(self.manifest.shards[shard_index]))
                if isinstance(error, OSError) and error.errno in _TRANSIENT and num_waits < len(_WAITS_S):
                    logger.warning("%s: %s; reading again", self.manifest.shards[shard_index].name, error)
                    time.sleep(_WAITS_S[num_waits])
                    num_waits += 1
                    continue
                reason = reason_of(error)
            if done == len(wanted) or (not reason and self._index is not None):
                continue
            shard = self.manifest.shards[shard_index]
            reason = reason or f"the tar ended early; expected {shard.samples} samples"
            lost = (
                [o for o in wanted[done:] if o == wanted[done]] if self._index is not None else wanted[done:]
            )
            logger.warning("%s: %d samples cannot be read: %s", shard.name, len(lost), reason)
            for ordinal in lost:
                done += 1
                yield ordinal, Failure(f"{shard.name}#{ordinal}", reason)

    def _read_run(
        self, shard_index: int, wanted: Sequence[int]
    ) -> Iterator[tuple[int, EncodedSample | Failure]]:
        """Yields the samples asked for, until all are there, the tar ends or a wide gap is better jumped.

        Raises:
            One of READ_ERRORS: the next sample asked for cannot be read.
        """
        shard = self.manifest.shards[shard_index]
        done = 0
        with self._files.open(partial(self._open, shard_index, shard)) as file:
            for ordinal, sample in self._samples_from(file, shard_index, wanted[0]):
                checked = self._check(shard_index, ordinal, sample) if wanted[done] == ordinal else sample
                while done < len(wanted) and wanted[done] == ordinal:
                    yield ordinal, checked
                    done += 1
                if done < len(wanted):
                    if self._index is not None and wanted[done] - ordinal > _JUMP_SAMPLES:
                        return
                # Read on after the shard's last sample: only then is it known that there are no more.
                elif ordinal != shard.samples - 1:
                    return
            # Here only when the tar has no more.
            if done == len(wanted) and file.seek(0, os.SEEK_END) != shard.bytes:
                raise DataError(
                    f"{shard.name} has {file.tell()} bytes at its end; expected {shard.bytes} as in the manifest: it "
                    f"changed during the run; restore it, or look at it with python -m data.verify_shards "
                    f"{self.manifest.directory}"
                )
        if not done:
            raise EOFError(f"the tar ended early; expected {shard.samples} samples")

    def _check(self, shard_index: int, ordinal: int, sample: EncodedSample) -> EncodedSample | Failure:
        if self._index is None:
            return sample
        expected = int(self._index["checksum"][self._first_ids[shard_index] + ordinal])
        if checksum_of(sample) == expected:
            return sample
        name = f"{self.manifest.shards[shard_index].name}#{ordinal} ({sample.key})"
        return Failure(name, "its bytes are not those that the index describes")

    def _open(self, shard_index: int, shard: Shard) -> BufferedReader:
        path = Path(self.manifest.path_of(shard))
        file = path.open("rb") if self._cache is None else self._cache.open(shard)
        if self._verify_hash and shard_index not in self._verified:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                file.close()
                raise DataError(
                    f"{path} has SHA-256 {found[:12]}...; expected {shard.sha256[:12]}... as in the manifest; "
                    f"restore the file, or look at it with python -m data.verify_shards {self.manifest.directory}"
                )
            self._verified.add(shard_index)
            file.seek(0)
        return file

    def _samples_from(
        self, file: ReadableFile, shard_index: int, first: int
    ) -> Iterator[tuple[int, EncodedSample]]:
        shard = self.manifest.shards[shard_index]
        if self._index is not None:
            file.seek(int(self._index["offset"][self._first_ids[shard_index] + first]))
            ordinal = first
        else:
            ordinal = skip_samples(file, first)
        for sample in iterate_samples(file, shard.name):
            if ordinal >= shard.samples:
                raise DataError(
                    f"{shard.name} holds more than the {shard.samples} samples in the manifest; write the manifest "
                    f"again with python -m data.verify_shards {self.manifest.directory} --write"
                )
            if ordinal >= first:
                yield ordinal, sample
            ordinal += 1


def checksum_of(sample: EncodedSample) -> int:
    """Returns the CRC-32 of a sample's members and their suffixes, in their order."""
    checksum = 0
    for suffix, data in sample.members.items():
        checksum = zlib.crc32(data, zlib.crc32(suffix.encode(), checksum))
    return checksum


def reason_of(error: Exception) -> str:
    """Returns what a reading error says, without the file objects that webdataset adds to it."""
    said = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return f"{type(error).__name__}: {said.split(' @ <')[0]}"


def iterate_samples(
    file: ReadableFile, name: str, split: Callable[[str], tuple[str, str] | tuple[None, None]] = split_name
) -> Iterator[EncodedSample]:
    """Yields the samples of an open tar from its present position, as webdataset groups them.

    Args:
        file: the tar; compressed ones are read, too.
        name: of the tar, for messages.
        split: a member's name to its key and suffix.
    """
    # Here, because it loads torch, which usage lines do not wait for.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    files = tar_file_expander(iter([{"url": name, "stream": file}]))
    for sample in group_by_keys(files, keys=split):
        yield to_encoded(sample)


def to_encoded(sample: dict[str, Any]) -> EncodedSample:
    """Returns a webdataset sample without its bookkeeping members."""
    members = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
    return EncodedSample(sample["__key__"], members)


def skip_samples(file: ReadableFile, count: int) -> int:
    """Moves an open tar to its sample number `count`, reading headers only; returns the number it stands at.

    A compressed tar cannot be skipped: it stays at 0 and its caller reads on.

    Raises:
        tarfile.TarError, EOFError: the tar is damaged or ends before that sample.
    """
    if count == 0:
        return 0
    if file.read(2) == _GZIP_MAGIC:
        file.seek(0)
        return 0
    file.seek(0)
    for samples, offset in enumerate(iterate_offsets(file)):
        if samples == count:
            file.seek(offset)
            return count
    raise EOFError(f"the tar ended before its sample {count}")


def iterate_offsets(
    file: ReadableFile, pass_over: Callable[[tarfile.TarInfo], None] = lambda _: None
) -> Iterator[int]:
    """Yields where each sample of an open, uncompressed tar starts, reading headers only.

    Args:
        file: the tar.
        pass_over: is told of every member that belongs to no sample, links and folders too.

    Raises:
        tarfile.TarError, OSError: not a tar.
    """
    tar = tarfile.open(fileobj=cast("BinaryIO", file), mode="r:")  # noqa: SIM115  (closing it would close nothing)
    previous_key = None
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        key = split_name(member.name)[0] if member.isreg() else None
        if key is None:
            pass_over(member)
            continue
        if key != previous_key:
            yield member.offset
            previous_key = key
