"""The manifest of shards that somebody else wrote: splits from the tars' names, labels and indices from the tars."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.members import is_system_name
from data.shards import (
    INDEX_DTYPE,
    MANIFEST_NAME,
    DataError,
    Manifest,
    Shard,
    save_index,
    save_manifest,
)
from data.writing.findings import Finding
from data.writing.inspection import ShardScan, find_other_kinds, scan_shard
from data.writing.labels import LabelError, number_classes, number_label, read_class_names

logger = logging.getLogger(__name__)

NUM_DECODED = 16
# `train-000007`, `imagenet1k-train-0007`, `00007`, and the hub's `train-00007-of-00042`.
_SHARD_STEM = re.compile(r"^(?:(?P<split>.*?)[-_.]?)(?P<number>\d+)(?:-of-(?P<total>\d+))?$")
# What browsers and file managers put behind the name of a second download or a copy.
_COPY = re.compile(r"( - Copy( \(\d+\))?| copy( \d+)?| \(\d+\))$")
_NUM_NAMED = 3


@dataclass(frozen=True)
class ShardFile:
    """A tar of a folder: its path below it and, in the hub's naming, how many there should be (0: not said)."""

    name: str
    total: int = 0


def list_splits(directory: str) -> dict[str, list[ShardFile]]:
    """Returns the tars of a folder by split, in the order of their names.

    `train-000007.tar` and `train-00007-of-00042.tar` belong to the split `train`, tars that are numbered only to
    `train`, others to a split of their own name; a second download, `train-000007 (1).tar`, to that of the first.
    Where no tar lies in the folder itself, those one level down are taken, and numbered ones belong to the split of
    their folder's name.

    Raises:
        DataError: no folder, no tar in it, or a tar beside its own copy.
    """
    base = Path(directory)
    if not base.is_dir():
        raise DataError(f"{directory} is no folder; expected one that holds .tar shards; pass its path")
    paths = _visible(base.iterdir()) or _visible(base.glob("*/*"))
    if not paths:
        others = sorted(path.name for path in base.iterdir() if ".tar." in path.name or path.suffix == ".tgz")
        found = f" ({len(others)} compressed ones, {others[0]}: expand them)" if others else ""
        raise DataError(
            f"{directory} holds no .tar file{found}; expected shards; write some with python -m data.make_shards"
        )
    splits: dict[str, list[ShardFile]] = {}
    for path in paths:
        folder = "" if path.parent == base else path.parent.name
        stem = _COPY.sub("", path.stem)
        original = path.with_name(stem + path.suffix)
        if original != path and original in paths:
            raise DataError(
                f"{path.name} lies beside {original.name}, whose copy its name says it is; expected each shard once; "
                "remove one of them, or rename it where it holds other samples"
            )
        match = _SHARD_STEM.match(stem)
        split = (match["split"] if match else stem) or folder or "train"
        total = int(match["total"] or 0) if match else 0
        splits.setdefault(split, []).append(ShardFile(path.relative_to(base).as_posix(), total))
    return splits


def _visible(paths: Iterator[Path]) -> list[Path]:
    # `._train-000000.tar` and `__MACOSX/` are what macOS keeps beside files on a foreign disk.
    tars = sorted(
        path
        for path in paths
        if path.suffix.lower() == ".tar"
        and not (is_system_name(path.name) or is_system_name(path.parent.name))
    )
    for path in tars:
        # To open a pipe is to wait for whoever writes into it.
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file; expected a tar; remove it")
    return tars


def write_manifests(
    directory: str,
    *,
    num_decoded: int | None = NUM_DECODED,
    num_processes: int = 1,
    image_key: str = "",
    notes: dict[str, Any] | None = None,
) -> list[Finding]:
    """Writes `manifest.json` and the indices of the tars in a folder; returns what is wrong with the tars.

    Splits: see `list_splits`. Labels are class indices or class names, of one kind in the whole folder. Names come
    from a file `classes.txt`, one a line in index order; else text labels are numbered in sorted order, and indices
    name themselves. Nothing is written while anything is wrong: what is accepted here can be trained on.

    Args:
        directory: of the tars.
        num_decoded: images to decode in each tar; None for all.
        num_processes: processes that read.
        image_key: which member is a sample's image, where samples hold several; becomes part of the manifest.
        notes: on how the shards were made; becomes part of the manifest.

    Raises:
        DataError: no folder, no tar in it, or an unusable file of classes.
    """
    splits = list_splits(directory)
    scans = {
        split: list(
            scan_all(
                [(Path(directory) / file.name, file.name) for file in files],
                num_decoded,
                num_processes,
                split,
                image_key,
            )
        )
        for split, files in splits.items()
    }
    for of_split in scans.values():
        find_other_kinds(of_split)
    every = [scan for of_split in scans.values() for scan in of_split]
    findings = [finding for scan in every for finding in scan.findings]
    log_passed_over(every)
    _warn_of_missing(splits)
    classes, class_findings = _name_classes(directory, every)
    findings.extend(class_findings)
    if findings:
        return findings
    described = [
        _describe(directory, split, of_split, classes, image_key) for split, of_split in scans.items()
    ]
    (Path(directory) / MANIFEST_NAME).unlink(missing_ok=True)
    for manifest, index in described:
        save_manifest(save_index(replace(manifest, notes=notes or {}), index))
    return []


def scan_all(
    files: Sequence[tuple[Path, str]],
    num_decoded: int | None,
    num_processes: int,
    split: str,
    image_key: str = "",
) -> Iterator[ShardScan]:
    """Yields the scans of a split's tars in order; see `data.inspection.scan_shard`."""
    scan = partial(_scan, num_decoded=num_decoded, image_key=image_key)
    progress = partial(tqdm, total=len(files), desc=split, unit="shard", disable=not sys.stderr.isatty())
    if num_processes <= 1 or len(files) <= 1:
        yield from progress(map(scan, files))
        return
    with ProcessPoolExecutor(min(num_processes, len(files))) as pool:
        yield from progress(pool.map(scan, files))


def _scan(file: tuple[Path, str], num_decoded: int | None, image_key: str) -> ShardScan:
    return scan_shard(file[0], name=file[1], num_decoded=num_decoded, image_key=image_key)


def number_labels(scan: ShardScan, numbers: dict[str, int]) -> list[int]:
    """Returns the class index of every sample of a scan, -1 where it has none that the classes know."""
    found = []
    for key, label in zip(scan.keys, scan.labels, strict=True):
        try:
            found.append(number_label(key, label, numbers))
        except LabelError:
            found.append(-1)
    return found


def log_passed_over(scans: Sequence[ShardScan]) -> None:
    """Says which members belong to no sample, by reason, and how many samples of a labelled set have no label."""
    totals = sum((scan.num_passed_over for scan in scans), Counter[str]())
    for reason, total in sorted(totals.items()):
        named = [f"{scan.name}: {name}" for scan in scans for name in scan.passed_over.get(reason, ())]
        logger.info("passed over, %s: %d members (%s)", reason, total, ", ".join(named[:_NUM_NAMED]))
    num_samples = sum(len(scan.labels) for scan in scans)
    unlabelled = sum(label is None for scan in scans for label in scan.labels)
    if 0 < unlabelled < num_samples:
        logger.info("%d of %d samples have no label", unlabelled, num_samples)


def _warn_of_missing(splits: dict[str, list[ShardFile]]) -> None:
    for split, files in splits.items():
        total = max(file.total for file in files)
        if total > len(files):
            logger.warning(
                "%s: %d of its %d shards are here (%s, ...); the manifest describes these only",
                split,
                len(files),
                total,
                files[0].name,
            )


def _name_classes(directory: str, scans: Sequence[ShardScan]) -> tuple[tuple[str, ...], list[Finding]]:
    """Returns the class names of a folder in index order, and what is wrong with its labels."""
    path, listed = read_class_names(directory)
    names = sorted({label for scan in scans for label in scan.labels if isinstance(label, str)})
    largest = max((label for scan in scans for label in scan.labels if isinstance(label, int)), default=-1)
    if names and largest >= 0:
        message = (
            "labels are of two kinds; expected class indices only, or names only; write the shards again"
        )
        return (), [Finding(directory, "", message, f"names such as {names[0]!r}, indices such as {largest}")]
    if not listed:
        return tuple(names) or tuple(str(number) for number in range(largest + 1)), []
    findings = []
    numbers = number_classes(listed)
    for scan in scans:
        for ordinal, (key, label) in enumerate(zip(scan.keys, scan.labels, strict=True)):
            try:
                number_label(key, label, numbers)
            except LabelError as error:
                before = len(scan.findings)
                message = (
                    f"has a class that {path} does not list; expected one of {len(listed)}; mend that file"
                )
                scan.find(ordinal, message, error.shown)
                findings.extend(scan.findings[before:])
    return (listed if names or largest >= 0 or _has_label_maps(scans) else ()), findings


def _has_label_maps(scans: Sequence[ShardScan]) -> bool:
    return any(scan.num_label_maps for scan in scans)


def _describe(
    directory: str, split: str, scans: Sequence[ShardScan], classes: tuple[str, ...], image_key: str
) -> tuple[Manifest, NDArray[Any]]:
    shards = tuple(
        Shard(name=scan.name, samples=len(scan.keys), bytes=scan.bytes, sha256=scan.sha256) for scan in scans
    )
    numbers = number_classes(classes)
    labels = [label for scan in scans for label in number_labels(scan, numbers)]
    counts = Counter(labels)
    labelled = counts.keys() != {-1} or _has_label_maps(scans)
    manifest = Manifest(
        split=split,
        shards=shards,
        classes=classes if labelled else (),
        images_per_class=tuple(counts[number] for number in range(len(classes))) if labelled else (),
        directory=directory,
        index_path=f"{split}.index",
        image_key=image_key,
    )
    index = np.empty(manifest.num_samples, INDEX_DTYPE)
    index["offset"] = [offset for scan in scans for offset in scan.offsets]
    index["checksum"] = [checksum for scan in scans for checksum in scan.checksums]
    index["label"] = labels
    return manifest, index
