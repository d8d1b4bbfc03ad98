"""Images of many bands as bytes: `.npy`, and TIFF as its specification has it, which no library here writes."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np

_KINDS = {"u": 1, "i": 2, "f": 3}


def encode_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def encode_tiff(
    *pages: np.ndarray,
    order: str = "<",
    planar: bool = False,
    compressed: bool = False,
    tile: int = 0,
    predictor: int = 1,
    photometric: int = 1,
    subfiles: tuple[int, ...] = (),
) -> bytes:
    """Returns a classic TIFF whose pages are bands [C, H, W]; strips of 7 rows, or square tiles."""
    file = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    link = 4
    for number, page in enumerate(pages):
        count, height, width = page.shape
        planes = [page[band : band + 1] for band in range(count)] if planar else [page]
        places, sizes = [], []
        for plane in planes:
            for part in _parts(plane, tile):
                rows = np.ascontiguousarray(np.moveaxis(part, 0, 2))
                raw = _differ(rows, order, predictor)
                encoded = zlib.compress(raw) if compressed else raw
                places.append(len(file))
                sizes.append(len(encoded))
                file += encoded
        tags = {
            254: [subfiles[number] if subfiles else 0],
            256: [width],
            257: [height],
            258: [page.dtype.itemsize * 8] * count,
            259: [8 if compressed else 1],
            262: [photometric],
            277: [count],
            284: [2 if planar else 1],
            317: [predictor],
            339: [_KINDS[page.dtype.kind]] * count,
        }
        tags |= (
            {322: [tile], 323: [tile], 324: places, 325: sizes}
            if tile
            else {273: places, 278: [7], 279: sizes}
        )
        file += b"\0" * (len(file) % 2)
        struct.pack_into(f"{order}L", file, link, len(file))
        link = _add_directory(file, tags, order)
    return bytes(file)


def encode_twelve_bits(grey: np.ndarray) -> bytes:
    """Returns a TIFF of one strip [H, W], W even, whose samples are two to three bytes."""
    height, width = grey.shape
    first, second = (grey.reshape(-1, 2)[:, side].astype(np.uint32) for side in (0, 1))
    packed = (first << 12 | second).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    file = bytearray(b"II*\0" + struct.pack("<L", 8 + len(packed)) + packed)
    tags = {256: [width], 257: [height], 258: [12], 259: [1], 262: [1], 273: [8], 277: [1], 278: [height]}
    _add_directory(file, tags | {279: [len(packed)]}, "<")
    return bytes(file)


def _parts(plane: np.ndarray, tile: int) -> list[np.ndarray]:
    _, height, width = plane.shape
    if not tile:
        return [plane[:, top : top + 7] for top in range(0, height, 7)]
    padded = np.pad(plane, ((0, 0), (0, -height % tile), (0, -width % tile)))
    places = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
    return [padded[:, top : top + tile, left : left + tile] for top, left in places]


def _differ(rows: np.ndarray, order: str, predictor: int) -> bytes:
    """Rows [h, w, C] as bytes, or as differences along w."""
    if predictor == 3:  # bytes of a row by their weight, the highest first, then differences of those
        by_weight = (
            rows.astype(rows.dtype.newbyteorder(">")).view(np.uint8).reshape(len(rows), -1, rows.itemsize)
        )
        flat = by_weight.transpose(0, 2, 1).reshape(len(rows), -1, rows.shape[2])
        return np.diff(flat, axis=1, prepend=np.uint8(0)).tobytes()
    if predictor == 2:
        whole = rows.view(f"u{rows.itemsize}")
        rows = np.diff(whole, axis=1, prepend=whole.dtype.type(0))
    return rows.astype(rows.dtype.newbyteorder(order)).tobytes()


def _add_directory(file: bytearray, tags: dict[int, list[int]], order: str) -> int:
    """Appends a directory; returns where the place of the next one stands."""
    start = len(file)
    behind = start + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}L", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack(f"{order}L", behind + len(values)), values + packed
        entries += struct.pack(f"{order}HHL", tag, 4, len(numbers)) + packed
    file += struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + values
    return start + 2 + 12 * len(tags)
