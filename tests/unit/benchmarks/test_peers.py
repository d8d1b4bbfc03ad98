"""Peers at equal time: what is refused, what is unpacked and measured, and a whole small comparison."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import _peer_runs, peers
from data.make_shards import main as make_shards
from runtime.program import run_program

ROOT = Path(__file__).resolve().parents[3]
LIGHTLY = ROOT / "outputs" / "peers_environment"


@pytest.fixture(autouse=True)
def _cores_as_before():
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    for split, count in (("train", 256), ("test", 32)):
        for number in range(count):
            path = folder / "images" / split / f"class{number % 4}" / f"{split}{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number + count).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(path)
    assert make_shards(["imagefolder", str(folder / "images"), "--out", str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--only", "byol"], "--only is byol; expected names of full, joint, dino, swav, simclr"),
        (["--minutes", "0"], "--minutes is 0.0; expected more than 0"),
        (["--minutes", "nan"], "--minutes is nan; expected more than 0"),
        (["--threads", "100000"], "--threads is 100000; expected 1 to"),
        (["--workers", "0", "-1"], "--workers is [0, -1]; expected 0 or more"),
        (["--lr", "inf"], "--lr is [inf]; expected more than 0"),
        (["--batch", "1"], "--batch is 1; expected 2 or more"),
        (["--data", "nowhere"], "nowhere"),
        (
            ["--environment", "configs"],
            "which holds something else; expected a new folder; set --environment",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, expected, shards, tmp_path, capsys):
    place = ["--data", str(shards), "--threads", "1", "--out", str(tmp_path / "out")]
    assert run_program(peers.main, [*place, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and expected in error, error
    assert not (tmp_path / "out").exists()


def test_peers_read_the_very_bytes_that_we_decode(shards, tmp_path):
    assert _peer_runs.unpack(shards, tmp_path / "train") == 256
    found = sorted((tmp_path / "train" / "images").glob("*/*"))
    originals = (shards.parent / "images" / "train").glob("*/*")
    assert sorted(path.read_bytes() for path in found) == sorted(path.read_bytes() for path in originals)
    assert {path.parent.name for path in found} == {f"000{c}-class{c}" for c in range(4)}
    found[0].write_bytes(b"seen")  # complete: not written again
    assert _peer_runs.unpack(shards, tmp_path / "train") == 256 and found[0].read_bytes() == b"seen"


def test_memory_is_that_of_all_processes_together(monkeypatch):
    monkeypatch.setattr(_peer_runs, "_SAMPLED_EVERY_S", 0.05)
    hold = "import time; block = bytearray(2**26); time.sleep(2)"
    code = f"import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', {hold!r}])\n{hold}\nchild.wait()"
    process = subprocess.Popen([sys.executable, "-c", code])
    with _peer_runs.MemoryGauge(process.pid) as gauge:
        assert process.wait(timeout=60) == 0
    assert 2 * 2**26 < gauge.peak_gib * 2**30 < 3 * 2**26 + 2**26


def make_row(name, *, minutes=10.0, load=1.0):
    return {
        "name": name,
        "settings": {"lr": 0.002, "minutes": 10.0, "threads": 2},
        "top1": {"knn": 0.5, "linear": 0.6, "raw-pixels knn": 0.25},
        "images_per_s": 280.0,
        "in_turn": [310.0, 290.0, 300.0],
        "minutes": minutes,
        "epochs": 4.0,
        "peak_gib": 1.0,
        "workers": 1,
        "load": [0.0, load],
    }


def test_the_table_says_what_is_no_evidence():
    text = peers.write_table([make_row("full"), make_row("dino", minutes=12.0, load=4.0)])
    assert (
        "| full | 0.002 | 50.00 | 60.00 | 300 (290 to 310) | 280 | 10.0 | 4.0 | 1.00 | 1 | 0.0 to 1.0 |"
        in text
    )
    assert "| raw-pixels | | 25.00 |" in text
    assert "other work (dino): no evidence" in text and "minutes asked for: dino." in text
    assert "no evidence" not in peers.write_table([make_row("full")])


def compare(shards, out, *names):
    arguments = [
        "--minutes",
        "0.002",
        "--batch",
        "16",
        "--calibration-steps",
        "4",
        "--rounds",
        "2",
        "--workers",
        "0",
        "--lr",
        "0.002",
    ]
    place = ["--data", str(shards), "--threads", "1", "--out", str(out), "--environment", str(LIGHTLY)]
    return run_program(peers.main, [*arguments, *place, "--only", *names])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", [("full", "joint"), ("dino", "swav", "simclr")], ids=["ours", "lightly"])
def test_a_small_comparison_is_whole_and_goes_on(names, shards, tmp_path, capsys, monkeypatch):
    if "dino" in names and not (LIGHTLY / "installed.txt").is_file():
        pytest.skip(f"{LIGHTLY} is not there; python -m benchmarks.peers makes it")
    assert compare(shards, tmp_path, *names) == 0
    record = json.loads((tmp_path / "peers.json").read_text())
    assert [row["name"] for row in record["contestants"]] == list(names)
    for row in record["contestants"]:
        assert row["steps"] >= 1 and row["images_per_s"] > 0 and row["peak_gib"] > 0.05
        assert 0 <= row["top1"]["knn"] <= 1 and 0 <= row["top1"]["linear"] <= 1
    assert {"random-init knn", "raw-pixels knn"} <= record["contestants"][0]["top1"].keys()
    assert (tmp_path / "peers.md").read_text() == peers.write_table(record["contestants"])
    monkeypatch.setattr(_peer_runs.Bench, "train", None)  # what is done is not done again
    assert compare(shards, tmp_path, *names) == 0
    capsys.readouterr()
    done = tmp_path / f"{names[0]}-lr0.002" / "result.json"
    row = json.loads(done.read_text())
    done.write_text(json.dumps({**row, "settings": {**row["settings"], "seed": 1}}))
    assert compare(shards, tmp_path, *names) == 2
    assert "of a run with other settings" in capsys.readouterr().err
    speeds = json.loads((tmp_path / "speeds.json").read_text())["speeds"]
    assert {name: len(of["images_per_s"]["0"]) for name, of in speeds.items()} == dict.fromkeys(names, 2)
