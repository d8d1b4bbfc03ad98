"""Which files of a folder are images of which class and split, and what happens to all the others."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from data.make_shards import main
from data.shards import load_manifest
from data.verify_shards import verify
from data.writing.folder_walk import walk_images
from data.writing.image_sources import list_image_folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def write_images(
    folder: Path, image_bytes, count: int, *, offset: int = 0, suffix: str = "png"
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.{suffix}" for i in range(count)]
    for number, path in enumerate(paths, start=offset):
        path.write_bytes(image_bytes(number))
    return paths


def classes_of(root: Path) -> dict[str, int]:
    listing = list_image_folder(str(root))
    return {name: sum(file.label == n for file in listing.files) for n, name in enumerate(listing.classes)}


def test_a_link_loop_ends_and_every_image_has_one_class(tmp_path, image_bytes):
    write_images(tmp_path / "a", image_bytes, 2)
    write_images(tmp_path / "b", image_bytes, 3, offset=2)
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b" / "self").symlink_to(".")
    assert classes_of(tmp_path) == {"a": 2, "b": 3}
    _, passed = walk_images(str(tmp_path))
    assert passed.counts == {"link to a folder that is read already": 2}


def test_a_link_never_takes_a_folders_place(tmp_path, image_bytes):
    write_images(tmp_path / "z", image_bytes, 2)
    write_images(tmp_path / "m", image_bytes, 1, offset=2)
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "m" / "deep").symlink_to(tmp_path / "z")
    assert classes_of(tmp_path) == {"m": 1, "z": 2}


def test_links_out_of_the_tree_are_followed_once_and_never_upwards(tmp_path, image_bytes):
    write_images(tmp_path / "store" / "x", image_bytes, 2)
    root = tmp_path / "photos"
    write_images(root / "a", image_bytes, 1, offset=2)
    (root / "b").symlink_to(tmp_path / "store")
    (root / "c").symlink_to(tmp_path / "store" / "x")
    (root / "d").symlink_to(tmp_path)
    assert classes_of(root) == {"a": 1, "b": 2}


def test_hidden_and_system_names_are_no_data(tmp_path, image_bytes):
    write_images(tmp_path / "a", image_bytes, 2)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"):
        write_images(tmp_path / name, image_bytes, 2)
        write_images(tmp_path / "a" / name, image_bytes, 2)
    for name in ("._0.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "a" / name).write_bytes(image_bytes(9))
    assert classes_of(tmp_path) == {"a": 2}
    _, passed = walk_images(str(tmp_path))
    assert passed.counts == {"hidden or system file": 12}


def test_whatever_pillow_opens_is_read_and_the_rest_is_counted(tmp_path, image_bytes, make_config, capsys):
    picture = Image.open(io.BytesIO(image_bytes(0, size=16))).convert("RGB")
    kinds = {"jfif": "JPEG", "jp2": "JPEG2000", "webp": "WEBP", "avif": "AVIF", "TIF": "TIFF", "png": "PNG"}
    (tmp_path / "in").mkdir()
    for number, (suffix, kind) in enumerate(kinds.items()):
        picture.rotate(number * 10).save(tmp_path / "in" / f"{number}.{suffix}", format=kind)
    for number, kind in enumerate(("JPEG", "GIF", "WEBP", "AVIF"), start=100):
        picture.rotate(number).save(tmp_path / "in" / f"without{number}", format=kind)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "unknown").write_text("no image")
    (tmp_path / "in" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 10 images" in said
    assert "passed over, no image (.txt): 1" in said and "notes.txt" in said
    assert "passed over, no image (unknown content, no suffix): 1" in said
    assert "passed over, broken link or special file: 1" in said
    assert ".heic" in said  # without pillow-heif it is passed over, with it this one is broken
    assert verify(str(tmp_path / "out"), num_decoded=None) == []


def test_split_folders_become_splits(tmp_path, image_bytes, capsys):
    for number, split in enumerate(("train", "test")):
        for offset, name in enumerate(("cat", "dog")):
            write_images(tmp_path / "in" / split / name, image_bytes, 3, offset=100 * number + 10 * offset)
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    for split in ("train", "test"):
        manifest = load_manifest(str(tmp_path / "out"), split)
        assert manifest.classes == ("cat", "dog") and manifest.images_per_class == (3, 3)
    assert run("imagefolder", tmp_path / "in", "--split-folders", "no", "--out", tmp_path / "flat") == 0
    assert load_manifest(str(tmp_path / "flat"), "train").classes == ("test", "train")
    assert run("imagefolder", tmp_path / "in", "--split", "val", "--out", tmp_path / "other") == 2
    assert (
        "holds the split folders train, test; expected none where --split is given" in capsys.readouterr().err
    )


def test_a_flat_test_folder_beside_labelled_training_images(tmp_path, image_bytes, capsys):
    write_images(tmp_path / "in" / "train" / "cat", image_bytes, 2)
    write_images(tmp_path / "in" / "test", image_bytes, 2, offset=5)
    (tmp_path / "in" / "sample_submission.csv").write_text("id,label\n")
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert "passed over, file beside split folders: 1" in (said := capsys.readouterr().out)
    assert "sample_submission.csv" in said
    assert load_manifest(str(tmp_path / "out"), "train").classes == ("cat",)
    assert load_manifest(str(tmp_path / "out"), "test").classes == ()


def test_nothing_is_written_when_the_second_split_is_wrong(tmp_path, image_bytes, capsys):
    write_images(tmp_path / "in" / "train" / "cat", image_bytes, 2)
    write_images(tmp_path / "in" / "test" / "dog", image_bytes, 2, offset=5)
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "class 'dog' is not among the 1 classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_class_folder_beside_split_folders_is_a_question(tmp_path, image_bytes, capsys):
    for offset, name in enumerate(("train", "plane")):
        write_images(tmp_path / "in" / name, image_bytes, 1, offset=offset)
    arguments = ("imagefolder", tmp_path / "in", "--out", tmp_path / "out")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "the split folder 'train' beside 'plane'" in error and "--split-folders no" in error
    assert run(*arguments, "--split-folders", "no") == 0
    assert load_manifest(str(tmp_path / "out"), "train").classes == ("plane", "train")


@pytest.mark.parametrize("policy", ["error", "first", "drop"])
def test_one_image_of_two_classes_is_a_named_conflict(tmp_path, image_bytes, capsys, policy):
    write_images(tmp_path / "in" / "a", image_bytes, 3)
    write_images(tmp_path / "in" / "b", image_bytes, 3, offset=3)
    (tmp_path / "in" / "b" / "twin.png").write_bytes(image_bytes(1))
    arguments = ("imagefolder", tmp_path / "in", "--out", tmp_path / "out", "--samples-per-shard", 2)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "a/1.png (a) and" in error and "b/twin.png (b); expected one class an image" in error
    assert not (tmp_path / "out" / "manifest.json").exists()
    for _ in range(2):  # the second run finds everything there
        assert run(*arguments, "--label-conflicts", policy) == (2 if policy == "error" else 0)
        said = capsys.readouterr().out
        if policy != "error":
            counts = {"first": (3, 3), "drop": (2, 3)}[policy]
            assert load_manifest(str(tmp_path / "out"), "train").images_per_class == counts
            assert "b/twin.png: same bytes as" in said and "of two classes" in said
            assert verify(str(tmp_path / "out")) == []
    # Another policy judges again what the one before left out.
    other = {"error": "first", "first": "drop", "drop": "error"}[policy]
    assert run(*arguments, "--label-conflicts", other) == (2 if other == "error" else 0)
    if other == "drop":
        assert load_manifest(str(tmp_path / "out"), "train").images_per_class == (2, 3)


def test_what_is_left_out_is_named_with_its_reason_and_listed(tmp_path, image_bytes, capsys):
    paths = write_images(tmp_path / "in" / "a", image_bytes, 30)
    for number in range(1, 9):
        paths[number].write_bytes(paths[0].read_bytes())
    paths[20].write_bytes(b"no image")
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "left out, duplicate: 8" in said and "a/1.png: same bytes as " in said
    assert "all in train.left_out.txt" in said and "a/20.png: no format that Pillow knows" in said
    listed = (tmp_path / "out" / "train.left_out.txt").read_text().splitlines()
    assert len(listed) == 9 and all(line.count("\t") == 2 for line in listed)


def test_latin_1_names_of_files_and_classes(tmp_path, image_bytes):
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9"))
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / os.fsdecode(b"\xe8%d.png" % number)).write_bytes(image_bytes(number))
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert load_manifest(str(tmp_path / "out"), "train").classes == ("caf\xe9",)
    assert verify(str(tmp_path / "out"), num_decoded=None) == []


def test_a_list_with_a_byte_order_mark_and_one_in_another_encoding(tmp_path, image_bytes, capsys):
    write_images(tmp_path, image_bytes, 2)
    table = (
        "csv",
        tmp_path / "list.csv",
        "--root",
        tmp_path,
        "--label-column",
        "kind",
        "--out",
        tmp_path / "out",
    )
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfpath,kind\n0.png,a\n1.png,b\n")
    assert run(*table) == 0
    (tmp_path / "list.csv").write_bytes(b"path,kind\n0.png,caf\xe9\n1.png,b\n")
    assert run(*table) == 2
    assert "list.csv is not UTF-8 (byte 19 is 0xe9)" in capsys.readouterr().err
    (tmp_path / "list.csv").write_text("path,kind\n0.png,a\n1.png,\n")
    assert run(*table) == 2
    assert "row 3 of" in (said := capsys.readouterr().err) and "has an empty 'kind'" in said


@pytest.mark.parametrize("split", ["100%", "a/b", "", "..", "-x", "a b"])
def test_impossible_names_of_splits_are_one_line(tmp_path, image_bytes, capsys, split):
    write_images(tmp_path / "in", image_bytes, 2)
    (tmp_path / "list.csv").write_text("path\nin/0.png\n")
    assert (
        run("csv", tmp_path / "list.csv", "--root", tmp_path, f"--split={split}", "--out", tmp_path / "out")
        == 2
    )
    assert f"error: --split is {split!r}; expected letters" in capsys.readouterr().err


def test_a_class_folder_without_an_image_is_named(tmp_path, image_bytes):
    write_images(tmp_path / "in" / "full", image_bytes, 1)
    for name in ("empty", ".hidden"):
        (tmp_path / "in" / name).mkdir()
    listing = list_image_folder(str(tmp_path / "in"))
    assert listing.classes == ("full",)
    (line,) = [line for line in listing.passed_over.lines() if "class folder" in line]
    assert "class folder without an image: 1 (" in line and "empty" in line


def test_shards_of_others_are_neither_replaced_nor_removed(tmp_path, image_bytes, capsys):
    write_images(tmp_path / "in", image_bytes, 2)
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"somebody's")
    assert run("imagefolder", tmp_path / "in", "--out", out) == 2
    assert "train-000000.tar was not written by this program" in capsys.readouterr().err
    (out / "train-000000.tar").rename(out / "train-000007.tar")
    assert run("imagefolder", tmp_path / "in", "--out", out) == 0
    assert (out / "train-000007.tar").read_bytes() == b"somebody's"
