"""A lane's samples in the plan's order: sequential reading, a bounded window of encoded samples, skipped bad ones."""

from __future__ import annotations

from collections.abc import Iterator

from data.members import EncodedSample
from data.stream.plan import Element, SamplePlan
from data.stream.reader import Failure, ShardReader


class LaneReader:
    """Yields a lane's elements, from any place, for ever.

    Args:
        plan: the order.
        lane: which lane.
        used: elements of the lane that were used up before; the first element out is number `used`.
        reader: where the samples come from.
    """

    def __init__(self, plan: SamplePlan, lane: int, used: int, reader: ShardReader) -> None:
        self.used = used
        self._plan = plan
        self._lane = lane
        self._reader = reader
        self._elements = self._iterate()

    def next(self) -> tuple[Element, EncodedSample | Failure]:
        """Returns the lane's next element and counts it as used."""
        element, sample = next(self._elements)
        self.used += 1
        return element, sample

    def _iterate(self) -> Iterator[tuple[Element, EncodedSample | Failure]]:
        epoch, place = self._plan.locate(self._lane, self.used)
        while True:
            start, stop = self._plan.lane_range(self._lane, epoch)
            if place < stop - start:
                yield from self._iterate_part(epoch, start, stop, place)
            epoch, place = epoch + 1, 0

    def _iterate_part(
        self, epoch: int, start: int, stop: int, place: int
    ) -> Iterator[tuple[Element, EncodedSample | Failure]]:
        """Yields a lane's part [start, stop) of an epoch from a place on, window by window."""
        begin, order = self._plan.window_order(self._lane, epoch, place)
        in_reading_order = self._read(epoch, start + begin, stop)
        emitted = place - begin
        while True:
            pending: dict[int, tuple[Element, EncodedSample | Failure]] = {}
            wanted = set(order[emitted:].tolist())
            num_read = 0
            for position in order[emitted:].tolist():
                # Read no further than this element needs: the window fills while it is used.
                while num_read <= position:
                    item = next(in_reading_order)
                    if num_read in wanted:
                        pending[num_read] = item
                    num_read += 1
                yield pending.pop(position)
            # After a resumption the window's last samples may have been shown before.
            for _ in range(len(order) - num_read):
                next(in_reading_order)
            begin, emitted = begin + len(order), 0
            if begin >= stop - start:
                return
            _, order = self._plan.window_order(self._lane, epoch, begin)

    def _read(self, epoch: int, start: int, stop: int) -> Iterator[tuple[Element, EncodedSample | Failure]]:
        for segment in self._plan.segments(epoch, start, stop):
            previous, copy = -1, 0
            for ordinal, sample in self._reader.read(segment.shard, segment.ordinals):
                copy = copy + 1 if ordinal == previous else 0
                previous = ordinal
                yield self._plan.element(epoch, segment.shard, ordinal, copy), sample
