"""Arrays and TIFF of any number of bands come back bit for bit, in their own type; anything else is one line."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image

from data.views import bands
from data.views.bands import read_bands
from data.views.config import PixelFormat
from data.views.decoding import BadImageError, decode_bands, decode_image
from data.views.kinds import describe_loss
from tests.helpers.bands import encode_npy, encode_tiff

LIMIT = 10**6
TYPES = ("u1", "i1", "u2", "i2", "u4", "f2", "f4", "f8")


def draw(dtype: str, shape: Sequence[int] = (13, 21, 19), seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(scale=3000, size=shape)
    return values.astype(dtype) if dtype[0] == "f" else values.astype(np.int64).astype(dtype)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [1, 4, 13])
def test_bands_come_back_bit_for_bit(order, dtype, count):
    image = draw(dtype, (count, 21, 19))
    for planar in (False, True):
        for compressed in (False, True):
            for tile in (0, 16):
                data = encode_tiff(image, order=order, planar=planar, compressed=compressed, tile=tile)
                found = read_bands(data, LIMIT)
                assert found.dtype == image.dtype and found.dtype.isnative
                assert np.array_equal(found, image)
    array = image.astype(image.dtype.newbyteorder(order))
    assert np.array_equal(read_bands(encode_npy(array), LIMIT, count), image)
    assert np.array_equal(read_bands(encode_npy(np.moveaxis(array, 0, 2)), LIMIT, count), image)


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("dtype", TYPES)
def test_differences_are_summed_up(dtype, tile):
    """TIFF's predictors, of whole numbers and of floating-point ones, start again in every tile."""
    image = draw(dtype)
    for order in "<>":
        data = encode_tiff(
            image, order=order, compressed=True, tile=tile, predictor=3 if dtype[0] == "f" else 2
        )
        assert np.array_equal(read_bands(data, LIMIT), image)


def test_pages_are_bands_and_overviews_are_none():
    stack = draw("u2", (5, 24, 16))
    assert np.array_equal(read_bands(encode_tiff(*stack[:, None]), LIMIT), stack)
    overview = encode_tiff(stack, stack[:, ::2, ::2], subfiles=(0, 1))
    assert np.array_equal(read_bands(overview, LIMIT), stack)


def test_pages_of_8_bits_are_the_three_bands_that_are_asked_for():
    """Pillow opens the first page alone, as a grey image: statistics had three bands and training one."""
    stack = draw("u1", (3, 24, 16))
    data = encode_tiff(*stack[:, None])
    assert np.array_equal(decode_image(data, max_pixels=LIMIT), stack)
    assert np.array_equal(decode_image(data, PixelFormat(1), max_pixels=LIMIT), stack[:1])
    # Two pages are no colours: a scan of grey pages stays its first one.
    assert np.array_equal(decode_image(encode_tiff(*stack[:2, None]), max_pixels=LIMIT), stack[:1])


def test_numbers_beyond_float32_are_refused_without_a_warning(recwarn):
    huge = np.full((2, 8, 8), 1e300)
    with pytest.raises(BadImageError, match="not finite"):
        decode_image(encode_npy(huge), PixelFormat(2, "float32"), max_pixels=LIMIT)
    assert not recwarn.list


def test_the_axis_of_bands_is_the_expected_one_else_what_leaves_a_square_else_the_shorter():
    image = draw("u2", (13, 8, 8))
    # More bands than pixels on a side, as cut-outs of spectra have.
    for array in (image, np.moveaxis(image, 0, 2)):
        assert read_bands(encode_npy(array), LIMIT).shape == (13, 8, 8)
    assert read_bands(encode_npy(image), LIMIT, 13).shape == (13, 8, 8)
    assert read_bands(encode_npy(np.moveaxis(image, 0, 2)), LIMIT, 13).shape == (13, 8, 8)
    assert read_bands(encode_npy(draw("u1", (30, 40, 4))), LIMIT).shape == (4, 30, 40)
    assert read_bands(encode_npy(draw("u1", (30, 40))), LIMIT).shape == (1, 30, 40)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "I;16", "F"])
def test_what_pillow_opens_keeps_its_channels(mode):
    kind = "TIFF" if mode == "F" else "PNG"
    pixels = draw(
        {"I;16": "u2", "F": "f4"}.get(mode, "u1"), (21, 19, {"RGB": 3, "RGBA": 4, "LA": 2}.get(mode, 1))
    )
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels, None)
    stream = io.BytesIO()
    image.save(stream, kind)
    assert np.array_equal(read_bands(stream.getvalue(), LIMIT), np.moveaxis(pixels, 2, 0))


def test_training_gets_its_type_and_number_or_one_line():
    image = draw("u2", (4, 12, 10))
    for data in (encode_tiff(image), encode_npy(image)):
        deep = decode_image(data, PixelFormat(4, "uint16"), max_pixels=LIMIT)
        assert deep.dtype == torch.uint16 and np.array_equal(deep.numpy(), image)
        plain = decode_image(data, PixelFormat(4, "float32"), max_pixels=LIMIT)
        assert plain.dtype == torch.float32 and np.array_equal(plain.numpy(), image.astype(np.float32))
        with pytest.raises(BadImageError, match=r"^4 bands of 12 x 10; expected 13$"):
            decode_image(data, PixelFormat(13, "uint16"), max_pixels=LIMIT)
        with pytest.raises(BadImageError, match=r"type uint16; expected uint8$"):
            decode_image(data, PixelFormat(4), max_pixels=LIMIT)
        with pytest.raises(BadImageError, match=r"^4 bands of 12 x 10; expected 3"):
            decode_image(data, max_pixels=LIMIT)  # a photograph's reader says it, too
    holes = np.where(image > 30000, np.nan, image.astype(np.float32))
    with pytest.raises(BadImageError, match="not finite"):
        decode_image(encode_npy(holes), PixelFormat(4, "float32"), max_pixels=LIMIT)


def test_a_grey_image_is_repeated_where_three_channels_are_asked_for():
    image = draw("u2", (1, 12, 10))
    for data in (encode_tiff(image), encode_npy(image[0])):
        assert decode_image(data, PixelFormat(3, "uint16"), max_pixels=LIMIT).shape == (1, 12, 10)


def test_lost_bits_are_known():
    """Photographs are scaled to 8 bits, which a run says; nothing that Pillow would cut silently passes as 16 bits."""
    deep, shallow = io.BytesIO(), io.BytesIO()
    Image.fromarray(draw("u2", (12, 10))).save(deep, "PNG")
    Image.fromarray(draw("u1", (12, 10))).save(shallow, "PNG")
    assert describe_loss(deep.getvalue()) and not describe_loss(shallow.getvalue())
    assert describe_loss(encode_tiff(draw("u2", (3, 12, 10)), photometric=2))
    png = bytearray(shallow.getvalue())
    png[24:26] = b"\x10\x02"  # 16 bits, RGB
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    assert describe_loss(bytes(png))
    with pytest.raises(BadImageError, match=r"only 8 are read; expected TIFF or \.npy"):
        decode_bands(bytes(png), max_pixels=LIMIT)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode_npy(np.array(["a", "b"])), "of type <U1; expected numbers"),
        (encode_npy(np.zeros(4, np.uint8)), "of 1 axes"),
        (encode_npy(np.zeros((2, 3, 4, 5), np.uint8)), "of 4 axes"),
        (encode_npy(np.zeros((13, 0, 5), np.uint8)), "no pixels"),
        (
            encode_npy(np.zeros((4, 2000, 900), np.uint8)),
            "900 x 2000 pixels of 4 bands; expected at most 1000000",
        ),
        (
            encode_tiff(np.zeros((4, 2000, 900), np.uint8)),
            "900 x 2000 pixels of 4 bands; expected at most 1000000",
        ),
        (b"MM\0\x2b\0\x08\0\0" + bytes(8), "a big-endian BigTIFF"),
    ],
)
def test_what_is_no_image_is_one_line(data, message):
    with pytest.raises(BadImageError, match=message):
        decode_bands(data, max_pixels=LIMIT)


def test_an_array_is_measured_before_it_is_made(monkeypatch):
    """A header may claim any size; pickled members are refused by their type."""
    monkeypatch.setattr(bands.np, "load", lambda *_, **__: pytest.fail("loaded"))
    for descr, shape, message in (
        ("<f8", (4, 99999, 99999), "99999 x 99999 pixels of 4 bands"),
        ("|O", (2, 2), "of type object; expected numbers"),
    ):
        stream = io.BytesIO()
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        with pytest.raises(BadImageError, match=message):
            decode_bands(stream.getvalue() + b"cos\nsystem\n(S'false'\ntR.", max_pixels=LIMIT)


@pytest.mark.filterwarnings("ignore")
def test_damage_is_refused_or_read_and_never_more():
    """Cut anywhere and flipped anywhere, members give pixels or `BadImageError`."""
    image = draw("u2", (4, 20, 12))
    whole = [
        encode_npy(image),
        encode_tiff(image, compressed=True, tile=16, predictor=2),
        encode_tiff(image.astype("f4"), compressed=True, predictor=3),
        encode_tiff(*image[:, None]),
    ]
    dice, refused = random.Random(0), 0
    for data in whole:
        for trial in range(150):
            damaged = bytearray(data[: dice.randrange(len(data))] if trial % 2 else data)
            for _ in range(trial % 4):
                at = dice.choice(
                    (dice.randrange(len(damaged) or 1), dice.randrange(min(400, len(damaged) or 1)))
                )
                damaged[at : at + 1] = bytes([dice.randrange(256)])
            try:
                decode_bands(bytes(damaged), max_pixels=LIMIT)
            except BadImageError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 200
