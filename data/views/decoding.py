"""Encoded bytes to uint8 pixels: decoded right, or refused with a reason.

torchvision's libjpeg-turbo decodes JPEG; Pillow reads the headers and decodes whatever else there is. (torchvision's
decode_png is faster, but one flipped bit in a PNG can end the process with a segmentation fault.)
Nothing in EXIF is used: a damaged block cannot break a sample, and the orientation tag is ignored, as in every
ImageNet pipeline.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from data.local_errors import raise_if_local
from data.members import VOID_INDEX, EncodedSample, NoImageError, choose_image
from data.shards import DataError

with contextlib.suppress(ImportError):  # phones' photographs; Pillow does not open them by itself
    import pillow_heif

    pillow_heif.register_heif_opener()

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_GRAY_MODES = ("L", "1", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")

# What Pillow and torchvision raise on bytes that are no whole image.
DECODE_ERRORS = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, IndexError, TypeError, MemoryError)


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


def decode_image(data: bytes, *, channels: int, max_pixels: int) -> Tensor:
    """Returns an image as uint8 [channels or 1, H, W].

    A grey image comes back with one channel even where three are asked for: its caller repeats it after cropping,
    which costs a third.

    Args:
        data: an encoded image.
        channels: 3 for RGB, 1 for grey values.
        max_pixels: larger images are refused before anything is allocated.

    Raises:
        BadImageError: not a whole image, or too large.
        DataError: the machine is out of memory or open files.
    """
    try:
        pixels = _decode(data, channels, max_pixels)
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        if isinstance(error, BadImageError):
            raise
        raise_if_local(error, "an image")
        if isinstance(error, UnidentifiedImageError):  # whose message is an address in memory
            raise BadImageError("no format that Pillow knows" if data else "the file is empty") from error
        raise BadImageError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if pixels.shape[-1] < 1 or pixels.shape[-2] < 1:
        raise BadImageError("the image has no pixels")
    return pixels


def decode_to_pil(data: bytes, *, max_pixels: int) -> Image.Image:
    """Returns an image as an RGB Pillow image; see `decode_image`."""
    pixels = decode_image(data, channels=3, max_pixels=max_pixels)
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


def _decode(data: bytes, channels: int, max_pixels: int) -> Tensor:
    # The plug-in's class costs half of what Image.open does on a small PNG.
    stream = io.BytesIO(data)
    image = PngImageFile(stream) if data[:8] == _PNG_MAGIC else Image.open(stream)
    _require_size(*image.size, max_pixels)
    gray = channels == 1 or image.mode in _GRAY_MODES
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        # torch wants a writable buffer.
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.GRAY if gray else ImageReadMode.RGB)
    return _decode_with_pillow(image, gray)


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(f"{width} x {height} pixels; expected at most {max_pixels}")


def _decode_with_pillow(image: Image.Image, gray: bool) -> Tensor:
    """Decodes what is no plain JPEG: PNG, palettes, CMYK, transparency, more than 8 bits a channel."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        # 16-bit PNGs open as I;16 or, in older files, as I; plain division keeps their range, Pillow's would clip.
        if not np.isfinite(values).all():
            raise BadImageError("values that are not finite")
        scale = 255.0 if image.mode == "F" and values.max(initial=0.0) <= 1.0 else 1.0
        if image.mode != "F":
            scale = 255.0 / 65535.0
        array = np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)
        return torch.from_numpy(array)[None]
    mode = "L" if gray else "RGB"
    array = np.array(image if image.mode == mode else image.convert(mode))
    return torch.from_numpy(array)[None] if gray else torch.from_numpy(array).permute(2, 0, 1)
