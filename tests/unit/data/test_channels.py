"""Images of many bands from a folder of files to normalised crops; what has no colours gets no colour operation."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import torch
import webdataset
import yaml
from PIL import Image

from data import make_shards, show_crops, verify_shards
from data.config import AugmentationConfig, DataConfig
from data.members import choose_image
from data.shards import DataError, load_manifest
from data.stream.pipeline import TrainingStream
from data.stream.reader import ShardReader
from data.views.augmentations import DeviceAugmentation
from data.views.config import PixelFormat
from data.views.decoding import BadImageError, decode_image, find_image
from data.views.pictures import BandImage, decode_picture
from data.writing.folder_shards import make_folder_shards
from tests.helpers.bands import encode_npy, encode_tiff, encode_twelve_bits

NUM_IMAGES = 12


def draw(number: int, channels: int, dtype: str = "u2") -> np.ndarray:
    """Bands whose levels differ by their number; twelve bits of sixteen, as cameras have them."""
    noise = np.random.default_rng(number).integers(0, 100, (channels, 24, 20))
    return (noise + 40 * np.arange(channels)[:, None, None]).astype(dtype)


@pytest.fixture
def folder(tmp_path):
    """Half arrays, half TIFF, which are the same to a reader."""

    def make(channels: int = 13, dtype: str = "u2", *, name: str = "images"):
        (tmp_path / name).mkdir()
        for number in range(NUM_IMAGES):
            bands = draw(number, channels, dtype)
            suffix, encode = ("npy", encode_npy) if number % 2 else ("tif", encode_tiff)
            (tmp_path / name / f"{number}.{suffix}").write_bytes(encode(bands))
        return tmp_path / name

    return make


@pytest.fixture
def shards(tmp_path, folder):
    def make(channels: int = 13, dtype: str = "u2"):
        # Through arrays alone: beside images of another kind they would be passed over.
        source = folder(channels, dtype)
        for path in source.glob("*.tif"):
            path.rename(path.with_suffix(".tiff"))
        for path in source.glob("*.npy"):
            path.write_bytes(encode_tiff(np.load(path)))
            path.rename(path.with_suffix(".tif"))
        assert make_shards.main(["imagefolder", str(source), "--out", str(tmp_path / "set")]) == 0
        return str(tmp_path / "set")

    return make


def stream_of(shards: str, **options) -> TrainingStream:
    sizes = {
        "global_crop_size": 16,
        "local_crop_size": 8,
        "num_local_crops": 2,
        "num_workers": 0,
        "num_lanes": 1,
    }
    config = DataConfig(**{"shards": shards, "mean": (0.0,), "std": (1.0,), **sizes, **options})
    return TrainingStream(config, seed=0, global_batch_size=6, micro_batch_size=6, rank=0, world_size=1)


KINDS = [
    (1, "u2", "uint16"),
    (4, "u1", "uint8"),
    (13, "u2", "uint16"),
    (13, "f4", "float32"),
    (2, "i2", "float32"),
]


@pytest.mark.parametrize(("channels", "dtype", "pixels"), KINDS)
def test_a_folder_of_bands_becomes_crops_in_their_own_numbers(shards, channels, dtype, pixels):
    """No number leaves the images' range, none is cut to 8 bits, and every band keeps its level."""
    stream = stream_of(shards(channels, dtype), channels=channels, pixels=pixels, recipe="none")
    batch = next(iter(stream))
    assert batch.global_crops.dtype == getattr(torch, pixels)
    assert batch.global_crops.shape == (2, 6, channels, 16, 16) and batch.local_crops.shape[2] == channels
    crops = batch.global_crops.float()
    level = crops.mean(dim=(0, 1, 3, 4)) - 40 * torch.arange(channels)
    assert torch.allclose(level, torch.full((channels,), 49.5), atol=6)
    assert crops.min() >= -30 and crops.max() < 40 * channels + 130
    augmented = DeviceAugmentation(stream.config)(batch).global_crops
    assert torch.allclose(augmented, crops / stream.config.format.full_scale, rtol=1e-6)
    assert torch.equal(batch.global_crops.float(), crops)  # the batch is not written to


def test_deep_crops_are_the_images_crops_rounded(shards):
    """The whole image at its own size comes back bit for bit, whatever the interpolation."""
    path = shards(13, "u2")
    whole = AugmentationConfig(global_crop_scale=(1.0, 1.0), flip=0.0)
    stream = stream_of(
        path, channels=13, pixels="uint16", recipe="none", global_crop_size=(24, 20), augmentation=whole
    )
    batch = next(iter(stream))
    originals = [draw(number, 13) for number in range(NUM_IMAGES)]
    for crop in batch.global_crops[0].numpy():
        assert any(np.array_equal(crop, original) for original in originals)


@pytest.mark.parametrize("pixels", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("channels", [3, 5])
def test_recipes_lose_what_is_about_colours(channels, pixels, caplog):
    config = DataConfig(shards="x", channels=channels, pixels=pixels, mean=(0.5,), std=(0.2,))
    recipe = config.resolved_augmentation
    has_colours = channels == 3 and pixels != "float32"
    assert recipe.jitter_strength == ((0.4, 0.4, 0.2, 0.1) if has_colours else (0.4, 0.4, 0.0, 0.0))
    assert recipe.gray == (0.2 if has_colours else 0.0)
    assert recipe.global_solarize == ((0.0, 0.2) if channels == 3 and pixels == "uint8" else (0.0,))
    assert recipe.jitter == 0.8 and recipe.global_blur == (1.0, 0.1)
    assert bool(config.left_out_of_recipe) == (channels != 3 or pixels != "uint8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gray": 0.2},
            r"data\.augmentation\.gray is 0\.2; expected 0\.0, as images of 13 x uint16 have no colours",
        ),
        (
            {"jitter_strength": (0.4, 0.4, 0.2, 0.0)},
            r"jitter_strength is .*; expected \(0\.4, 0\.4, 0\.0, 0\.0\)",
        ),
        ({"local_solarize": 0.1}, r"data\.augmentation\.local_solarize is 0\.1; expected 0\.0"),
    ],
)
def test_a_colour_operation_by_name_is_refused(options, message):
    given = {"shards": "x", "channels": 13, "pixels": "uint16", "mean": (0.1,), "std": (0.1,)}
    with pytest.raises(ValueError, match=message):
        DataConfig(**given, augmentation=AugmentationConfig(**options))
    DataConfig(**given, augmentation=AugmentationConfig(gray=0.0, jitter_strength=(0.2, 0.2, 0.0, 0.0)))


def test_brightness_and_contrast_leave_bands_their_proportions():
    """Contrast is about each band's own mean: bands of other levels are not drawn together."""
    augmentation = AugmentationConfig(
        jitter=1.0, jitter_strength=(0.0, 1.0, 0.0, 0.0), global_blur=(0.0,), local_blur=0.0
    )
    for pixels in ("uint16", "float32"):
        config = DataConfig(
            shards="x", channels=4, pixels=pixels, mean=(0.0,), std=(1.0,), augmentation=augmentation
        )
        augment = DeviceAugmentation(config)
        images = torch.rand(8, 4, 6, 6) * torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None, None] / 400 + 0.2
        before = images.mean(dim=(2, 3))
        augment._jitter_(images, augment.draw(np.arange(8, dtype=np.uint64), 0))
        assert torch.allclose(images.mean(dim=(2, 3)), before, rtol=1e-5)


def test_unbounded_numbers_are_not_clamped():
    config = DataConfig(shards="x", channels=4, pixels="float32", mean=(0.0,), std=(1.0,))
    augment = DeviceAugmentation(config)
    images = torch.randn(8, 4, 6, 6) * 500
    augment._jitter_(images, augment.draw(np.arange(8, dtype=np.uint64), 0))
    assert images.min() < -100 and images.max() > 100


def test_a_member_of_other_bands_is_named_before_the_run_and_counted_in_it(tmp_path, caplog):
    """All wrong: one line names the first sample. One wrong: it is skipped, counted and named."""
    directory = tmp_path / "set"
    directory.mkdir()
    with webdataset.TarWriter(str(directory / "train-000000.tar"), mtime=0) as writer:
        for number in range(NUM_IMAGES):
            bands = draw(number, 4 if number == 10 else 13)
            writer.write({"__key__": f"k{number:02d}", "tif": encode_tiff(bands)})
    (finding,) = verify_shards.write_manifests(str(directory))
    assert "sample 10 (k10): has other bands or another type than most images (4 x uint16; exp" in str(
        finding
    )
    assert not verify_shards.write_manifests(str(directory), num_decoded=0)
    assert verify_shards.verify(str(directory)) == [finding]
    with pytest.raises(DataError) as caught:
        stream_of(str(directory), channels=4, pixels="uint16")
    said = str(caught.value)
    assert "(k00: 13 bands of 24 x 20; expected 4)" in said and "\n" not in said
    stream = stream_of(str(directory), channels=13, pixels="uint16", max_skipped_fraction=0.5)
    batches = iter(stream)
    found = [name for _ in range(3) for name in next(batches).skipped]
    assert found and all(
        name.startswith("k10 (sample 10): 4 bands of 24 x 20; expected 13") for name in found
    )
    with pytest.raises(DataError, match=r"type uint16; expected uint8\).*--statistics prints"):
        stream_of(str(directory), channels=13)


def test_bits_that_photographs_lose_are_said(shards, caplog):
    path = shards(1, "u2")
    stream_of(path, channels=1)
    assert "set data.pixels=uint16" in caplog.text
    caplog.clear()
    stream_of(path, channels=1, pixels="uint16")
    assert "set data.pixels" not in caplog.text


def test_what_does_not_apply_is_said(shards, caplog):
    caplog.set_level("INFO")
    stream_of(shards(13, "u2"), channels=13, pixels="uint16")
    assert "data.recipe dino: images of 13 x uint16 have no colours, so that jitter_strength, gray, global_sol" in caplog.text  # noqa: E501  # fmt: skip


@pytest.mark.parametrize(("channels", "dtype"), [(1, "u1"), (3, "u1"), (4, "u2"), (13, "f4")])
def test_statistics_can_be_pasted(shards, channels, dtype, capsys, tmp_path):
    """They are those of all pixels, in the unit that training divides by; what is printed builds a configuration."""
    path = shards(channels, dtype)
    images = np.stack([draw(number, channels, dtype) for number in range(NUM_IMAGES)]).astype(np.float64)
    capsys.readouterr()
    assert verify_shards.main([path, "--statistics", "--decode", "all", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    printed = yaml.safe_load(
        said[said.index("# 12 of 12 images of train") : said.index(path, said.index("data:"))]
    )
    config = DataConfig(shards=path, **printed["data"])
    values = images / config.format.full_scale
    assert config.channels == channels and np.dtype(config.pixels) == np.dtype(dtype)
    assert np.allclose(config.mean, values.mean(axis=(0, 2, 3)), rtol=1e-5)
    assert np.allclose(config.std, values.std(axis=(0, 2, 3)), rtol=1e-5)


def test_statistics_of_mixed_images_say_what_they_leave_out(tmp_path, capsys):
    directory = tmp_path / "set"
    directory.mkdir()
    with webdataset.TarWriter(str(directory / "train-000000.tar"), mtime=0) as writer:
        for number in range(6):
            kind = {0: (1, "u1"), 1: (4, "u2")}.get(number, (3, "u1"))
            writer.write({"__key__": f"k{number}", "tif": encode_tiff(draw(number, *kind), photometric=1)})
    assert not verify_shards.write_manifests(str(directory), num_decoded=0)
    assert verify_shards.main([str(directory), "--statistics", "--processes", "1"]) == 2
    said = capsys.readouterr().out
    # Grey among RGB is read as RGB, and so it is measured.
    assert "# 5 of 6 images of train; left out: 1 of 4 x uint16, the first train-000000.tar: k1" in said
    values = np.concatenate(
        [
            draw(0, 1, "u1").repeat(3, axis=0).reshape(3, -1),
            *(draw(n, 3, "u1").reshape(3, -1) for n in range(2, 6)),
        ],
        axis=1,
    )
    printed = yaml.safe_load(said[said.index("data:") : said.index(str(directory), said.index("data:"))])
    assert np.allclose(printed["data"]["mean"], values.mean(axis=1) / 255, rtol=1e-5)


def test_statistics_of_a_band_of_one_number_can_be_pasted_too(tmp_path, capsys):
    directory = tmp_path / "set"
    directory.mkdir()
    with webdataset.TarWriter(str(directory / "train-000000.tar"), mtime=0) as writer:
        for number in range(4):
            bands = draw(number, 4)
            bands[2] = 7
            writer.write({"__key__": f"k{number}", "npy": encode_npy(bands)})
    assert not verify_shards.write_manifests(str(directory))
    assert verify_shards.main([str(directory), "--statistics", "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "# one number in all of channel 2 (from 0): std is 1 there" in said
    printed = yaml.safe_load(said[said.index("data:") : said.index(str(directory), said.index("data:"))])
    assert DataConfig(shards=str(directory), **printed["data"]).std[2] == 1


def test_arrays_are_images_where_there_are_no_others(folder, tmp_path):
    both = folder(4)
    made = make_folder_shards(str(both), str(tmp_path / "cache"))
    manifest = load_manifest(made, "train")
    assert manifest.num_samples == NUM_IMAGES // 2  # the TIFFs: arrays beside images may be anything
    for path in both.glob("*.tif"):
        path.unlink()
    alone = load_manifest(make_folder_shards(str(both), str(tmp_path / "cache")), "train")
    assert alone.num_samples == NUM_IMAGES // 2
    (_, sample), *_ = ShardReader(alone).read(0, range(1))
    assert choose_image(sample.key, sample.members) == "npy"
    assert choose_image("k", {"npy": b"", "jpg": b"", "cls": b""}) == "jpg"
    assert choose_image("k", {"npy": b"", "seg.png": b""}) == "npy"
    picture = decode_picture(find_image(sample), dataclasses.replace(DataConfig(shards="x").format, channels=4, pixels="uint16"), max_pixels=10**6)  # noqa: E501  # fmt: skip
    assert isinstance(picture, BandImage) and picture.size == (20, 24)


def test_what_has_more_than_8_bits_is_not_shrunk(folder, tmp_path):
    source = folder(4)
    arguments = ["imagefolder", str(source), "--out", str(tmp_path / "set"), "--max-side", "8"]
    assert make_shards.main(arguments) == 0
    manifest = load_manifest(str(tmp_path / "set"), "train")
    for _, sample in ShardReader(manifest).read(0, range(manifest.num_samples)):
        assert (source / f"{sample.key.split('-')[1]}.tif").read_bytes() == sample.members["tif"]


def test_a_picture_of_bands_is_drawn(shards, tmp_path, capsys):
    out = tmp_path / "crops.png"
    options = [
        "--channels",
        "13",
        "--pixels",
        "uint16",
        "--global-size",
        "20",
        "--images",
        "2",
        "--local-crops",
        "0",
    ]
    path = shards(13, "u2")
    assert show_crops.main([path, "--out", str(out), *options, "--bands", "12", "5", "0"]) == 0
    assert show_crops.main([path, "--out", str(out), *options, "--bands", "13", "5", "0"]) == 2
    assert "--bands holds 13; expected 0 to 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"channels": 13},
            r"data\.mean is .*; expected one number or 13, as data\.channels is 13: verify_shards --statistics",
        ),
        (
            {"mean": (123.7,)},
            r"data\.mean is .*; expected numbers in \[0, 1\], as uint8 pixels are divided by 255",
        ),
        (
            {"pixels": "uint16", "std": (90.0,)},
            r"data\.std is .*; expected numbers in \[0, 10\], as uint16 pixels",
        ),
    ],
)
def test_statistics_of_another_unit_or_number_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(shards="x", **options)
    DataConfig(shards="x", pixels="float32", mean=(-1200.0,), std=(350.0,))


def write_members(directory, *members):
    """Shards of one member each; returns what training finds wrong with them in its first epoch, and what is found."""
    directory.mkdir()
    with webdataset.TarWriter(str(directory / "train-000000.tar"), mtime=0) as writer:
        for number, (suffix, encoded) in enumerate(members):
            writer.write({"__key__": f"k{number}", suffix: encoded})
    findings = verify_shards.write_manifests(str(directory))
    assert not verify_shards.write_manifests(str(directory), num_decoded=0)
    assert verify_shards.verify(str(directory)) == findings
    return [str(finding) for finding in findings]


def statistics_of(directory, capsys):
    verify_shards.main([str(directory), "--statistics", "--processes", "1"])
    said = capsys.readouterr().out
    return said, yaml.safe_load(said[said.index("data:") : said.index(str(directory), said.index("data:"))])[
        "data"
    ]


def skipped_by_training(directory, **options):
    stream = stream_of(str(directory), max_skipped_fraction=1, recipe="none", **options)
    return sorted(
        {name.split(" ")[0] for _, batch in zip(range(4), stream, strict=False) for name in batch.skipped}
    )


def encode_png(array, mode=None):
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(stream, "PNG")
    return stream.getvalue()


def test_what_training_refuses_verify_shards_names(tmp_path, capsys):
    """It called sets well of which training then refused images, or all of them."""
    holes = np.where(draw(0, 4, "f4") > 60, np.nan, draw(0, 4, "f4"))
    good = [("npy", encode_npy(draw(number, 4, "f4"))) for number in range(5)]
    odd = [
        ("npy", encode_npy(holes)),
        ("npy", encode_npy(draw(9, 5, "f4"))),
        ("npy", encode_npy(draw(9, 4, "u1"))),
        ("npy", encode_npy(draw(9, 4, "u2") > 50)),
    ]
    said = "\n".join(write_members(tmp_path / "set", *good, *odd))
    assert "sample 5 (k5): cannot be decoded (values that are not finite)" in said
    assert (
        "sample 6 (k6): has other bands or another type than most images (5 x float32; expected 4 x float32)"
        in said
    )
    # Bytes can be read as float32, but would be 255 times too large beside the others: they are named as well.
    assert "and 1 more like it" in said
    text, printed = statistics_of(tmp_path / "set", capsys)
    assert (printed["channels"], printed["pixels"]) == (4, "float32")
    assert "1 that cannot be read" in text and "1 of 4 x uint8, the first train-000000.tar: k7" in text
    assert skipped_by_training(tmp_path / "set", **printed) == ["k5", "k6"]


def test_one_array_of_another_type_gives_no_advice_about_all(tmp_path):
    members = [("npy", encode_npy(draw(number, 4, "u1"))) for number in range(9)]
    members[3] = ("npy", encode_npy(draw(3, 4, "u1") > 9))
    (said,) = write_members(tmp_path / "set", *members)
    assert (
        "sample 3 (k3): has other bands or another type than most images (4 x bool; expected 4 x uint8)"
        in said
    )
    stream = stream_of(str(tmp_path / "set"), channels=4, max_skipped_fraction=1, recipe="none")
    (name,) = {name for _, batch in zip(range(3), stream, strict=False) for name in batch.skipped}
    assert name == "k3 (sample 3): numbers of type bool; expected uint8"


def test_photographs_of_every_kind_are_one_kind(tmp_path, capsys, caplog):
    """Grey, transparent, palettes, deep ones: training converts them, and they are measured as it reads them."""
    picture = np.moveaxis(draw(1, 4, "u1"), 0, 2)
    images = [
        ("png", encode_png(picture[..., :3])),
        ("png", encode_png(picture[..., :3])),
        ("png", encode_png(picture)),
        ("png", encode_png(picture[..., 0])),
        ("png", encode_png(picture[..., 0].astype("u2") * 257)),
    ]
    assert write_members(tmp_path / "set", *images) == []
    text, printed = statistics_of(tmp_path / "set", capsys)
    assert "# 5 of 5 images" in text and (printed["channels"], printed["pixels"]) == (3, "uint8")
    grey = picture[..., :1].repeat(3, axis=2)
    read = np.stack([picture[..., :3]] * 3 + [grey] * 2) / 255
    assert np.allclose(printed["mean"], read.mean(axis=(0, 1, 2)), rtol=1e-5)
    assert skipped_by_training(tmp_path / "set", **printed) == []


def test_a_fourth_channel_is_kept_or_said_to_be_dropped(tmp_path, capsys, caplog):
    """All of them transparent: statistics keep that channel, and training without it says so."""
    picture = np.moveaxis(draw(1, 4, "u1"), 0, 2)
    assert write_members(tmp_path / "set", *[("png", encode_png(picture + n)) for n in range(6)]) == []
    text, printed = statistics_of(tmp_path / "set", capsys)
    assert printed["channels"] == 4 and "# the last channel is transparency" in text
    stream_of(str(tmp_path / "set"))
    assert "transparency is dropped; set data.channels=4 to keep it" in caplog.text
    caplog.clear()
    stream_of(str(tmp_path / "set"), channels=4)
    assert "dropped" not in caplog.text


def test_a_dark_or_signed_tiff_is_none(tmp_path):
    """Twelve bits reach white; signed numbers are not read as unsigned ones, nor 32 bits as 16."""
    values = np.arange(0, 4096, 4096 // 64, dtype="u2")[:64].reshape(8, 8) | 15
    twelve = decode_image(encode_twelve_bits(values), PixelFormat(1), max_pixels=1000)
    assert np.array_equal(twelve[0].numpy(), np.rint(values * (255 / 4095)).astype("u1"))
    for dtype in ("i1", "i2", "i4", "u4"):
        data = encode_tiff(draw(0, 1, dtype))
        with pytest.raises(BadImageError, match=rf"type {np.dtype(dtype)}; expected uint8"):
            decode_image(data, max_pixels=1000)
        assert decode_image(data, PixelFormat(1, "float32"), max_pixels=1000).max() > 80
        members = [("tif", encode_tiff(draw(n, 1, "u1"))) for n in range(3)]
        (said,) = write_members(tmp_path / dtype, *members, ("tif", data))
        assert (
            f"(k3): has other bands or another type than most images (1 x {np.dtype(dtype)}; expected 8 bits in"
            in said
        )
