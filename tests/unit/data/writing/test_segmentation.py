"""Images with label maps into shards: makers' layouts in miniature, and what is wrong with foreign labels."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import EvaluationStream
from data.make_shards import main
from data.members import EncodedSample
from data.shards import DataError, load_manifest
from data.stream.reader import ShardReader
from data.verify_shards import verify, write_manifests
from data.views.decoding import decode_label_map, find_image

SIZE = (12, 8)  # width, height


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def write_image(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_label(
    path: Path, values: np.ndarray | int, mode: str = "L", palette: list[int] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.full((SIZE[1], SIZE[0]), values) if isinstance(values, int) else values
    image = Image.fromarray(array.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = image.copy()
        image.putpalette(palette or [i % 256 for i in range(768)])
    elif mode not in ("L", "I;16"):
        image = image.convert(mode)
    image.save(path)


def write_pairs(root: Path, count: int = 2, values: int = 1, seed: int = 0) -> None:
    for i in range(count):
        write_image(root / f"{i}.jpg", seed + i)
        write_label(root / f"{i}.png", values)


def read_maps(directory: Path, split: str) -> dict[str, np.ndarray]:
    """Label maps by the stem of their image, as they lie in the shards."""
    manifest = load_manifest(str(directory), split)
    found = {}
    for number, shard in enumerate(manifest.shards):
        for _, sample in ShardReader(manifest).read(number, range(shard.samples)):
            assert isinstance(sample, EncodedSample)
            assert find_image(sample) != sample.members["seg.png"]
            image = Image.open(io.BytesIO(sample.members["seg.png"]))
            assert image.mode == "L"
            found[sample.key.split("-", 1)[1]] = np.asarray(image)
    return found


def whole(image: Image.Image, label_map: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(np.array(label_map))


@pytest.mark.parametrize("layout", ["beside", "parallel", "inside"])
def test_folders_in_every_layout(layout, tmp_path):
    places = {
        "beside": ("{split}/{name}.jpg", "{split}/{name}.png"),
        "parallel": ("images/{split}/{name}.jpg", "annotations/{split}/{name}.png"),
        "inside": ("{split}/images/{name}.jpg", "{split}/labels/{name}.png"),
    }[layout]
    expected: dict[str, dict[str, np.ndarray]] = {"train": {}, "test": {}}
    generator = np.random.default_rng(0)
    for split, maps in expected.items():
        for i in range(3):
            image, label = (tmp_path / "in" / place.format(split=split, name=f"{i}") for place in places)
            write_image(image, i)
            maps[f"{i}"] = generator.choice([0, 1, 2, 255], (SIZE[1], SIZE[0])).astype(np.uint8)
            write_label(label, maps[f"{i}"])
    (tmp_path / "in" / "classes.txt").write_text("sky\nroad\ncar\n")
    assert run("segmentation", tmp_path / "in", "--out", tmp_path / "out", "--processes", 1) == 0
    assert not verify(str(tmp_path / "out"))
    for split, maps in expected.items():
        manifest = load_manifest(str(tmp_path / "out"), split)
        assert manifest.classes == ("sky", "road", "car") and manifest.num_samples == 3
        found = read_maps(tmp_path / "out", split)
        assert found.keys() == maps.keys()
        assert all(np.array_equal(found[name], maps[name]) for name in maps)
    stream = EvaluationStream(str(tmp_path / "out"), "train", batch_size=2, dense_transform=whole)
    labels = torch.cat([labels for _, labels, _ in stream])
    assert labels.shape == (3, SIZE[1], SIZE[0]) and labels.dtype == torch.uint8
    assert sorted(labels.sum(dim=(1, 2)).tolist()) == sorted(int(m.sum()) for m in expected["train"].values())


def test_voids_by_name_and_by_value_and_classes_that_begin_elsewhere(tmp_path):
    values = np.tile(np.arange(6), (SIZE[1], 2))
    write_image(tmp_path / "in" / "a.jpg", 0)
    write_label(tmp_path / "in" / "a.png", values)
    (tmp_path / "in" / "classes.txt").write_text("one\nVoid\nthree\nfour\n")
    common = ("segmentation", tmp_path / "in", "--first-class", 1, "--void", 0, 5, "--processes", 1)
    assert run(*common, "--out", tmp_path / "out", "--split", "val") == 0
    assert load_manifest(str(tmp_path / "out"), "val").classes == ("one", "three", "four")
    expected = np.array([255, 0, 255, 1, 2, 255])[values]
    assert np.array_equal(read_maps(tmp_path / "out", "val")["a"], expected)


def test_voc_takes_the_official_lists_and_no_others(tmp_path):
    root = tmp_path / "VOC2012"
    palette = [c for i in range(256) for c in (i // 2, i, 255 - i)]
    for number, name in enumerate(["2007_1", "2007_2", "2008_3", "2008_4"]):
        write_image(root / "JPEGImages" / f"{name}.jpg", number)
        values = np.full((SIZE[1], SIZE[0]), number)
        values[0, 0], values[0, 1] = 255, 20
        write_label(root / "SegmentationClass" / f"{name}.png", values, "P", palette)
        write_label(root / "SegmentationClassAug" / f"{name}.png", 7)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_1\n2007_2\n")
    (lists / "val.txt").write_text("2008_3\n")
    # As in circulation: it holds an image of the official validation split.
    (lists / "trainaug.txt").write_text("2007_1\n2007_2\n2008_3\n2008_4\n")
    assert run("segmentation", root, "--out", tmp_path / "out", "--processes", 1) == 0
    train, val = (read_maps(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train) == ["2007_1", "2007_2"] and sorted(val) == ["2008_3"]
    classes = load_manifest(str(tmp_path / "out"), "val").classes
    assert len(classes) == 21 and classes[0] == "background" and classes[20] == "tvmonitor"
    assert val["2008_3"][0].tolist() == [255, 20] + 10 * [2] and train["2007_2"][3, 3] == 1
    assert not verify(str(tmp_path / "out"))


def test_voc_whose_lists_share_an_image_is_refused(tmp_path, capsys):
    for name in ("a", "b"):
        write_image(tmp_path / "JPEGImages" / f"{name}.jpg", 0)
        write_label(tmp_path / "SegmentationClass" / f"{name}.png", 0)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("b\n")
    assert run("segmentation", tmp_path, "--out", tmp_path / "out") == 2
    assert "1 images, as b.jpg, are in both lists" in capsys.readouterr().err


def test_ade20k_drops_its_zero_and_names_its_classes(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for split, count in (("training", 2), ("validation", 1)):
        for i in range(count):
            name = f"ADE_{split}_{i:08d}"
            write_image(root / "images" / split / f"{name}.jpg", i)
            write_label(root / "annotations" / split / f"{name}.png", np.tile(np.arange(4), (SIZE[1], 3)))
    lines = ["Idx\tRatio\tTrain\tVal\tName", "1\t.16\t11664\t1172\twall", "2\t.1\t9\t8\tbuilding, edifice"]
    (root / "objectInfo150.txt").write_text("\n".join([*lines, "3\t.1\t9\t8\tsky"]))
    assert run("segmentation", root, "--out", tmp_path / "out", "--processes", 1) == 0
    manifest = load_manifest(str(tmp_path / "out"), "val")
    assert manifest.classes == ("wall", "building, edifice", "sky") and manifest.num_samples == 1
    assert read_maps(tmp_path / "out", "val")["ADE_validation_00000000"][0, :4].tolist() == [255, 0, 1, 2]
    assert load_manifest(str(tmp_path / "out"), "train").num_samples == 2


def spoil_size(root):
    write_image(root / "0.jpg", 0, (13, 8))


def spoil_colour(root):
    write_label(root / "0.png", 1, "RGB")


def spoil_void(root):
    write_label(root / "0.png", 11)


def spoil_sixteen_bits(root):
    write_label(root / "0.png", 1000, "I;16")


def spoil_palette_index(root):
    write_label(root / "0.png", 9, "P")


def spoil_palettes(root):
    write_label(root / "0.png", 1, "P", [0, 0, 0, 9, 9, 9])
    write_label(root / "1.png", 1, "P", [0, 0, 0, 8, 8, 8])


def spoil_missing(root):
    (root / "0.png").unlink()


def spoil_bytes(root):
    (root / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")


def spoil_classes(root):
    (root / "classes.txt").unlink()


def spoil_names(root):
    (root / "classes.txt").write_text("void\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_size, "label .*0.png has 12 x 8 pixels and its image 13 x 8; expected the same size"),
        (spoil_colour, r"label .*0.png is a colour image \(RGB\); expected one channel of class indices"),
        (spoil_void, "holds 11 at row 0, column 0; expected a class, 0 to 1, or void, 255; set --void"),
        (spoil_sixteen_bits, "holds 1000 at row 0, column 0; expected a class, 0 to 1"),
        (spoil_palette_index, "holds 9 at .*; of a palette PNG the indices count; set"),
        (spoil_palettes, r"index 1 the colour \(8, 8, 8\), other labels give it \(9, 9, 9\); expected one palette"),
        (spoil_missing, "1 of 2 images have no label, the first .*0.jpg; expected .*0.png; add"),
        (spoil_bytes, "label .*0.png cannot be read .*; expected a PNG of class indices; mend it"),
        (spoil_classes, "has no classes.txt; expected one with the name of every class"),
        (spoil_names, "0 different classes of 0; expected 1 to 255 names"),
    ],
)  # fmt: skip
def test_wrong_labels_are_one_line(spoil, said, tmp_path, capsys):
    write_pairs(tmp_path / "in")
    (tmp_path / "in" / "classes.txt").write_text("sky\nroad\n")
    spoil(tmp_path / "in")
    assert run("segmentation", tmp_path / "in", "--out", tmp_path / "out", "--processes", 1) == 2
    captured = capsys.readouterr().err
    assert captured.count("\n") == 1 and re.search(said, captured)


def test_a_void_that_is_a_class_and_a_folder_without_labels(tmp_path, capsys):
    write_pairs(tmp_path / "in")
    (tmp_path / "in" / "classes.txt").write_text("sky\nroad\n")
    assert run("segmentation", tmp_path / "in", "--void", 1, "--out", tmp_path / "out") == 2
    assert "--void is 1, which is class 'road'" in capsys.readouterr().err
    (tmp_path / "in" / "images").mkdir()
    assert run("segmentation", tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "labels, annotations, masks: none; expected one folder of labels" in capsys.readouterr().err


def test_broken_images_are_left_out_and_counted(tmp_path, capsys):
    write_pairs(tmp_path / "in", 3)
    (tmp_path / "in" / "classes.txt").write_text("sky\nroad\n")
    (tmp_path / "in" / "1.jpg").write_bytes(b"\xff\xd8\xff nothing")
    write_label(tmp_path / "in" / "stray.png", 1)
    assert run("segmentation", tmp_path / "in", "--out", tmp_path / "out", "--processes", 1) == 0
    said = capsys.readouterr().out
    assert "left out, broken: 1" in said and "PNG without an image of its name: 1" in said
    assert sorted(read_maps(tmp_path / "out", "train")) == ["0", "2"]


def test_shards_of_label_maps_stay_so_without_a_manifest_and_reshuffled(tmp_path):
    write_pairs(tmp_path / "in", 4)
    (tmp_path / "in" / "classes.txt").write_text("sky\nroad\n")
    out = tmp_path / "out"
    assert run("segmentation", tmp_path / "in", "--out", out, "--processes", 1) == 0
    assert run("reshuffle", out, "--out", tmp_path / "again", "--processes", 1) == 0
    assert load_manifest(str(tmp_path / "again"), "train").classes == ("sky", "road")
    (out / "manifest.json").unlink()
    (out / "classes.txt").write_text("sky\nroad\n")
    assert not write_manifests(str(out))
    assert load_manifest(str(out), "train").classes == ("sky", "road")


def test_verifying_decodes_label_maps_too(tmp_path):
    write_image(tmp_path / "0.jpg", 0)
    write_label(tmp_path / "0.png", 1)
    write_label(tmp_path / "wide.png", np.ones((8, 13)))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "train-000000.tar", "w") as tar:
        for key, label in (("a", "0.png"), ("b", "wide.png"), ("c", "0.jpg")):
            tar.add(tmp_path / "0.jpg", f"{key}.jpg")
            tar.add(tmp_path / label, f"{key}.seg.png")
    (finding,) = write_manifests(str(tmp_path / "shards"), num_decoded=None)
    assert finding.count == 2 and finding.message == "has no usable label map"
    assert "is L, 13 x 8; expected L (8-bit grey), 12 x 8" in finding.detail and "(b)" in finding.sample


@pytest.mark.parametrize(
    ("values", "mode", "said"),
    [(2, "L", "below 2 or 255"), (1, "RGB", "is RGB"), (None, "L", "cannot be decoded")],
)
def test_a_foreign_label_map_in_a_shard_is_one_line(values, mode, said, tmp_path):
    content = b"no PNG"
    if values is not None:
        write_label(tmp_path / "x.png", values, mode)
        content = (tmp_path / "x.png").read_bytes()
    with pytest.raises(DataError, match=f"the label map of k .*{said}"):
        decode_label_map(content, SIZE, 2, "k")


def test_samples_without_label_map_are_named(tmp_path):
    write_image(tmp_path / "in" / "a" / "0.jpg", 0)
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out", "--processes", 1) == 0
    with pytest.raises(DataError, match=r"has no label map .*make_shards segmentation"):
        list(EvaluationStream(str(tmp_path / "out"), "train", batch_size=1, dense_transform=whole))
