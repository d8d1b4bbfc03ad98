"""The stream of a rank: the same global batches for any ranks and workers, resumable, and strict about its input."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.shards import DataError, load_manifest
from data.stream.pipeline import TrainingStream, merge_positions
from data.views.augmentations import DeviceAugmentation

UNEVEN = [7, 3, 7, 3, 7, 3, 7, 3]


def read_steps(config, *, steps, world_size=1, batch=8, micro=None, position=None, seed=0):
    """Returns what every step showed (sample id, key, seed, pixels, masks), by slot, and the merged position."""
    micro = micro or batch // world_size
    by_step = [[None] * batch for _ in range(steps)]
    parts = []
    for rank in range(world_size):
        stream = TrainingStream(
            config,
            seed=seed,
            global_batch_size=batch,
            micro_batch_size=micro,
            rank=rank,
            world_size=world_size,
            position=position,
        )
        batches = iter(stream)
        for step in range(steps):
            rows = []
            for _ in range(batch // (micro * world_size)):
                last = next(batches)
                rows += list_samples(last)
            by_step[step][rank::world_size] = rows
        stream.close()
        parts.append(last.position)
    return by_step, json.loads(json.dumps(merge_positions(parts)))


def list_samples(batch):
    """Returns a tuple for each sample of a batch: id, key, seed, sums over pixels, masks."""
    crops = batch.global_crops.flatten(2).sum(-1).T.tolist()
    masks = torch.stack([batch.masks.hidden, batch.masks.predicted]).transpose(0, 2).tolist()
    ids, seeds = batch.sample_ids.tolist(), batch.seeds.tolist()
    return list(zip(ids, batch.keys, seeds, map(tuple, crops), masks, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_global_batches_are_the_same_for_any_ranks_and_workers(
    make_set, make_config, world_size, num_workers
):
    shards = make_set(UNEVEN)
    reference, _ = read_steps(make_config(shards, num_lanes=8), steps=5)
    config = make_config(shards, num_lanes=8, num_workers=num_workers)
    steps, position = read_steps(config, steps=5, world_size=world_size)
    assert steps == reference
    # 40 samples: the five batches are one epoch.
    assert sorted(sample for step in steps for sample, *_ in step) == list(range(40))
    assert position["samples_seen"] == 40 and sum(position["used"].values()) == 40


def test_processes_that_run_ahead_leave_the_micro_batch_being_taken_alone(make_set, make_config):
    """The loader processes write into the micro-batches themselves: none may overtake a slow reader by a slot."""
    shards = make_set([32, 32])
    options = {"num_lanes": 4, "prefetch_factor": 1}
    inline, _ = read_steps(make_config(shards, **options), steps=6)
    stream = open_stream(make_config(shards, num_workers=2, **options))
    batches, found = iter(stream), []
    receive = stream._start

    def receive_slowly(parts):
        for part in receive(parts):
            time.sleep(0.1)
            yield part

    stream._start = receive_slowly
    for _ in range(6):
        batch = next(batches)
        found.append(list_samples(batch))
        time.sleep(0.1)
    stream.close()
    assert found == inline


def test_rows_do_not_depend_on_the_number_of_workers(make_set, make_config):
    shards = make_set(UNEVEN)
    inline, _ = read_steps(make_config(shards, num_lanes=8), steps=3, micro=4)
    for num_workers in (1, 3):
        config = make_config(shards, num_lanes=8, num_workers=num_workers)
        assert read_steps(config, steps=3, micro=4)[0] == inline


def test_micro_batches_are_parts_of_the_same_global_batch(make_set, make_config):
    config = make_config(make_set(UNEVEN))
    whole, _ = read_steps(config, steps=4)
    assert read_steps(config, steps=4, world_size=2, micro=2)[0] == whole


def test_a_batch_may_straddle_two_epochs(make_set, make_config):
    config = make_config(make_set([7, 3]), num_lanes=2)
    steps, _ = read_steps(config, steps=5, batch=4)
    ids = [sample for step in steps for sample, *_ in step]
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10] != ids[10:]


@pytest.mark.parametrize("worlds", [(1, 1, 1, 1), (1, 2, 4, 1), (4, 2, 1, 2)])
def test_resumed_three_times_nothing_is_lost_or_repeated(make_set, make_config, image_bytes, worlds):
    bad = {3: b"no image", 21: image_bytes(21)[:60]}
    config = make_config(make_set(UNEVEN, bad=bad), num_lanes=8, max_skipped_fraction=1.0)
    whole, end = read_steps(config, steps=13)
    pieces, position = [], None
    for world_size, steps in zip(worlds, (3, 1, 4, 5), strict=True):
        piece, position = read_steps(config, steps=steps, world_size=world_size, position=position)
        pieces += piece
    assert pieces == whole
    assert position == end


def test_resumption_inside_accumulation_and_with_workers(make_set, make_config):
    config = make_config(make_set(UNEVEN), num_lanes=8, num_workers=2)
    whole, _ = read_steps(config, steps=6, micro=2)
    first, position = read_steps(config, steps=2, micro=2)
    second, _ = read_steps(config, steps=4, micro=2, position=position)
    assert first + second == whole


def test_bad_samples_are_skipped_counted_and_named(make_set, make_config, image_bytes):
    bad = {3: b"no image", 21: image_bytes(21)[:60]}
    config = make_config(make_set(UNEVEN, bad=bad), num_lanes=1, max_skipped_fraction=1.0)
    stream = TrainingStream(config, seed=0, global_batch_size=19, micro_batch_size=19, rank=0, world_size=1)
    batches = iter(stream)
    seen, skipped = [], []
    for _ in range(2):
        batch = next(batches)
        seen += batch.sample_ids.tolist()
        skipped += batch.skipped
    assert len(seen) + len(skipped) == stream.num_samples == 40
    assert sorted({*range(40)} - {*seen}) == [3, 21]
    assert any("k00003" in name for name in skipped) and any("k00021" in name for name in skipped)


def test_too_many_bad_samples_stop_the_run_with_their_names(make_set, make_config):
    config = make_config(make_set(UNEVEN, bad={3: b"no image"}))
    with pytest.raises(DataError, match=r"k00003.*BadImage|k00003.*no format"):
        read_steps(config, steps=6)


def test_what_was_skipped_before_a_resumption_counts(make_set, make_config):
    # One bad sample of 40 an epoch: 2.5 % are allowed over a whole run, and three epochs show it three times.
    shards = make_set(UNEVEN, bad={3: b"no image"})
    options = {"num_lanes": 8, "max_skipped_fraction": 1.0}
    _, position = read_steps(make_config(shards, **options), steps=15, position=None)
    assert sum(position["used"].values()) - position["samples_seen"] == 3
    strict = make_config(shards, **{**options, "max_skipped_fraction": 0.02})
    with pytest.raises(DataError, match=r"\d samples could not be decoded; expected at most [2-4]\.\d"):
        read_steps(strict, steps=6, position=position)


def test_all_samples_bad_is_an_error_before_step_0(make_set, make_config):
    config = make_config(make_set([7, 3], bad=dict.fromkeys(range(10), b"x")))
    with pytest.raises(DataError, match="no image"):
        TrainingStream(config, seed=0, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png"])
def test_shards_of_webdatasets_writer_train_with_any_image_key(make_set, make_config, suffix):
    config = make_config(make_set([5, 5], suffix=suffix))
    steps, _ = read_steps(config, steps=2, batch=4)
    assert len({sample for step in steps for sample, *_ in step}) == 8


def test_jpeg_and_json_shards_made_elsewhere_train(tmp_path, make_config, image_bytes):
    import webdataset

    from data.datasets import EvaluationStream
    from data.verify_shards import write_manifests

    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for i in range(4):
                writer.write(
                    {
                        "__key__": f"photos/{shard}_{i}",
                        "jpeg": image_bytes(i, suffix="jpeg"),
                        "json": {"label": i, "caption": "a picture"},
                    }
                )
    assert write_manifests(str(tmp_path)) == []
    read_steps(make_config(str(tmp_path)), steps=2, batch=4)
    stream = EvaluationStream(str(tmp_path), "train", lambda image: torch.zeros(3, 2, 2), batch_size=8)
    assert next(iter(stream))[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def open_stream(config, **changes):
    options = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    return TrainingStream(config, **{**options, **changes})


def test_errors_name_value_and_remedy_before_step_0(make_set, make_config, tmp_path):
    shards = make_set([7, 3])
    config = make_config(shards)
    with pytest.raises(DataError, match=r"data.shards is .*nowhere.*make_shards"):
        open_stream(make_config(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"global_batch_size is 9; expected a multiple of .*8"):
        open_stream(config, global_batch_size=9)
    with pytest.raises(DataError, match=r"holds 2 shards.*at least 4 = world size 4"):
        open_stream(config, world_size=4, micro_batch_size=2)
    with pytest.raises(DataError, match=r"holds 2 shards.*at least 3 = world size 1 x 3 workers"):
        open_stream(make_config(shards, num_workers=3))
    with pytest.raises(ValueError, match=r"data.num_lanes is 3; expected a multiple of the world size 2"):
        open_stream(make_config(shards, num_lanes=3), world_size=2, micro_batch_size=4)
    with pytest.raises(
        ValueError, match=r"num_lanes is 1; .*at least 2 = world size x 2 workers; .*workers to at most 1"
    ):
        open_stream(make_config(shards, num_lanes=1, num_workers=2))
    with pytest.raises(DataError, match=r"data.split is 'test'; expected one of .*train"):
        open_stream(make_config(shards, split="test"))


def test_missing_and_cut_shards_are_errors_before_step_0(make_set, make_config):
    shards = make_set([7, 3])
    path = Path(shards) / "train-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(
        DataError, match=rf"train-000001.tar has {len(content) - 512} bytes; expected {len(content)}"
    ):
        open_stream(make_config(shards))
    path.unlink()
    with pytest.raises(DataError, match=r"train-000001.tar is missing; the manifest lists it with 3 samples"):
        open_stream(make_config(shards))


def test_a_position_of_another_order_is_refused(make_set, make_config):
    config = make_config(make_set([7, 3]))
    _, position = read_steps(config, steps=1)
    with pytest.raises(DataError, match="has seed 0; expected 1"):
        open_stream(config, seed=1, position=position)
    with pytest.raises(DataError, match="num_lanes 4; expected 2"):
        open_stream(make_config(config.shards, num_lanes=2), position=position)
    del position["used"]["3"]
    with pytest.raises(DataError, match="3 lanes; expected 4"):
        open_stream(config, position=position)


def test_parts_of_different_steps_do_not_merge(make_set, make_config):
    config = make_config(make_set([7, 3]))
    batches = iter(open_stream(config))
    first, second = next(batches).position, next(batches).position
    with pytest.raises(DataError, match="differ in samples_seen"):
        merge_positions([first, second])


def test_crops_are_channels_of_the_configuration(tmp_path, make_config, make_set):
    gray = io.BytesIO()
    Image.new("L", (9, 9), 77).save(gray, "PNG")
    shards = make_set([4], bad=dict.fromkeys(range(4), gray.getvalue()))
    for channels in (1, 3):
        config = make_config(shards, channels=channels, mean=(0.5,), std=(0.25,))
        batch = next(iter(open_stream(config, global_batch_size=4, micro_batch_size=4)))
        assert batch.global_crops.shape == (2, 4, channels, 8, 8)
        assert batch.local_crops.shape == (1, 4, channels, 4, 4)
        assert (batch.global_crops == 77).all()
        crops = DeviceAugmentation(config)(batch)
        assert torch.allclose(crops.global_crops, torch.tensor((77 / 255 - 0.5) / 0.25))


def test_the_manifest_hash_follows_the_samples(make_set):
    first = load_manifest(make_set([3, 2], name="a"), "train")
    assert first.hash == load_manifest(make_set([3, 2], name="b"), "train").hash
    assert first.hash != load_manifest(make_set([2, 3], name="c"), "train").hash
