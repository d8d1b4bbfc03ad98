"""Shards behind an address: a store that answers badly, a bounded folder, and no shell by accident."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import random
import shutil
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from data.shards import DataError, load_manifest
from data.stream.pipeline import TrainingStream
from data.stream.remote import ShardCache


class FlakyFileSystem(LocalFileSystem):
    """A store over local files in which some answers are errors and some files arrive cut or changed."""

    protocol = "flaky"
    cachable = False
    failures = 0.1
    opened = 0
    dice = random.Random(0)

    def _strip(self, path: str) -> str:
        return path.removeprefix("flaky://")

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("flaky://") if isinstance(path, str) else path

    def _open(self, path, mode="rb", **options):
        type(self).opened += 1
        content = Path(path).read_bytes()
        roll = self.dice.random()
        if roll < self.failures / 3:
            raise OSError("503 slow down")
        if roll < 2 * self.failures / 3:
            content = content[: len(content) // 2]
        elif roll < self.failures:
            content = content[:-700] + b"?" + content[-699:]
        return io.BytesIO(content)


@pytest.fixture(autouse=True)
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.opened, FlakyFileSystem.dice = 0, random.Random(0)
    FlakyFileSystem.failures = 0.1
    monkeypatch.setattr("data.stream.remote._FIRST_WAIT_S", 0.0)


def ids_of(config, steps=3, batch=10):
    stream = TrainingStream(
        config, seed=0, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1
    )
    batches = iter(stream)
    ids = [next(batches).sample_ids.tolist() for _ in range(steps)]
    stream.close()
    return ids


@pytest.mark.parametrize("failures", [0.1, 0.4])
def test_a_flaky_store_loses_no_sample(make_set, make_config, tmp_path, failures):
    FlakyFileSystem.failures = failures
    shards = make_set([5] * 6)
    config = make_config(f"flaky://{shards}", cache_dir=str(tmp_path / "cache"))
    assert ids_of(config) == ids_of(make_config(shards))
    assert sorted(sample for step in ids_of(config) for sample in step) == list(range(30))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


class BadServer(BaseHTTPRequestHandler):
    """Answers every third request badly: 503, half the body, one byte changed, or too late."""

    root = ""
    number = 0
    troubles = ("503", "cut", "changed", "slow")

    def do_GET(self) -> None:
        type(self).number += 1
        trouble = self.troubles[self.number // 3 % 4] if self.number % 3 == 0 else ""
        content = Path(self.root, self.path.lstrip("/")).read_bytes()
        if trouble == "503":
            self.send_error(503)
            return
        if trouble == "slow":
            time.sleep(0.6)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if trouble == "cut":
            content = content[: len(content) // 2]
        if trouble == "changed":
            content = content[:20] + b"?" + content[21:]
        with contextlib.suppress(OSError):  # who was too late finds nobody listening
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


class WebFileSystem(LocalFileSystem):
    """Reads a web server; its errors are http.client's and urllib's, not all of which are OSErrors."""

    protocol = "web"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return path.removeprefix("web://") if isinstance(path, str) else path

    def _open(self, path, mode="rb", **options):
        with urllib.request.urlopen(f"http://{self._strip_protocol(path)}", timeout=0.3) as answer:
            return io.BytesIO(answer.read())


def test_a_real_server_that_fails_in_every_way_loses_no_sample(make_set, make_config, tmp_path):
    fsspec.register_implementation("web", WebFileSystem, clobber=True)
    shards = make_set([3] * 20)
    BadServer.root, BadServer.number = shards, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), BadServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        config = make_config(f"web://127.0.0.1:{server.server_port}", cache_dir=str(tmp_path / "cache"))
        assert ids_of(config, steps=6) == ids_of(make_config(shards), steps=6)
    finally:
        server.shutdown()
        server.server_close()
    # Twenty tars, the manifest and the index: a third more requests, each kind of trouble at least twice.
    assert BadServer.number >= 30
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_an_index_changed_on_the_way_is_fetched_again(make_set, make_config, tmp_path, monkeypatch):
    FlakyFileSystem.failures = 0.0
    shards = make_set([5] * 6)
    transfer, changed = ShardCache._transfer, []

    def change_once(self: ShardCache, name: str, target: Path) -> None:
        transfer(self, name, target)
        if name == "train.index" and not changed:
            content = bytearray(target.read_bytes())
            content[8] ^= 1
            target.write_bytes(content)
            changed.append(name)

    monkeypatch.setattr(ShardCache, "_transfer", change_once)
    config = make_config(f"flaky://{shards}", cache_dir=str(tmp_path / "cache"))
    assert ids_of(config) == ids_of(make_config(shards)) and changed


def test_a_manifest_cannot_name_files_outside_its_folder(make_set, make_config, tmp_path):
    shards = Path(make_set([3, 3]))
    FlakyFileSystem.failures = 0.0
    (tmp_path / "secret.tar").write_bytes(b"not the store's")
    original = (shards / "manifest.json").read_bytes()
    for name in ("../secret.tar", str(tmp_path / "secret.tar")):
        document = json.loads(original)
        document["splits"]["train"]["shards"][0]["name"] = name
        (shards / "manifest.json").write_text(json.dumps(document))
        with pytest.raises(DataError, match=r"lists '.*secret.tar'; expected a file below that address"):
            ids_of(make_config(f"flaky://{shards}", cache_dir=str(tmp_path / "cache")))
    assert (tmp_path / "secret.tar").read_bytes() == b"not the store's"
    document = json.loads(original)
    document["splits"]["train"]["index_path"] = "../secret.tar"
    (shards / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"lists '../secret.tar'"):
        ids_of(make_config(f"flaky://{shards}", cache_dir=str(tmp_path / "cache")))


def test_workers_share_the_folder(make_set, make_config, tmp_path):
    shards = make_set([5] * 6)
    config = make_config(f"flaky://{shards}", cache_dir=str(tmp_path / "cache"), num_workers=2)
    assert ids_of(config) == ids_of(make_config(shards))


def test_the_folder_is_bounded_and_keeps_what_was_used_last(make_set, tmp_path):
    FlakyFileSystem.failures = 0.0
    shards = make_set([3] * 5)
    manifest = load_manifest(shards, "train")
    size = manifest.shards[0].bytes
    cache = ShardCache(f"flaky://{shards}", str(tmp_path / "cache"), max_bytes=2 * size + 10)
    for shard in manifest.shards:
        with cache.open(shard) as file:
            assert file.read() == (Path(shards) / shard.name).read_bytes()
        assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 2 * size + 10
    assert FlakyFileSystem.opened == 5
    cache.open(manifest.shards[-1]).close()
    assert FlakyFileSystem.opened == 5
    last = manifest.shards[-1]
    assert (tmp_path / "cache" / f"{last.sha256[:16]}-{last.name}").is_file()


@pytest.mark.parametrize("with_index", [True, False])
def test_a_set_written_again_never_meets_its_old_shards(
    make_set, make_config, image_bytes, tmp_path, with_index
):
    FlakyFileSystem.failures = 0.0
    shards, other = Path(make_set([5] * 6)), Path(make_set([5] * 6, name="other", bad={7: image_bytes(99)}))
    if not with_index:
        for folder in (shards, other):
            text = (folder / "manifest.json").read_text()
            (folder / "manifest.json").write_text(text.replace('"train.index"', '""'))
    config = make_config(f"flaky://{shards}", cache_dir=str(tmp_path / "cache"))
    remote, local = pixels_of(config), pixels_of(make_config(str(shards)))
    assert torch.equal(remote, local)
    shutil.rmtree(shards)
    other.rename(shards)
    assert torch.equal(pixels_of(config), pixels_of(make_config(str(shards))))
    assert not torch.equal(pixels_of(config), remote)


def pixels_of(config):
    """Returns the first epoch's global crops by sample."""
    stream = TrainingStream(config, seed=0, global_batch_size=30, micro_batch_size=30, rank=0, world_size=1)
    batch = next(iter(stream))
    return batch.global_crops[:, batch.sample_ids.argsort()]


def test_a_dead_store_is_one_clear_error_after_longer_and_longer_waits(make_set, make_config, tmp_path):
    FlakyFileSystem.failures = 1.0
    shards = make_set([3])
    waits: list[float] = []
    cache = ShardCache(f"flaky://{shards}", str(tmp_path / "cache"), 10**9, wait=waits.append)
    with pytest.raises(DataError, match=r"train-000000.tar of flaky://.* could not be fetched in 6 tries"):
        cache.open(load_manifest(shards, "train").shards[0])
    assert len(waits) == 5
    assert waits == sorted(waits)
    # A file that is not there is not asked for again.
    FlakyFileSystem.failures, FlakyFileSystem.opened = 0.0, 0
    config = make_config(f"flaky://{tmp_path}/nowhere", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"manifest.json of flaky://.*in 1 tries \(FileNotFoundError"):
        ids_of(config)
    assert FlakyFileSystem.opened == 1


def test_pipes_are_refused_unless_allowed(make_set, make_config, tmp_path):
    shards = make_set([5] * 4)
    canary = tmp_path / "canary"
    address = f"pipe:touch {canary}; cat {shards}/{{}}"
    with pytest.raises(DataError, match=r"runs a shell command.*data.allow_pipe=true"):
        ids_of(make_config(address, cache_dir=str(tmp_path / "cache")))
    assert not canary.exists()
    config = make_config(address, cache_dir=str(tmp_path / "cache"), allow_pipe=True)
    assert ids_of(config, steps=2) == ids_of(make_config(shards), steps=2)
    assert canary.exists()


def test_an_unknown_protocol_is_one_line(make_config, tmp_path):
    config = make_config("nosuch://bucket/x", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(
        DataError, match=r"'nosuch://bucket/x'; expected a folder, or an address of a protocol"
    ):
        ids_of(config)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed here")
def test_a_missing_package_is_one_line(make_config, tmp_path):
    with pytest.raises(DataError, match=r"'s3://bucket/x', which needs a package: .*s3fs"):
        ids_of(make_config("s3://bucket/x", cache_dir=str(tmp_path / "cache")))


def test_brace_lists_choose_shards(make_set, make_config):
    shards = make_set([5] * 6)
    config = make_config(f"{shards}/train-{{000001..000002}}.tar")
    assert sorted(sample for step in ids_of(config, steps=1) for sample in step) == list(range(5, 15))
    with pytest.raises(DataError, match=r"data.shards names train-000009.tar"):
        ids_of(make_config(f"{shards}/train-{{000005,000009}}.tar"))
