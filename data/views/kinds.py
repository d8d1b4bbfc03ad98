"""What an image's file holds, which formats training can read it as, and what it loses there. Imports no torch."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.views.bands import NPY_MAGIC, Array, is_deep_colour_png, is_tiff
from data.views.config import PixelFormat, PixelType

DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_WITH_ALPHA = {"LA": 2, "RGBA": 4, "RGBX": 4}
# TIFF 6.0, section 8 and 19.
_BITS, _PHOTOMETRIC, _SAMPLES, _FORMAT = 258, 262, 277, 339
_INKS, _SIGNED, _FLOATS = 5, 2, 3
_PLAIN_CHANNELS = (1, 3)
_MOST_CHANNELS = 4


@dataclass(frozen=True)
class ImageKind:
    """Bands of a file and the type of their numbers, by NumPy's name; whether it can be read as a photograph."""

    channels: int
    dtype: str
    is_photograph: bool

    @property
    def pixels(self) -> PixelType:
        """The `data.pixels` that takes the numbers as they are."""
        return "uint8" if self.dtype == "uint8" else "uint16" if self.dtype == "uint16" else "float32"

    @property
    def is_plain(self) -> bool:
        """Whether it is a photograph of which nothing is lost: 8 bits in grey or RGB."""
        return self.is_photograph and self.dtype == "uint8" and self.channels in _PLAIN_CHANNELS

    @property
    def has_alpha(self) -> bool:
        """Whether a photograph has a channel beside its colours."""
        return self.is_photograph and self.dtype == "uint8" and not self.is_plain

    def fits(self, format: PixelFormat) -> bool:
        """Returns whether training with this format reads such images, by the numbers that the others have."""
        if format.is_photograph:
            return self.is_photograph
        is_grey = (self.channels, format.channels) == (1, 3)
        return (self.channels == format.channels or is_grey) and self.pixels == format.pixels

    def __str__(self) -> str:
        return f"{self.channels} x {self.dtype}"


def kind_of(data: bytes, pixels: Array) -> ImageKind:
    """Returns the kind of an image.

    Args:
        data: its file.
        pixels: what `data.views.decoding.decode_any` has made of it.
    """
    own = ImageKind(
        len(pixels), str(pixels.dtype), pixels.dtype == np.uint8 and len(pixels) in _PLAIN_CHANNELS
    )
    if data[: len(NPY_MAGIC)] == NPY_MAGIC:
        return own
    if is_tiff(data):
        if len(pixels) > _MOST_CHANNELS:  # of which Pillow would say more than that it is none of its own
            return own
        with contextlib.suppress(UnidentifiedImageError), Image.open(io.BytesIO(data)) as image:
            return ImageKind(own.channels, own.dtype, own.is_photograph or holds_photograph(image))
        return own
    with Image.open(io.BytesIO(data)) as image:
        if image.mode in DEEP_MODES:
            return ImageKind(1, "float32" if image.mode == "F" else "uint16", True)
        return ImageKind(_WITH_ALPHA.get(image.mode, own.channels), "uint8", True)


def holds_photograph(image: Image.Image) -> bool:
    """Returns whether an opened image has brightnesses, which can be scaled to 8 bits.

    Pillow reads signed numbers of a TIFF as unsigned ones, and of whole numbers of 32 bits no largest one is known.
    """
    tags = getattr(image, "tag_v2", {})
    formats = tags.get(_FORMAT, (1,))
    return _SIGNED not in formats and (_FLOATS in formats or max(tags.get(_BITS, (1,))) <= 16)


def full_scale_of(image: Image.Image) -> float:
    """Returns the largest brightness of an opened image of more than 8 bits; Pillow leaves a TIFF's 12 as they are."""
    tags = getattr(image, "tag_v2", {})
    return float(2 ** max(tags[_BITS]) - 1) if _BITS in tags else 65535.0


def choose_format(counts: Mapping[ImageKind, int]) -> PixelFormat:
    """Returns the format in which training reads most images of so many of each kind; of several, what keeps more."""
    in_order = sorted(counts, key=lambda kind: -counts[kind])
    colours = 1 if all(kind.channels == 1 for kind in counts) else 3
    candidates = [
        PixelFormat(colours) if kind.is_plain else PixelFormat(kind.channels, kind.pixels)
        for kind in in_order
    ]
    candidates.append(PixelFormat(colours))
    return max(
        candidates, key=lambda format: sum(counts[kind] for kind in counts if kind.fits(format))
    )  # the first of several


def describe_loss(data: bytes) -> list[str]:
    """Returns what of a decodable image is lost where it is read as 8 bits in grey or RGB, and how it is kept."""
    with contextlib.suppress(UnidentifiedImageError), Image.open(io.BytesIO(data)) as image:
        tags = getattr(image, "tag_v2", {})
        channels = _WITH_ALPHA.get(image.mode, 0)
        if tags.get(_SAMPLES, 1) > 3 and tags.get(_PHOTOMETRIC) != _INKS:
            channels = tags[_SAMPLES]
        lost = []
        if image.mode in DEEP_MODES or max(tags.get(_BITS, (8,))) > 8 or is_deep_colour_png(data):
            kept = "set data.pixels=uint16 (or float32) to keep them"
            lost.append(f"values of more than 8 bits are scaled down to 8; {kept}")
        if channels:
            what = "transparency" if image.mode in _WITH_ALPHA else "what is beside the colours"
            lost.append(f"{what} is dropped; set data.channels={channels} to keep it")
        return lost
    return []
