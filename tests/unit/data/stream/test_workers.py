"""Loader processes: they outlive the job's signals, end with the trainer, and report their memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.shards import DataError
from data.stream.pipeline import TrainingStream

OPTIONS = {"seed": 0, "global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def test_workers_ignore_the_jobs_signals(make_set, make_config):
    before = set(children())
    stream = TrainingStream(make_config(make_set([7, 3, 7, 3]), num_workers=2), **OPTIONS)
    batches = iter(stream)
    next(batches)
    workers = [pid for pid in children() if pid not in before]
    assert len(workers) >= 2
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        for pid in workers:
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, number)
    ids = [sample for _ in range(6) for sample in next(batches).sample_ids.tolist()]
    assert len(ids) == 48
    stream.close()


PROGRAM = """
import sys
from data.config import DataConfig
from data.stream.pipeline import TrainingStream
config = DataConfig(shards=sys.argv[1], recipe="none", num_lanes=4, num_workers=2, global_crop_size=8,
                    num_local_crops=0)
batches = iter(TrainingStream(config, seed=0, global_batch_size=8, micro_batch_size=8, rank=0, world_size=1))
print(next(batches).worker_rss_mib, flush=True)
{ending}
"""


@pytest.mark.parametrize(
    ("ending", "code"),
    [("", 0), ("raise RuntimeError('a fault')", 1), ("import os, signal; os.kill(os.getpid(), 9)", -9)],
)
def test_no_loader_outlives_its_trainer(make_set, ending, code):
    shards = make_set([7, 3, 7, 3])
    started = time.monotonic()
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending), shards],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )
    assert float(program.stdout) > 10
    # subprocess.run waits for the pipes' last writer: a loader left behind would hold it open.
    assert time.monotonic() - started < 50
    assert program.returncode == code


def test_memory_is_bounded_by_the_configuration(make_set, make_config):
    config = make_config(make_set([7, 3]), num_workers=1, max_worker_memory_gib=0.001)
    with pytest.raises(DataError, match=r"holds [\d.]+ GiB; expected at most 0.001 GiB"):
        next(iter(TrainingStream(config, **OPTIONS)))


HEAP = """
from data.stream.workers import measure_rss_mib, start_worker
{prepare}
block = bytearray(16 << 20); del block  # glibc would take its size for the new threshold
before, images, keepers = measure_rss_mib(), [], []
for _ in range(100):
    images.append(bytearray(3 << 20))
    keepers.append(bytearray(100_000))  # as crops lie between decoded images
images.clear()
print(measure_rss_mib() - before)
"""


def test_freed_images_leave_a_loader_process():
    """Without the fixed threshold the freed blocks stay, a heap full of holes: the test sees both."""
    kept = []
    for prepare in ("", "start_worker(0)"):
        program = [sys.executable, "-c", HEAP.format(prepare=prepare)]
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        run = subprocess.run(program, capture_output=True, text=True, timeout=60, env=environment, check=True)
        kept.append(float(run.stdout))
    assert kept[0] > 200 and kept[1] < 50, kept
