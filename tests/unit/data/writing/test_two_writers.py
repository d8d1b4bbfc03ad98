"""Two starts that write the same shards: the second waits for the first and finds its result; no half is deleted."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.shards import DataError, load_manifest, split_names
from data.verify_shards import verify
from data.writing import reshuffling
from data.writing.folder_shards import make_folder_shards
from data.writing.image_sources import FileSource, ImageFile
from data.writing.reshuffling import ReshuffleOptions
from data.writing.shard_writing import write_split
from tests.unit.data.conftest import encode_image

ROOT = Path(__file__).resolve().parents[4]
CONTEXT = multiprocessing.get_context("fork")
LOAD = FileSource.load


def write_photos(folder: Path, count: int) -> list[ImageFile]:
    folder.mkdir()
    files = [ImageFile(str(folder / f"{number}.png")) for number in range(count)]
    for number, file in enumerate(files):
        Path(file.path).write_bytes(encode_image(number))
    return files


@contextmanager
def writing(target: Callable[[], object], out: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """Runs a writer in another process, which has begun a shard and goes on once the block waits or ends."""

    def slowly(source: FileSource, index: int) -> object:
        time.sleep(0.5)
        return LOAD(source, index)

    def run() -> None:
        FileSource.load = slowly  # type: ignore[assignment,method-assign]
        target()

    process = CONTEXT.Process(target=run)
    process.start()
    deadline = time.monotonic() + 60
    while not list(out.rglob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process
    process.join(60)
    assert process.exitcode == 0


def test_a_second_start_finds_what_the_first_has_written(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photos, cache = tmp_path / "photos", tmp_path / "cache"
    write_photos(photos, 4)
    with writing(lambda: make_folder_shards(str(photos), str(cache)), cache) as first:
        made = make_folder_shards(str(photos), str(cache))
        assert f"waiting for process {first.pid} on host" in caplog.text and "once" not in caplog.text
    assert load_manifest(made, "train").num_samples == 4 and not list(Path(made).glob(".*.tmp"))


@pytest.mark.parametrize("has_locks", [True, False])
def test_two_commands_with_the_same_out(tmp_path, caplog, monkeypatch, has_locks):
    """Where the file system refuses locks, both write, and neither deletes the other's half."""
    caplog.set_level(logging.INFO)
    out, files = str(tmp_path / "out"), write_photos(tmp_path / "photos", 4)

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with writing(lambda: write_split(FileSource(files, ()), "train", out), Path(out)):
        write_split(FileSource(files, ()), "train", out)
        assert ("1 of 1 shards are there" if has_locks else "has no locks") in caplog.text
    assert verify(out) == []


def test_another_split_is_not_waited_for_and_both_are_in_the_manifest(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out, files = str(tmp_path / "out"), write_photos(tmp_path / "photos", 4)
    with writing(lambda: write_split(FileSource(files, ()), "train", out), Path(out)) as first:
        write_split(FileSource(files, ()), "val", out)
        assert first.is_alive() and "waiting" not in caplog.text
    assert split_names(out) == ["train", "val"]


def test_of_two_that_reshuffle_into_one_folder_one_does(tmp_path, make_set, monkeypatch):
    """The second looks whether the folder is empty when the first has ended, and not only before."""
    source, out, hold = make_set([4, 4]), str(tmp_path / "out"), reshuffling.hold

    def wait(directory: str, what: str) -> object:
        monkeypatch.setattr(reshuffling, "hold", hold)
        reshuffling.reshuffle(source, directory, ReshuffleOptions())
        return hold(directory, what)

    monkeypatch.setattr(reshuffling, "hold", wait)
    with pytest.raises(DataError, match="which is not empty"):
        reshuffling.reshuffle(source, out, ReshuffleOptions())
    assert verify(out) == []


def test_a_holder_that_was_killed_holds_nothing(tmp_path):
    """Nor do the processes that wrote for it: they end with it."""
    out = tmp_path / "out"
    write_photos(tmp_path / "photos", 6)
    code = (
        "import sys, time; from data import make_shards; from data.writing.image_sources import FileSource\n"
        "FileSource.load = lambda self, index: time.sleep(60)\n"
        "make_shards.main(sys.argv[1:])"
    )
    arguments = ["imagefolder", str(tmp_path / "photos"), "--out", str(out), "--samples-per-shard", "2"]
    first = subprocess.Popen([sys.executable, "-c", code, *arguments, "--processes", "2"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(out.glob(".*.tmp"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    second = [sys.executable, "-m", "data.make_shards", *arguments, "--processes", "2"]
    subprocess.run(second, cwd=ROOT, check=True, timeout=50)
    assert verify(str(out)) == [] and not list(out.glob(".*.tmp"))
