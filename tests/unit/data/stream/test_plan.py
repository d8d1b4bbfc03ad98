"""The order of the samples: a pure function, each sample once an epoch, the same for any ranks and workers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.members import EncodedSample
from data.shards import Manifest, Shard
from data.stream.lanes import LaneReader
from data.stream.plan import SamplePlan
from data.stream.reader import Failure

shard_sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def make_manifest(sizes: list[int]) -> Manifest:
    shards = tuple(
        Shard(name=f"train-{i:06d}.tar", samples=size, bytes=1, sha256=str(i)) for i, size in enumerate(sizes)
    )
    return Manifest(split="train", shards=shards)


class FakeReader:
    """Answers for every sample of a manifest without a file; some are bad."""

    def __init__(self, manifest: Manifest, bad: frozenset[int] = frozenset()) -> None:
        self.first_ids, self.bad, self.reads = manifest.first_ids, bad, Counter[int]()

    def read(self, shard: int, ordinals: object):
        for ordinal in ordinals:
            sample_id = self.first_ids[shard] + int(ordinal)
            self.reads[sample_id] += 1
            if sample_id in self.bad:
                yield int(ordinal), Failure(str(sample_id), "bad")
            else:
                yield int(ordinal), EncodedSample(str(sample_id), {})


def simulate(
    plan: SamplePlan,
    reader: FakeReader,
    num_slots: int,
    *,
    world_size: int = 1,
    first: int = 0,
    used: dict[int, int] | None = None,
) -> tuple[list[int], dict[int, int], int]:
    """Returns sample ids by slot, the counters after it and the number of skipped samples, over all ranks."""
    used = dict(used or dict.fromkeys(range(plan.num_lanes), 0))
    shown: dict[int, int] = {}
    skipped = 0
    assert num_slots % world_size == 0
    for rank in range(world_size):
        lanes = {
            lane: LaneReader(plan, lane, used[lane], reader)
            for lane in range(rank, plan.num_lanes, world_size)
        }
        per_rank = num_slots // world_size
        for i, lane in enumerate(plan.slots_of(rank, world_size, first // world_size, per_rank).tolist()):
            while True:
                element, sample = lanes[lane].next()
                if isinstance(sample, EncodedSample):
                    break
                skipped += 1
            shown[(first // world_size + i) * world_size + rank] = element.sample_id
        used.update({lane: reader.used for lane, reader in lanes.items()})
    return [shown[slot] for slot in sorted(shown)], used, skipped


@given(shard_sizes, st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_every_epoch_shows_every_sample_exactly_once(sizes, num_lanes, window, seed):
    manifest = make_manifest(sizes)
    plan = SamplePlan(manifest, seed=seed, num_lanes=num_lanes, window=window)
    n = manifest.num_samples
    shown, _, _ = simulate(plan, FakeReader(manifest), 3 * n)
    for epoch in range(3):
        assert sorted(shown[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(
    shard_sizes,
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(0, 3),
    st.sets(st.integers(0, 71)),
)
@settings(max_examples=150, deadline=None)
def test_slots_do_not_depend_on_the_world_size(sizes, world_size, lanes_over_4, window, seed, bad):
    manifest = make_manifest(sizes)
    good = frozenset(range(manifest.num_samples)) - bad
    if not good:
        return
    plan = SamplePlan(manifest, seed=seed, num_lanes=4 * lanes_over_4, window=window)
    # A lane may be all bad for many epochs; keep those cases out, a run would stop on them.
    bad = frozenset(bad) if len(good) == manifest.num_samples else frozenset(list(bad)[:1])
    if manifest.num_samples < 3:
        bad = frozenset()
    one = simulate(plan, FakeReader(manifest, bad), 32)
    many = simulate(plan, FakeReader(manifest, bad), 32, world_size=world_size)
    assert one == many
    assert not set(one[0]) & bad


@given(
    shard_sizes,
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4])), min_size=1, max_size=4),
    st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_resuming_again_and_again_on_other_world_sizes_changes_nothing(sizes, window, legs, seed):
    manifest = make_manifest(sizes)
    plan = SamplePlan(manifest, seed=seed, num_lanes=8, window=window)
    bad = frozenset({1}) if manifest.num_samples > 3 else frozenset()
    batch = 8
    whole, _, _ = simulate(plan, FakeReader(manifest, bad), batch * sum(steps for steps, _ in legs))
    pieces: list[int] = []
    used = None
    for steps, world_size in legs:
        shown, used, _ = simulate(
            plan,
            FakeReader(manifest, bad),
            batch * steps,
            world_size=world_size,
            first=len(pieces),
            used=used,
        )
        pieces += shown
    assert pieces == whole


@given(shard_sizes, st.integers(1, 9), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_seen_and_skipped_are_the_elements_used(sizes, num_lanes, window):
    manifest = make_manifest([*sizes, 5])
    bad = frozenset({0, manifest.num_samples - 1})
    plan = SamplePlan(manifest, seed=1, num_lanes=num_lanes, window=window)
    num_slots = 2 * manifest.num_samples
    if manifest.num_samples <= 3 * num_lanes:
        return  # a lane of bad samples only needs many epochs for one slot
    shown, used, skipped = simulate(plan, FakeReader(manifest, bad), num_slots)
    assert len(shown) + skipped == sum(used.values())
    assert not set(shown) & bad


def test_two_epochs_and_two_seeds_differ_in_order():
    manifest = make_manifest([7, 3, 9, 11])
    plan = SamplePlan(manifest, seed=0, num_lanes=2, window=4)
    n = manifest.num_samples
    shown, _, _ = simulate(plan, FakeReader(manifest), 2 * n)
    assert shown[:n] != shown[n:]
    other, _, _ = simulate(SamplePlan(manifest, seed=1, num_lanes=2, window=4), FakeReader(manifest), 2 * n)
    assert other[:n] != shown[:n]


def test_window_one_keeps_the_order_inside_shards():
    manifest = make_manifest([6])
    plan = SamplePlan(manifest, seed=3, num_lanes=1, window=1)
    shown = simulate(plan, FakeReader(manifest), 6)[0]
    assert [(sample - shown[0]) % 6 for sample in shown] == list(range(6))


def test_a_lane_reads_sequentially_and_each_sample_once():
    manifest = make_manifest([40])
    reader = FakeReader(manifest)
    plan = SamplePlan(manifest, seed=3, num_lanes=1, window=16)
    simulate(plan, reader, 40)
    assert reader.reads == Counter(range(40))


def test_augmentation_seeds_differ_between_epochs_and_samples_only():
    manifest = make_manifest([5])
    plan = SamplePlan(manifest, seed=7, num_lanes=1, window=1)
    seeds = {
        (epoch, ordinal): plan.augmentation_seed(plan.element(epoch, 0, ordinal, 0))
        for epoch in range(3)
        for ordinal in range(5)
    }
    assert len(set(seeds.values())) == len(seeds)
    again = SamplePlan(manifest, seed=7, num_lanes=3, window=4)
    assert again.augmentation_seed(again.element(2, 0, 4, 0)) == seeds[2, 4]
    assert all(0 <= seed < 2**63 for seed in seeds.values())


def test_the_order_is_the_one_of_every_machine():
    # Recorded once: a change here breaks the resumption of saved runs.
    manifest = make_manifest([7, 3])
    plan = SamplePlan(manifest, seed=0, num_lanes=2, window=4)
    assert simulate(plan, FakeReader(manifest), 10)[0] == RECORDED


RECORDED = [3, 8, 6, 9, 4, 0, 5, 1, 7, 2]


@pytest.mark.parametrize("sizes", [[7, 3], [3, 7, 7, 3]])
def test_world_and_workers_share_out_an_uneven_set(sizes):
    manifest = make_manifest(sizes)
    plan = SamplePlan(manifest, seed=2, num_lanes=8, window=4)
    for world_size in (1, 2, 4):
        ids, _, _ = simulate(plan, FakeReader(manifest), 40, world_size=world_size)
        assert Counter(ids[: manifest.num_samples]) == Counter(range(manifest.num_samples))


def test_locate_and_lane_range_agree_by_hand():
    # N = 10, L = 4. Epoch 1 starts at element 10, whose lane is 2: lanes 2, 3 get three samples, 0 and 1 two.
    plan = SamplePlan(make_manifest([10]), seed=0, num_lanes=4, window=2)
    assert [plan.lane_range(lane, 0) for lane in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert [plan.lane_range(lane, 1) for lane in (2, 3, 0, 1)] == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert plan.locate(2, 2) == (1, 0)
    assert plan.locate(0, 3) == (1, 0)
    lengths = np.array([plan.lane_range(lane, 5) for lane in range(4)])
    assert (lengths[:, 1] - lengths[:, 0]).sum() == 10
