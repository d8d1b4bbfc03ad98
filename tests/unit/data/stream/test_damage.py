"""Six ways to damage a tar, none of which goes unnoticed; and every sample of the manifest is seen or skipped."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import pytest

from data.shards import DataError, load_manifest
from data.stream.pipeline import TrainingStream
from data.stream.reader import ShardReader, iterate_offsets
from data.verify_shards import main, verify

NUM_SAMPLES, DAMAGED = 12, 7


def damage(path: Path, kind: str) -> None:
    """Damages sample 7 of a shard of 12, whose samples are cls (1 KiB with its header), then png."""
    with path.open("rb") as file:
        offsets = list(iterate_offsets(file))
    content = bytearray(path.read_bytes())
    start, image = offsets[DAMAGED], offsets[DAMAGED] + 1024
    if kind == "cut inside a member":
        content = content[: image + 512 + 40]
    elif kind == "cut at a member boundary":
        content = content[:image]
    elif kind == "cut at a sample boundary":
        content = content[:start]
    elif kind == "header zeroed":
        content[start : start + 512] = bytes(512)
    elif kind == "header changed":
        content[start + 3] ^= 1
    elif kind == "payload bit flipped":
        content[image + 512 + 60] ^= 4
    path.write_bytes(content)


KINDS = (
    "cut inside a member",
    "cut at a member boundary",
    "cut at a sample boundary",
    "header zeroed",
    "header changed",
    "payload bit flipped",
)


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_shard_and_sample(make_set, kind, capsys):
    shards = make_set([NUM_SAMPLES, NUM_SAMPLES])
    assert verify(shards) == []
    damage(Path(shards) / "train-000001.tar", kind)
    findings = verify(shards)
    assert {finding.shard for finding in findings} == {"train-000001.tar"}
    assert any(f"sample {DAMAGED}" in finding.sample for finding in findings), findings
    assert main([shards, "--processes", "1"]) == 2
    assert "train-000001.tar: sample 7" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_index", [True, False])
def test_seen_and_failed_are_the_manifests_samples(make_set, kind, with_index):
    shards = make_set([NUM_SAMPLES])
    if not with_index:
        (Path(shards) / "train.index").unlink()
    damage(Path(shards) / "train-000000.tar", kind)
    reader = ShardReader(load_manifest(shards, "train"))
    answers = list(reader.read(0, range(NUM_SAMPLES)))
    assert [ordinal for ordinal, _ in answers] == list(range(NUM_SAMPLES))
    failed = [ordinal for ordinal, sample in answers if not hasattr(sample, "members")]
    # A half sample (label, no image) is caught by the decoder, and a flipped bit only by the index.
    half = [
        ordinal for ordinal, sample in answers if hasattr(sample, "members") and "png" not in sample.members
    ]
    expected = {DAMAGED} if with_index and not kind.startswith("cut") else set(range(DAMAGED, NUM_SAMPLES))
    if kind == "payload bit flipped" and not with_index:
        expected = set()
    assert set(failed) | set(half) == expected


@pytest.mark.parametrize("first", [0, 5, 7, 8, 11])
@pytest.mark.parametrize("kind", KINDS)
def test_a_samples_fate_does_not_depend_on_where_reading_began(make_set, kind, first):
    shards = make_set([NUM_SAMPLES])
    damage(Path(shards) / "train-000000.tar", kind)
    manifest = load_manifest(shards, "train")
    whole = dict(ShardReader(manifest).read(0, range(NUM_SAMPLES)))
    part = dict(ShardReader(manifest).read(0, range(first, NUM_SAMPLES)))
    for ordinal, sample in part.items():
        assert hasattr(sample, "members") == hasattr(whole[ordinal], "members")


@pytest.mark.parametrize("kind", ["header zeroed", "header changed", "payload bit flipped"])
def test_training_skips_counts_and_names_what_the_start_cannot_see(make_set, make_config, kind):
    shards = make_set([NUM_SAMPLES] * 4)
    damage(Path(shards) / "train-000002.tar", kind)
    options = {"seed": 0, "global_batch_size": 47, "micro_batch_size": 47, "rank": 0, "world_size": 1}
    config = make_config(shards, num_lanes=1, max_skipped_fraction=0.05)
    stream = TrainingStream(config, **options)
    batches = iter(stream)
    first, second = next(batches), next(batches)
    seen = first.sample_ids.tolist() + second.sample_ids.tolist()
    skipped = first.skipped + second.skipped
    assert sorted(set(seen)) == [i for i in range(48) if i != 2 * NUM_SAMPLES + DAMAGED]
    assert first.position["used"] == {"0": 47 + len(first.skipped)}
    assert skipped and all("train-000002.tar#7" in name or "k00031" in name for name in skipped)
    with pytest.raises(DataError, match="could not be decoded"):
        list(zip(range(3), TrainingStream(make_config(shards, num_lanes=1), **options), strict=False))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_cut_shard_is_an_error_before_step_0(make_set, make_config, kind):
    shards = make_set([NUM_SAMPLES] * 2)
    damage(Path(shards) / "train-000001.tar", kind)
    with pytest.raises(DataError, match=r"train-000001.tar has \d+ bytes; expected \d+"):
        TrainingStream(
            make_config(shards), seed=0, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1
        )


def test_the_hash_is_compared_by_choice(make_set, make_config):
    shards = make_set([NUM_SAMPLES])
    (Path(shards) / "train.index").unlink()
    damage(Path(shards) / "train-000000.tar", "payload bit flipped")
    options = {"seed": 0, "global_batch_size": 12, "micro_batch_size": 12, "rank": 0, "world_size": 1}
    with pytest.raises(DataError, match=r"train-000000.tar has SHA-256 .* expected"):
        next(iter(TrainingStream(make_config(shards, verify_hash=True), **options)))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_that_grows_during_the_run_is_noticed_at_its_end(make_set, make_config, with_index):
    shards = make_set([NUM_SAMPLES] * 2)
    if not with_index:
        (Path(shards) / "train.index").unlink()
    options = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    batches = iter(TrainingStream(make_config(shards, shuffle_window=1, num_lanes=1), **options))
    with (Path(shards) / "train-000000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000000.tar has \d+ bytes at its end; expected \d+"):
        list(zip(range(12), batches, strict=False))


@pytest.mark.parametrize("with_index", [True, False])
def test_a_file_system_that_stumbles_is_asked_again(make_set, monkeypatch, with_index):
    shards = make_set([NUM_SAMPLES])
    if not with_index:
        (Path(shards) / "train.index").unlink()
    reader = ShardReader(load_manifest(shards, "train"))
    monkeypatch.setattr("data.stream.reader._WAITS_S", (0.0,) * 4)
    whole, stumbles = [sample.key for _, sample in reader.read(0, range(NUM_SAMPLES))], iter([3, 900, 1700])

    class StumblingFile(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal place
            if place is not None and self.tell() >= place:
                place = next(stumbles, None)
                raise OSError(errno.ESTALE, "Stale file handle")
            return super().read(size)

    place: int | None = next(stumbles)
    monkeypatch.setattr(reader, "_open", lambda number, shard: StumblingFile(f"{shards}/{shard.name}"))
    answers = list(reader.read(0, range(NUM_SAMPLES)))
    assert place is None, "the file system stumbled three times"
    assert [ordinal for ordinal, _ in answers] == list(range(NUM_SAMPLES))
    assert [getattr(sample, "key", sample) for _, sample in answers] == whole


def test_a_changed_index_is_found(make_set):
    shards = make_set([NUM_SAMPLES])
    index = Path(shards) / "train.index"
    content = bytearray(index.read_bytes())
    content[8 + 16 * DAMAGED] ^= 1
    index.write_bytes(content)
    findings = [str(finding) for finding in verify(shards)]
    assert any("train.index: has another SHA-256" in finding for finding in findings)
    assert any(f"train-000000.tar: sample {DAMAGED}" in finding for finding in findings)


def test_an_index_of_other_shards_is_refused(make_set):
    shards = make_set([3])
    index = Path(shards) / "train.index"
    index.write_bytes(index.read_bytes()[:-16])
    with pytest.raises(DataError, match=r"train.index has 32 bytes; expected 48"):
        ShardReader(load_manifest(shards, "train"))


def test_an_extra_sample_is_reported(make_set):
    import json

    shards = make_set([3])
    path = Path(shards) / "manifest.json"
    document = json.loads(path.read_bytes())
    document["splits"]["train"]["shards"][0]["samples"] = 2
    path.write_text(json.dumps(document))
    (Path(shards) / "train.index").unlink()
    with pytest.raises(DataError, match="more than the 2 samples"):
        list(ShardReader(load_manifest(shards, "train")).read(0, range(2)))


def test_gaps_are_jumped_and_repeats_are_read_once(make_set):
    import numpy as np

    reader = ShardReader(load_manifest(make_set([30]), "train"))
    wanted = np.array([2, 2, 3, 20, 29, 29])
    answers = list(reader.read(0, wanted))
    assert [ordinal for ordinal, _ in answers] == wanted.tolist()
    assert [sample.key for _, sample in answers] == [f"k{i:05d}" for i in wanted]
