"""Members of a tar by their roles: which is a sample's image, which its label, and which are no data at all.

A member's name is `KEY.SUFFIX`: the key ends at the first dot behind the last slash, the suffix is the rest. Roles
follow from the last part of the suffix, so `k.jpg`, `k.JPEG` and `k.rgb.png` are images whatever their neighbours
are called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from data.shards import DataError

# What Pillow opens as photographs and scans. Formats of icons, documents and scientific containers are left out.
_EVERYWHERE = "jpg jpeg jpe jfif png webp bmp dib ppm pgm pbm pnm tif tiff gif tga"
_WITH_A_LIBRARY = "avif heic heif jp2 j2k jpf jpx"
IMAGE_SUFFIXES = frozenset(f"{_EVERYWHERE} {_WITH_A_LIBRARY}".split())
# An image where there is no other: beside one it may be anything, such as its features.
ARRAY_SUFFIX = "npy"
READABLE_SUFFIXES = IMAGE_SUFFIXES | {ARRAY_SUFFIX}
LABEL_SUFFIX = "cls"
# A class index for every pixel, `VOID_INDEX` for none: an 8-bit grey PNG of the image's size.
LABEL_MAP_SUFFIX = "seg.png"
VOID_INDEX = 255
_SYSTEM_NAMES = frozenset(("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "lost+found"))
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that webdataset passes over
_NAME = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NUM_NAMED = 6


@dataclass(frozen=True)
class EncodedSample:
    """A sample as it lies in its tar: its key and the bytes of its members by suffix (`jpg`, `cls`, ...)."""

    key: str
    members: dict[str, bytes]


class NoImageError(ValueError):
    """A sample has no image among its members; the message names them."""


def is_system_name(name: str) -> bool:
    """Returns whether a file or folder is hidden, or made by an operating system beside the data."""
    return name in _SYSTEM_NAMES or (name.startswith(".") and name not in (".", ".."))


def readable(name: str) -> str:
    """Returns a file's name as one line of text: what is no UTF-8 is taken as Latin-1, line breaks are escaped."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def split_name(name: str) -> tuple[str, str] | tuple[None, None]:
    """Returns (key, suffix) of a member; (None, None) for members that belong to no sample."""
    match = None if passed_over_reason(name) else _NAME.match(name)
    return (readable(match[1]), readable(match[2])) if match else (None, None)


def split_name_at_last_dot(name: str) -> tuple[str, str] | tuple[None, None]:
    """Returns (key, suffix) of a member whose key holds dots, with underscores in their place; see `split_name`."""
    if passed_over_reason(name):
        return None, None
    folder, _, base = readable(name).rpartition("/")
    stem, _, suffix = base.rpartition(".")
    return (f"{folder}/" if folder else "") + stem.replace(".", "_"), suffix


def passed_over_reason(name: str) -> str:
    """Returns why a regular member belongs to no sample; empty if it belongs to one."""
    if any(is_system_name(part) for part in PurePosixPath(name).parts):
        return "hidden or system file"
    if _METADATA.match(name):
        return "metadata of webdataset"
    return "" if _NAME.match(name) else "no suffix"


def image_members(suffixes: Iterable[str]) -> list[str]:
    """Returns those of a sample's suffixes that are images; arrays and a label map are none where there is another."""
    ends = {suffix: suffix.rsplit(".", 1)[-1] for suffix in suffixes}
    images = [suffix for suffix, end in ends.items() if end in IMAGE_SUFFIXES]
    arrays = [suffix for suffix, end in ends.items() if end == ARRAY_SUFFIX]
    return [suffix for suffix in images if suffix != LABEL_MAP_SUFFIX] or arrays or images


def choose_image(key: str, members: Mapping[str, bytes], image_key: str = "") -> str:
    """Returns the suffix of a sample's image.

    Args:
        key: of the sample.
        members: of the sample by suffix.
        image_key: which suffix is the image, or several in order of preference with `;` between them (`jpg;png`); empty
            where samples have one image each.

    Raises:
        NoImageError: the sample has no image, or none of that suffix.
        DataError: it has several and nothing says which.
    """
    if image_key:
        for suffix in image_key.split(";"):
            if suffix.strip().lstrip(".").lower() in members:
                return suffix.strip().lstrip(".").lower()
        raise NoImageError(
            f"no member {image_key!r} among its members ({', '.join(sorted(members)) or 'nothing'})"
        )
    images = image_members(members)
    if len(images) > 1:
        raise DataError(f"sample {key} holds {describe_several(key, images)}")
    if not images:
        raise NoImageError(f"no image among its members ({', '.join(sorted(members)) or 'nothing'})")
    return images[0]


def describe_several(key: str, images: list[str]) -> str:
    """Returns what a sample of several images has, and what to do: they may be roles, or a key that holds dots."""
    named = ", ".join(sorted(images)[:_NUM_NAMED]) + (", ..." if len(images) > _NUM_NAMED else "")
    dotted = next((suffix for suffix in sorted(images) if "." in suffix), "")
    text = f"{len(images)} images ({named}); expected one; set data.image_key to the one to train on"
    if dotted:
        text += (
            f"; if {key}.{dotted} is a sample of its own, its key holds a dot, at which keys end: rewrite the set "
            "with python -m data.make_shards reshuffle OLD --last-dot --out NEW"
        )
    return text


def label_member(key: str, members: Mapping[str, bytes]) -> str:
    """Returns the suffix of a sample's label; empty without one.

    Raises:
        DataError: it has several.
    """
    labels = [suffix for suffix in members if suffix.rsplit(".", 1)[-1] == LABEL_SUFFIX]
    if LABEL_SUFFIX in labels:
        return LABEL_SUFFIX
    if len(labels) > 1:
        raise DataError(
            f"sample {key} holds {len(labels)} labels ({', '.join(sorted(labels))}); expected one; write the shards "
            "again"
        )
    return labels[0] if labels else ""
