"""A close look at one tar: its index, and everything that is wrong with it.

tarfile takes a damaged header for the end of the archive and a missing end for an end. Here the blocks are walked by
hand, so that each kind of damage has a place and a name.
"""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.config import MAX_IMAGE_PIXELS
from data.local_errors import raise_if_local
from data.members import (
    LABEL_MAP_SUFFIX,
    VOID_INDEX,
    EncodedSample,
    NoImageError,
    choose_image,
    describe_several,
    image_members,
    passed_over_reason,
    readable,
)
from data.shards import DataError
from data.stream.reader import READ_ERRORS, checksum_of, iterate_offsets, iterate_samples, reason_of
from data.views.kinds import ImageKind, choose_format, kind_of
from data.writing.findings import Finding
from data.writing.labels import Label, LabelError, read_label

_BLOCK = 512
_END_BLOCKS = 2
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_NUM_NAMED = 3


@dataclass
class ShardScan:
    """What a tar holds.

    Attributes:
        name: of the tar.
        bytes: its size.
        sha256: its hash.
        keys: the samples' names in order.
        offsets: where each sample starts.
        checksums: CRC-32 of each sample's members.
        labels: class index or class name of each sample, None without.
        num_label_maps: samples that hold a class for every pixel.
        kinds: ordinals of the decoded images, by what they hold.
        passed_over: members other than folders that belong to no sample, by reason, and the first names of each.
        findings: what is wrong with it by itself, whatever a manifest says; one for each kind.
    """

    name: str
    bytes: int = 0
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    num_label_maps: int = 0
    kinds: dict[ImageKind, list[int]] = field(default_factory=dict)
    passed_over: dict[str, list[str]] = field(default_factory=dict)
    num_passed_over: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def find(self, ordinal: int | None, message: str, detail: str = "") -> None:
        """Adds a finding about a sample, or about the tar as a whole; the same message again is counted only."""
        for finding in self.findings:
            if finding.message == message:
                finding.count += 1
                return
        sample = ""
        if ordinal is not None:
            key = f" ({self.keys[ordinal]})" if ordinal < len(self.keys) else ""
            sample = f"sample {ordinal}{key}"
        self.findings.append(Finding(self.name, sample, message, detail))


def scan_shard(path: Path, *, name: str = "", num_decoded: int | None = 0, image_key: str = "") -> ShardScan:
    """Returns what a tar holds and what is wrong with it.

    Args:
        path: the tar.
        name: by which the scan calls it; empty for its file name.
        num_decoded: how many of its images to decode, spread evenly; None for all.
        image_key: which member is a sample's image; see `data.members.choose_image`.

    Raises:
        DataError: the machine refuses (memory, open files, permissions): that says nothing about the tar.
    """
    scan = ShardScan(name or path.name)
    try:
        scan.bytes = path.stat().st_size
        with path.open("rb") as file:
            scan.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            magic = file.read(_BLOCK)
        compression = next((kind for start, kind in _COMPRESSIONS.items() if magic.startswith(start)), "")
        if compression:
            scan.find(
                None,
                "is compressed; expected a plain tar, in which samples can be found; expand it",
                compression,
            )
            return scan
        _read_samples(path, scan, num_decoded, image_key)
    except OSError as error:
        raise_if_local(error, str(path))
        scan.find(None, "cannot be read", str(error))
        return scan
    _walk_blocks(path, scan)
    _check_keys(scan)
    return scan


def find_other_kinds(scans: Sequence[ShardScan]) -> None:
    """Finds the decoded images of a split that training does not read as it reads most of them."""
    counts: Counter[ImageKind] = Counter()
    for scan in scans:
        counts.update({kind: len(ordinals) for kind, ordinals in scan.kinds.items()})
    if len(counts) < 2:
        return
    format = choose_format(counts)
    usual = "8 bits in grey or RGB" if format.is_photograph else f"{format.channels} x {format.pixels}"
    for scan in scans:
        for kind, ordinals in scan.kinds.items():
            for ordinal in [] if kind.fits(format) else ordinals:
                scan.find(
                    ordinal, "has other bands or another type than most images", f"{kind}; expected {usual}"
                )


def _read_samples(path: Path, scan: ShardScan, num_decoded: int | None, image_key: str) -> None:
    decoded = None if num_decoded is None else set[int]()
    try:
        # What stops this will stop the reading below, which reports it.
        with contextlib.suppress(*READ_ERRORS), path.open("rb") as file:
            scan.offsets.extend(iterate_offsets(file, partial(_note_passed_over, scan)))
        if decoded is not None and num_decoded:
            stride = max(1, len(scan.offsets) // num_decoded)
            decoded.update(range(0, len(scan.offsets), stride))
        with path.open("rb") as file:
            for ordinal, sample in enumerate(iterate_samples(file, path.name)):
                _take_in(scan, ordinal, sample, image_key, decode=decoded is None or ordinal in decoded)
    except READ_ERRORS as error:
        if isinstance(error, DataError):  # the decoder's, about this machine
            raise
        raise_if_local(error, str(path))
        scan.find(len(scan.keys), "cannot be read", reason_of(error))
    del scan.offsets[len(scan.keys) :]


def _take_in(scan: ShardScan, ordinal: int, sample: EncodedSample, image_key: str, *, decode: bool) -> None:
    scan.keys.append(sample.key)
    scan.checksums.append(checksum_of(sample))
    scan.num_label_maps += LABEL_MAP_SUFFIX in sample.members
    label: Label = None
    try:
        label = read_label(sample.key, sample.members)
    except LabelError as error:
        scan.find(ordinal, "has no usable label", f"{error.shown}; expected {error.rule}")
    except DataError as error:
        scan.find(ordinal, "holds several labels", str(error))
    scan.labels.append(label)
    # Here, so that the programs that inspect answer --help without torch.
    from data.views.decoding import BadImageError, LabelMapError, decode_any, decode_label_map

    images = image_members(sample.members)
    if len(images) > 1 and not image_key:
        scan.find(ordinal, "holds several images", describe_several(sample.key, images))
        return
    try:
        chosen = choose_image(sample.key, sample.members, image_key)
        if decode:
            pixels = decode_any(sample.members[chosen], max_pixels=MAX_IMAGE_PIXELS)
            scan.kinds.setdefault(kind_of(sample.members[chosen], pixels), []).append(ordinal)
            height, width = pixels.shape[-2:]
            if LABEL_MAP_SUFFIX in sample.members and chosen != LABEL_MAP_SUFFIX:
                label_map = sample.members[LABEL_MAP_SUFFIX]
                decode_label_map(label_map, (width, height), VOID_INDEX, sample.key)
    except LabelMapError as error:
        scan.find(ordinal, "has no usable label map", str(error))
    except NoImageError as error:
        scan.find(ordinal, "has no image", str(error))
    except BadImageError as error:
        scan.find(ordinal, "cannot be decoded", str(error))


def _walk_blocks(path: Path, scan: ShardScan) -> None:
    """Finds damaged headers, a missing end of the archive and data behind the end."""
    with path.open("rb") as file:
        offset = 0
        while True:
            file.seek(offset)
            header = file.read(_BLOCK)
            if len(header) < _BLOCK:
                detail = f"at byte {scan.bytes}"
                scan.find(_ordinal_at(scan.offsets, offset), "the file ends within the archive", detail)
                return
            if not any(header):
                break
            try:
                member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError as error:
                scan.find(_ordinal_at(scan.offsets, offset), "damaged header", f"at byte {offset}: {error}")
                return
            if member.type == tarfile.GNUTYPE_SPARSE or "GNUSparseFile." in member.name:
                scan.find(
                    None, "holds a sparse file; expected whole ones; pack it without --sparse", member.name
                )
                return
            offset += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        file.seek(offset)
        if any(any(block) for block in iter(lambda: file.read(1 << 20), b"")):
            detail = f"at byte {offset}: there are members behind it"
            scan.find(_ordinal_at(scan.offsets, offset), "a zeroed header", detail)
        elif scan.bytes - offset < _END_BLOCKS * _BLOCK:
            scan.find(None, "the end of the archive is cut off")


def _note_passed_over(scan: ShardScan, member: tarfile.TarInfo) -> None:
    reason = passed_over_reason(member.name) if member.isreg() else "link or special file"
    if not member.isdir():
        scan.num_passed_over[reason] += 1
        named = scan.passed_over.setdefault(reason, [])
        if len(named) < _NUM_NAMED:
            named.append(readable(member.name))


def _ordinal_at(offsets: Sequence[int], offset: int) -> int:
    """Returns the number of the sample to which a damaged byte belongs."""
    after = [ordinal for ordinal, start in enumerate(offsets) if start > offset]
    return (after[0] if after else len(offsets)) - (1 if offsets and offset < offsets[-1] else 0)


def _check_keys(scan: ShardScan) -> None:
    """Finds a tar without samples, and keys that are not adjacent or occur twice."""
    if not scan.keys and not scan.findings:
        passed = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in scan.passed_over.items())
        scan.find(None, "holds no sample; expected members such as KEY.jpg; remove the file", passed)
    if len(scan.keys) != len(set(scan.keys)):
        twice = [key for key, count in Counter(scan.keys).items() if count > 1]
        detail = f"{len(twice)} keys: {', '.join(twice[:5])}"
        scan.find(None, "keys occur more than once, or their members are not adjacent", detail)
