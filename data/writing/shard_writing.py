"""Images of any source to shards: shuffled globally, written in parallel, resumable, with a manifest."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
import webdataset
from tqdm import tqdm

from data.local_errors import raise_if_local
from data.members import LABEL_SUFFIX, EncodedSample
from data.shards import (
    INDEX_DTYPE,
    DataError,
    Manifest,
    Shard,
    save_index,
    save_manifest,
    write_whole,
)
from data.stream.reader import checksum_of
from data.views.random_numbers import draw_permutation, hash_key
from data.writing.duplicates import CONFLICT_KINDS, DUPLICATE, Content, find_duplicates
from data.writing.shard_lock import hold
from data.writing.shard_records import (
    IndexEntry,
    ShardJob,
    ShardRecord,
    claim,
    find_record,
    refuse_others_split,
    remove_stale_shards,
    save_record,
)
from data.writing.sources import ImageSource, Rejected, SourceSample

logger = logging.getLogger(__name__)

_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHARD_ORDER = 11  # purpose of the shuffle's random key
_LOOK_EVERY_S = 1.0  # whether the parent of a writing process lives
_MOST_SAMPLES, _LEAST_SAMPLES, _NUM_SHARDS = 1500, 16, 256


def fit_shards(num_images: int) -> int:
    """Returns how many images a shard should hold, of so many in a split.

    Ranks and their workers share out whole shards: a small set must not end up in fewer than there are workers.
    """
    return min(_MOST_SAMPLES, max(_LEAST_SAMPLES, num_images // _NUM_SHARDS))


def write_split(
    source: ImageSource,
    split: str,
    directory: str,
    *,
    samples_per_shard: int = _MOST_SAMPLES,
    max_shard_bytes: int = 256 * 1024 * 1024,
    seed: int = 0,
    num_processes: int = 1,
) -> tuple[Manifest, list[Rejected]]:
    """Returns the manifest of a split after writing its shards, and the images that were left out.

    Finished shards of an earlier run with the same images and options are kept; `manifest.json` is written last. Those
    left out are listed in `SPLIT.left_out.txt`. Where another process writes the split, this one waits for its end.

    Args:
        source: the images.
        split: prefix of the shards' names.
        directory: where they go.
        samples_per_shard: most images in a shard.
        max_shard_bytes: most bytes of images in a shard, unless one image is larger.
        seed: of the shuffle.
        num_processes: processes that write.

    Raises:
        DataError: no images, all were left out, an impossible name of a split, two classes that claim one image,
            or a tar or a split in the folder that was not written here.
    """
    if not _SPLIT_NAME.fullmatch(split):
        raise DataError(
            f"--split is {split!r}; expected letters, digits, '_', '-' and '.', as it begins file names; set --split"
        )
    if len(source) == 0:
        raise DataError(f"split {split!r} has 0 images; expected at least 1; look at the input folder")
    jobs = _list_jobs(source, split, directory, samples_per_shard, max_shard_bytes, seed)
    with hold(directory, f"split-{split}") as is_alone:
        return _write_jobs(source, split, directory, jobs, num_processes, is_alone)


def _write_jobs(
    source: ImageSource, split: str, directory: str, jobs: list[ShardJob], num_processes: int, is_alone: bool
) -> tuple[Manifest, list[Rejected]]:
    refuse_others_split(directory, split)
    for job in jobs:
        claim(job)
    records = {
        job.name: record for job in jobs if (record := find_record(job, source.label_conflicts)) is not None
    }
    missing = [job for job in jobs if job.name not in records]
    logger.info("%s: %d of %d shards are there already", split, len(records), len(jobs))
    records.update(_write_all(source, missing, num_processes, desc=split, done=len(records)))
    if source.drops_duplicates:
        again = _jobs_with_duplicates(source, jobs, records)
        records.update(_write_all(source, again, num_processes, desc=f"{split}, without duplicates"))
    ordered = [records[job.name] for job in jobs]
    manifest = _build_manifest(source, split, directory, ordered)
    entries = [tuple(entry) for record in ordered for entry in record.index]
    manifest = save_index(manifest, np.array(entries, dtype=INDEX_DTYPE))
    with hold(directory, "manifest"):  # another start may write another split
        save_manifest(manifest)
    remove_stale_shards(directory, split, {job.name for job in jobs}, is_alone=is_alone)
    rejected = sorted((item for record in ordered for item in record.rejected), key=lambda item: item.index)
    _list_left_out(Path(directory) / f"{split}.left_out.txt", rejected)
    return manifest, rejected


def _list_left_out(path: Path, rejected: Sequence[Rejected]) -> None:
    if rejected:
        lines = sorted(f"{item.kind}\t{item.name}\t{item.detail}\n" for item in rejected)
        write_whole(path, "".join(lines).encode())
    else:
        path.unlink(missing_ok=True)


def _list_jobs(
    source: ImageSource, split: str, directory: str, samples_per_shard: int, max_shard_bytes: int, seed: int
) -> list[ShardJob]:
    fingerprint = _fingerprint(source, split, samples_per_shard, max_shard_bytes, seed)
    order = draw_permutation(hash_key(seed, _SHARD_ORDER), len(source)).tolist()
    shards = _cut_in_shards(source, order, samples_per_shard, max_shard_bytes)
    return [
        ShardJob(split=split, number=number, indices=indices, directory=directory, fingerprint=fingerprint)
        for number, indices in enumerate(shards)
    ]


def _jobs_with_duplicates(
    source: ImageSource, jobs: Sequence[ShardJob], records: dict[str, ShardRecord]
) -> list[ShardJob]:
    """Returns the jobs whose shards hold an image that occurs earlier in the source, to be written without it.

    Hashes are known only once everything was read; reading everything twice would cost more than to write the few
    shards with duplicates again.
    """
    contents = {
        name: [
            Content(index, digest, label)
            for (index, digest), (_, _, label) in zip(record.contents, record.index, strict=True)
        ]
        for name, record in records.items()
    }
    found = find_duplicates(
        [content for of_shard in contents.values() for content in of_shard],
        source.label_conflicts,
        source.name,
        lambda label: source.classes[label] if label >= 0 else "no class",
    )
    again = []
    for job in jobs:
        new = {c.index: found[c.index] for c in contents[job.name] if c.index in found}
        if new:
            before = {
                item.index: (item.kind, item.detail)
                for item in records[job.name].rejected
                if item.kind in (DUPLICATE, *CONFLICT_KINDS.values())
            }
            again.append(replace(job, left_out=before | new))
    return again


def _cut_in_shards(
    source: ImageSource, order: Sequence[int], samples_per_shard: int, max_shard_bytes: int
) -> Iterator[list[int]]:
    shard: list[int] = []
    shard_bytes = 0
    for index in order:
        size = source.size(index)
        if shard and (len(shard) >= samples_per_shard or shard_bytes + size > max_shard_bytes):
            yield shard
            shard, shard_bytes = [], 0
        shard.append(index)
        shard_bytes += size
    yield shard


def _write_all(
    source: ImageSource, jobs: Sequence[ShardJob], num_processes: int, *, desc: str, done: int = 0
) -> dict[str, ShardRecord]:
    """Returns the records of the jobs' shards by name after writing them, with a progress bar on a terminal."""
    records = {}
    total = len(jobs) + done
    with tqdm(
        total=total, initial=done, desc=desc, unit="shard", disable=not jobs or not sys.stderr.isatty()
    ) as progress:
        for record in _iterate_records(source, jobs, num_processes):
            records[record.name] = record
            progress.update()
    return records


def _iterate_records(
    source: ImageSource, jobs: Sequence[ShardJob], num_processes: int
) -> Iterator[ShardRecord]:
    if num_processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield write_shard(source, job)
        return
    # Forked processes inherit the source: pickling it with every job would cost more than the job.
    context = multiprocessing.get_context("fork")
    workers = min(num_processes, len(jobs))
    with ProcessPoolExecutor(
        workers, context, initializer=_Worker.start, initargs=(source, os.getpid())
    ) as pool:
        try:
            for future in as_completed([pool.submit(_Worker.write, job) for job in jobs]):
                yield future.result()
        except BaseException:
            # A full disk or Ctrl-C: hundreds of shards would each try and fail before the message came.
            pool.shutdown(cancel_futures=True)
            raise


class _Worker:
    """The source in a writing process."""

    source: ImageSource

    @classmethod
    def start(cls, source: ImageSource, parent: int) -> None:
        cls.source = source
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: finish this shard, the parent starts no other

    @classmethod
    def write(cls, job: ShardJob) -> ShardRecord:
        return write_shard(cls.source, job)


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent: of a killed one it would wait for work for ever, with its lock."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os._exit(1)


def write_shard(source: ImageSource, job: ShardJob) -> ShardRecord:
    """Writes one shard under a temporary name, renames it, records it, and returns the record."""
    directory = Path(job.directory)
    temporary = directory / f".{job.name}.{os.getpid()}.tmp"
    try:
        entries, contents, rejected = _write_tar(source, job, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = temporary.stat().st_size
        temporary.replace(directory / job.name)
    except OSError as error:
        raise_if_local(error, str(directory / job.name))
        raise
    finally:
        temporary.unlink(missing_ok=True)
    record = ShardRecord(job.fingerprint, job.name, len(entries), size, digest, entries, contents, rejected)
    save_record(record, job.directory)
    return record


def _write_tar(
    source: ImageSource, job: ShardJob, temporary: Path
) -> tuple[list[IndexEntry], list[tuple[int, str]], list[Rejected]]:
    entries: list[IndexEntry] = []
    contents: list[tuple[int, str]] = []
    rejected: list[Rejected] = []
    with webdataset.ShardWriter(
        f"{job.split}-%06d.tar",
        maxcount=len(job.indices) + 1,
        maxsize=float("inf"),
        start_shard=job.number,
        verbose=0,
        mtime=0,  # the same images give the same bytes, and so the same hash
        opener=lambda _: temporary.open("wb"),
    ) as writer:
        for index in job.indices:
            if index in job.left_out:
                rejected.append(Rejected(source.name(index), *job.left_out[index], index=index))
                continue
            sample = source.load(index)
            if isinstance(sample, Rejected):
                rejected.append(sample)
                continue
            if source.drops_duplicates:
                contents.append((index, _hash_image(sample)))
            members = dict(sample.members)
            if sample.label is not None and LABEL_SUFFIX not in members:
                members[LABEL_SUFFIX] = str(sample.label).encode()
            # The writer puts members in the order of their names.
            encoded = EncodedSample(sample.key, {suffix: members[suffix] for suffix in sorted(members)})
            offset = writer.tarstream.tarstream.offset
            label = -1 if sample.label is None else sample.label
            entries.append((offset, checksum_of(encoded), label))
            writer.write({"__key__": sample.key, **encoded.members})
    return entries, contents, rejected


def _hash_image(sample: SourceSample) -> str:
    image = b"".join(data for suffix, data in sorted(sample.members.items()) if suffix != "json")
    return hashlib.blake2b(image, digest_size=12).hexdigest()


def _fingerprint(source: ImageSource, split: str, *options: int) -> str:
    text = json.dumps([source.fingerprint, split, len(source), list(source.classes), *options])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _build_manifest(
    source: ImageSource, split: str, directory: str, records: Sequence[ShardRecord]
) -> Manifest:
    shards = tuple(
        Shard(name=record.name, samples=record.samples, bytes=record.bytes, sha256=record.sha256)
        for record in records
        if record.samples
    )
    rejected = [item for record in records for item in record.rejected]
    if not shards:
        raise DataError(
            f"all {len(source)} images of split {split!r} were left out; the first: {rejected[0]}"
        )
    counts = Counter(label for record in records for _, _, label in record.index)
    return Manifest(
        split=split,
        shards=shards,
        classes=source.classes,
        images_per_class=tuple(counts[index] for index in range(len(source.classes))),
        directory=directory,
        index_path=f"{split}.index",
        notes={"left_out": dict(Counter(item.kind for item in rejected)), "shuffled": True},
    )
