"""A job that is killed again and again shows the samples of one that never was, in the same order."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from data.stream.pipeline import TrainingStream, merge_positions

BATCH, NUM_STEPS = 8, 48
# A job that is to be killed waits for it after so many steps: on a busy machine the kill may come late.
MOST_STEPS_OF_A_LEG = 15
CONTEXT = multiprocessing.get_context("fork")


def train(config, world_size: int, path: Path, *, to_be_killed: bool = False) -> None:
    """Streams on from what a file says, rank after rank; notes each global batch's keys in the order of its slots."""
    state = json.loads(path.read_text()) if path.is_file() else {"steps": [], "position": None}
    ranks = [
        iter(
            TrainingStream(
                config,
                seed=3,
                global_batch_size=BATCH,
                micro_batch_size=BATCH // world_size,
                rank=rank,
                world_size=world_size,
                position=state["position"],
            )
        )
        for rank in range(world_size)
    ]
    last_step = len(state["steps"]) + MOST_STEPS_OF_A_LEG if to_be_killed else NUM_STEPS
    while len(state["steps"]) < last_step:
        batches = [next(rank) for rank in ranks]
        # Row i of rank r is slot i * W + r of the batch.
        keys = [batch.keys[i] for i in range(BATCH // world_size) for batch in batches]
        state["steps"].append(keys)
        state["position"] = merge_positions([batch.position for batch in batches])
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(path)
        if to_be_killed:
            time.sleep(0.01)
    if to_be_killed:
        signal.pause()


def kill_after(config, world_size: int, path: Path, delay_s: float) -> None:
    job = CONTEXT.Process(target=train, args=(config, world_size, path), kwargs={"to_be_killed": True})
    before = path.stat().st_mtime_ns if path.is_file() else 0
    job.start()
    while not path.is_file() or path.stat().st_mtime_ns == before:
        assert job.is_alive()
        time.sleep(0.005)
    time.sleep(delay_s)
    assert job.pid is not None
    os.kill(job.pid, signal.SIGKILL)
    job.join()


@pytest.mark.parametrize(
    ("worlds", "workers"), [((1, 1, 1, 1), 0), ((2, 2, 2, 2), 1), ((1, 2, 4, 1), 0), ((4, 2, 1, 2), 2)]
)
def test_three_kills_in_a_row_lose_and_repeat_nothing(
    make_set, make_config, image_bytes, tmp_path, worlds, workers
):
    # 40 samples of which one is bad: the 48 steps of 8 are nearly ten epochs, most of which straddle two batches.
    shards = make_set([7, 3, 7, 3, 7, 3, 7, 3], bad={21: image_bytes(21)[:60]})
    config = make_config(shards, num_lanes=8, max_skipped_fraction=1.0, num_workers=workers)
    train(make_config(shards, num_lanes=8, max_skipped_fraction=1.0), 1, tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text())
    dice = random.Random(repr(worlds))
    lengths = [0]
    for world_size in worlds[:3]:
        kill_after(config, world_size, tmp_path / "killed.json", dice.uniform(0, 0.15))
        lengths.append(len(json.loads((tmp_path / "killed.json").read_text())["steps"]))
    assert lengths == sorted(set(lengths)), "every leg went on where the one before it was killed"
    train(make_config(shards, num_lanes=8, max_skipped_fraction=1.0), worlds[3], tmp_path / "killed.json")
    killed = json.loads((tmp_path / "killed.json").read_text())
    assert killed["steps"] == whole["steps"]
    assert killed["position"] == whole["position"]
