"""Sub-samples of a set that share its tars: a manifest of their own, and no image copied."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.shards import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    load_manifest,
    manifest_to_json,
    split_names,
    write_whole,
)
from data.stream.samplers import select_long_tail, selected_labels

_SOURCE = "SHARDS"  # the argument that names the whole set
_MOST_IMBALANCE = 1_000_000  # no class of a set is that large, and infinity would leave nothing but ones


def write_long_tail(
    source: str, directory: str, *, split: str = "train", imbalance: float = 100.0, seed: int = 0
) -> list[Manifest]:
    """Returns the manifests of a long-tailed version of a set after writing them; the tars stay where they are.

    Args:
        source: folder of the whole set.
        directory: folder of the new manifest: new, or written by this function before.
        split: the split to thin out; the others are listed whole.
        imbalance: images of the largest class over images of the smallest; see `data.samplers.select_long_tail`.
        seed: of the choice.

    Raises:
        DataError: no labels, an imbalance out of bounds, or a folder that holds another set.
    """
    _check_place(source, directory, "long_tail", any)  # the other splits keep their notes
    if not 1 <= imbalance <= _MOST_IMBALANCE:
        raise DataError(f"--imbalance is {imbalance}; expected 1 to {_MOST_IMBALANCE:,}; set --imbalance")
    whole = load_manifest(source, split, "--split", _SOURCE)
    labels = selected_labels(whole)
    if labels is None or (labels < 0).any():
        raise DataError(
            f"{source} has images without class; expected a class for each; write an index with classes"
        )
    chosen = select_long_tail(labels, imbalance, seed)
    manifests = []
    for name in split_names(source):
        manifest = _relocate(load_manifest(source, name), directory)
        if name == split:
            manifest = _restrict(manifest, labels, chosen)
            manifest = replace(manifest, notes={"long_tail": {"imbalance": imbalance, "seed": seed}})
        manifests.append(manifest)
    return _write(manifests)


def write_held_out(source: str, directory: str, *, share: float = 0.1, seed: int = 0) -> list[Manifest]:
    """Returns the manifests of a set's training split cut in two after writing them; the tars stay where they are.

    What is chosen on the split `test` of the new set was chosen on training images: the whole set's own test split is
    not in it. About `share` of each class is held out, of classes of two images and more at least one.

    Args:
        source: folder of the whole set, with a split `train`.
        directory: folder of the new manifest: new, or written by this function before.
        share: of the images, in (0, 1).
        seed: of the choice.

    Raises:
        DataError: no labels, no such share, or a folder that holds another set.
    """
    _check_place(source, directory, "held_out", all)
    if not 0 < share < 1:
        raise DataError(f"--share is {share}; expected more than 0 and less than 1; set --share")
    if "train" not in (names := split_names(source, _SOURCE)):
        raise DataError(
            f"{_SOURCE} is {source}, which has {', '.join(names)}; expected a set with a split train; set {_SOURCE}"
        )
    whole = load_manifest(source, "train")
    labels = selected_labels(whole)
    if labels is None or (labels < 0).any():
        raise DataError(
            f"{source} has images without class; expected a class for each; write an index with classes"
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    manifests = []
    for name, chosen in (("train", ~held_out), ("test", held_out)):
        manifest = _restrict(_relocate(whole, directory), labels, chosen)
        notes = {"held_out": {"share": share, "seed": seed}}
        manifests.append(replace(manifest, split=name, notes=notes))
    return _write(manifests)


def _check_place(source: str, directory: str, note: str, of: Callable[[Iterable[bool]], bool]) -> None:
    """Refuses a folder that holds another set: its manifest would be replaced, and with it the names of its classes.

    Args:
        source: folder of the whole set.
        directory: where the new manifest is to go.
        note: by which the manifests of one's own are known.
        of: `any` or `all` splits of those carry it.
    """
    if Path(source).resolve() == Path(directory).resolve():
        raise DataError(f"--out is {directory}, the whole set's folder; expected another; set --out")
    found = next(Path(directory).glob("*.tar"), None)
    if (Path(directory) / MANIFEST_NAME).is_file():
        splits = [load_manifest(directory, name) for name in split_names(directory)]
        found = found or (
            None if of(note in split.notes for split in splits) else Path(directory) / MANIFEST_NAME
        )
    if found is not None:
        raise DataError(
            f"--out is {directory}, which holds {found.name} of another set; expected a new folder, or one that the "
            "same command wrote; set --out"
        )


def _write(manifests: list[Manifest]) -> list[Manifest]:
    """Returns the manifests after writing them in place of a former sub-sample's, whose splits may be others."""
    directory = Path(manifests[0].directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / MANIFEST_NAME, manifest_to_json(manifests).encode())
    return manifests


def _relocate(manifest: Manifest, directory: str) -> Manifest:
    """Returns a manifest that finds its tars from another folder."""
    way, source = os.path.relpath(manifest.directory, directory), os.path.realpath(manifest.directory)
    # The system goes up from where a link leads. Where both ways work, the shorter names stay what they were.
    if os.path.realpath(Path(directory) / way) != source:
        way = os.path.relpath(source, os.path.realpath(directory))
    shards = tuple(replace(shard, name=str(Path(way) / shard.name)) for shard in manifest.shards)
    index_path = str(Path(way) / manifest.index_path) if manifest.index_path else ""
    return replace(manifest, directory=directory, shards=shards, index_path=index_path)


def _restrict(
    manifest: Manifest, labels: np.ndarray[tuple[int], np.dtype[np.int64]], chosen: np.ndarray
) -> Manifest:
    """Returns a manifest of the chosen ones of its selected samples. Shards without any stay: ids count through."""
    shards, start = [], 0
    for shard in manifest.shards:
        selected = range(shard.samples) if shard.ordinals is None else shard.ordinals
        kept = chosen[start : start + len(selected)]
        shards.append(replace(shard, ordinals=tuple(int(o) for o in np.asarray(selected)[kept])))
        start += len(selected)
    counts = np.bincount(labels[chosen], minlength=len(manifest.classes))
    return replace(manifest, shards=tuple(shards), images_per_class=tuple(counts.tolist()))
