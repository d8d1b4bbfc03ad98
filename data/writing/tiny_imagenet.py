"""Tiny ImageNet from its official archive: 200 classes of ImageNet, 64 x 64; 100,000 + 10,000 labelled images.

Made for Stanford's CS231n. `train/WNID/images/*.JPEG`, `val/images/*.JPEG` with `val/val_annotations.txt`; the test
images have no public labels and are left aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from data.config import MAX_IMAGE_PIXELS
from data.local_errors import raise_if_local
from data.shards import DataError
from data.views.decoding import BadImageError, decode_image
from data.writing.downloads import Archive, fetch_archive
from data.writing.sources import ImageSource, Rejected, SourceSample

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_MARKER = "wnids.txt"
_ANNOTATIONS = "val/val_annotations.txt"
_IMAGE_BYTES = 2048  # about what one of them takes


class TinyImagenetSource(ImageSource):
    """One split's images, their bytes kept.

    Args:
        archive: the whole set.
        names: of the images in it.
        labels: class index of each.
        classes: WordNet ids in index order.
    """

    def __init__(
        self, archive: Archive, names: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]
    ) -> None:
        self._archive, self._names, self._labels, self.classes = archive, list(names), list(labels), classes
        listed = "\n".join(f"{name} {label}" for name, label in zip(names, labels, strict=True))
        self.fingerprint = f"tiny-imagenet {hashlib.sha256(listed.encode()).hexdigest()}"

    def __len__(self) -> int:
        return len(self._names)

    def size(self, index: int) -> int:
        """Returns about what an image takes."""
        return _IMAGE_BYTES

    def name(self, index: int) -> str:
        """Returns an image's name in the archive."""
        return self._names[index]

    def load(self, index: int) -> SourceSample | Rejected:
        """Returns an image's bytes and label, or why it is left out."""
        name = self._names[index]
        try:
            content = self._archive.read(name)
            decode_image(content, max_pixels=MAX_IMAGE_PIXELS)
        except BadImageError as error:
            return Rejected(name, "broken", str(error), index)
        except OSError as error:
            raise_if_local(error, name)
            return Rejected(name, "unreadable", str(error), index)
        stem = name.rsplit("/", 1)[-1].split(".")[0]
        return SourceSample(f"{index:08d}-{stem}", {"jpg": content}, self._labels[index])


def open_tiny_imagenet(archive: str, cache_dir: str) -> dict[str, TinyImagenetSource]:
    """Returns the splits `train` and `val`; classes are the WordNet ids in alphabetical order.

    Args:
        archive: `tiny-imagenet-200.zip` or its unpacked folder; empty fetches the former.
        cache_dir: where the fetched archive is kept.

    Raises:
        DataError: the archive cannot be had, or is not of that layout.
    """
    files = Archive(archive or str(fetch_archive(_URL, _MD5, cache_dir)), _MARKER)
    classes = tuple(sorted(files.read(_MARKER).decode().split()))
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    train = [name for name in files.names if name.startswith("train/") and name.endswith(".JPEG")]
    val = _read_annotations(files)
    images = {"train": [(name, name.split("/")[1]) for name in train], "val": sorted(val.items())}
    sources = {}
    for split, items in images.items():
        unknown = next((wnid for _, wnid in items if wnid not in numbers), None)
        if unknown is not None or not items:
            what = f"the class {unknown!r}, which {_MARKER} does not list" if items else "no image"
            raise DataError(
                f"{split} of {files.path} holds {what}; expected the official layout; fetch it again"
            )
        labels = [numbers[wnid] for _, wnid in items]
        sources[split] = TinyImagenetSource(files, [name for name, _ in items], labels, classes)
    return sources


def _read_annotations(files: Archive) -> dict[str, str]:
    """Returns the WordNet id of every validation image by its name; lines are `file, id, box`, tabs between."""
    if _ANNOTATIONS not in files.names:
        raise DataError(f"{files.path} lacks {_ANNOTATIONS}; expected the official layout; fetch it again")
    lines = [line.split("\t") for line in files.read(_ANNOTATIONS).decode().splitlines() if line.strip()]
    present = set(files.names)
    found = {f"val/images/{fields[0]}": fields[1] for fields in lines if len(fields) > 1}
    missing = next((name for name in found if name not in present), None)
    if missing is not None or len(found) < len(lines):
        raise DataError(
            f"{_ANNOTATIONS} of {files.path} does not fit the images ({missing or 'a line without class'}); expected "
            "the official layout; fetch it again"
        )
    return found
