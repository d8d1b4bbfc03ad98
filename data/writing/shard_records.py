"""What a folder's shards were written from: one small record each, which makes a second run resume.

What has no record was written by others: it is neither replaced nor removed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.shards import MANIFEST_NAME, DataError, load_manifest, write_whole
from data.writing.duplicates import CONFLICT_KINDS, LabelConflicts
from data.writing.sources import Rejected

RECORDS = ".records"
_NAME_PATTERN = "%s-%06d.tar"


# Offset, checksum and label, as in `INDEX_DTYPE`.
IndexEntry = tuple[int, int, int]


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard; `contents` are (number in the source, hash of the members)."""

    fingerprint: str
    name: str
    samples: int
    bytes: int
    sha256: str
    index: list[IndexEntry]
    contents: list[tuple[int, str]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard to write: its number, which images of the source go into it in which order, and which do not.

    `left_out` holds (kind, detail) by number in the source.
    """

    split: str
    number: int
    indices: Sequence[int]
    directory: str
    fingerprint: str
    left_out: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The tar's file name."""
        return _NAME_PATTERN % (self.split, self.number)


def refuse_others_split(directory: str, split: str) -> None:
    """Raises DataError if the manifest has this split from elsewhere: a sub-sample, or described by verify_shards."""
    try:
        shards = load_manifest(directory, split).shards
    except DataError:  # none, or a damaged one that is written again
        return
    for shard in shards:
        if not _record_path(directory, shard.name).is_file():
            raise DataError(
                f"{Path(directory) / MANIFEST_NAME} lists {shard.name} in split {split!r}, which this program did not "
                "write; expected a folder without others' shards; set --out to another one"
            )


def claim(job: ShardJob) -> None:
    """Marks a shard's name as ours before it is written: nothing that others wrote is replaced or removed."""
    record = _record_path(job.directory, job.name)
    if not record.exists() and (Path(job.directory) / job.name).exists():
        raise DataError(
            f"{Path(job.directory) / job.name} was not written by this program; expected a folder without others' "
            "shards; set --out to another one"
        )
    record.touch()


def find_record(job: ShardJob, policy: LabelConflicts) -> ShardRecord | None:
    """Returns the record of a finished shard of the same images and options; None if it has to be written."""
    path = _record_path(job.directory, job.name)
    try:
        values = json.loads(path.read_bytes())
        rejected = [Rejected(**item) for item in values.pop("rejected")]
        contents = [(int(index), str(digest)) for index, digest in values.pop("contents")]
        record = ShardRecord(**values, contents=contents, rejected=rejected)
        size = (Path(job.directory) / job.name).stat().st_size
    except (OSError, ValueError, TypeError, KeyError):
        return None
    # What another policy left out has to be judged again.
    others = set(CONFLICT_KINDS.values()) - {CONFLICT_KINDS.get(policy)}
    judged = all(item.kind not in others for item in rejected)
    return record if judged and record.fingerprint == job.fingerprint and record.bytes == size else None


def make_records_folder(directory: str) -> Path:
    """Returns the folder of the records, made if missing, in that of the shards."""
    folder = Path(directory) / RECORDS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_record(record: ShardRecord, directory: str) -> None:
    """Writes what is known of a finished shard."""
    write_whole(_record_path(directory, record.name), json.dumps(asdict(record)).encode())


def remove_stale_shards(directory: str, split: str, names: set[str], *, is_alone: bool) -> None:
    """Removes what the new manifest does not list: shards of other options, and halves that killed runs left.

    Halves only where no other start can be writing them.
    """
    number = "[0-9]" * 6
    for path in Path(directory).glob(f"{split}-{number}.tar"):
        record = _record_path(directory, path.name)
        if path.name not in names and record.exists():
            path.unlink()
            record.unlink()
    for path in Path(directory).glob(f".{split}-{number}.tar.*.tmp") if is_alone else ():
        path.unlink(missing_ok=True)


def _record_path(directory: str, name: str) -> Path:
    return Path(directory) / RECORDS / f"{name}.json"
