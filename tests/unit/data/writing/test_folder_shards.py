"""A folder is enough: written once, again when it has changed, and nothing of what was there is deleted."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from data.shards import DataError, load_manifest, split_names
from data.writing import folder_shards
from data.writing.folder_shards import make_folder_shards
from tests.unit.data.conftest import encode_image


def write_photos(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode_image(number))
    return root


def content(directory: str) -> dict[str, tuple[bytes, int]]:
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_folder_is_written_once_and_again_when_it_has_changed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photos, cache = write_photos(tmp_path / "my photos", "a/1.png", "b/2.png"), str(tmp_path / "cache")
    first = make_folder_shards(str(photos), cache)
    assert "writing the 2 images" in caplog.text and "GiB" in caplog.text
    assert load_manifest(first, "train").classes == ("a", "b")
    before = content(first)
    assert make_folder_shards(f"{photos}/../{photos.name}", cache) == first and content(first) == before
    (photos / "b" / "3.png").write_bytes(encode_image(7))
    caplog.clear()
    second = make_folder_shards(str(photos), cache)
    assert second != first and load_manifest(second, "train").num_samples == 3
    assert content(first) == before and f"stay in {first}" in caplog.text
    # An image that was replaced by another of the same size is a change, too.
    (photos / "b" / "3.png").write_bytes(encode_image(8)[: len(encode_image(7))])
    os.utime(photos / "b" / "3.png", ns=(1, 1))
    assert make_folder_shards(str(photos), cache) not in (first, second)


def test_a_small_folder_has_shards_for_several_workers(tmp_path):
    photos = write_photos(tmp_path / "p", *(f"{number}.png" for number in range(80)))
    assert len(load_manifest(make_folder_shards(str(photos), str(tmp_path / "cache")), "train").shards) == 5


def test_split_folders_are_splits_with_one_numbering_of_classes(tmp_path):
    photos = write_photos(tmp_path / "p", "train/cat/1.png", "train/dog/2.png", "test/dog/3.png")
    made = make_folder_shards(str(photos), str(tmp_path / "cache"))
    assert split_names(made) == ["test", "train"]
    test = load_manifest(made, "test")
    assert test.classes == ("cat", "dog") and test.images_per_class == (0, 1)


def test_an_untidy_folder_is_enough(tmp_path, caplog):
    """Images beside folders, one image in two folders, a broken one, and what is no image."""
    photos = write_photos(tmp_path / "p", "1.png", "2024/2.png", "2025/3.png")
    (photos / "2025" / "again.png").write_bytes(encode_image(1))
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image")
    made = make_folder_shards(str(photos), str(tmp_path / "cache"))
    manifest = load_manifest(made, "train")
    assert manifest.classes == () and manifest.num_samples == 3
    assert sorted(line.split("\t")[0] for line in (Path(made) / "train.left_out.txt").open()) == [
        "broken",
        "duplicate",
    ]


def test_an_image_of_two_classes_is_left_out(tmp_path):
    photos = write_photos(tmp_path / "p", "a/1.png", "b/2.png", "b/3.png")
    (photos / "a" / "3.png").write_bytes((photos / "b" / "3.png").read_bytes())
    manifest = load_manifest(make_folder_shards(str(photos), str(tmp_path / "cache")), "train")
    assert manifest.images_per_class == (1, 1)


def test_an_interrupted_start_is_taken_up(tmp_path, monkeypatch):
    photos, cache = write_photos(tmp_path / "p", "train/1.png", "val/2.png"), str(tmp_path / "cache")
    write, calls = folder_shards.write_split, []

    def stop_at_the_second(source, split, *arguments, **options):
        calls.append(split)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(source, split, *arguments, **options)

    monkeypatch.setattr(folder_shards, "write_split", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make_folder_shards(str(photos), cache)
    (tar,) = (tmp_path / "cache").rglob("train-*.tar")
    written = tar.stat().st_mtime_ns
    made = make_folder_shards(str(photos), cache)
    assert split_names(made) == ["train", "val"] and tar.stat().st_mtime_ns == written


def test_a_mistake_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    with pytest.raises(
        DataError,
        match=r"^data\.images is '[^']*nowhere'; expected an existing folder of images; set data\.images$",
    ):
        make_folder_shards(str(tmp_path / "nowhere"), str(cache))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^data\.images is '.*': it holds no image"):
        make_folder_shards(str(tmp_path / "empty"), str(cache))
    assert not cache.exists()
    photos = write_photos(tmp_path / "p", "1.png")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DataError, match=r"data\.cache_dir has 0\.00 GiB free"):
        make_folder_shards(str(photos), str(cache))
    assert not list(cache.rglob("*.tar"))
