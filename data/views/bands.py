"""Images as they lie in their files: every band, in its own number of bits. Nothing is converted or scaled.

`.npy` arrays, TIFF of any number of bands, and whatever else Pillow opens. Pillow has decoders for TIFF's compressions
and no image of 13 bands, so a TIFF's rows are decoded as the bytes that they are and put together here.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngImageFile

Array = NDArray[Any]
Order = Literal["<", ">"]

NPY_MAGIC = b"\x93NUMPY"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_TIFF_ORDERS: dict[bytes, Order] = {b"II": "<", b"MM": ">"}
_TIFF_VERSIONS = (42, 43)  # the second one is BigTIFF
_MAX_BANDS = 10_000
# Kinds of NumPy numbers that are pixels: whole numbers, floating-point ones and truth values.
_NUMBER_KINDS = "uifb"
_PNG_DEPTH_AT = 24

# TIFF 6.0, section 8; NewSubfileType's bits say that a page is a smaller copy (1) or a mask (4) of another.
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_FILL_ORDER, _STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES = 266, 273, 277, 278, 279
_PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, _FORMAT = (
    284,
    317,
    322,
    323,
    324,
    325,
    339,
)
_COPY_OR_MASK = 5
_SEPARATE_PLANES = 2
_DIFFERENCES, _FLOAT_DIFFERENCES = 2, 3
_FORMATS = {1: "u", 2: "i", 3: "f", 4: "u"}
# Streams of bytes, whatever the numbers are: none, LZW, deflate (twice), PackBits, LZMA, Zstandard. JPEG is none.
_BYTE_STREAMS = (1, 5, 8, 32946, 32773, 34925, 50000)
_SHORT, _LONG, _LONGEST_SHORT = 3, 4, 0xFFFF


class BandsError(ValueError):
    """Bytes that are no image, or one of a kind that is not read; the message is one line."""


def read_bands(data: bytes, max_pixels: int, channels: int | None = None) -> Array:
    """Returns an image's bands as they lie in the file, [C, H, W], native byte order.

    Of a `.npy` array of three axes the bands are the first or the last, whichever has the length `channels`, else
    whichever leaves a square, else whichever is shorter, else the first.

    Args:
        data: an encoded image.
        max_pixels: larger images are refused before anything is allocated; every three bands count once.
        channels: how many bands are expected; of another number the image comes back all the same.

    Raises:
        BandsError: not an image, of a kind that is not read, or too large.
        Exception: whatever Pillow and NumPy raise on damaged bytes.
    """
    if data[: len(NPY_MAGIC)] == NPY_MAGIC:
        return _read_npy(data, max_pixels, channels)
    if is_tiff(data) and (bands := _read_tiff(data, max_pixels)) is not None:
        return bands
    return _read_with_pillow(data, max_pixels)


def is_tiff(data: bytes) -> bool:
    """Returns whether bytes begin as a TIFF does."""
    order = _TIFF_ORDERS.get(data[:2])
    return (
        order is not None and len(data) > 4 and struct.unpack_from(f"{order}H", data, 2)[0] in _TIFF_VERSIONS
    )


def is_deep_colour_png(data: bytes) -> bool:
    """Returns whether these bytes are a PNG of 16 bits and several channels, of which Pillow gives 8 bits."""
    deep = data[:8] == PNG_MAGIC and data[_PNG_DEPTH_AT : _PNG_DEPTH_AT + 1] == b"\x10"
    return deep and data[_PNG_DEPTH_AT + 1 : _PNG_DEPTH_AT + 2] != b"\0"


def require_size(width: int, height: int, max_pixels: int, bands: int = 1) -> None:
    """Raises BandsError for an image that is too large to be one."""
    if width * height * -(-bands // 3) > max_pixels or bands > _MAX_BANDS:
        of_bands = f" of {bands} bands" if bands > 1 else ""
        raise BandsError(f"{width} x {height} pixels{of_bands}; expected at most {max_pixels}")


def _read_npy(data: bytes, max_pixels: int, channels: int | None) -> Array:
    stream = io.BytesIO(data)
    try:
        is_first = np.lib.format.read_magic(stream) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
    except Exception as error:  # a damaged header is whatever a parser of Python's literals meets
        raise BandsError(f"an array whose header cannot be read ({type(error).__name__})") from error
    if dtype.kind not in _NUMBER_KINDS:
        raise BandsError(f"an array of type {dtype}; expected numbers")
    if len(shape) not in (2, 3):
        raise BandsError(f"an array of {len(shape)} axes; expected height x width, with or without bands")
    first = len(shape) == 2 or _bands_come_first(shape, channels)
    height, width = shape[-2:] if first else shape[:2]
    require_size(width, height, max_pixels, 1 if len(shape) == 2 else shape[0 if first else 2])
    array = np.load(io.BytesIO(data), allow_pickle=False)
    array = array[None] if array.ndim == 2 else array
    return _native(array if first else np.moveaxis(array, 2, 0))


def _bands_come_first(shape: Sequence[int], channels: int | None) -> bool:
    fits = [shape[axis] == channels for axis in (0, 2)]
    if fits[0] == fits[1]:
        fits = [shape[1] == shape[2], shape[0] == shape[1]]
    return fits[0] if fits[0] != fits[1] else shape[0] <= shape[2]


def _native(array: Array) -> Array:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _read_with_pillow(data: bytes, max_pixels: int) -> Array:
    if is_deep_colour_png(data):
        raise BandsError(
            "a colour PNG of 16 bits, of which only 8 are read; expected TIFF or .npy, which keep them"
        )
    image = PngImageFile(io.BytesIO(data)) if data[:8] == PNG_MAGIC else Image.open(io.BytesIO(data))
    require_size(*image.size, max_pixels)
    if image.mode == "1":
        image = image.convert("L")  # type: ignore[assignment]
    elif image.mode in ("P", "PA", "YCbCr", "LAB", "HSV", "CMYK"):
        image = image.convert("RGB")  # type: ignore[assignment]
    array = np.asarray(image)
    if image.mode == "I" and image.format == "PNG":  # as older Pillows open what newer ones call I;16
        array = array.astype(np.uint16)
    return _native(array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0))


def _read_tiff(data: bytes, max_pixels: int) -> Array | None:
    """Returns the bands of the first page, or of one-band pages of one size and type all of them, one a band.

    None where the first page is compressed as a whole picture (JPEG and its like), or of other than whole bytes: Pillow
    may know it.
    """
    order = _TIFF_ORDERS[data[:2]]
    pages: list[Mapping[int, Any]] = []
    is_big = struct.unpack_from(f"{order}H", data, 2)[0] == _TIFF_VERSIONS[1]
    if is_big and order == ">":  # Pillow takes its header for another
        raise BandsError("a big-endian BigTIFF; expected little-endian, or a TIFF below 4 GiB")
    stream = io.BytesIO(data)
    directory = TiffImagePlugin.ImageFileDirectory_v2(stream.read(16 if is_big else 8))
    seen = {0}
    while directory.next not in seen and len(pages) < _MAX_BANDS:
        seen.add(directory.next)
        stream.seek(directory.next)
        directory.load(stream)
        if not directory.get(_SUBFILE, 0) & _COPY_OR_MASK:
            pages.append(dict(directory))
    if not pages:
        raise BandsError("a TIFF without a page")
    first = pages[0]
    dtype = _type_of(order, first)
    if first.get(_COMPRESSION, 1) not in _BYTE_STREAMS or dtype is None:
        return None
    alike = (_WIDTH, _HEIGHT, _SAMPLES, _BITS, _FORMAT)
    stack = [page for page in pages if all(page.get(tag) == first.get(tag) for tag in alike)]
    chosen = stack if first.get(_SAMPLES, 1) == 1 else [first]
    require_size(first[_WIDTH], first[_HEIGHT], max_pixels, len(chosen) * first.get(_SAMPLES, 1))
    return _native(np.concatenate([_read_page(data, dtype, page) for page in chosen]))


def _read_page(data: bytes, dtype: np.dtype[Any], tags: Mapping[int, Any]) -> Array:
    """Returns a page's samples [C, H, W] of a type."""
    width, height, bands = tags[_WIDTH], tags[_HEIGHT], tags.get(_SAMPLES, 1)
    tile = tags.get(_TILE_WIDTH, width)
    across = -(-width // tile)
    planes = bands if tags.get(_PLANAR, 1) == _SEPARATE_PLANES else 1
    samples = bands // planes
    parts, sizes = (_TILES, _TILE_BYTES) if _TILES in tags else (_STRIPS, _STRIP_BYTES)
    offsets, counts = tags[parts], tags[sizes]
    if len(offsets) % planes or len(offsets) != len(counts):
        raise BandsError(
            f"a TIFF of {len(offsets)} parts and {len(counts)} sizes; expected as many, for each plane"
        )
    each = len(offsets) // planes
    layout = {name: tags[name] for name in (_TILE_HEIGHT, _STRIP_ROWS) if name in tags}
    if _TILES in tags:
        layout[_TILE_WIDTH] = tile * samples * dtype.itemsize
    read = []
    for plane in range(planes):
        own = slice(plane * each, (plane + 1) * each)
        encoded = [data[start : start + size] for start, size in zip(offsets[own], counts[own], strict=True)]
        size = (across * tile * samples * dtype.itemsize, height)
        rows = _decode_rows(encoded, size, tags.get(_COMPRESSION, 1), layout)
        values = _undo_predictor(rows.reshape(height * across, -1), tags.get(_PREDICTOR, 1), dtype, samples)
        read.append(np.moveaxis(values.reshape(height, across * tile, samples)[:, :width], 2, 0))
    return np.concatenate(read)


def _type_of(order: Order, tags: Mapping[int, Any]) -> np.dtype[Any] | None:
    """Returns the type of a page's samples; None where they are not all of one, or not of whole bytes."""
    bits, kinds = set(tags.get(_BITS, (1,))), {_FORMATS.get(number) for number in tags.get(_FORMAT, (1,))}
    width, kind = max(bits), kinds.pop()
    usual = width in (8, 16, 32, 64) and kind is not None and (kind, width) != ("f", 8)
    if len(bits) > 1 or kinds or not usual or tags.get(_FILL_ORDER, 1) != 1:
        return None
    return np.dtype(f"{order}{kind}{width // 8}")


def _decode_rows(
    encoded: Sequence[bytes], size: tuple[int, int], compression: int, layout: Mapping[int, int]
) -> NDArray[np.uint8]:
    """Returns strips or tiles decompressed, [H, bytes of a row], by Pillow: as a grey TIFF, whose pixels are bytes."""
    single = {
        _WIDTH: size[0],
        _HEIGHT: size[1],
        _BITS: 8,
        _COMPRESSION: compression,
        _PHOTOMETRIC: 1,
        _SAMPLES: 1,
    }
    tags: dict[int, Sequence[int]] = {name: (value,) for name, value in (single | dict(layout)).items()}
    parts, sizes = (_TILES, _TILE_BYTES) if _TILE_WIDTH in layout else (_STRIPS, _STRIP_BYTES)
    starts = np.cumsum([8, *(len(part) for part in encoded)])
    tags |= {parts: starts[:-1].tolist(), sizes: [len(part) for part in encoded]}
    body = b"".join(encoded)
    directory_at = 8 + len(body) + len(body) % 2
    header = struct.pack("<2sHL", b"II", 42, directory_at)
    file = header + body.ljust(directory_at - 8, b"\0") + _pack_directory(tags, directory_at)
    # Its class and not Image.open, whose measure of too many pixels is another.
    with TiffImagePlugin.TiffImageFile(io.BytesIO(file)) as image:
        return np.array(image)


def _pack_directory(tags: Mapping[int, Sequence[int]], offset: int) -> bytes:
    """Returns a TIFF directory that stands at `offset`, little-endian."""
    entries, behind = b"", b""
    end = offset + 2 + 12 * len(tags) + 4
    for name, values in sorted(tags.items()):
        kind, code = (
            (_LONG, "L") if name in (_STRIPS, _TILES) or max(values) > _LONGEST_SHORT else (_SHORT, "H")
        )
        packed = struct.pack(f"<{len(values)}{code}", *values)
        if len(packed) > 4:
            packed, behind = struct.pack("<L", end + len(behind)), behind + packed
        entries += struct.pack("<HHL", name, kind, len(values)) + packed.ljust(4, b"\0")
    return struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + behind


def _undo_predictor(rows: NDArray[np.uint8], predictor: int, dtype: np.dtype[Any], samples: int) -> Array:
    """Returns the numbers of rows of tiles [n, bytes]: as they are, or summed up from their differences.

    TIFF 6.0, section 14 (differences of whole numbers), and Adobe's technical note 3 (of the bytes of floating-point
    ones, the highest bytes of a row first).
    """
    if predictor == _DIFFERENCES:
        whole = dtype.newbyteorder("=").str.replace("f", "u").replace("i", "u")
        values = rows.view(dtype.str.replace("f", "u").replace("i", "u")).astype(whole)
        summed = values.reshape(len(rows), -1, samples).cumsum(axis=1, dtype=whole)
        return summed.view(dtype.newbyteorder("="))
    if predictor == _FLOAT_DIFFERENCES:
        summed = rows.reshape(len(rows), -1, samples).cumsum(axis=1, dtype=np.uint8)
        by_value = summed.reshape(len(rows), dtype.itemsize, -1).transpose(0, 2, 1)
        return np.ascontiguousarray(by_value).view(dtype.newbyteorder(">"))
    if predictor != 1:
        raise BandsError(f"a TIFF of predictor {predictor}; expected 1, 2 or 3")
    return rows.view(dtype)
