"""Looks for damage in a folder of shards, or writes the manifest of others' shards.

    python -m data.verify_shards datasets/imagenet        compares tars and manifest; exit code 2 on any difference
    python -m data.verify_shards others/shards --write    writes manifest.json and the index from the tars

Checked: sizes, SHA-256, sample counts, every header and the archive's end, each sample's checksum against the index,
keys that do not pair, decodability of a sample of the images (`--decode all` for every one), and the class histogram.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.inspection import Finding, ShardScan, scan_shard
from data.shards import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    load_index,
    load_manifest,
    save_index,
    save_manifest,
    split_names,
)

_NUM_DECODED = 16
_CLASSES_NAME = "classes.txt"


def main(arguments: list[str] | None = None) -> int:
    """Verifies or describes a folder; returns 0 when all is well, 2 when anything is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m data.verify_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", help="folder of shards")
    parser.add_argument(
        "--write", action="store_true", help="write manifest.json and the index from the tars"
    )
    parser.add_argument(
        "--decode", default=str(_NUM_DECODED), help="images to decode in a shard: a number or 'all'"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    try:
        num_decoded = _parse_decode(options.decode)
        run = write_manifests if options.write else verify
        findings = run(options.directory, num_decoded=num_decoded, num_processes=options.processes)
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    print(
        f"{options.directory}: {len(findings)} findings" if findings else f"{options.directory}: all is well"
    )
    return 2 if findings else 0


def _parse_decode(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise DataError(f"--decode is {text!r}; expected a number of images a shard, or 'all'; set --decode")
    return int(text)


def verify(
    directory: str, *, num_decoded: int | None = _NUM_DECODED, num_processes: int = 1
) -> list[Finding]:
    """Returns everything in which a folder's shards differ from its manifest, or are damaged.

    Args:
        directory: of the shards.
        num_decoded: images to decode in each shard; None for all.
        num_processes: processes that read.

    Raises:
        DataError: no manifest, or an unreadable one.
    """
    findings: list[Finding] = []
    for split in split_names(directory):
        manifest = load_manifest(directory, split)
        index = load_index(manifest)
        if index is None:
            findings.append(Finding(split, "", "has no index; write one with --write"))
        elif manifest.index_sha256 not in ("", hashlib.sha256(index.tobytes()).hexdigest()):
            message = f"has another SHA-256 than the manifest says of it; write it again with --write (split {split})"
            findings.append(Finding(manifest.index_path, "", message))
        paths = [Path(manifest.path_of(shard)) for shard in manifest.shards]
        scans = _scan_all(paths, num_decoded, num_processes, split)
        labels: Counter[int] = Counter()
        complete = True
        for number, (shard, scan) in enumerate(zip(manifest.shards, scans, strict=True)):
            start, stop = manifest.first_ids[number : number + 2]
            entries = None if index is None else index[start:stop]
            findings.extend(_compare(shard, scan, entries))
            complete = complete and len(scan.keys) == shard.samples
            if len(scan.keys) == shard.samples:
                selected = range(shard.samples) if shard.ordinals is None else shard.ordinals
                labels.update(scan.labels[ordinal] for ordinal in selected)
        if complete:
            findings.extend(_compare_classes(manifest, labels))
    return findings


def write_manifests(
    directory: str, *, num_decoded: int | None = _NUM_DECODED, num_processes: int = 1
) -> list[Finding]:
    """Writes `manifest.json` and the indices of the tars in a folder; returns what is wrong with the tars.

    `train-000007.tar` belongs to the split `train`; tars that are numbered only make up the split `train`. Class names
    come from a file `classes.txt`, one a line in index order, else they are the numbers. Damaged samples are
    reported; nothing is written while a tar is damaged.

    Raises:
        DataError: no folder, or no tar in it.
    """
    if not Path(directory).is_dir():
        raise DataError(f"{directory} is no folder; expected one that holds .tar shards; pass its path")
    splits: dict[str, list[Path]] = {}
    for path in sorted(Path(directory).glob("*.tar")):
        match = re.match(r"^(?:(.*?)[-_.]?)(\d+)$", path.stem)
        splits.setdefault((match.group(1) if match else path.stem) or "train", []).append(path)
    if not splits:
        raise DataError(
            f"{directory} holds no .tar file; expected shards; write some with python -m data.make_shards"
        )
    described: list[tuple[Manifest, NDArray[Any]]] = []
    findings: list[Finding] = []
    for split, paths in splits.items():
        scans = list(_scan_all(paths, num_decoded, num_processes, split))
        findings.extend(finding for scan in scans for finding in scan.findings)
        described.append(_describe(directory, split, scans))
    if not findings:
        (Path(directory) / MANIFEST_NAME).unlink(missing_ok=True)
        for manifest, index in described:
            save_manifest(save_index(manifest, index))
    return findings


def _describe(directory: str, split: str, scans: Sequence[ShardScan]) -> tuple[Manifest, NDArray[Any]]:
    shards = tuple(
        Shard(name=scan.name, samples=len(scan.keys), bytes=scan.bytes, sha256=scan.sha256) for scan in scans
    )
    labels = Counter(label for scan in scans for label in scan.labels)
    del labels[-1]
    names_path = Path(directory) / _CLASSES_NAME
    names = names_path.read_text().split("\n") if names_path.is_file() else []
    classes = [name.strip() for name in names if name.strip()]
    if labels and max(labels) >= len(classes):
        classes.extend(str(number) for number in range(len(classes), max(labels) + 1))
    manifest = Manifest(
        split=split,
        shards=shards,
        classes=tuple(classes),
        images_per_class=tuple(labels[number] for number in range(len(classes))),
        directory=directory,
        index_path=f"{split}.index",
    )
    index = np.empty(manifest.num_samples, INDEX_DTYPE)
    for name, field in (("offset", "offsets"), ("checksum", "checksums"), ("label", "labels")):
        index[name] = [value for scan in scans for value in getattr(scan, field)]
    return manifest, index


def _scan_all(
    paths: Sequence[Path], num_decoded: int | None, num_processes: int, name: str
) -> Iterator[ShardScan]:
    scan = partial(scan_shard, num_decoded=num_decoded)
    progress = partial(tqdm, total=len(paths), desc=name, unit="shard", disable=not sys.stderr.isatty())
    if num_processes <= 1 or len(paths) <= 1:
        yield from progress(map(scan, paths))
        return
    with ProcessPoolExecutor(min(num_processes, len(paths))) as pool:
        yield from progress(pool.map(scan, paths))


def _compare(shard: Shard, scan: ShardScan, index: NDArray[Any] | None) -> list[Finding]:
    """Returns a shard's findings: its own, and those beside the manifest and the index."""
    if not scan.bytes:
        return scan.findings or [Finding(shard.name, "", "is empty")]
    if scan.bytes != shard.bytes:
        scan.find(None, f"has {scan.bytes} bytes; the manifest says {shard.bytes}")
    if scan.sha256 != shard.sha256:
        scan.find(None, f"has SHA-256 {scan.sha256[:12]}...; the manifest says {shard.sha256[:12]}...")
    if len(scan.keys) != shard.samples:
        scan.find(
            len(scan.keys), f"the tar yields {len(scan.keys)} samples; the manifest says {shard.samples}"
        )
    if index is not None:
        expected = zip(index["checksum"].tolist(), index["label"].tolist(), strict=True)
        found = zip(scan.checksums, scan.labels, strict=True)
        for ordinal, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
            if ours != theirs:
                scan.find(ordinal, "its bytes or its label are not those that the index describes")
    return scan.findings


def _compare_classes(manifest: Manifest, labels: Counter[int]) -> list[Finding]:
    found = tuple(labels[number] for number in range(len(manifest.classes)))
    beyond = sorted(label for label in labels if label >= len(manifest.classes) and label >= 0)
    findings = []
    if beyond and manifest.classes:
        message = f"labels {beyond[:5]} are beyond the {len(manifest.classes)} classes of the manifest"
        findings.append(Finding(manifest.split, "", message))
    if found != manifest.images_per_class:
        pairs = enumerate(zip(found, manifest.images_per_class, strict=False))
        number, (ours, theirs) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        message = f"class {number} ({manifest.classes[number]}) has {ours} images; the manifest says {theirs}"
        findings.append(Finding(manifest.split, "", message))
    return findings


if __name__ == "__main__":
    sys.exit(main())
