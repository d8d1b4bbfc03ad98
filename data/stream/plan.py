"""Which sample is read when: a pure function of (manifest, seed, global sample counter).

The run is an infinite row of *slots*, numbered by the global sample counter g: global batch t is the slots
[t*B, (t+1)*B), and a batch may straddle two epochs. The samples form an infinite row of *elements*: element m
belongs to epoch m // N. Slot g and element m are dealt to *lanes*, g mod L and m mod L, so that without bad
samples slot g shows element g and every epoch shows every sample once. A lane is read in order by one reader;
the place of a bad sample goes to the next good element of its lane, so everything a reader has to remember is
how many elements its lane has used up: one counter a lane.

Rank r of W takes the slots g with g mod W = r. As W divides L, the lanes of a rank never change, and as W divides
the global batch, every rank has equally many slots of every batch. Which samples a batch holds therefore depends
neither on W nor on the number of workers.

Within an epoch the shards are put in a random order, and their concatenation, a ring, is cut from a random place on
into L contiguous parts, one a lane: reading stays sequential. Inside its part, a lane shuffles windows of `window`
encoded samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.shards import DataError, Manifest
from data.views.random_numbers import draw_permutation, hash_key

# Purposes of the keys below; any distinct numbers.
_SHARD_ORDER, _WINDOW_ORDER, _COPIES, _AUGMENTATION, _ROTATION = 1, 2, 3, 4, 5


@dataclass(frozen=True)
class Segment:
    """A run of samples of one shard: ordinals inside the tar, never descending, repeated where sampled twice."""

    shard: int
    ordinals: range | NDArray[np.int64]


@dataclass(frozen=True)
class Element:
    """One sample at its place in a lane."""

    epoch: int
    shard: int
    ordinal: int
    sample_id: int
    copy: int


class SamplePlan:
    """The order of a split's samples for a seed, a number of lanes and a window.

    Args:
        manifest: the split.
        seed: of the run.
        num_lanes: L.
        window: samples a lane shuffles at a time.
        copies: how often an epoch shows each selected sample, as a function of the epoch; None shows each once.
            Every epoch must show equally many.
    """

    def __init__(
        self, manifest: Manifest, *, seed: int, num_lanes: int, window: int, copies: CopyCounts | None = None
    ) -> None:
        self.seed = seed
        self.num_lanes = num_lanes
        self.window = window
        self._selected = [shard.num_selected for shard in manifest.shards]
        self._ordinals = [
            None if shard.ordinals is None else np.asarray(shard.ordinals, dtype=np.int64)
            for shard in manifest.shards
        ]
        self._first_selected = np.concatenate([[0], np.cumsum(self._selected)])
        # Sample ids number every sample of the tars, so that a sub-sample keeps the ids of the whole set.
        self._first_id = manifest.first_ids
        self._copies = copies
        self.num_samples = copies.num_samples if copies is not None else int(self._first_selected[-1])
        if self.num_samples < 1:
            raise DataError(f"split {manifest.split!r} holds 0 samples; expected at least 1; write it again")
        self._epoch = lru_cache(maxsize=3)(self._lay_out_epoch)

    def locate(self, lane: int, used: int) -> tuple[int, int]:
        """Returns (epoch, place in the lane's part of it) of a lane's element number `used`."""
        element = lane + used * self.num_lanes
        epoch = element // self.num_samples
        offset = (lane - epoch * self.num_samples) % self.num_lanes
        return epoch, (element - epoch * self.num_samples - offset) // self.num_lanes

    def lane_range(self, lane: int, epoch: int) -> tuple[int, int]:
        """Returns (start, stop) of a lane's part of an epoch's row of samples."""
        offset = (lane - epoch * self.num_samples) % self.num_lanes
        quotient, remainder = divmod(self.num_samples, self.num_lanes)
        start = offset * quotient + min(offset, remainder)
        return start, start + quotient + (1 if offset < remainder else 0)

    def window_order(self, lane: int, epoch: int, place: int) -> tuple[int, NDArray[np.int64]]:
        """Returns (first place, permutation) of the window that holds a place of a lane's part of an epoch."""
        start, stop = self.lane_range(lane, epoch)
        # The first window is shorter, by another amount for every lane: they fill at different times, and the
        # first batch does not wait for all of them.
        first_length = 1 + (lane * self.window) // self.num_lanes
        index = 0 if place < first_length else 1 + (place - first_length) // self.window
        begin = 0 if index == 0 else first_length + (index - 1) * self.window
        length = min(first_length if index == 0 else self.window, stop - start - begin)
        key = hash_key(self.seed, _WINDOW_ORDER, epoch, lane, index)
        return begin, draw_permutation(key, length)

    def segments(self, epoch: int, start: int, stop: int) -> Iterator[Segment]:
        """Yields the runs of samples that make up [start, stop) of an epoch's row."""
        rotation = hash_key(self.seed, _ROTATION, epoch) % self.num_samples
        first, length = (start + rotation) % self.num_samples, stop - start
        until_end = min(length, self.num_samples - first)
        yield from self._unrotated_segments(epoch, first, first + until_end)
        yield from self._unrotated_segments(epoch, 0, length - until_end)

    def _unrotated_segments(self, epoch: int, start: int, stop: int) -> Iterator[Segment]:
        layout = self._epoch(epoch)
        index = bisect_right(layout.starts, start) - 1
        while start < stop:
            end = min(stop, layout.starts[index + 1])
            if end > start:
                shard = layout.shards[index]
                first = layout.starts[index]
                yield Segment(shard, self._entries(epoch, shard)[start - first : end - first])
            start, index = max(start, end), index + 1

    def element(self, epoch: int, shard: int, ordinal: int, copy: int) -> Element:
        """Returns the element of a sample that is shown for the `copy`-th time in an epoch."""
        return Element(epoch, shard, ordinal, self._first_id[shard] + ordinal, copy)

    def augmentation_seed(self, element: Element) -> int:
        """Returns the sample's augmentation seed, a non-negative 63-bit integer, from (seed, epoch, sample)."""
        key = hash_key(self.seed, _AUGMENTATION, element.epoch, element.sample_id, element.copy)
        return key >> 1

    def slots_of(self, rank: int, world_size: int, first: int, count: int) -> NDArray[np.int64]:
        """Returns the lanes of a rank's slots number `first` to `first + count`, in their order."""
        slots = np.arange(first, first + count, dtype=np.int64) * world_size + rank
        return slots % self.num_lanes

    def samples_of_slots(self, first: int, count: int) -> NDArray[np.int64]:
        """Returns the ids of the samples in slots [first, first + count), as long as no sample is bad."""
        ids = np.empty(count, dtype=np.int64)
        for row, slot in enumerate(range(first, first + count)):
            lane = slot % self.num_lanes
            epoch, place = self.locate(lane, slot // self.num_lanes)
            begin, order = self.window_order(lane, epoch, place)
            start = self.lane_range(lane, epoch)[0] + begin + int(order[place - begin])
            (segment,) = self.segments(epoch, start, start + 1)
            ids[row] = self._first_id[segment.shard] + segment.ordinals[0]
        return ids

    def copies_of_samples(self, epoch: int) -> NDArray[np.int64]:
        """Returns how often an epoch shows each sample of the tars, by its id."""
        copies = np.zeros(self._first_id[-1], dtype=np.int64)
        for shard in range(len(self._selected)):
            entries = np.asarray(self._entries(epoch, shard), dtype=np.int64)
            np.add.at(copies, self._first_id[shard] + entries, 1)
        return copies

    def _lay_out_epoch(self, epoch: int) -> EpochLayout:
        order = draw_permutation(hash_key(self.seed, _SHARD_ORDER, epoch), len(self._selected))
        counts = self._selected
        copies = None
        if self._copies is not None:
            copies = self._copies.draw(epoch, hash_key(self.seed, _COPIES, epoch))
            sums = np.concatenate([[0], np.cumsum(copies)])
            counts = (sums[self._first_selected[1:]] - sums[self._first_selected[:-1]]).tolist()
        starts = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64)[order])])
        return EpochLayout(order.tolist(), starts.tolist(), copies)

    def _entries(self, epoch: int, shard: int) -> range | NDArray[np.int64]:
        copies = self._epoch(epoch).copies
        ordinals = self._ordinals[shard]
        if copies is None:
            return range(self._selected[shard]) if ordinals is None else ordinals
        selected = np.arange(self._selected[shard]) if ordinals is None else ordinals
        return np.repeat(selected, copies[self._first_selected[shard] : self._first_selected[shard + 1]])


@dataclass(frozen=True)
class EpochLayout:
    """One epoch's row: shards in reading order, where each starts (one more than shards), copies of each sample."""

    shards: Sequence[int]
    starts: Sequence[int]
    copies: NDArray[np.int64] | None


class CopyCounts(ABC):
    """How often an epoch shows each sample so that classes get their shares: see `data.samplers`."""

    num_samples: int

    @abstractmethod
    def draw(self, epoch: int, key: int) -> NDArray[np.int64]:
        """Returns the number of copies of every selected sample in one epoch; they sum to `num_samples`."""
