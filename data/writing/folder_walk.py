"""The images under a folder, each real folder once; whatever is passed over is counted by reason and named."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from data.local_errors import raise_if_local
from data.members import ARRAY_SUFFIX, READABLE_SUFFIXES, is_system_name, readable
from data.shards import DataError
from data.views.decoding import can_open

SPLIT_FOLDERS = ("train", "val", "test", "valid", "validation")
_NUM_NAMED = 3
# How files without suffix begin; of RIFF files, WebP has its name at byte 8, and of ISO media the brand stands there.
_MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\0\0\0\x0cjP  \r\n": "jp2",
    b"\x93NUMPY": ARRAY_SUFFIX,
}
_BRANDS = {
    b"WEBP": "webp",
    b"avif": "avif",
    b"avis": "avif",
    b"heic": "heic",
    b"heix": "heic",
    b"mif1": "heic",
}
_MAGIC_BYTES = 12


@dataclass
class PassedOver:
    """What a walk left aside: how many by reason, and the first names of each."""

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        """Counts a file or folder."""
        self.counts[reason] += 1
        named = self.names.setdefault(reason, [])
        if len(named) < _NUM_NAMED:
            named.append(readable(path))

    def lines(self) -> list[str]:
        """Returns a line for each reason."""
        return [
            f"passed over, {reason}: {number} ({', '.join(self.names[reason])}{', ...' if number > _NUM_NAMED else ''})"
            for reason, number in sorted(self.counts.items())
        ]


def walk_images(root: str) -> tuple[list[tuple[Path, str]], PassedOver]:
    """Returns (path, suffix) of the images under a folder, sorted by path, and what was passed over.

    Links to folders are followed, out of the tree too, but each real folder is entered once: under its own name if
    it lies in the tree, else under the first link to it. A link to a folder that holds the tree is passed over.
    Suffixes decide what is an image; a file without one is looked into. Arrays (`.npy`) are images where there are no
    others: beside them they may be anything.

    Raises:
        DataError: no such folder, or one that may not be read.
    """
    if not Path(root).is_dir():
        raise DataError(f"the input folder is {root!r}; expected an existing folder of images; pass its path")
    passed = PassedOver()
    found: list[tuple[Path, str]] = []
    visited = {os.path.realpath(root)}
    above = {str(parent) for parent in Path(os.path.realpath(root)).parents}
    folders: list[str] = [root]
    links: list[str] = []
    while folders or links:
        # Real folders first: a link to a folder of the tree must not take its place.
        if not folders:
            links.sort(reverse=True)
            link = links.pop()
            real = os.path.realpath(link)
            if real in visited or real in above:
                passed.add("link to a folder that is read already", link)
                continue
            visited.add(real)
            folders.append(link)
        folder = folders.pop()
        for entry in _list_folder(folder):
            if is_system_name(entry.name):
                passed.add("hidden or system file", entry.path)
            elif _is(entry.is_dir):
                if entry.is_symlink():
                    links.append(entry.path)
                elif os.path.realpath(entry.path) not in visited:
                    visited.add(os.path.realpath(entry.path))
                    folders.append(entry.path)
                else:
                    passed.add("link to a folder that is read already", entry.path)
            else:
                _take_file(entry, found, passed)
    images = [(path, suffix) for path, suffix in found if suffix != ARRAY_SUFFIX]
    if images and len(images) < len(found):
        for path, suffix in found:
            if suffix == ARRAY_SUFFIX:
                passed.add("array beside images (.npy)", str(path))
    return sorted(images or found), passed


def find_split_folders(root: str) -> tuple[list[str], PassedOver]:
    """Returns the names of the split folders (`train`, `val`, `test`, ...) of a folder, training first; [] for none.

    With them comes what lies beside them and belongs to no split.

    Raises:
        DataError: split folders lie beside others, so that one of them may be a class.
    """
    passed = PassedOver()
    names = []
    for entry in _list_folder(root):
        if is_system_name(entry.name):
            passed.add("hidden or system file", entry.path)
        elif _is(entry.is_dir):
            names.append(entry.name)
        else:
            passed.add("file beside split folders", entry.path)
    splits = [name for name in names if name.lower() in SPLIT_FOLDERS]
    if len({name.lower() for name in splits}) < len(splits):
        raise DataError(
            f"{root} holds the folders {', '.join(splits)}; expected one a split, whatever its case; merge them, or "
            "pass --split-folders no if they are classes"
        )
    if splits and len(splits) < len(names):
        other = next(name for name in names if name not in splits)
        raise DataError(
            f"{root} holds the split folder {splits[0]!r} beside {readable(other)!r}; expected split folders only, or "
            "class folders only; pass one of them, or --split-folders no if all are classes"
        )
    return sorted(splits, key=lambda name: SPLIT_FOLDERS.index(name.lower())), passed


def _list_folder(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise_if_local(error, readable(folder))
        raise DataError(
            f"{readable(folder)} cannot be read ({error.strerror}); expected a folder; mend it"
        ) from error


def _is(kind: Callable[[], bool]) -> bool:
    """Returns whether a directory entry is of a kind; a link that leads round in a circle is of none."""
    try:
        return kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _take_file(entry: os.DirEntry[str], found: list[tuple[Path, str]], passed: PassedOver) -> None:
    path = Path(entry.path)
    if not _is(entry.is_file):
        passed.add("broken link or special file", entry.path)
        return
    suffix = path.suffix[1:].lower() or _sniff(path)
    if suffix not in READABLE_SUFFIXES:
        passed.add(
            f"no image ({f'.{readable(suffix)}' if suffix else 'unknown content, no suffix'})", entry.path
        )
    elif suffix != ARRAY_SUFFIX and not can_open(suffix):
        remedy = "pip install pillow-heif" if suffix in ("heic", "heif") else "needs a Pillow that reads it"
        passed.add(f"no decoder for .{suffix} ({remedy})", entry.path)
    else:
        found.append((path, suffix))


def sniff_suffix(content: bytes) -> str:
    """Returns the suffix that a file's first bytes ask for; empty if they are no image's."""
    known = next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), "")
    return known or _BRANDS.get(content[8:_MAGIC_BYTES], "")


def _sniff(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return sniff_suffix(file.read(_MAGIC_BYTES))
    except OSError as error:
        raise_if_local(error, readable(str(path)))
        return ""
