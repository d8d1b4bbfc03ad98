"""wandb switched on where no network is: nothing waits for it, nothing is lost."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.slurm.network import ended_with, missing_for_namespaces, without_a_route

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PAIRED = Path(__file__).with_name("paired_pretrain.py")
NUM_STEPS = 240
MISSING = missing_for_namespaces()
if MISSING:
    pytestmark.append(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**kept, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": "0" * 40}


def arguments(shards: str, out: Path, name: str, mode: str) -> list[str]:
    return [
        *(DEMO, *TINY, f"data.shards={shards}", f"run.output_dir={out}", f"run.name={name}"),
        *(f"optim.steps={NUM_STEPS}", f"logging.wandb_mode={mode}"),
    ]


def read_record(out: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def run_pair(shards: str, out: Path, modes: tuple[str, str]) -> dict[str, dict]:
    """Trains in both modes at the same time, step about, and returns their reports."""
    out.mkdir()
    pipes = [os.pipe(), os.pipe()]
    os.write(pipes[0][1], b".")
    processes = []
    for index, mode in enumerate(modes):
        read_fd, write_fd = pipes[index][0], pipes[1 - index][1]
        command = [sys.executable, str(PAIRED), str(read_fd), str(write_fd), str(out / f"{mode}.json")]
        log = (out / f"{mode}.log").open("wb")
        processes.append(
            subprocess.Popen(
                without_a_route(*command, *arguments(shards, out, mode, mode)),
                cwd=ROOT,
                env=environment(),
                stdout=log,
                stderr=log,
                pass_fds=(read_fd, write_fd),
                start_new_session=True,
            )
        )
    for pair in pipes:
        os.close(pair[0])
        os.close(pair[1])
    with ended_with(processes):
        for mode, process in zip(modes, processes, strict=True):
            assert process.wait(timeout=300) == 0, (out / f"{mode}.log").read_text()
    return {mode: json.loads((out / f"{mode}.json").read_text()) for mode in modes}


def test_unreachable_wandb_costs_nothing_and_loses_nothing(shards: str, tmp_path: Path) -> None:
    ratios, delays = [], []
    for trial, modes in enumerate((("disabled", "online"), ("online", "disabled"))):
        out = tmp_path / f"trial{trial}"
        reports = run_pair(shards, out, modes)
        online, disabled = reports["online"], reports["disabled"]
        assert len(online["step_s"]) == len(disabled["step_s"]) == NUM_STEPS
        ratios.append(
            statistics.median(a / b for a, b in zip(online["step_s"], disabled["step_s"], strict=True))
        )
        delays.append(online["first_step_s"] - disabled["first_step_s"])
        for mode in modes:
            record = read_record(out, mode)
            assert [line["step"] for line in record] == list(range(NUM_STEPS + 1)), "the record is the truth"
        # wandb is a process of its own: the one that trains opens no connection, in no thread.
        assert online["connections"] == []
        assert list((out / "online" / "wandb").glob("run-*")), "wandb was not even tried"
        assert "training.metrics replay" in (out / "online.log").read_text()
        assert online["after_last_step_s"] <= disabled["after_last_step_s"] + 25
    # The modes go first and second in turn.
    ratio = statistics.geometric_mean(ratios)
    print(f"step ratio {ratio:.3f} from {ratios}, start delays {delays} s")
    assert ratio <= 1.05
    assert max(delays) <= 10


def test_unreachable_wandb_does_not_use_up_the_grace_time(shards: str, tmp_path: Path) -> None:
    command = [sys.executable, "pretrain.py", *arguments(shards, tmp_path, "run", "online")]
    log, record = tmp_path / "log", tmp_path / "run" / "metrics.jsonl"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            without_a_route(*command),
            cwd=ROOT,
            env=environment(),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    with ended_with([process]):
        deadline = time.monotonic() + 120
        while not (record.exists() and record.read_text().count("\n") > 5) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR2)
        warned = time.monotonic()
        assert process.wait(timeout=60) == 75, log.read_text()
        took = time.monotonic() - warned
    print(f"exit 75 after {took:.1f} s")
    assert took <= 30, "what Slurm gives where nobody has changed KillWait"
    assert "training.metrics replay" in log.read_text()


def test_replay_makes_one_offline_run_of_the_whole_record(shards: str, tmp_path: Path) -> None:
    training = [sys.executable, "pretrain.py", *arguments(shards, tmp_path, "run", "disabled")]
    subprocess.run(training, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=240)
    command = [sys.executable, "-m", "training.metrics", "replay", str(tmp_path / "run"), "mode=offline"]
    done = subprocess.run(
        without_a_route(*command), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"replayed {NUM_STEPS + 1} lines" in done.stdout
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    identifier = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert len(runs) == 1 and runs[0].name.endswith(identifier)
