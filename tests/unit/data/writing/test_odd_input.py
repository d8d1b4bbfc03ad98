"""What nobody packs on purpose: pipes, names of several lines, links in a circle, labels that are no text."""

import csv
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.make_shards import main as make_shards
from data.shards import DataError, load_manifest
from data.views.decoding import BadImageError, decode_image
from data.writing.foreign_shards import list_splits, write_manifests
from data.writing.inspection import scan_shard


def _png(number: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


def _write_folder(root: Path, *classes: str, first: int = 0) -> Path:
    for number, name in enumerate(classes, start=first):
        (root / name).mkdir(parents=True)
        for image in range(2):
            (root / name / f"{image}.png").write_bytes(_png(10 * number + image))
    return root


def _write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _run(*arguments: object) -> int:
    return make_shards([*map(str, arguments), "--processes", "1"])


def test_two_folders_of_one_split_are_refused_and_not_halved(tmp_path, capsys):
    root = tmp_path / "in"
    _write_folder(root / "train", "a", "b")
    _write_folder(root / "Train", "a", "b", first=5)
    assert _run("imagefolder", root, "--out", tmp_path / "out") == 2
    assert "holds the folders" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_link_to_itself_is_a_broken_link(tmp_path, capsys):
    root = _write_folder(tmp_path / "in", "a", "b")
    (root / "a" / "self.png").symlink_to("self.png")
    (root / "around").symlink_to("around")
    assert _run("imagefolder", root, "--out", tmp_path / "out") == 0
    assert "broken link or special file: 2" in capsys.readouterr().out
    assert load_manifest(str(tmp_path / "out"), "train").num_samples == 4


def test_a_list_that_names_a_pipe_does_not_wait_for_it(tmp_path):
    root = _write_folder(tmp_path / "in", "a")
    os.mkfifo(root / "pipe.png")
    (tmp_path / "list.csv").write_text("path\npipe.png\na/0.png\n")
    command = ["csv", tmp_path / "list.csv", "--root", root, "--out", tmp_path / "out"]
    # In a process of its own, which the time limit ends: to open a pipe is to wait.
    program = [sys.executable, "-m", "data.make_shards", *map(str, command)]
    assert subprocess.run(program, timeout=120, check=False).returncode == 0
    assert "no regular file" in (tmp_path / "out" / "train.left_out.txt").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\na/\0.png,x\n", "row 2 .* has a zero byte in 'path'"),
        ("path,label\na/0.png," + "x" * (csv.field_size_limit() + 1) + "\n", "line 2 .* is no CSV"),
    ],
    ids=["zero byte", "endless field"],
)
def test_a_list_that_is_no_csv_is_one_line(tmp_path, capsys, text, said):
    root = _write_folder(tmp_path / "in", "a")
    (tmp_path / "list.csv").write_text(text)
    arguments = ("--root", root, "--label-column", "label", "--out", tmp_path / "out")
    assert _run("csv", tmp_path / "list.csv", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(said, line)


def test_no_folder_to_write_to_is_not_the_working_directory(tmp_path, monkeypatch, capsys):
    root = _write_folder(tmp_path / "in", "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert _run("imagefolder", root, "--out", "") == 2
    assert "--out is empty" in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_names_of_several_lines_stay_one_line(tmp_path):
    root = _write_folder(tmp_path / "in", "a\nb", "c")
    (root / "c" / "x\ty\n.png").write_bytes(b"no image")
    (root / "c" / "empty.png").touch()
    assert _run("imagefolder", root, "--out", tmp_path / "out") == 0
    assert load_manifest(str(tmp_path / "out"), "train").classes == ("a\\x0ab", "c")
    lines = (tmp_path / "out" / "train.left_out.txt").read_text().splitlines()
    assert [line.split("\t")[2] for line in lines] == ["the file is empty", "no format that Pillow knows"]
    assert _run("reshuffle", tmp_path / "out", "--out", tmp_path / "again") == 0
    assert load_manifest(str(tmp_path / "again"), "train").classes == ("a\\x0ab", "c")


def test_reshuffling_refuses_class_names_that_its_list_cannot_hold(tmp_path, capsys):
    root = _write_folder(tmp_path / "in", "a ", "a")
    assert _run("imagefolder", root, "--out", tmp_path / "out") == 0
    assert _run("reshuffle", tmp_path / "out", "--out", tmp_path / "again") == 2
    assert "class 'a '" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_values_that_are_not_finite_are_no_image():
    encoded = io.BytesIO()
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(encoded, "TIFF")
    with pytest.raises(BadImageError, match="not finite"):
        decode_image(encoded.getvalue(), max_pixels=100)


@pytest.mark.parametrize("label", [b"1\n2\n", b"\x01\x00\x00\x00", "猫".encode("utf-16"), b"caf\xe9"])
def test_labels_that_are_no_single_line_of_text_are_found(tmp_path, label):
    _write_tar(tmp_path / "train-0.tar", ("k.png", _png(1)), ("k.cls", label))
    (finding,) = write_manifests(str(tmp_path))
    assert finding.message == "has no usable label"


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_whole_and_links_are_counted(tmp_path, layout):
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w", format=layout) as tar:
        for name, kind in (
            ("d" * 150 + "/k.png", tarfile.REGTYPE),
            ("l.png", tarfile.SYMTYPE),
            ("d", tarfile.DIRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "k.png" if kind == tarfile.SYMTYPE else ""
            content = _png(1) if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    scan = scan_shard(path)
    assert len(scan.keys) == 1 and not scan.findings
    assert scan.passed_over == {"link or special file": ["l.png"]}


def test_a_pipe_among_the_shards_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(DataError, match="no regular file"):
        list_splits(str(tmp_path))


def test_a_suffix_in_capitals_is_a_shard_too(tmp_path):
    for name in ("train-0.tar", "train-1.TAR"):
        _write_tar(tmp_path / name, (f"{name[6]}.png", _png(1)))
    assert [file.name for file in list_splits(str(tmp_path))["train"]] == ["train-0.tar", "train-1.TAR"]


@pytest.mark.parametrize(
    "name", ["train-000001 (1)", "train-000001 copy", "train-000001 copy 2", "train-000001 - Copy"]
)
def test_a_second_download_is_no_split_of_its_own(tmp_path, name):
    for stem in ("train-000000", name):
        (tmp_path / f"{stem}.tar").touch()
    assert [file.name for file in list_splits(str(tmp_path))["train"]] == ["train-000000.tar", f"{name}.tar"]
    (tmp_path / "train-000001.tar").touch()
    with pytest.raises(DataError, match=r"lies beside train-000001\.tar, whose copy its name says it is"):
        list_splits(str(tmp_path))
    # Numbers behind a space are names like any other.
    (tmp_path / "other").mkdir()
    for stem in ("photos", "photos 2"):
        (tmp_path / "other" / f"{stem}.tar").touch()
    assert len(list_splits(str(tmp_path / "other"))) == 2
