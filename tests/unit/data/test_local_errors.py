"""Errors of the machine end a run with the remedy and are never counted as bad samples."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from data.local_errors import raise_if_local
from data.make_shards import main
from data.shards import DataError, load_manifest
from data.stream.open_files import FilePool
from data.stream.pipeline import TrainingStream
from data.stream.reader import ShardReader
from data.verify_shards import main as verify_main
from data.verify_shards import verify
from data.views import decoding
from data.views.decoding import BadImageError, decode_image
from data.writing.image_sources import FileSource, ImageFile
from tests.unit.data.conftest import encode_image

ROOT = Path(__file__).resolve().parents[3]
STREAM = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}
REMEDIES = {
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "ulimit -n",
    errno.ENOMEM: "memory",
    errno.EACCES: "right to read",
    errno.ENOSPC: "make room",
    errno.EFBIG: "ulimit -f",
}


@pytest.mark.parametrize("number", REMEDIES)
def test_each_names_what_was_wanted_and_the_remedy(number):
    with pytest.raises(DataError, match=f"k.png cannot be used: {os.strerror(number)}; .*{REMEDIES[number]}"):
        raise_if_local(OSError(number, os.strerror(number)), "k.png")
    raise_if_local(OSError(errno.EIO, "Input/output error"), "k.png")
    raise_if_local(ValueError("no image"), "k.png")


@pytest.mark.parametrize("number", REMEDIES)
@pytest.mark.parametrize("with_index", [True, False])
def test_a_reader_that_is_refused_ends_the_run(make_set, monkeypatch, number, with_index):
    shards = make_set([6])
    if not with_index:
        (Path(shards) / "train.index").unlink()
    reader = ShardReader(load_manifest(shards, "train"))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(reader, "_open", refuse)
    with pytest.raises(DataError, match=r"train-000000.tar cannot be used"):
        list(reader.read(0, range(6)))


def test_a_verifier_that_is_refused_finds_no_fault_with_the_shards(make_set, monkeypatch):
    shards = make_set([3])
    whole = Path.open

    def refuse(path, *arguments, **options):
        if path.suffix == ".tar":
            raise OSError(errno.EMFILE, "Too many open files")
        return whole(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"Too many open files; .*ulimit -n"):
        verify(shards)


def test_a_writer_that_is_refused_leaves_no_image_out(tmp_path, image_bytes, monkeypatch):
    (tmp_path / "0.png").write_bytes(image_bytes(0))
    source = FileSource([ImageFile(str(tmp_path / "0.png")), ImageFile(str(tmp_path / "gone.png"))], ())
    assert source.load(1).kind == "unreadable"

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"0.png cannot be used: Permission denied"):
        source.load(0)


@pytest.mark.parametrize("is_short", [True, False])
def test_a_decoder_without_memory_is_judged_by_whether_there_is_any(image_bytes, monkeypatch, is_short):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(decoding, "_decode", fail)
    monkeypatch.setattr("data.local_errors._memory_is_short", lambda: is_short)
    with pytest.raises(DataError if is_short else BadImageError):
        decode_image(image_bytes(0), max_pixels=1000)


def test_a_verifier_without_memory_finds_no_fault_with_the_images(make_set, monkeypatch):
    shards = make_set([3])

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(decoding, "_decode", fail)
    monkeypatch.setattr("data.local_errors._memory_is_short", lambda: True)
    with pytest.raises(DataError, match="Cannot allocate memory"):
        verify(shards, num_decoded=None)


def test_a_full_disk_is_one_line(tmp_path, image_bytes, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(image_bytes(0))

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data.writing.shard_writing.os.fsync", full)
    assert (
        main(["imagefolder", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--processes", "1"]) == 2
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and "make room on the disk" in line
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.fixture
def small_files():
    """No file may grow beyond two KiB, as on a full disk: a write is refused and names no file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_cannot_be_written_is_one_line_with_the_file_and_leaves_no_half(
    tmp_path, make_set, capsys, request
):
    """Tars by this process and by others, and the small files beside them: index, manifest."""
    (tmp_path / "in").mkdir()
    for number in range(40):
        (tmp_path / "in" / f"{number}.png").write_bytes(encode_image(number))
    images, shards = ["imagefolder", str(tmp_path / "in"), "--samples-per-shard", "20"], make_set([1] * 30)
    request.getfixturevalue("small_files")
    for arguments, named in (
        ([*images, "--out", "one", "--processes", "1"], "one/train-000000.tar"),
        ([*images, "--out", "two", "--processes", "2"], "two/train-00000[01].tar"),
        (["lt", shards, "--imbalance", "1", "--out", "tail"], "tail/manifest.json"),
        (["holdout", shards, "--out", "cut"], "cut/manifest.json"),
        (["reshuffle", shards, "--out", "again"], "again"),
    ):
        arguments[arguments.index("--out") + 1] = str(tmp_path / arguments[arguments.index("--out") + 1])
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(rf"error: \S+/{named} cannot be used: File too large; .*ulimit -f.*", line), line
    assert verify_main([shards, "--write"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "/manifest.json cannot be used: File too large" in line
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_on_a_full_disk_is_not_blamed_on_the_store(tmp_path, monkeypatch):
    from data.stream.remote import ShardCache

    waits: list[float] = []
    cache = ShardCache("memory://nowhere", str(tmp_path), 1 << 20, wait=waits.append)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardCache, "_transfer", full)
    with pytest.raises(DataError, match=r"No space left on device; .*make room on the disk"):
        cache.fetch("train-000000.tar", lambda path: None)
    assert not waits


def test_a_pool_keeps_places_and_few_files(tmp_path):
    paths = [tmp_path / f"{number}" for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 50 + bytes(range(50)))
    pool = FilePool(3)
    files = [pool.open(lambda path=path: path.open("rb")) for path in paths]
    for turn in range(50):
        for number, file in enumerate(files):
            assert file.read(1) == bytes([number]), turn
            assert pool.num_open <= 3
    for turn in range(50):
        for file in files:
            assert file.read(1) == bytes([turn])
    assert files[0].seek(-1, os.SEEK_END) == 99 and files[0].tell() == 99
    for file in files:
        file.close()
    assert pool.num_open == 0


def test_lanes_do_not_need_a_descriptor_each(make_set):
    """64 lanes over 64 shards, where a process may have 40 files open."""
    shards = make_set([6] * 64)
    code = f"""
import re
import resource
from data.config import DataConfig
from data.stream.pipeline import TrainingStream
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
config = DataConfig(shards={shards!r}, recipe="none", global_crop_size=8, num_local_crops=0, num_workers=0,
                    num_lanes=64, shuffle_window=2, max_skipped_fraction=0)
stream = iter(TrainingStream(config, seed=0, global_batch_size=64, micro_batch_size=64, rank=0, world_size=1))
keys = [key for _ in range(6) for key in next(stream).keys]
assert len(set(keys)) == 384, len(set(keys))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_order_does_not_depend_on_the_pool(make_set, make_config, monkeypatch):
    config = make_config(make_set([5] * 8), num_lanes=8)

    def read() -> list[str]:
        batches = iter(TrainingStream(config, **STREAM))
        return [key for _ in range(8) for key in next(batches).keys]

    whole = read()
    monkeypatch.setattr("data.stream.reader.most_open_files", lambda: 1)
    assert read() == whole


def test_the_limit_follows_the_system(monkeypatch):
    from data.stream.open_files import most_open_files

    for soft, expected in ((64, 32), (4, 2), (1 << 20, 512), (resource.RLIM_INFINITY, 512)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert most_open_files() == expected
