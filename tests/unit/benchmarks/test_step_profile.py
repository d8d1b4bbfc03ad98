"""The profile of a step counts everything once, for the stage that launched it."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step_profile import describe, read_trace

ROOT = Path(__file__).resolve().parents[3]


def event(category, name, start, length, correlation=None):
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"cat": category, "name": name, "ts": start, "dur": length, "args": arguments}


EVENTS = [
    event("user_annotation", "stage:rest", 0, 10_000),
    event("user_annotation", "stage:teacher", 1_000, 3_000),
    event("user_annotation", "stage:backward", 5_000, 2_000),
    event("user_annotation", "another's", 1_000, 1_000),
    event("cuda_runtime", "cudaLaunchKernel", 2_000, 10, 1),
    event("cuda_driver", "cuLaunchKernelEx", 3_900, 200, 2),  # begins inside the stage
    event("cuda_runtime", "cudaMemcpyAsync", 4_500, 10, 3),
    event("cuda_runtime", "cudaLaunchKernel", 6_000, 10, 4),
    event("cuda_runtime", "cudaStreamSynchronize", 9_000, 10, 5),
    event("kernel", "a", 2_500, 1_000, 1),
    event("kernel", "b", 3_000, 2_000, 2),  # beside the first
    event("gpu_memcpy", "c", 5_000, 500, 3),
    event("kernel", "d", 7_000, 4_000, 4),
    event("kernel", "of nobody", 20_000, 1_000, 99),
    {"cat": "kernel", "name": "no length", "ts": 3},
]


def test_time_and_launches_are_the_innermost_stage_s():
    found = read_trace(EVENTS)
    assert found.host == {"rest": 5.0, "teacher": 3.0, "backward": 2.0}
    assert found.launches == {"teacher": 2, "rest": 1, "backward": 1, "outside": 1}
    assert found.device == {"teacher": 3.0, "rest": 0.5, "backward": 4.0, "outside": 1.0}
    assert found.busy == pytest.approx(2.5 + 0.5 + 4.0 + 1.0)


def test_the_table_is_of_one_step_and_adds_up():
    lines = describe(read_trace(EVENTS), num_steps=2)
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["teacher", "1.50"], ["backward", "1.00"], ["rest", "2.50"], ["outside", "0.00"],
    ]  # fmt: skip
    assert lines[-1].split()[:4] == ["sum", "5.00", "2", "4.25"]
    assert "busy for 4.0 ms" in lines[-1]


@pytest.mark.timeout(280)
def test_a_step_on_a_cpu_is_profiled():
    command = [
        sys.executable,
        "-m",
        "benchmarks.step_profile",
        "--batch",
        "4",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=260)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "4 images, 2 + 2 crops" in done.stdout and "student forward" in done.stdout
