"""The manifest of a folder of shards: what is in which tar, and how to notice that it no longer is.

A tar that was cut, or of which one header byte changed, reads like a shorter tar: webdataset and tarfile report
nothing for five of six kinds of damage. The manifest's counts, sizes and hashes are what makes a loss visible.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

MANIFEST_NAME = "manifest.json"
_SCHEMA = 1
# Where a sample starts in its tar, the CRC-32 of its members, and its class index or -1.
INDEX_DTYPE = np.dtype([("offset", "<i8"), ("checksum", "<u4"), ("label", "<i4")])


class DataError(ValueError):
    """Something wrong with the images or shards that the user can mend; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar of a split.

    Attributes:
        name: file name, relative to the manifest's folder.
        samples: image samples in the tar.
        bytes: size of the tar.
        sha256: hash of the tar in hexadecimal.
        ordinals: which of the samples belong to the split, ascending; None means all. Sub-samples of a set
            share its tars in this way.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    ordinals: tuple[int, ...] | None = None

    @property
    def num_selected(self) -> int:
        """How many of the tar's samples belong to the split."""
        return self.samples if self.ordinals is None else len(self.ordinals)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One split of a folder of shards.

    Attributes:
        split: its name.
        shards: the tars in the order that numbers the samples.
        classes: class names in index order; empty where the images carry no labels.
        images_per_class: number of images of each class, in the same order.
        directory: the folder in which the tars lie.
        index_path: file of `INDEX_DTYPE`, one entry for every sample of the tars, relative to the folder; empty if
            there is none.
        index_sha256: hash of that file in hexadecimal.
        image_key: which member is a sample's image, where samples hold several; see `data.members.choose_image`.
        notes: how the split was made; for people.
    """

    split: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()
    images_per_class: tuple[int, ...] = ()
    directory: str = ""
    index_path: str = ""
    index_sha256: str = ""
    image_key: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Number of images of the split."""
        return sum(shard.num_selected for shard in self.shards)

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of a hash of everything that decides the order of the samples."""
        parts = [(shard.name, shard.samples, shard.sha256, shard.ordinals) for shard in self.shards]
        rest = [self.image_key] if self.image_key else []
        canonical = json.dumps([self.split, parts, list(self.classes), *rest], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def first_ids(self) -> tuple[int, ...]:
        """The sample id of each shard's first sample, and one past the last id: ids number every sample of the tars."""
        return tuple(accumulate((shard.samples for shard in self.shards), initial=0))

    def path_of(self, shard: Shard) -> str:
        """Returns the shard's path."""
        return str(Path(self.directory) / shard.name)


def load_manifest(
    directory: str, split: str, key: str = "data.split", folder_key: str = "data.shards"
) -> Manifest:
    """Returns one split of the manifest in a folder.

    Args:
        directory: the folder, or a brace list of some of its shards such as `DIR/train-{000000..000099}.tar`.
        split: which split.
        key: the option that named the split, for the message.
        folder_key: the option or argument that named the folder, likewise.

    Raises:
        DataError: no such folder or manifest, an unreadable one, or no such split or shard in it.
    """
    pattern = ""
    if directory.endswith(".tar"):
        directory, pattern = str(Path(directory).parent), Path(directory).name
    splits = _read_splits(directory, folder_key)
    where = str(Path(directory) / MANIFEST_NAME)
    if split not in splits:
        known = ", ".join(sorted(splits)) or "none"
        raise DataError(f"{key} is {split!r}; expected one of {where}: {known}; set {key}")
    manifest = _split_from_dict(splits[split], directory, split, where)
    return _restrict_to(manifest, set(braceexpand(pattern)), folder_key) if pattern else manifest


def _restrict_to(manifest: Manifest, names: set[str], key: str) -> Manifest:
    unknown = sorted(names - {shard.name for shard in manifest.shards})
    if unknown:
        raise DataError(
            f"{key} names {unknown[0]}; expected shards that the manifest lists; mend the list in {key}"
        )
    # The others stay, with nothing selected: sample ids count through all of them.
    shards = tuple(shard if shard.name in names else replace(shard, ordinals=()) for shard in manifest.shards)
    return replace(manifest, shards=shards)


def split_names(directory: str, folder_key: str = "data.shards") -> list[str]:
    """Returns the names of the splits in a folder's manifest, sorted; see `load_manifest`."""
    return sorted(_read_splits(directory, folder_key))


def _read_splits(directory: str, key: str) -> dict[str, Any]:
    path = Path(directory) / MANIFEST_NAME
    if not Path(directory).is_dir():
        raise DataError(
            f"{key} is {directory!r}; expected an existing folder of shards; write one with "
            f"python -m data.make_shards, or set {key}"
        )
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST_NAME}; expected one beside the shards; write it with "
            f"python -m data.verify_shards {directory} --write"
        )
    try:
        document = json.loads(path.read_bytes())
        schema, splits = document["schema"], dict(document["splits"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); write it again") from error
    if schema != _SCHEMA:
        raise DataError(f"{path} has schema {schema}; expected {_SCHEMA}; write it again")
    return splits


def _split_from_dict(values: dict[str, Any], directory: str, split: str, where: str) -> Manifest:
    try:
        shards = tuple(_shard_from_dict(shard) for shard in values["shards"])
        manifest = Manifest(
            split=split,
            shards=shards,
            classes=_tuple_of(values["classes"]),
            images_per_class=_tuple_of(values["images_per_class"]),
            directory=directory,
            index_path=values.get("index_path", ""),
            index_sha256=values.get("index_sha256", ""),
            image_key=str(values.get("image_key", "")),
            notes=values.get("notes", {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is damaged at split {split!r} ({error!r}); write it again") from error
    if not manifest.shards:
        raise DataError(f"{where} lists no shard of split {split!r}; expected at least one; write it again")
    for shard in manifest.shards:
        if shard.samples < 1:
            raise DataError(
                f"{shard.name} holds {shard.samples} samples; expected at least 1; remove that shard"
            )
    wrong = _find_wrong(manifest)
    if wrong:
        raise DataError(f"{where} is damaged at split {split!r}: {wrong}; write it again")
    return manifest


def _find_wrong(manifest: Manifest) -> str:
    """Returns what a manifest that somebody edited says amiss; empty if nothing."""
    classes, counts, names = manifest.classes, manifest.images_per_class, [s.name for s in manifest.shards]
    if not all(isinstance(name, str) for name in classes) or len(set(classes)) != len(classes):
        return "classes are not different names"
    if len(counts) != len(classes) or not all(isinstance(number, int) and number >= 0 for number in counts):
        return f"images_per_class are not {len(classes)} numbers, one a class"
    if not isinstance(manifest.index_path, str) or not isinstance(manifest.notes, dict):
        return "index_path is no text, or notes are no object"
    if len(set(names)) != len(names):
        return f"shard {next(name for name in names if names.count(name) > 1)} is listed twice"
    for shard in manifest.shards:
        chosen = np.array(shard.ordinals or (), dtype=np.int64)
        if len(chosen) and (chosen[0] < 0 or chosen[-1] >= shard.samples or (np.diff(chosen) <= 0).any()):
            return f"ordinals of {shard.name} are not ascending numbers below {shard.samples}"
    return "" if manifest.num_samples else "no sample is selected"


def _shard_from_dict(values: dict[str, Any]) -> Shard:
    ordinals = values.get("ordinals")
    return Shard(
        name=str(values["name"]),
        samples=int(values["samples"]),
        bytes=int(values["bytes"]),
        sha256=str(values["sha256"]),
        ordinals=None if ordinals is None else tuple(int(ordinal) for ordinal in ordinals),
    )


def _tuple_of(values: object) -> tuple[Any, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{str(values)[:40]!r} is no list")
    return tuple(values)


def manifest_to_json(manifests: Sequence[Manifest]) -> str:
    """Returns the text of `manifest.json` for the splits of one folder."""
    splits = {}
    for manifest in manifests:
        values = asdict(manifest)
        del values["directory"], values["split"]
        for shard in values["shards"]:
            if shard["ordinals"] is None:
                del shard["ordinals"]
        splits[manifest.split] = values
    return json.dumps({"schema": _SCHEMA, "splits": splits}, indent=1) + "\n"


def save_index(manifest: Manifest, index: NDArray[Any]) -> Manifest:
    """Writes a split's `INDEX_DTYPE` entries beside its shards; returns the manifest with the index's hash."""
    content = index.astype(INDEX_DTYPE).tobytes()
    write_whole(Path(manifest.directory) / manifest.index_path, content)
    return replace(manifest, index_sha256=hashlib.sha256(content).hexdigest())


def save_manifest(manifest: Manifest) -> None:
    """Writes a split into its folder's `manifest.json`, beside the other splits."""
    directory = Path(manifest.directory)
    splits = {manifest.split: manifest}
    path = directory / MANIFEST_NAME
    if path.is_file():
        for name in split_names(str(directory)):
            splits.setdefault(name, load_manifest(str(directory), name))
    write_whole(path, manifest_to_json([splits[name] for name in sorted(splits)]).encode())


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees all of it or none: temporary name, flush, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk's names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # which would hide the reason
            temporary.unlink()


def load_index(manifest: Manifest) -> NDArray[Any] | None:
    """Returns a split's `INDEX_DTYPE` entries, mapped into memory; None where nobody wrote them.

    Raises:
        DataError: the index is of another set of shards.
    """
    path = Path(manifest.directory) / manifest.index_path
    if not manifest.index_path or not path.is_file():
        return None
    expected = manifest.first_ids[-1]
    if path.stat().st_size != expected * INDEX_DTYPE.itemsize:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes; expected {expected * INDEX_DTYPE.itemsize}, "
            f"{INDEX_DTYPE.itemsize} a sample; write it again with python -m data.verify_shards "
            f"{manifest.directory} --write"
        )
    return np.memmap(path, dtype=INDEX_DTYPE, mode="r")


def check_shard_files(manifest: Manifest) -> None:
    """Raises DataError if a local shard is missing or has another size than the manifest says.

    One `stat` a shard: cheap enough before every run. It finds every cut tar; `python -m data.verify_shards`
    finds the rest.
    """
    for shard in manifest.shards:
        if not shard.num_selected:
            continue
        path = Path(manifest.path_of(shard))
        if not path.is_file():
            raise DataError(
                f"{path} is missing; the manifest lists it with {shard.samples} samples; restore it, or write the "
                f"manifest again with python -m data.verify_shards {manifest.directory} --write"
            )
        size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"{path} has {size} bytes; expected {shard.bytes} as in the manifest; restore the file, or look at "
                f"it with python -m data.verify_shards {manifest.directory}"
            )
