"""Images of every kind: decoded right, or refused with a reason and without a crash."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.members import EncodedSample
from data.views.config import PixelFormat
from data.views.decoding import BadImageError, decode_image, decode_to_pil, find_image

LIMIT = 10_000_000


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def decode(data: bytes, channels: int = 3) -> torch.Tensor:
    return decode_image(data, PixelFormat(channels), max_pixels=LIMIT)


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))


def test_rgb_png_is_lossless_and_jpeg_equals_pillow_closely():
    assert torch.equal(decode(encode(RGB, "PNG")), torch.from_numpy(np.array(RGB)).permute(2, 0, 1))
    smooth = RGB.resize((90, 60), Image.BICUBIC)
    data = encode(smooth, "JPEG", quality=95)
    pillow = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1)
    assert (decode(data).int() - pillow.int()).abs().max() <= 2


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("1", "PNG"), ("LA", "PNG")])
def test_gray_images_keep_one_channel(mode, kind):
    assert decode(encode(RGB.convert(mode), kind)).shape == (1, 6, 9)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("P", "GIF"), ("RGB", "WEBP"), ("CMYK", "TIFF")],
)
def test_other_modes_become_rgb(mode, kind):
    pixels = decode(encode(RGB.convert(mode), kind))
    assert pixels.shape == (3, 6, 9) and pixels.dtype == torch.uint8
    reference = np.array(Image.open(io.BytesIO(encode(RGB.convert(mode), kind))).convert("RGB"))
    assert (pixels.permute(1, 2, 0).int().numpy() == reference).all()


def test_one_channel_can_be_asked_of_colour_images():
    for kind in ("PNG", "JPEG", "WEBP"):
        assert decode(encode(RGB, kind), channels=1).shape == (1, 6, 9)


def test_16_bits_keep_their_range():
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    assert decode(encode(Image.fromarray(values), "PNG")).tolist() == [[[0, 1, 128, 255]]]


def test_one_pixel():
    assert decode(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")).flatten().tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_truncated_images_are_refused(kind, keep):
    data = encode(RGB.resize((64, 64)), kind)
    with pytest.raises(BadImageError):
        decode(data[: int(len(data) * keep)])


def test_bogus_bytes_are_refused():
    for data in (b"", b"\0" * 100, b"GIF89a", b"\xff\xd8\xff\xe0 nothing", b"\x89PNG\r\n\x1a\n" + b"\0" * 40):
        with pytest.raises(BadImageError):
            decode(data)


def bomb(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_decompression_bombs_are_refused_unopened():
    with pytest.raises(BadImageError, match="60000 x 60000 pixels; expected at most"):
        decode(bomb(60_000))
    gif = bytearray(encode(RGB.convert("P"), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(BadImageError):
        decode(bytes(gif))


def test_damaged_exif_changes_nothing():
    plain = encode(RGB.resize((32, 32)), "JPEG")
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xde\xad" * 30
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    assert torch.equal(decode(plain[:2] + segment + plain[2:]), decode(plain))


def test_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encode(RGB, "JPEG", exif=exif)).shape == (3, 6, 9)


def test_find_image_by_suffix_only():
    assert find_image(EncodedSample("k", {"cls": b"1", "seg.png": b"x"})) == b"x"
    for members in ({"cls": b"1"}, {"pyd": b"x"}, {"pickle": b"x", "pth": b"y"}):
        with pytest.raises(BadImageError, match="no image among its members"):
            find_image(EncodedSample("k", members))


def test_to_pil_is_rgb():
    assert decode_to_pil(encode(RGB.convert("L"), "PNG"), max_pixels=LIMIT).mode == "RGB"
    assert np.array_equal(np.array(decode_to_pil(encode(RGB, "PNG"), max_pixels=LIMIT)), np.array(RGB))
