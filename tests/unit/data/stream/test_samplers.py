"""Class shares of an epoch and long tails."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.shards import DataError
from data.stream.pipeline import TrainingStream
from data.stream.samplers import ClassShares, select_long_tail

labels_strategy = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


@given(labels_strategy, st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**60))
def test_every_epoch_has_the_same_length_and_shares(labels, power, key):
    shares = ClassShares(labels, 5, power)
    copies = shares.draw(0, key)
    assert copies.sum() == len(labels) == shares.num_samples
    assert np.bincount(labels, weights=copies, minlength=5).astype(int).tolist() == shares.quotas.tolist()
    for number in range(5):
        of_class = copies[labels == number]
        assert not len(of_class) or of_class.max() - of_class.min() <= 1
    if power == 1.0:
        assert (copies == 1).all()


def test_shares_by_hand():
    labels = np.repeat([0, 1, 2], [64, 16, 4])
    assert ClassShares(labels, 3, 0.0).quotas.tolist() == [28, 28, 28]
    assert ClassShares(labels, 3, 0.5).quotas.tolist() == [48, 24, 12]


def test_epochs_draw_other_images():
    labels = np.repeat([0, 1], [50, 10])
    shares = ClassShares(labels, 2, 0.0)
    assert not np.array_equal(shares.draw(0, 1), shares.draw(1, 2))


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [("class_balanced", [8, 8, 8]), ("square_root", [14, 7, 3]), ("uniform", [19, 4, 1])],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_stream_shows_the_shares(make_set, make_config, sampler, expected, world_size):
    labels = [0] * 19 + [1] * 4 + [2]
    config = make_config(make_set([6, 6, 6, 6], labels=labels), sampler=sampler)
    ids = []
    for rank in range(world_size):
        stream = TrainingStream(
            config,
            seed=0,
            global_batch_size=24,
            micro_batch_size=24 // world_size,
            rank=rank,
            world_size=world_size,
        )
        batches = iter(stream)
        ids += [batch.sample_ids.tolist() for batch in (next(batches), next(batches))]
    for epoch in range(2):
        shown = np.array([i for part in ids[epoch::2] for i in part])
        assert np.bincount(np.array(labels)[shown]).tolist() == expected


def test_copies_of_a_sample_get_other_crops(make_set, make_config, tmp_path):
    import webdataset

    from data.verify_shards import write_manifests
    from tests.unit.data.conftest import encode_image

    directory = tmp_path / "skewed"
    directory.mkdir()
    with webdataset.TarWriter(str(directory / "train-000000.tar")) as writer:
        for i in range(8):
            writer.write(
                {"__key__": f"k{i}", "png": encode_image(i, size=30), "cls": b"1" if i == 3 else b"0"}
            )
    assert not write_manifests(str(directory))
    config = make_config(str(directory), sampler="class_balanced", num_lanes=1)
    batch = next(
        iter(TrainingStream(config, seed=0, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1))
    )
    rows = [row for row, i in enumerate(batch.sample_ids.tolist()) if i == 3]
    assert len(rows) == 4
    assert len({int(batch.seeds[row]) for row in rows}) == 4
    assert len({batch.global_crops[0, row].numpy().tobytes() for row in rows}) == 4


def test_samplers_need_labels(make_set, make_config):
    from pathlib import Path

    shards = make_set([4])
    (Path(shards) / "train.index").unlink()
    with pytest.raises(DataError, match=r"data.sampler is square_root; expected shards with a class"):
        TrainingStream(
            make_config(shards, sampler="square_root"),
            seed=0,
            global_batch_size=4,
            micro_batch_size=4,
            rank=0,
            world_size=1,
        )


@pytest.mark.parametrize("imbalance", [10.0, 100.0, 1000.0])
def test_a_long_tail_is_exponential(imbalance):
    labels = np.repeat(np.arange(11), 1000)
    chosen = select_long_tail(labels, imbalance, seed=0)
    counts = np.sort(np.bincount(labels[chosen], minlength=11))[::-1]
    assert counts[0] == 1000 and counts[-1] == 1000 // imbalance
    expected = np.floor(1000 * imbalance ** (-np.arange(11) / 10) + 1e-9)
    assert counts.tolist() == expected.tolist()
    assert not np.array_equal(chosen, select_long_tail(labels, imbalance, seed=1))
    assert np.array_equal(chosen, select_long_tail(labels, imbalance, seed=0))
