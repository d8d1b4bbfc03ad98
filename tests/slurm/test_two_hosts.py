"""Without SLURM: torchrun on two hosts, which are two network namespaces of this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.slurm.network import ended_with, missing_for_namespaces, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
MISSING = missing_for_namespaces()
if MISSING:
    pytestmark.append(pytest.mark.skip(reason=MISSING))


def start(hosts, shards: str, out: Path, num_steps: int) -> list[subprocess.Popen]:
    """Starts what docs/slurm.md tells to type on each host."""
    processes = []
    for node_rank, host in enumerate(hosts):
        command = host.command(
            sys.executable,
            *("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node_rank)),
            *("--nproc_per_node", "1", "--master_addr", hosts[0].address, "--master_port", "29500"),
            *("pretrain.py", DEMO, *TINY, "data.num_workers=1", "checkpoint.every_steps=1000"),
            *(f"data.shards={shards}", f"run.output_dir={out}", "run.name=two", f"optim.steps={num_steps}"),
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": host.interface}
        log = (out / f"host{node_rank}.log").open("ab")
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        )
    return processes


def steps_done(out: Path) -> int:
    record = out / "two" / "metrics.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def wait_for_step(processes: list[subprocess.Popen], out: Path, step: int, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while steps_done(out) < step and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), (out / "host0.log").read_text()
        time.sleep(0.1)
    assert steps_done(out) >= step, (out / "host0.log").read_text()


def test_torchrun_on_two_hosts_trains_is_warned_on_one_and_goes_on(tmp_path: Path) -> None:
    shards = write_digit_shards(tmp_path / "digits")
    with two_hosts() as hosts, ended_with(started := []):
        started += (processes := start(hosts, shards, tmp_path, num_steps=2000))
        wait_for_step(processes, tmp_path, 5)
        # torchrun passes SIGTERM on to its ranks; the ranks of the other host learn of it from them.
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(timeout=120) != 0
        log = (tmp_path / "host0.log").read_text()
        saved_at = steps_done(tmp_path)
        assert saved_at >= 5, log
        assert (tmp_path / "two" / "checkpoints" / f"step-{saved_at:08d}" / "COMMIT").is_file(), log

        # optim.steps stretches the schedule: the same run again, then, is the same command.
        started += (processes := start(hosts, shards, tmp_path, num_steps=2000))
        wait_for_step(processes, tmp_path, saved_at + 5)
        processes[0].send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(timeout=120)
        assert steps_done(tmp_path) >= saved_at + 5, (tmp_path / "host0.log").read_text()
        record = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in record]
        assert sorted(set(steps)) == list(range(steps_done(tmp_path) + 1)), "a step is missing"
