"""Faults of a run on two gloo ranks: the fault matrix on `pretrain.py`, with planned faults around it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import starts
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.helpers.ranks import start_ranks, wait_for_ranks
from training.checkpoints.files import list_committed, load_manifest

STEPS, EVERY = 8, 3
CANARY = "canary4711" * 4  # as long as wandb's keys
SAVE_POINTS = ("begin", "written", "hashed", "manifest", "commit", "committed")
ZERO = "engine.deepspeed_config=ds_configs/zero{}_fp32.json"
MODES = {**{f"zero{stage}": ZERO.format(stage) for stage in range(4)}, "fsdp2": "engine.name=fsdp2"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def start(
    out: Path,
    shards: str,
    *overrides: str,
    fault: str | None = None,
    world_size: int = 2,
    label: str = "logs",
    **env: str,
) -> list[starts.Started | subprocess.Popen]:
    arguments = [
        DEMO,
        *TINY,
        f"data.shards={shards}",
        f"run.output_dir={out}",
        "run.name=run",
        f"optim.steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "checkpoint.keep_last=10",
        "engine.hang_timeout_s=60",
        "run.collective_timeout_s=60",
        # BatchNorm sees its own rank's images on CPUs: other numbers of ranks would compute something else.
        "model.head.use_bn=false",
        *overrides,
    ]
    module, planned = ("tests.faults.injection", {"FAULT": fault}) if fault else ("pretrain", {})
    return start_ranks(module, arguments, world_size, environment={**env, **planned}, log_dir=out / label)


def run(
    out: Path, shards: str, *overrides: str, expect: int = 0, timeout_s: float = 200, **options
) -> list[int]:
    codes = wait_for_ranks(start(out, shards, *overrides, **options), timeout_s)
    logs = "".join(
        path.read_text()[-3000:] for path in sorted((out / options.get("label", "logs")).glob("*.log"))
    )
    if expect == 0:
        assert codes == [0] * len(codes), logs
    else:
        assert all(codes), logs
    return codes


def hashes(out: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of everything in a checkpoint that the run computed.

    Left out: the model card, which names the run, and the length of the record, in which seconds are written.
    """
    files = load_manifest(out / "run" / "checkpoints" / f"step-{step:08d}")["files"]
    found = {entry["path"]: entry["sha256"] for entry in files}
    assert {
        "estimator.json",
        "progress.json",
        "record.json",
        "rng-00000-of-00002.safetensors",
    } <= found.keys()
    return {path: value for path, value in found.items() if path not in ("teacher/README.md", "record.json")}


def metrics(out: Path) -> dict[int, float]:
    lines = (out / "run" / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss/total"] for entry in map(json.loads, lines) if "loss/total" in entry}


def wait_until(happened: Callable[[], bool], timeout_s: float = 150) -> float:
    """Returns when it happened, on the monotonic clock; looks a hundred times a second."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
    return time.monotonic()


def console(out: Path) -> str:
    return "".join(path.read_text() for path in sorted(out.glob("*/rank-*.log")))


@pytest.fixture(scope="module")
def uninterrupted(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    options = ("engine.checksum_every=1", "logging.wandb_mode=offline")
    run(out, shards, *options, CANARY_TOKEN=CANARY, WANDB_API_KEY=CANARY, WANDB_MODE="offline")
    return out


def test_sigkill_of_a_rank_ends_its_peer_and_the_restart_is_bitwise(
    shards: str, uninterrupted: Path, tmp_path: Path
) -> None:
    processes = start(tmp_path, shards, fault="kill@1:7:backward", label="killed")
    died_at = wait_until(lambda: processes[1].poll() is not None)
    ended_at = wait_until(lambda: processes[0].poll() is not None)
    wait_for_ranks(processes, 5)
    assert processes[1].returncode == -signal.SIGKILL and processes[0].returncode not in (0, -signal.SIGKILL)
    assert (
        ended_at - died_at <= 3.0
    )  # the bar of 1 s is measured by the slow tests, on a machine of their own
    assert list_committed(tmp_path / "run" / "checkpoints")[0].name == "step-00000006"
    # The other way of writing gives the same bytes.
    run(tmp_path, shards, "checkpoint.asynchronous=true", label="again")
    assert hashes(tmp_path) == hashes(uninterrupted)
    assert metrics(tmp_path) == metrics(uninterrupted)


def test_a_flipped_bit_in_one_replica_stops_the_run_and_is_named(shards: str, tmp_path: Path) -> None:
    run(tmp_path, shards, "engine.checksum_every=2", fault="flip@1:3:replicas", expect=1)
    assert "rank 1 differs in estimator/" in console(tmp_path) and "step 4" in console(tmp_path)


def test_no_secret_of_the_environment_reaches_a_file(uninterrupted: Path) -> None:
    files = [path for path in uninterrupted.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(
        "checkpoints" in path.parts for path in files
    )
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_a_flipped_bit_in_the_teacher_is_named(shards: str, tmp_path: Path) -> None:
    run(tmp_path, shards, "engine.checksum_every=1", fault="flip@0:3:teacher", expect=1)
    assert "rank 0 differs in teacher/" in console(tmp_path) or "rank 1 differs in teacher/" in console(
        tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("point", ["forward", "reduce", "backward", "update"])
def test_a_rank_that_dies_anywhere_in_a_step_ends_its_peer(shards: str, tmp_path: Path, point: str) -> None:
    processes = start(tmp_path, shards, fault=f"kill@1:4:{point}")
    died_at = wait_until(lambda: processes[1].poll() is not None)
    ended_at = wait_until(lambda: processes[0].poll() is not None)
    assert processes[1].returncode == -signal.SIGKILL and processes[0].returncode == 1
    assert ended_at - died_at <= 1.0


@pytest.mark.slow
def test_a_rank_that_fails_waits_for_nobody(shards: str, tmp_path: Path) -> None:
    processes = start(tmp_path, shards, fault="raise@1:4:reduce")
    failed_at = wait_until(lambda: "planned fault" in (tmp_path / "logs" / "rank-1.log").read_text())
    ended_at = wait_until(lambda: all(process.poll() is not None for process in processes))
    assert [process.returncode for process in processes] == [1, 1]
    assert ended_at - failed_at <= 2.0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint(
    shards: str, uninterrupted: Path, tmp_path: Path, rank: int
) -> None:
    # Rank 0 alone publishes, so that the last three points are its own.
    for point in SAVE_POINTS if rank == 0 else SAVE_POINTS[:3]:
        out = tmp_path / point
        run(out, shards, fault=f"kill@{rank}:6:save_{point}", expect=1, label="killed")
        newest = list_committed(out / "run" / "checkpoints")[0].name
        assert newest == ("step-00000006" if point == "committed" else "step-00000003")
        run(out, shards, label="again")
        assert hashes(out) == hashes(uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
def test_five_kills_at_random_steps_of_one_run_change_no_byte(shards: str, tmp_path: Path, mode: str) -> None:
    options = (MODES[mode], "batch.gradient_accumulation_steps=2")
    reference, out = tmp_path / "reference", tmp_path / "interrupted"
    run(reference, shards, *options)
    generator = random.Random(mode)
    for number, step in enumerate(sorted(generator.sample(range(1, STEPS), 5))):
        point = generator.choice(("forward", "reduce", "backward", "update"))
        fault = f"kill@{generator.randrange(2)}:{step}:{point}"
        run(out, shards, *options, fault=fault, expect=1, label=f"{number}")
    run(out, shards, *options)
    assert hashes(out) == hashes(reference)
    assert metrics(out) == metrics(reference)


@pytest.mark.slow
@pytest.mark.parametrize("order", [(1, 2, 4), (4, 2, 1), (2, 4, 1)])
def test_any_number_of_ranks_continues(shards: str, tmp_path: Path, order: tuple[int, ...]) -> None:
    # A start from features takes rows in rank order: other numbers of ranks would number the prototypes otherwise.
    options = ("prototypes.gmm.init.method=sphere", "prototypes.gmm.revival.interval_steps=3")
    uninterrupted, tmp_path = tmp_path / "uninterrupted", tmp_path / "interrupted"
    run(uninterrupted, shards, *options)
    for number, world_size in enumerate(order):
        fault = f"kill@*:{EVERY * (number + 1)}:forward" if number < len(order) - 1 else None
        run(
            tmp_path,
            shards,
            *options,
            world_size=world_size,
            fault=fault,
            expect=int(fault is not None),
            label=f"{number}",
        )
    expected, found = metrics(uninterrupted), metrics(tmp_path)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_one_bad_loss_costs_one_step(shards: str, tmp_path: Path, value: str) -> None:
    run(tmp_path, shards, fault=f"{value}@1:3:loss")
    assert "moved nothing" in console(tmp_path)


@pytest.mark.slow
def test_bad_losses_without_end_stop_the_run(shards: str, tmp_path: Path) -> None:
    run(tmp_path, shards, "optim.max_skipped_steps=3", fault="nan@1:*:loss", expect=1)
    assert "3 steps in a row were skipped" in console(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_stopped_rank_is_named_by_its_peer(shards: str, tmp_path: Path) -> None:
    timeout_s = 20
    processes = start(tmp_path, shards, f"engine.hang_timeout_s={timeout_s}", fault="stop@1:5:forward")
    status = Path(f"/proc/{processes[1].pid}/stat")
    try:
        stopped_at = wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")
        ended_at = wait_until(lambda: processes[0].poll() is not None)
        assert processes[0].returncode == 1
        assert ended_at - stopped_at <= timeout_s + 1
        assert "silent rank 1 (not running)" in console(tmp_path)
        stacks = (tmp_path / "run" / "heartbeats" / "stacks-rank-0.txt").read_text()
        assert "training/step.py" in stacks
    finally:
        for process in processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_a_loss_spike_is_skipped_alike_after_a_resume(shards: str, tmp_path: Path) -> None:
    options = ("optim.spike_factor=3", "optim.steps=24", "checkpoint.every_steps=10")
    spike = "spike@*:21:loss"
    reference, out = tmp_path / "reference", tmp_path / "resumed"
    run(reference, shards, *options, fault=spike)
    run(out, shards, *options, fault="kill@0:12:forward", expect=1, label="killed")
    run(out, shards, *options, fault=spike)
    assert "moved nothing" in console(reference)
    assert hashes(out, 24) == hashes(reference, 24)


@pytest.mark.slow
def test_a_full_disk_during_a_save_does_not_end_the_run(shards: str, tmp_path: Path) -> None:
    run(tmp_path, shards, fault="enospc@1:3:save_written")
    names = [path.name for path in list_committed(tmp_path / "run" / "checkpoints")]
    assert names == ["step-00000008", "step-00000006"]
    assert "NOT saved" in console(tmp_path) and "No space left" in console(tmp_path)


@pytest.mark.slow
def test_a_full_disk_at_a_preemption_is_a_fault(shards: str, tmp_path: Path) -> None:
    """Exit 75 promises a saved state; a scheduler that started this again would come here again."""
    ranks = start(tmp_path, shards, "optim.steps=2000", fault="enospc@1:*:save_written")
    record = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (record.exists() and record.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR2)
    assert wait_for_ranks(ranks, 60) == [1, 1]
    assert "is not saved; no checkpoint is saved yet" in console(tmp_path)
