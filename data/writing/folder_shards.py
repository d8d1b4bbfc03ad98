"""A folder of images as shards, written once into a cache and found again as long as the folder is the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.local_errors import raise_if_local
from data.shards import DataError, write_whole
from data.writing.folder_walk import find_split_folders
from data.writing.image_sources import FileSource, list_splits
from data.writing.shard_lock import hold
from data.writing.shard_writing import fit_shards, write_split

logger = logging.getLogger(__name__)

_DONE_NAME = (
    "folder.json"  # written last: what lies in a folder of the cache is whole, and of which folder it is
)
_NO_PLAIN_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_LONGEST_NAME = 60
_GIB = 2**30


@dataclass(frozen=True)
class FolderShards:
    """Where the shards of a folder are, or will be, and what goes into them by split."""

    root: str
    directory: Path
    sources: dict[str, FileSource]

    @property
    def is_made(self) -> bool:
        """Whether all splits are written."""
        return (self.directory / _DONE_NAME).is_file()


def find_folder_shards(images: str, cache_dir: str) -> FolderShards:
    """Returns where the shards of a folder belong, by a fingerprint of its files' paths, sizes and times.

    Folders below it are classes, unless files lie beside them: then the images carry no labels. Folders called `train`,
    `val`, `test`, ... are splits; without them all is `train`.

    Raises:
        DataError: no such folder, no image in it, or splits of different classes.
    """
    root = os.path.realpath(images)
    if not Path(root).is_dir():
        raise DataError(f"data.images is {images!r}; expected an existing folder of images; set data.images")
    try:
        folders = find_split_folders(root)[0]
        roots = {name.lower(): str(Path(root) / name) for name in folders} or {"train": root}
        listed = list_splits(roots, strays_are_unlabelled=True)
    except DataError as error:
        reason = re.sub(rf"^{re.escape(root)} ", "it ", str(error))
        raise DataError(
            f"data.images is {images!r}: {reason}; or write shards yourself with python -m data.make_shards "
            "imagefolder, and set data.shards"
        ) from error
    # One image under two classes: left out, counted and listed, as nobody is there to be asked.
    sources = {
        split: FileSource(listing.files, listing.classes, label_conflicts="drop")
        for split, listing in listed.items()
    }
    described = json.dumps([(split, source.fingerprint, source.classes) for split, source in sources.items()])
    key = hashlib.sha256(described.encode()).hexdigest()[:12]
    name = _NO_PLAIN_NAME.sub("_", Path(root).name)[:_LONGEST_NAME] or "images"
    return FolderShards(root, Path(cache_dir) / f"{name}-{key}", sources)


def make_folder_shards(images: str, cache_dir: str) -> str:
    """Returns the folder of the shards of a folder of images, which are written unless they are there already.

    Nothing is ever deleted: a run that was made with the folder as it was needs those shards to go on. An interrupted
    start goes on with the shards that are missing; one beside another waits for its end.

    Raises:
        DataError: see `find_folder_shards`; or the disk has no room, or cannot be written.
    """
    found = find_folder_shards(images, cache_dir)
    try:
        if not found.is_made:
            with hold(str(found.directory), "folder"):
                if not found.is_made:  # nor by the one that was waited for
                    _write_all(found, images)
    except OSError as error:
        raise_if_local(error, str(found.directory))
        raise DataError(
            f"{found.directory} cannot be written ({error.strerror}); expected a folder that can; set data.cache_dir"
        ) from error
    logger.info("data.images: the shards of %s are in %s", images, found.directory)
    return str(found.directory)


def _write_all(found: FolderShards, images: str) -> None:
    number = sum(len(source) for source in found.sources.values())
    size = sum(source.size(index) for source in found.sources.values() for index in range(len(source)))
    for former in _of_same_folder(found):
        logger.warning(
            "data.images: %s has changed; its former shards stay in %s, for runs that were made with them",
            images,
            former,
        )
    logger.info(
        "data.images: writing the %d images of %s (%.2f GiB) as shards into %s, once",
        number,
        images,
        size / _GIB,
        found.directory,
    )
    _require_room(found.directory, size)
    splits = {split: _write(source, split, found.directory) for split, source in found.sources.items()}
    done = {"images": found.root, "splits": splits}
    write_whole(found.directory / _DONE_NAME, (json.dumps(done, indent=1) + "\n").encode())


def _write(source: FileSource, split: str, directory: Path) -> int:
    manifest, rejected = write_split(
        source,
        split,
        str(directory),
        samples_per_shard=fit_shards(len(source)),
        num_processes=os.cpu_count() or 1,
    )
    counts = Counter(item.kind for item in rejected)
    left_out = ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
    where = f"; left out: {left_out}, see {directory / f'{split}.left_out.txt'}" if rejected else ""
    logger.info(
        "data.images: %s: %d images, %d classes, %d shards%s",
        split,
        manifest.num_samples,
        len(manifest.classes),
        len(manifest.shards),
        where,
    )
    return manifest.num_samples


def _require_room(directory: Path, size: int) -> None:
    free = shutil.disk_usage(directory).free + sum(path.stat().st_size for path in directory.glob("*.tar"))
    if free < size:
        raise DataError(
            f"data.cache_dir has {free / _GIB:.2f} GiB free; expected the {size / _GIB:.2f} GiB of data.images; make "
            "room, or set data.cache_dir"
        )


def _of_same_folder(found: FolderShards) -> list[Path]:
    same = []
    for done in sorted(found.directory.parent.glob(f"*/{_DONE_NAME}")):
        try:
            if json.loads(done.read_bytes())["images"] == found.root:
                same.append(done.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return same
