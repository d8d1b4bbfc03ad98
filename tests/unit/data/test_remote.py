"""Shards behind an address: a store that answers badly, a bounded folder, and no shell by accident."""

from __future__ import annotations

import random
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from data.pipeline import TrainingStream
from data.remote import ShardCache
from data.shards import DataError, load_manifest


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
        import io

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
    monkeypatch.setattr("data.remote._FIRST_WAIT_S", 0.0)


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
    assert (tmp_path / "cache" / manifest.shards[-1].name).is_file()


def test_a_dead_store_is_one_clear_error_after_longer_and_longer_waits(make_set, make_config, tmp_path):
    FlakyFileSystem.failures = 1.0
    shards = make_set([3])
    waits: list[float] = []
    cache = ShardCache(f"flaky://{shards}", str(tmp_path / "cache"), 10**9, wait=waits.append)
    with pytest.raises(DataError, match=r"train-000000.tar of flaky://.* could not be fetched in 6 tries"):
        cache.open(load_manifest(shards, "train").shards[0])
    assert len(waits) == 5
    config = make_config(f"flaky://{tmp_path}/nowhere", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"manifest.json of flaky://.*FileNotFoundError"):
        ids_of(config)


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
    with pytest.raises(ValueError, match="nosuch"):
        ids_of(config)


def test_brace_lists_choose_shards(make_set, make_config):
    shards = make_set([5] * 6)
    config = make_config(f"{shards}/train-{{000001..000002}}.tar")
    assert sorted(sample for step in ids_of(config, steps=1) for sample in step) == list(range(5, 15))
    with pytest.raises(DataError, match=r"data.shards names train-000009.tar"):
        ids_of(make_config(f"{shards}/train-{{000005,000009}}.tar"))
