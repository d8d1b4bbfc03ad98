"""What an evaluation's transforms are given: a Pillow image, or of any other format its bands with the same methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.views.config import PixelFormat
from data.views.decoding import decode_image, decode_to_pil

RGB = PixelFormat()
_SHOWN_PERCENTILES = (2, 98)


@dataclass(frozen=True)
class BandImage:
    """Several bands of one size, floating-point Pillow images each, with what transforms ask of a Pillow image.

    Resized by Pillow band by band, as it resizes the channels of a photograph, but without rounding.
    """

    bands: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.bands[0].size

    @property
    def width(self) -> int:
        """In pixels."""
        return self.bands[0].width

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bands[0].height

    def crop(self, box: tuple[int, int, int, int]) -> BandImage:
        """Returns the part (left, top, right, bottom)."""
        return BandImage(tuple(band.crop(box) for band in self.bands))

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> BandImage:
        """Returns the image at (width, height)."""
        return BandImage(tuple(band.resize(size, resample) for band in self.bands))

    def transpose(self, method: Image.Transpose) -> BandImage:
        """Returns the image flipped or turned."""
        return BandImage(tuple(band.transpose(method) for band in self.bands))

    def paste(self, image: BandImage, place: tuple[int, int]) -> None:
        """Writes another image over this one at (left, top)."""
        for band, other in zip(self.bands, image.bands, strict=True):
            band.paste(other, place)


Picture = Image.Image | BandImage


def decode_picture(data: bytes, format: PixelFormat, *, max_pixels: int) -> Picture:
    """Returns an image as transforms want it: photographs as an RGB Pillow image, others as bands.

    Raises:
        BadImageError: not a whole image, or not of this format.
        DataError: the machine is out of memory or open files.
    """
    if format.is_photograph:
        return decode_to_pil(data, max_pixels=max_pixels)
    values = decode_image(data, format, max_pixels=max_pixels).numpy()
    return _from_values(np.broadcast_to(values, (format.channels, *values.shape[1:])))


def make_picture(values: NDArray[np.float64], format: PixelFormat) -> Picture:
    """Returns a picture of numbers in 0..1, [H, W, C], as a decoder would give it."""
    scaled = values * (255 if format.is_photograph else format.full_scale)
    if not format.is_photograph:
        return _from_values(np.moveaxis(scaled, 2, 0))
    rounded = np.rint(scaled).astype(np.uint8)
    return Image.fromarray(rounded if rounded.shape[2] == 3 else rounded.repeat(3, axis=2))


def fill_picture(size: tuple[int, int], format: PixelFormat, colour: Sequence[float] = (0.0,)) -> Picture:
    """Returns a picture (width, height) of one colour, whose channels are in 0..1 (of `float32` in the file's unit)."""
    per_channel = np.broadcast_to(np.asarray(colour, dtype=np.float64), format.channels)
    return make_picture(np.broadcast_to(per_channel, (size[1], size[0], format.channels)), format)


def to_rgb(picture: Picture) -> Image.Image:
    """Returns a picture to look at: of bands the first three, or the first, each stretched over what it holds."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    shown = picture.bands[:3] if len(picture.bands) >= 3 else picture.bands[:1] * 3
    channels = []
    for band in shown:
        values = np.asarray(band)
        low, high = np.percentile(values, _SHOWN_PERCENTILES)
        stretched = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
        channels.append(Image.fromarray(np.rint(255 * stretched).astype(np.uint8)))
    return Image.merge("RGB", channels)


def _from_values(values: NDArray[np.generic]) -> BandImage:
    return BandImage(tuple(Image.fromarray(np.ascontiguousarray(band, dtype=np.float32)) for band in values))
