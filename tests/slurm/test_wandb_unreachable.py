"""wandb switched on where no network is: nothing waits for it, nothing is lost."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.slurm.network import missing_for_namespaces, without_a_route

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 240
MISSING = missing_for_namespaces()
if MISSING:
    pytestmark.append(pytest.mark.skip(reason=MISSING))

# Python reports every connection attempt, with the thread that makes it, before it is made.
AUDIT = """
import os, sys, threading
log = open(os.environ["AUDIT_LOG"], "a", buffering=1)
def audit(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        log.write(f"{threading.current_thread().name} {event} {arguments!r}\\n")
sys.addaudithook(audit)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def start(shards: str, out: Path, name: str, mode: str, core: int) -> subprocess.Popen:
    hooks = out / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(AUDIT)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment |= {"OMP_NUM_THREADS": "1", "WANDB_API_KEY": "0" * 40, "PYTHONPATH": str(hooks)}
    environment["AUDIT_LOG"] = str(out / f"{name}.audit")
    command = [
        *(sys.executable, "pretrain.py", DEMO, *TINY, f"data.shards={shards}", f"run.output_dir={out}"),
        *(f"run.name={name}", f"optim.steps={NUM_STEPS}", f"logging.wandb_mode={mode}"),
    ]
    log = (out / f"{name}.log").open("wb")
    pinned = ["taskset", "-c", str(core), *without_a_route(*command)]
    return subprocess.Popen(pinned, cwd=ROOT, env=environment, stdout=log, stderr=log)


def read_record(out: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def run_pair(shards: str, out: Path, modes: tuple[str, str]) -> dict[str, float]:
    """Runs both modes at the same time on a core each; returns the seconds from start to the first step."""
    out.mkdir()
    cores = sorted(os.sched_getaffinity(0))[:2]
    started = time.time()
    processes = [start(shards, out, mode, mode, core) for mode, core in zip(modes, cores, strict=True)]
    first: dict[str, float] = {}
    while len(first) < 2 and time.time() < started + 180:
        for mode in modes:
            record = out / mode / "metrics.jsonl"
            if mode not in first and record.exists() and len(record.read_text().splitlines()) >= 2:
                first[mode] = time.time() - started
        time.sleep(0.05)
    for mode, process in zip(modes, processes, strict=True):
        assert process.wait(timeout=240) == 0, (out / f"{mode}.log").read_text()
    return first


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores for a paired timing")
def test_unreachable_wandb_costs_nothing_and_loses_nothing(shards: str, tmp_path: Path) -> None:
    ratios, delays = [], []
    for trial, modes in enumerate((("disabled", "online"), ("online", "disabled"))):
        out = tmp_path / f"trial{trial}"
        first = run_pair(shards, out, modes)
        medians = {}
        for mode in modes:
            lines = read_record(out, mode)
            assert [line["step"] for line in lines] == list(range(NUM_STEPS + 1)), "the record is the truth"
            medians[mode] = statistics.median(
                line["throughput/step_s"] for line in lines if "throughput/step_s" in line
            )
        ratios.append(medians["online"] / medians["disabled"])
        delays.append(first["online"] - first["disabled"])
        attempts = (out / "online.audit").read_text().splitlines()
        assert attempts, "wandb was not even tried"
        assert not [line for line in attempts if line.startswith("MainThread")], attempts
        assert "training.metrics replay" in (out / "online.log").read_text()
    # Each pair saw the same load, and the modes changed cores in between.
    ratio = statistics.geometric_mean(ratios)
    print(f"step ratio {ratio:.3f} from {ratios}, start delay {max(delays):.1f} s")
    assert ratio <= 1.05
    assert max(delays) <= 10


def test_replay_makes_one_offline_run_of_the_whole_record(shards: str, tmp_path: Path) -> None:
    process = start(shards, tmp_path, "run", "disabled", sorted(os.sched_getaffinity(0))[0])
    assert process.wait(timeout=240) == 0
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    command = [sys.executable, "-m", "training.metrics", "replay", str(tmp_path / "run"), "mode=offline"]
    done = subprocess.run(
        without_a_route(*command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"replayed {NUM_STEPS + 1} lines" in done.stdout
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    identifier = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert len(runs) == 1 and runs[0].name.endswith(identifier)
