"""One truth about devices, and a meeting that says what is missing; groups of two ranks: tests/distributed."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from runtime import distributed
from runtime.distributed import check_own_gpus, choose_device
from runtime.rendezvous import free_port
from tests.helpers.digits import DEMO

ROOT = Path(__file__).resolve().parents[3]
PRETRAIN = [sys.executable, "pretrain.py", DEMO]


def clean_environment(**added: str) -> dict[str, str]:
    """This environment without what launchers and tests put into it."""
    launchers = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "DS_ACCELERATOR")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return {**kept, "OMP_NUM_THREADS": "1", **added}


@pytest.mark.parametrize(
    ("device", "local_rank", "visible", "expected"),
    [
        ("auto", 3, 8, "cuda:3"),  # every task sees all GPUs of its node
        ("auto", 3, 1, "cuda:0"),  # one visible GPU a task
        ("cuda", 3, 1, "cuda:0"),
        ("auto", 3, 2, "cuda:1"),  # two visible GPUs a task
        ("auto", 3, 0, "cpu"),
        ("cpu", 3, 8, "cpu"),
    ],
)
def test_the_device_follows_from_local_rank_and_what_is_visible(
    device: str, local_rank: int, visible: int, expected: str
) -> None:
    assert str(choose_device(device, local_rank, visible)) == expected


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"run\.device is 'cuda'; expected a visible CUDA device; set run\.device"
    ):
        choose_device("cuda", 0, 0)


def test_two_ranks_on_one_gpu_are_named() -> None:
    check_own_gpus(["a 1", "a 2", "b 1"])
    with pytest.raises(ValueError, match=r"ranks 1 and 3 share one GPU \(a 2\)"):
        check_own_gpus(["a 1", "a 2", "b 1", "a 2"])


ACCELERATOR = """
import os, sys, torch
from runtime import distributed
with distributed.joined("cpu") as process:
    from deepspeed.accelerator import get_accelerator
    assert get_accelerator()._name == "cpu" == process.device.type == os.environ["DS_ACCELERATOR"], os.environ
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("inherited", ["cuda", "cpu", None])
def test_a_run_on_the_cpu_is_one_for_deepspeed_too(inherited: str | None) -> None:
    """`DS_ACCELERATOR` of a shell, a Makefile or a cluster's description does not decide: `run.device` does."""
    environment = clean_environment(**({"DS_ACCELERATOR": inherited} if inherited else {}))
    done = subprocess.run(
        [sys.executable, "-c", ACCELERATOR],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


class FakeCuda:
    """Stands for torch.cuda and torch.distributed where `start` speaks to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, visible: int) -> None:
        self.chosen: list[torch.device] = []
        self.backends: list[str] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", self.chosen.append)
        properties = type("Properties", (), {"uuid": "GPU-1"})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        group = distributed.dist
        monkeypatch.setattr(
            group, "init_process_group", lambda backend, timeout: self.backends.append(backend)
        )
        monkeypatch.setattr(group, "new_group", lambda **_: None)
        monkeypatch.setattr(group, "get_rank", lambda: 0)
        monkeypatch.setattr(group, "get_world_size", lambda: 1)


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3), (8, 3)])
@pytest.mark.parametrize("inherited", ["cpu", "cuda"])
def test_deepspeed_is_told_the_gpu_that_torch_uses(
    visible: int, index: int, inherited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed calls set_device(LOCAL_RANK), whatever is visible."""
    fake = FakeCuda(monkeypatch, visible)
    meeting = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    monkeypatch.setattr(os, "environ", {**meeting, "DS_ACCELERATOR": inherited})
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        process = distributed.start("auto", tf32=True)
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    assert process.device == torch.device("cuda", index) and fake.chosen == [process.device]
    assert os.environ["LOCAL_RANK"] == str(index) and process.local_rank == 3
    assert os.environ["DS_ACCELERATOR"] == "cuda" and fake.backends == ["cpu:gloo,cuda:nccl"]


def test_a_dry_run_waits_for_nobody() -> None:
    """In an interactive shell of an allocation, and as one rank of a launch whose others never come."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_NODELIST": "nowhere[1-2]"}
    launch = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [*PRETRAIN, "run.dry_run=true", "run.device=cuda", "run.dry_run_world_size=4"],
            cwd=ROOT,
            env=clean_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            step | {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            launch,
        )
    ]
    outputs = [process.communicate(timeout=150) for process in running]
    assert time.monotonic() - started < 150
    for process, (out, err) in zip(running, outputs, strict=True):
        assert process.returncode == 0, err
        assert "parameters" in out, out
    assert "SLURM_NTASKS is 2" in outputs[0][1] and "srun python" in outputs[0][1]


def test_peers_that_never_come_are_one_line_that_names_slurm() -> None:
    name = os.uname().nodename
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "SLURM_JOB_NODELIST": name, "SLURM_NTASKS": "2"}
    code = "import sys\nfrom runtime import distributed\nfrom runtime.program import run_program\n"
    code += "sys.exit(run_program(lambda _: distributed.start('cpu', timeout_s=1) and 0, []))"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in "01":
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=clean_environment(**step, **meeting, SLURM_PROCID=rank),
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,  # a step of srun has no terminal, this test may have one
        )
        lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert done.returncode == 1 and len(lines) == 1, done.stderr
        assert f"rank {rank} of 2 waited 1 s for its peers at 127.0.0.1:" in lines[0]
        assert "srun python" in lines[0] and "Traceback" not in done.stderr


def test_a_terminal_is_seen_through_a_redirected_input() -> None:
    """`srun --pty bash` gives its shell a terminal; a task of srun has none."""
    code = "import os, sys\nfrom runtime.distributed import has_terminal\nsys.exit(40 + has_terminal())"
    command = [sys.executable, "-c", code]
    without = subprocess.run(command, cwd=ROOT, start_new_session=True, stdin=subprocess.DEVNULL)
    pid, terminal = pty.fork()
    if pid == 0:  # the child of pty.fork has the new terminal as its own
        os.chdir(ROOT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execv(sys.executable, command)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert (without.returncode, os.waitstatus_to_exitcode(status)) == (40, 41)
