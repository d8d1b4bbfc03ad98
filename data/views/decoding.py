"""Encoded bytes to pixels: decoded right, or refused with a reason.

Photographs, which are 8 bits in grey or RGB, are converted to what is asked for; any other image must hold it.

torchvision's libjpeg-turbo decodes JPEG; Pillow reads the headers and decodes whatever else there is. (torchvision's
decode_png is faster, but one flipped bit in a PNG can end the process with a segmentation fault.)
Nothing in EXIF is used: a damaged block cannot break a sample, and the orientation tag is ignored, as in every
ImageNet pipeline.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from data.local_errors import raise_if_local
from data.members import VOID_INDEX, EncodedSample, NoImageError, choose_image
from data.shards import DataError
from data.views.bands import (
    NPY_MAGIC,
    PNG_MAGIC,
    Array,
    BandsError,
    is_tiff,
    read_bands,
    require_size,
)
from data.views.config import PixelFormat
from data.views.kinds import DEEP_MODES, full_scale_of, holds_photograph

with contextlib.suppress(ImportError):  # phones' photographs; Pillow does not open them by itself
    import pillow_heif

    pillow_heif.register_heif_opener()

_GRAY_MODES = ("L", "1", "LA", *DEEP_MODES)
_RGB = PixelFormat()

# What Pillow, NumPy and torchvision raise on bytes that are no whole image.
DECODE_ERRORS = (
    *(OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, TypeError, MemoryError),
    *(ArithmeticError, struct.error),
)


class BadImageError(ValueError):
    """The sample holds no image that can be decoded; the message says why."""


class LabelMapError(DataError):
    """The sample's label map is damaged, or not one of its image; the message is one line."""


def find_image(sample: EncodedSample, image_key: str = "") -> bytes:
    """Returns the bytes of a sample's image member; see `data.members.choose_image`.

    Raises:
        BadImageError: the sample has none.
        DataError: it has several and nothing says which.
    """
    try:
        return sample.members[choose_image(sample.key, sample.members, image_key)]
    except NoImageError as error:
        raise BadImageError(str(error)) from error


def can_open(suffix: str) -> bool:
    """Returns whether an image of this suffix can be decoded here: some need a library beside Pillow."""
    Image.init()
    return Image.registered_extensions().get(f".{suffix}") in Image.OPEN


def decode_image(data: bytes, format: PixelFormat = _RGB, *, max_pixels: int) -> Tensor:
    """Returns an image as [C or 1, H, W] of `format.pixels`.

    A grey image comes back with one channel even where three are asked for: its caller repeats it after cropping,
    which costs a third.

    Args:
        data: an encoded image.
        format: what is asked for.
        max_pixels: larger images are refused before anything is allocated.

    Raises:
        BadImageError: not a whole image, too large, or not of this format.
        DataError: the machine is out of memory or open files.
    """
    with _explained(data):
        pixels = _decode(data, format, max_pixels)
    if pixels.shape[-1] < 1 or pixels.shape[-2] < 1:
        raise BadImageError("the image has no pixels")
    return pixels


def decode_bands(data: bytes, *, max_pixels: int) -> Array:
    """Returns an image's bands as they lie in its file, [C, H, W]; see `data.views.bands.read_bands`.

    Raises:
        BadImageError: not a whole image, too large, or of numbers that are none in float32, which training refuses.
        DataError: the machine is out of memory or open files.
    """
    with _explained(data):
        bands = read_bands(data, max_pixels)
        if bands.dtype.kind == "f":
            _as_float32(bands)
    if not bands.size:
        raise BadImageError("the image has no pixels")
    return bands


def decode_any(data: bytes, *, max_pixels: int) -> Array:
    """Returns an image of any kind, [C, H, W]: photographs as `decode_image` has them, arrays and TIFF as they lie.

    Raises:
        BadImageError: not a whole image, or too large.
        DataError: the machine is out of memory or open files.
    """
    if data[: len(NPY_MAGIC)] == NPY_MAGIC or is_tiff(data):
        return decode_bands(data, max_pixels=max_pixels)
    return decode_image(data, max_pixels=max_pixels).numpy()


@contextlib.contextmanager
def _explained(data: bytes) -> Iterator[None]:
    """Raises what a decoder says of an image as a `BadImageError`, of this machine as a `DataError`."""
    try:
        yield
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise _bad_image(error, data) from error


def _bad_image(error: Exception, data: bytes) -> BadImageError:
    """Returns what an error of a decoder says of an image; raises DataError where it speaks of this machine."""
    if isinstance(error, BadImageError | BandsError):
        return BadImageError(str(error))
    raise_if_local(error, "an image")
    if isinstance(error, UnidentifiedImageError):  # whose message is an address in memory
        return BadImageError("no format that Pillow knows" if data else "the file is empty")
    return BadImageError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def decode_to_pil(data: bytes, *, max_pixels: int) -> Image.Image:
    """Returns an image as an RGB Pillow image; see `decode_image`."""
    pixels = decode_image(data, max_pixels=max_pixels)
    array = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array)


def decode_label_map(data: bytes, size: tuple[int, int], num_classes: int, key: str) -> Image.Image:
    """Returns a sample's label map as a grey Pillow image of class indices and `VOID_INDEX`.

    Args:
        data: the encoded label map.
        size: (width, height) of its image.
        num_classes: C.
        key: of the sample, for the message.

    Raises:
        LabelMapError: it is damaged, or not an 8-bit grey image of that size and those classes.
    """
    try:
        found = Image.open(io.BytesIO(data))
        if found.size == size:  # of another one, the header is enough
            found.load()
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise_if_local(error, f"the label map of {key}")
        raise LabelMapError(
            f"the label map of {key} cannot be decoded ({type(error).__name__}); expected a PNG of its image's size; "
            "make the shards again"
        ) from error
    fits = found.mode == "L" and found.size == size
    if not fits or any(found.histogram()[num_classes:VOID_INDEX]):
        raise LabelMapError(
            f"the label map of {key} is {found.mode}, {found.width} x {found.height}; expected L (8-bit grey), "
            f"{size[0]} x {size[1]}, with values below {num_classes} or {VOID_INDEX}; make the shards with "
            "python -m data.make_shards segmentation"
        )
    return found


def _decode(data: bytes, format: PixelFormat, max_pixels: int) -> Tensor:
    if not format.is_photograph or data[: len(NPY_MAGIC)] == NPY_MAGIC:
        return _take_bands(data, format, max_pixels)
    # The plug-in's class costs half of what Image.open does on a small PNG.
    stream = io.BytesIO(data)
    try:
        image = PngImageFile(stream) if data[:8] == PNG_MAGIC else Image.open(stream)
    except UnidentifiedImageError:
        if is_tiff(data):  # of more bands than Pillow has a mode for
            return _take_bands(data, format, max_pixels)
        raise
    if format.channels > 1 and is_tiff(data) and image.mode == "L" and getattr(image, "n_frames", 1) > 1:
        bands = read_bands(data, max_pixels)  # of which Pillow has seen the first
        if len(bands) == format.channels and bands.dtype == np.uint8:
            return torch.from_numpy(bands)
    if not holds_photograph(image):
        return _take_bands(data, format, max_pixels)
    require_size(*image.size, max_pixels)
    gray = format.channels == 1 or image.mode in _GRAY_MODES
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        # torch wants a writable buffer.
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.GRAY if gray else ImageReadMode.RGB)
    return _decode_with_pillow(image, gray)


def _take_bands(data: bytes, format: PixelFormat, max_pixels: int) -> Tensor:
    """Returns the bands of an image that is not converted, but for a grey one where three channels are asked for."""
    bands = read_bands(data, max_pixels, format.channels)
    number, height, width = bands.shape
    if number != format.channels and (number, format.channels) != (1, 3):
        raise BadImageError(f"{number} bands of {height} x {width}; expected {format.channels}")
    if format.pixels == "float32":
        return torch.from_numpy(_as_float32(bands))
    if bands.dtype != format.pixels:
        raise BadImageError(f"numbers of type {bands.dtype}; expected {format.pixels}")
    return torch.from_numpy(bands)


def _as_float32(bands: Array) -> Array:
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, which is refused
        values = bands.astype(np.float32)
    if not np.isfinite(values).all():
        raise BadImageError("values that are not finite")
    return values


def _decode_with_pillow(image: Image.Image, gray: bool) -> Tensor:
    """Decodes what is no plain JPEG: PNG, palettes, CMYK, transparency, more than 8 bits a channel."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        # 16-bit PNGs open as I;16 or, in older files, as I; plain division keeps their range, Pillow's would clip.
        if not np.isfinite(values).all():
            raise BadImageError("values that are not finite")
        scale = 255.0 if image.mode == "F" and values.max(initial=0.0) <= 1.0 else 1.0
        if image.mode != "F":
            scale = 255.0 / full_scale_of(image)
        array = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
        return torch.from_numpy(array)[None]
    mode = "L" if gray else "RGB"
    array = np.array(image if image.mode == mode else image.convert(mode))
    return torch.from_numpy(array)[None] if gray else torch.from_numpy(array).permute(2, 0, 1)
