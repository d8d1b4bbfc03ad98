"""A set of shards rewritten in random order: an external shuffle, whose memory does not grow with the set.

Every sample gets a random number; its leading part says into which new shard the sample goes, the number itself where
in it. One pass over the old shards appends the samples to a file for each new shard, through a bounded buffer; then
each such file is sorted in memory and becomes a shard. The result is a uniformly random order of all samples.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import webdataset

from data.local_errors import raise_if_local
from data.members import EncodedSample, choose_image, split_name, split_name_at_last_dot
from data.shards import MANIFEST_NAME, DataError, Manifest, load_manifest, split_names, write_whole
from data.stream.reader import READ_ERRORS, Failure, ShardReader, iterate_offsets, iterate_samples, reason_of
from data.views.random_numbers import hash_key
from data.writing.findings import summarise
from data.writing.foreign_shards import list_splits, write_manifests
from data.writing.labels import read_class_names
from data.writing.shard_lock import hold
from data.writing.shard_records import RECORDS

logger = logging.getLogger(__name__)

_ORDER = 31  # purpose of the random numbers
_HASH_BITS = 64
_HEADER = struct.Struct("<QI")  # a record's random number and the bytes of its JSON header
# Loader processes need a shard each: few samples are not put into fewer shards than before, up to this number.
_MOST_KEPT = 64
_NUMBERED = re.compile(r"^\d{8,9}-")


@dataclass(frozen=True, kw_only=True)
class ReshuffleOptions:
    """How a set is rewritten.

    Attributes:
        seed: of the order.
        samples_per_shard: about how many samples a new shard holds.
        max_shard_bytes: about how many bytes it holds at most.
        buffer_bytes: of samples that wait in memory for their place.
        last_dot: keys end at the last dot of a name and not at the first.
        image_key: which member is a sample's image, where samples hold several.
        num_processes: that check the new shards.
    """

    seed: int = 0
    samples_per_shard: int = 1500
    max_shard_bytes: int = 256 * 1024 * 1024
    buffer_bytes: int = 512 * 1024 * 1024
    last_dot: bool = False
    image_key: str = ""
    num_processes: int = 1


@dataclass
class _Split:
    """A split to rewrite: its samples, how many there are, the size of its tars, and how many tars."""

    read: Callable[[], Iterator[EncodedSample]]
    num_samples: int
    num_bytes: int
    num_shards: int


def reshuffle(source: str, directory: str, options: ReshuffleOptions) -> None:
    """Writes every split of a set into another folder, in random order, with a manifest; members keep their bytes.

    A set without manifest will do, compressed tars too. Keys get a number, which makes them unique. Class names go into
    `classes.txt`.

    Args:
        source: folder of the set.
        directory: an empty or new folder.
        options: how.

    Raises:
        DataError: a sample that cannot be read or has no single image, a folder that is not empty, or a full disk.
    """
    _require_empty(directory)
    splits, classes, image_key = _open(source, options)
    unfit = next((name for name in classes if name.splitlines() != [name.strip()]), None)
    if unfit is not None:
        raise DataError(
            f"{source} has the class {unfit!r}; expected names of one line without spaces around them, as classes.txt "
            "holds one a line; rename it"
        )
    with hold(directory, "reshuffle"):
        _require_empty(directory)  # still, where this start has waited for another
        _rewrite_all(source, directory, options, splits, classes, image_key)


def _require_empty(directory: str) -> None:
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(path.name != RECORDS for path in target.iterdir())):
        raise DataError(
            f"--out is {directory}, which is not empty; expected a new or empty folder; set --out"
        )


def _rewrite_all(
    source: str,
    directory: str,
    options: ReshuffleOptions,
    splits: dict[str, _Split],
    classes: tuple[str, ...],
    image_key: str,
) -> None:
    target = Path(directory)
    needed = sum(split.num_bytes for split in splits.values())
    free = shutil.disk_usage(target).free
    if free < needed:
        raise DataError(
            f"the disk of {directory} has {free / 1024**3:.1f} GiB free; expected {needed / 1024**3:.1f} for a copy of "
            "the set; make room, or set --out to another disk"
        )
    try:
        for name, split in splits.items():
            _rewrite(name, split, target, options, image_key)
    except OSError as error:
        raise_if_local(error, directory)
        raise
    if classes:
        write_whole(target / "classes.txt", "".join(f"{name}\n" for name in classes).encode())
    notes = {"shuffled": True, "reshuffled_from": source}
    findings = write_manifests(
        directory, num_processes=options.num_processes, image_key=image_key, notes=notes
    )
    if findings:
        raise DataError(f"{directory} was written, but: " + "; ".join(summarise(findings)))


def _open(source: str, options: ReshuffleOptions) -> tuple[dict[str, _Split], tuple[str, ...], str]:
    """Returns a set's splits by name, its class names and which member is its image."""
    if (Path(source) / MANIFEST_NAME).is_file() and not options.last_dot:
        manifests = {name: load_manifest(source, name) for name in split_names(source)}
        splits = {
            name: _Split(
                partial(_read_described, manifest),
                manifest.num_samples,
                sum(shard.bytes for shard in manifest.shards if shard.num_selected),
                len(manifest.shards),
            )
            for name, manifest in manifests.items()
        }
        image_key = options.image_key or next(iter(manifests.values())).image_key
        return splits, next((m.classes for m in manifests.values() if m.classes), ()), image_key
    split_key = split_name_at_last_dot if options.last_dot else split_name
    splits = {}
    for name, files in list_splits(source).items():
        paths = [Path(source) / file.name for file in files]
        splits[name] = _Split(
            partial(_read_tars, paths, split_key),
            sum(_count(path) for path in paths),
            sum(path.stat().st_size for path in paths),
            len(paths),
        )
    return splits, read_class_names(source)[1], options.image_key


def _read_described(manifest: Manifest) -> Iterator[EncodedSample]:
    reader = ShardReader(manifest)
    for number, shard in enumerate(manifest.shards):
        wanted = range(shard.samples) if shard.ordinals is None else np.array(shard.ordinals, dtype=np.int64)
        for _, sample in reader.read(number, wanted):
            if isinstance(sample, Failure):
                raise DataError(
                    f"{sample.name} cannot be read ({sample.reason}); expected whole shards; look at them with python "
                    f"-m data.verify_shards {manifest.directory}"
                )
            yield sample


def _read_tars(
    paths: Sequence[Path], split_key: Callable[[str], tuple[str, str] | tuple[None, None]]
) -> Iterator[EncodedSample]:
    for path in paths:
        try:
            with path.open("rb") as file:
                yield from iterate_samples(file, path.name, split_key)
        except READ_ERRORS as error:
            raise_if_local(error, str(path))
            raise DataError(
                f"{path} cannot be read ({reason_of(error)}); expected a tar; restore or remove it"
            ) from error


def _count(path: Path) -> int:
    """Returns about how many samples a tar holds; 0 for a compressed one, whose headers cannot be jumped to."""
    with contextlib.suppress(*READ_ERRORS), path.open("rb") as file:
        return sum(1 for _ in iterate_offsets(file))
    return 0


def _rewrite(name: str, split: _Split, target: Path, options: ReshuffleOptions, image_key: str) -> None:
    """Writes the new shards of a split."""
    num_shards = max(
        min(split.num_shards, _MOST_KEPT),
        -(-split.num_samples // options.samples_per_shard),
        -(-split.num_bytes // options.max_shard_bytes),
    )
    written = 0
    with tempfile.TemporaryDirectory(prefix=".reshuffle-", dir=target) as scratch:
        spools = _Spools(Path(scratch), options.buffer_bytes)
        for number, sample in enumerate(split.read()):
            choose_image(sample.key, sample.members, image_key)
            value = hash_key(options.seed, _ORDER, number)
            key = _NUMBERED.sub("", sample.key.replace("/", "_").replace(".", "_"))
            renamed = EncodedSample(f"{number:09d}-{key}", sample.members)
            spools.add(value * num_shards >> _HASH_BITS, value, renamed)
        spools.flush()
        logger.info("%s: %d samples in %d parts", name, spools.num_added, len(spools.paths))
        for path in sorted(spools.paths):
            _write_tar(target / f"{name}-{written:06d}.tar", _sorted_samples(path))
            path.unlink()
            written += 1


@dataclass
class _Spools:
    """Files to which samples are appended, through one buffer; one file is open at a time."""

    directory: Path
    buffer_bytes: int
    paths: set[Path] = field(default_factory=set)
    num_added: int = 0
    _buffered: int = 0
    _buffers: dict[int, list[bytes]] = field(default_factory=dict)

    def add(self, part: int, value: int, sample: EncodedSample) -> None:
        """Appends a sample and its random number to a part."""
        sizes = {suffix: len(data) for suffix, data in sample.members.items()}
        header = json.dumps([sample.key, sizes]).encode()
        record = b"".join((_HEADER.pack(value, len(header)), header, *sample.members.values()))
        self._buffers.setdefault(part, []).append(record)
        self._buffered += len(record)
        self.num_added += 1
        if self._buffered > self.buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what waits in memory."""
        for part, records in self._buffers.items():
            path = self.directory / f"{part:09d}"
            with path.open("ab") as file:
                file.writelines(records)
            self.paths.add(path)
        self._buffers, self._buffered = {}, 0


def _sorted_samples(path: Path) -> list[EncodedSample]:
    found: list[tuple[int, EncodedSample]] = []
    with path.open("rb") as file:
        while start := file.read(_HEADER.size):
            value, length = _HEADER.unpack(start)
            key, sizes = json.loads(file.read(length))
            members = {suffix: file.read(size) for suffix, size in sizes.items()}
            found.append((value, EncodedSample(key, members)))
    return [sample for _, sample in sorted(found, key=lambda item: item[0])]


def _write_tar(path: Path, samples: list[EncodedSample]) -> None:
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, **sample.members})
