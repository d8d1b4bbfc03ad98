"""The feed: a step's input on time, one step ahead where there is a device beside the CPU, and errors in their turn."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from data.shards import DataError
from training import feed
from training.feed import Feed


def batches(number, fail_at=None):
    """Micro-batches whose crops and positions are their numbers."""
    for index in range(number):
        if index == fail_at:
            raise DataError(f"micro-batch {index} is broken")
        batch = SimpleNamespace(
            number=index, position={"samples_seen": index}, skipped=["x"] * index, worker_rss_mib=index
        )
        batch.to = lambda device, batch=batch: batch
        yield batch


class Recorded:
    """A tensor's place on a stream."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def augment(batch):
    return SimpleNamespace(number=batch.number, global_crops=Recorded(), local_crops=Recorded())


@pytest.fixture
def gpu(monkeypatch):
    """A device with a side stream and a current one, on which nothing runs; returns the current one."""
    current = SimpleNamespace(waited_for=[])
    current.wait_stream = current.waited_for.append
    monkeypatch.setattr(feed.torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(feed.torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(feed.torch.cuda, "current_stream", lambda device: current)
    return current


def numbers(taken):
    return [crops.number for crops in taken.crops]


def test_a_cpu_prepares_nothing():
    asked = []

    def stream():
        for batch in batches(6):
            asked.append(batch.number)
            yield batch

    source = Feed(stream(), augment, torch.device("cpu"), 2)
    source.prepare()
    assert asked == []
    first = source.take()
    assert asked == numbers(first) == [0, 1]
    assert first.position == {"samples_seen": 1} and first.skipped == 1 and first.worker_rss_mib == 1


def test_a_gpu_is_one_step_ahead_and_the_position_is_the_steps_own(gpu):
    source = Feed(batches(6), augment, torch.device("cuda"), 2)
    steps = []
    for _ in range(3):
        steps.append(source.take())
        if len(steps) < 3:
            source.prepare()
            source.prepare()  # once is enough: the step after the next one is not touched
    assert [numbers(step) for step in steps] == [[0, 1], [2, 3], [4, 5]]
    assert [step.position["samples_seen"] for step in steps] == [1, 3, 5]
    assert gpu.waited_for == ["side"] * 3
    for step in steps:
        for crops in step.crops:
            assert crops.global_crops.streams == crops.local_crops.streams == [gpu]


def test_what_fails_ahead_is_raised_when_its_step_comes(gpu):
    source = Feed(batches(6, fail_at=3), augment, torch.device("cuda"), 2)
    assert numbers(source.take()) == [0, 1]
    source.prepare()  # the step at work goes on
    with pytest.raises(DataError, match="micro-batch 3 is broken"):
        source.take()


def test_waiting_is_counted_once():
    source = Feed(batches(4), augment, torch.device("cpu"), 2)
    source.take()
    assert source.read_wait() > 0 and source.read_wait() == 0
