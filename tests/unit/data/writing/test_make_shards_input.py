"""What make_shards is given: layouts it must take, mistakes it must answer in one line, remains it must clear away."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.make_shards import main
from data.shards import load_manifest
from data.verify_shards import main as verify_main
from data.writing import fashion_mnist
from data.writing.image_sources import list_image_folder

ROOT = Path(__file__).resolve().parents[4]
MAKE_SHARDS = (sys.executable, "-m", "data.make_shards")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def write_images(folder: Path, image_bytes, count: int, *, offset: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for number, path in enumerate(paths, start=offset):
        path.write_bytes(image_bytes(number))
    return paths


@pytest.mark.skipif(Path("/", fashion_mnist._INSTALLED).exists(), reason="the package is installed here")
def test_without_a_network_the_user_reads_one_line(tmp_path):
    # No apt-get on the path, and a proxy that nobody listens at.
    dead = "http://127.0.0.1:9"
    done = subprocess.run(
        [*MAKE_SHARDS, "fashion-mnist", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PATH": str(tmp_path), "http_proxy": dead, "HTTP_PROXY": dead, "no_proxy": ""},
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Fashion-MNIST cannot be fetched (apt-get is not installed | ")
    for remedy in ("install the Debian package", "network on which", "copy the four *-ubyte.gz files into"):
        assert remedy in line


def test_a_validation_set_can_keep_its_duplicates(tmp_path, image_bytes, capsys):
    paths = write_images(tmp_path / "in", image_bytes, 4)
    paths[3].write_bytes(paths[0].read_bytes())
    arguments = ("imagefolder", tmp_path / "in", "--out", tmp_path / "out")
    assert run(*arguments, "--keep-duplicates") == 0
    assert "left out" not in capsys.readouterr().out
    assert load_manifest(str(tmp_path / "out"), "train").num_samples == 4
    assert run(*arguments) == 0
    assert "left out, duplicate: 1" in capsys.readouterr().out
    assert load_manifest(str(tmp_path / "out"), "train").num_samples == 3


def test_a_replaced_image_is_written_again(tmp_path, image_bytes):
    paths = write_images(tmp_path / "in", image_bytes, 3)
    arguments = ("imagefolder", tmp_path / "in", "--out", tmp_path / "out")
    assert run(*arguments) == 0
    before = (tmp_path / "out" / "train-000000.tar").read_bytes()
    paths[1].write_bytes(image_bytes(77))
    assert run(*arguments) == 0
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() != before


def test_remains_of_killed_runs_are_cleared_away(tmp_path, image_bytes):
    write_images(tmp_path / "in", image_bytes, 3)
    out = tmp_path / "out"
    out.mkdir()
    for name in (".train-000000.tar.4711.tmp", ".val-000000.tar.4711.tmp"):
        (out / name).write_bytes(b"half a shard")
    assert run("imagefolder", tmp_path / "in", "--out", out) == 0
    # Another split's may still be written.
    assert [path.name for path in out.glob("*.tmp")] == [".val-000000.tar.4711.tmp"]


def test_links_to_class_folders_are_followed(tmp_path, image_bytes):
    write_images(tmp_path / "imagenet" / "n01440764", image_bytes, 2)
    write_images(tmp_path / "imagenet" / "n01443537", image_bytes, 2, offset=2)
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "n01443537").symlink_to(tmp_path / "imagenet" / "n01443537")
    listing = list_image_folder(str(tmp_path / "subset"))
    assert len(listing.files) == 2 and listing.classes == ("n01443537",)


@pytest.mark.parametrize(
    "lines",
    [
        ["ImageId,PredictionString", "0,n01440764 1 2 3 4 n01440764 5 6 7 8", "1,n01443537 1 2 3 4"],
        ["0.png n01440764", "", "1.png  n01443537"],
        ["0.png\tn01440764", "1.png\tn01443537"],
    ],
)
def test_class_files_of_flat_folders(tmp_path, image_bytes, lines):
    write_images(tmp_path / "val", image_bytes, 2)
    (tmp_path / "classes.csv").write_text("\n".join(lines))
    listing = list_image_folder(str(tmp_path / "val"), labels_path=str(tmp_path / "classes.csv"))
    assert listing.classes == ("n01440764", "n01443537")
    assert [file.label for file in listing.files] == [0, 1]


def test_class_names_of_several_words_stay_whole(tmp_path, image_bytes):
    write_images(tmp_path / "val", image_bytes, 2)
    (tmp_path / "classes.csv").write_text("0.png, red fox\n1.png, red panda\n")
    listing = list_image_folder(str(tmp_path / "val"), labels_path=str(tmp_path / "classes.csv"))
    assert listing.classes == ("red fox", "red panda")


MISTAKES = {
    "samples": (["--samples-per-shard", "0"], "--samples-per-shard is 0; expected at least 1"),
    "mib": (["--shard-mib", "-1"], "--shard-mib is -1; expected at least 1"),
    "processes": (["--processes", "0"], "--processes is 0; expected at least 1"),
    "side": (["--max-side", "-5"], "--max-side is -5; expected at least 0"),
    "out": (["--out", "FILE"], "File exists"),
    "seed": (["--seed", "-1"], "--seed is -1; expected at least 0; set --seed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_options_that_cannot_work_are_one_line(tmp_path, image_bytes, capsys, mistake):
    write_images(tmp_path / "in", image_bytes, 2)
    (tmp_path / "file").write_text("not a folder")
    options, expected = MISTAKES[mistake]
    changed = [option.replace("FILE", str(tmp_path / "file")) for option in options]
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out", *changed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and expected in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,kind\n0.png\n", "row 2 of .* has another number of columns; expected 2"),
        ("path,kind\n0.png,a\n1.png,b,c\n", "row 3 of .* has another number of columns"),
        ("path,kind\n", "split 'train' has 0 images; expected at least 1"),
        ("", "has no column 'path'"),
        ("path,kind,kind\n0.png,a,b\n", "list.csv has 2 columns 'kind'; expected different names; mend"),
        ("path,kind,note,note\n0.png,a,b,c\n", "list.csv has 2 columns 'note'"),
    ],
)
def test_malformed_lists_are_one_line(tmp_path, image_bytes, capsys, text, expected):
    write_images(tmp_path, image_bytes, 2)
    (tmp_path / "list.csv").write_text(text)
    table = ("csv", tmp_path / "list.csv", "--root", tmp_path, "--label-column", "kind")
    assert run(*table, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line)


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        *[
            (
                "lt",
                ["--imbalance", value],
                rf"--imbalance is {value}; expected 1 to 1,000,000; set --imbalance$",
            )
            for value in ("inf", "1e\\+300", "nan", "0.5")
        ],
        ("lt", ["--seed", "-1"], "--seed is -1; expected at least 0; set --seed$"),
        ("holdout", ["--seed", "-1"], "--seed is -1; expected at least 0; set --seed$"),
        ("lt", ["--split", "val"], "--split is 'val'; expected one of .*: test; set --split$"),
        (
            "lt",
            ["--split", "test", "nowhere"],
            "SHARDS is 'nowhere'; expected an existing .*, or set SHARDS$",
        ),
        ("holdout", ["nowhere"], "SHARDS is 'nowhere'; expected an existing .*, or set SHARDS$"),
        ("holdout", [], "SHARDS is .*, which has test; expected a set with a split train; set SHARDS$"),
    ],
)
def test_a_sub_sample_s_mistakes_name_its_own_options(
    tmp_path, image_bytes, capsys, command, options, expected
):
    write_images(tmp_path / "in", image_bytes, 2)
    assert run("imagefolder", tmp_path / "in", "--split", "test", "--out", tmp_path / "whole") == 0
    source = options[-1] if options[-1:] == ["nowhere"] else tmp_path / "whole"
    given = [option.replace("\\", "") for option in options if option != "nowhere"]
    assert run(command, source, *given, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line), line
    assert not (tmp_path / "out").exists()


def test_an_image_without_annotation_and_other_categories_are_one_line(tmp_path, image_bytes, capsys):
    write_images(tmp_path / "images", image_bytes, 2)
    whole = {
        "images": [{"id": 5, "file_name": "images/0.png"}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 0}],
        "categories": [{"id": 0, "name": "fox"}],
    }
    changes = {
        "no annotation": {"annotations": []},
        "has category 7, which": {"annotations": [{"id": 1, "image_id": 5, "category_id": 7}]},
        "different categories": {"categories": [{"id": 0, "name": "owl"}]},
        "not of iNaturalist's layout": {"images": [{"file_name": "images/0.png"}]},
    }
    (tmp_path / "train.json").write_text(json.dumps(whole))
    for expected, change in changes.items():
        (tmp_path / "val.json").write_text(json.dumps({**whole, **change}))
        files = ("--train", tmp_path / "train.json", "--val", tmp_path / "val.json")
        assert run("inat2018", "--root", tmp_path, *files, "--out", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line


def test_verify_answers_mistakes_in_one_line(make_set, tmp_path, capsys):
    shards = make_set([2])
    for arguments, expected in (
        ([shards, "--decode", "some"], "--decode is 'some'; expected a number of images a shard, or 'all'"),
        ([str(tmp_path / "nowhere")], "DIRECTORY is "),
        ([str(tmp_path / "nowhere"), "--write"], "is no folder"),
    ):
        assert verify_main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and expected in line


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, image_bytes):
    write_images(tmp_path / "in", image_bytes, 80)
    # Images that take long to decode, so that the interruption comes in the middle.
    large = image_bytes(9, size=500)
    for path in (tmp_path / "in").glob("*.png"):
        path.write_bytes(large + path.name.encode())
    out = tmp_path / "out"
    command = [*MAKE_SHARDS, "imagefolder", str(tmp_path / "in"), "--out", str(out), "--processes", "2"]
    job = subprocess.Popen(
        # A shell starts background jobs with SIGINT ignored, and what they start inherits that.
        ["env", "--default-signal=INT", *command, "--samples-per-shard", "1"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal does: every process of the group
    _, said = job.communicate(timeout=60)
    assert job.returncode == 1, said
    assert said.splitlines() == ["interrupted: the same command goes on with the shards that are missing"]
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 3 <= len(done) < 80 and not (out / "manifest.json").exists()
    assert not list(out.glob("*.tmp"))
    assert run(*command[3:], "--samples-per-shard", "1") == 0
    assert load_manifest(str(out), "train").num_samples == 80
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}.items()
