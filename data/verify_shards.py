"""Looks for damage in a folder of shards, or writes the manifest of others' shards.

    python -m data.verify_shards datasets/imagenet        compares tars and manifest; exit code 2 on any difference
    python -m data.verify_shards others/shards --write    writes manifest.json and the index from the tars
    python -m data.verify_shards datasets/satellite --statistics    prints data.channels, pixels, mean, std of train

Checked: sizes, SHA-256, sample counts, every header and the archive's end, each sample's checksum against the index,
one image and at most one label a sample, decodability of a sample of the images (`--decode all` for every one), the
class histogram, and how well the order of the samples mixes the classes within a batch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from data.config import DataConfig
from data.local_errors import line_of
from data.shards import DataError, Manifest, Shard, load_index, load_manifest, split_names
from data.stream.mixing import measure_mixing, report_mixing
from data.usage import Parser
from data.writing.findings import Finding, count, summarise
from data.writing.foreign_shards import NUM_DECODED, log_passed_over, number_labels, scan_all, write_manifests
from data.writing.inspection import ShardScan, find_other_kinds
from data.writing.labels import number_classes
from data.writing.pixel_statistics import describe_statistics

_BATCH_SIZE = 1024  # of the run that is imagined to say how mixed its batches will be


def main(arguments: list[str] | None = None) -> int:
    """Verifies or describes a folder; returns 0 when all is well, 2 when anything is wrong."""
    parser = Parser(
        prog="python -m data.verify_shards",
        description=__doc__,
    )
    parser.add_argument("directory", help="folder of shards")
    parser.add_argument(
        "--write", action="store_true", help="write manifest.json and the index from the tars"
    )
    parser.add_argument(
        "--decode", default=str(NUM_DECODED), help="images to decode in a shard: a number or 'all'"
    )
    parser.add_argument(
        "--image-key", default="", help="with --write: the image's suffix, where samples hold several images"
    )
    parser.add_argument(
        "--statistics",
        action="store_true",
        help="print mean and deviation of each channel, of the decoded images",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        inspect = partial(write_manifests, image_key=options.image_key) if options.write else verify
        how: dict[str, Any] = {
            "num_decoded": _parse_decode(options.decode),
            "num_processes": options.processes,
        }
        findings = inspect(options.directory, **how)
        wanted = options.statistics and not (options.write and findings)  # which leaves no manifest
        statistics = describe_statistics(options.directory, **how) if wanted else []
    except (ValueError, OSError) as error:
        print(f"error: {line_of(error, options.directory)}", file=sys.stderr)
        return 2
    for line in summarise(findings):
        print(line)
    if not findings:
        _report_mixing(options.directory)
    for line in statistics:
        print(line)
    print(f"{options.directory}: {f'{count(findings):,} findings' if findings else 'all is well'}")
    return 2 if findings else 0


def _report_mixing(directory: str) -> None:
    """Logs how mixed the batches of a run with the default lanes and window are, for every split."""
    default = DataConfig(shards=directory)
    for split in split_names(directory):
        mixing = measure_mixing(
            load_manifest(directory, split),
            num_lanes=default.num_lanes,
            window=default.shuffle_window,
            batch_size=_BATCH_SIZE,
        )
        report_mixing(directory, split, mixing)


def _parse_decode(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise DataError(f"--decode is {text!r}; expected a number of images a shard, or 'all'; set --decode")
    return int(text)


def verify(directory: str, *, num_decoded: int | None = NUM_DECODED, num_processes: int = 1) -> list[Finding]:
    """Returns everything in which a folder's shards differ from its manifest, or are damaged.

    Args:
        directory: of the shards.
        num_decoded: images to decode in each shard; None for all.
        num_processes: processes that read.

    Raises:
        DataError: no manifest, or an unreadable one.
    """
    findings: list[Finding] = []
    for split in split_names(directory, "DIRECTORY"):
        manifest = load_manifest(directory, split)
        index = load_index(manifest)
        if index is None:
            findings.append(Finding(split, "", "has no index; write one with --write"))
        elif manifest.index_sha256 not in ("", hashlib.sha256(index.tobytes()).hexdigest()):
            message = f"has another SHA-256 than the manifest says of it; write it again with --write (split {split})"
            findings.append(Finding(manifest.index_path, "", message))
        files = [(Path(manifest.path_of(shard)), shard.name) for shard in manifest.shards]
        scans = list(scan_all(files, num_decoded, num_processes, split, manifest.image_key))
        log_passed_over(scans)
        find_other_kinds(scans)
        numbers = number_classes(manifest.classes)
        labels: Counter[int] = Counter()
        complete = True
        for number, (shard, scan) in enumerate(zip(manifest.shards, scans, strict=True)):
            start, stop = manifest.first_ids[number : number + 2]
            entries = None if index is None else index[start:stop]
            numbered = number_labels(scan, numbers)
            findings.extend(_compare(shard, scan, numbered, entries))
            complete = complete and len(scan.keys) == shard.samples
            if len(scan.keys) == shard.samples:
                selected = range(shard.samples) if shard.ordinals is None else shard.ordinals
                labels.update(numbered[ordinal] for ordinal in selected)
        if complete:
            findings.extend(_compare_classes(manifest, labels))
    return findings


def _compare(shard: Shard, scan: ShardScan, labels: list[int], index: NDArray[Any] | None) -> list[Finding]:
    """Returns a shard's findings: its own, and those beside the manifest and the index."""
    if not scan.bytes:
        return scan.findings or [Finding(shard.name, "", "is empty")]
    if scan.bytes != shard.bytes:
        scan.find(None, "differs in size from the manifest", f"{scan.bytes} bytes; expected {shard.bytes}")
    if scan.sha256 != shard.sha256:
        detail = f"{scan.sha256[:12]}...; expected {shard.sha256[:12]}..."
        scan.find(None, "differs in SHA-256 from the manifest", detail)
    if len(scan.keys) != shard.samples:
        detail = f"{len(scan.keys)}; expected {shard.samples}"
        scan.find(len(scan.keys), "differs in its number of samples from the manifest", detail)
    if index is not None:
        expected = zip(index["checksum"].tolist(), index["label"].tolist(), strict=True)
        found = zip(scan.checksums, labels, strict=True)
        for ordinal, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
            if ours != theirs:
                scan.find(ordinal, "its bytes or its label are not those that the index describes")
    return scan.findings


def _compare_classes(manifest: Manifest, labels: Counter[int]) -> list[Finding]:
    found = tuple(labels[number] for number in range(len(manifest.classes)))
    if found == manifest.images_per_class:
        return []
    pairs = enumerate(zip(found, manifest.images_per_class, strict=False))
    number, (ours, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    detail = f"class {number} ({manifest.classes[number]}) has {ours}; expected {theirs}"
    return [Finding(manifest.split, "", "differs in its images per class from the manifest", detail)]


if __name__ == "__main__":
    sys.exit(main())
