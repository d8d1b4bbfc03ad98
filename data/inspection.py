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
from pathlib import Path

from data.config import MAX_IMAGE_PIXELS
from data.datasets import label_of
from data.decoding import BadImageError, decode_image, find_image, has_image
from data.reader import READ_ERRORS, EncodedSample, checksum_of, iterate_offsets, iterate_samples
from data.shards import DataError

_BLOCK = 512
_END_BLOCKS = 2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which shard, at which sample (empty for the shard as a whole), and what."""

    shard: str
    sample: str
    message: str

    def __str__(self) -> str:
        where = f"{self.shard}: {self.sample}" if self.sample else self.shard
        return f"{where}: {self.message}"


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
        labels: class index of each sample, -1 without.
        suffixes: how many samples have which set of members.
        findings: what is wrong with it by itself, whatever a manifest says.
    """

    name: str
    bytes: int = 0
    sha256: str = ""
    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    suffixes: Counter[tuple[str, ...]] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)

    def find(self, ordinal: int | None, message: str) -> None:
        """Adds a finding about a sample, or about the tar as a whole."""
        sample = ""
        if ordinal is not None:
            key = f" ({self.keys[ordinal]})" if ordinal < len(self.keys) else ""
            sample = f"sample {ordinal}{key}"
        self.findings.append(Finding(self.name, sample, message))


def scan_shard(path: Path, *, num_decoded: int | None = 0) -> ShardScan:
    """Returns what a tar holds and what is wrong with it.

    Args:
        path: the tar.
        num_decoded: how many of its images to decode, spread evenly; None for all.
    """
    scan = ShardScan(path.name)
    try:
        scan.bytes = path.stat().st_size
        with path.open("rb") as file:
            scan.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        _read_samples(path, scan, num_decoded)
    except OSError as error:
        scan.find(None, f"cannot be read: {error}")
        return scan
    _walk_blocks(path, scan)
    _compare_members(path, scan)
    return scan


def _read_samples(path: Path, scan: ShardScan, num_decoded: int | None) -> None:
    decoded = None if num_decoded is None else set[int]()
    try:
        # What stops this will stop the reading below, which reports it.
        with contextlib.suppress(*READ_ERRORS), path.open("rb") as file:
            scan.offsets.extend(iterate_offsets(file))
        if decoded is not None and num_decoded:
            stride = max(1, len(scan.offsets) // num_decoded)
            decoded.update(range(0, len(scan.offsets), stride))
        with path.open("rb") as file:
            for ordinal, sample in enumerate(iterate_samples(file, path.name)):
                _take_in(scan, ordinal, sample, decode=decoded is None or ordinal in decoded)
    except READ_ERRORS as error:
        scan.find(len(scan.keys), f"cannot be read: {type(error).__name__}: {error}")
    del scan.offsets[len(scan.keys) :]


def _take_in(scan: ShardScan, ordinal: int, sample: EncodedSample, *, decode: bool) -> None:
    scan.keys.append(sample.key)
    scan.checksums.append(checksum_of(sample))
    scan.suffixes[tuple(sorted(sample.members))] += 1
    try:
        scan.labels.append(label_of(sample))
    except DataError as error:
        scan.labels.append(-1)
        scan.find(ordinal, str(error))
    if not has_image(sample):
        scan.find(ordinal, f"no image among its members ({', '.join(sorted(sample.members))})")
    elif decode:
        try:
            decode_image(find_image(sample), channels=3, max_pixels=MAX_IMAGE_PIXELS)
        except BadImageError as error:
            scan.find(ordinal, f"cannot be decoded: {error}")


def _walk_blocks(path: Path, scan: ShardScan) -> None:
    """Finds damaged headers, a missing end of the archive, and data behind the end."""
    with path.open("rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return
        offset = 0
        while True:
            file.seek(offset)
            header = file.read(_BLOCK)
            if len(header) < _BLOCK:
                scan.find(
                    _ordinal_at(scan.offsets, offset),
                    f"the file ends at byte {scan.bytes}, within the archive",
                )
                return
            if not any(header):
                break
            try:
                member = tarfile.TarInfo.frombuf(header, tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError as error:
                scan.find(_ordinal_at(scan.offsets, offset), f"damaged header at byte {offset}: {error}")
                return
            offset += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        file.seek(offset)
        if any(any(block) for block in iter(lambda: file.read(1 << 20), b"")):
            scan.find(
                _ordinal_at(scan.offsets, offset),
                f"a zeroed header at byte {offset}: there are members behind it",
            )
        elif scan.bytes - offset < _END_BLOCKS * _BLOCK:
            scan.find(None, "the end of the archive is cut off")


def _ordinal_at(offsets: Sequence[int], offset: int) -> int:
    """Returns the number of the sample to which a damaged byte belongs."""
    after = [ordinal for ordinal, start in enumerate(offsets) if start > offset]
    return (after[0] if after else len(offsets)) - (1 if offsets and offset < offsets[-1] else 0)


def _compare_members(path: Path, scan: ShardScan) -> None:
    """Finds samples that lack members which the others have: keys that do not pair."""
    if len(scan.keys) != len(set(scan.keys)):
        twice = [key for key, count in Counter(scan.keys).items() if count > 1]
        scan.find(
            None, f"{len(twice)} keys occur more than once, or are not adjacent: {', '.join(twice[:5])}"
        )
    if len(scan.suffixes) <= 1:
        return
    usual = scan.suffixes.most_common(1)[0][0]
    with path.open("rb") as file:
        try:
            for ordinal, sample in enumerate(iterate_samples(file, path.name)):
                lacking = sorted(set(usual) - set(sample.members))
                if lacking:
                    scan.find(ordinal, f"lacks {', '.join(lacking)}")
        except READ_ERRORS:
            return  # found above
