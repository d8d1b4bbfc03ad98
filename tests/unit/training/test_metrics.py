"""The record of a run and its view in wandb, with a stand-in for wandb that writes down what it was given."""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.logging_setup import add_log_file
from runtime.program import UserError
from runtime.record import read_record
from training.metrics import MetricsRecord, RecordView, main

STAND_IN = """
import json, os, time

class Settings:
    def __init__(self, **options): pass

class Run:
    def __init__(self, options): self.path, self.options = os.environ["STAND_IN_LOG"], options
    def define_metric(self, *names, **options): pass
    def log(self, line): self.write(line)
    def finish(self): self.write({"finished": True})
    def write(self, entry):
        with open(self.path, "a") as file:
            file.write(json.dumps({"id": self.options["id"], "mode": self.options["mode"], **entry}) + "\\n")

def init(**options):
    trouble = os.environ.get("STAND_IN_TROUBLE")
    if trouble == "fails":
        raise OSError("no network")
    if trouble == "hangs":
        time.sleep(60)
    run = Run(options)
    run.write({"config": options["config"]})
    return run
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "sent"))
    return tmp_path / "sent"


def run_start(run_dir: Path, first: int, last: int, *, mode: str = "online", timeout_s: float = 30) -> None:
    """One start of a run that is resumed at step `first - 1`, with one line a step."""
    run_dir.mkdir(exist_ok=True)
    record = MetricsRecord(run_dir, resume_step=first - 1)
    view = RecordView(run_dir, "wandb", mode=mode, project="p", facts={"commit": "abc"})
    for step in range(first, last + 1):
        record.write(step, 10 * step, {"loss/total": 1.0 / step})
    record.close()
    view.close(timeout_s)


def entries(sent: Path) -> list[dict]:
    return [json.loads(text) for text in sent.read_text().splitlines()]


def steps(sent: Path) -> list[int]:
    return [entry["step"] for entry in entries(sent) if "step" in entry]


def test_record_goes_on_behind_the_checkpoint_and_says_what_is_done_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = MetricsRecord(tmp_path, resume_step=0)
    for step in range(1, 8):
        record.write(step, step, {"loss/total": math.nan if step == 2 else 1.0})
    record.close()
    with record.path.open("a") as file:
        file.write('{"step": 8, "samp')  # killed in the middle of a line
    with caplog.at_level(logging.WARNING):
        MetricsRecord(tmp_path, resume_step=5).close()
    lines = read_record(record.path.parent)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[1]["loss/total"] is None
    assert "ended at step 7 or later without saving it: going on from step 5" in caplog.text
    caplog.clear()
    MetricsRecord(tmp_path, resume_step=5).close()
    assert "without saving" not in caplog.text


def test_a_run_that_begins_anew_puts_its_former_record_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = MetricsRecord(tmp_path, resume_step=0)
    for step in range(1, 4):
        record.write(step, step, {"loss/total": 1.0})
    record.close()
    former = record.path.read_bytes()
    anew = MetricsRecord(tmp_path, resume_step=0)
    anew.close()
    assert read_record(anew.path.parent) == []
    (aside,) = tmp_path.glob("metrics-*.jsonl")
    assert aside.read_bytes() == former
    assert "no checkpoint is left of it: beginning anew" in caplog.text and aside.name in caplog.text
    MetricsRecord(tmp_path, resume_step=0).close()
    assert list(tmp_path.glob("metrics-*.jsonl")) == [aside], "a record without a step is nothing to keep"


def test_files_of_a_run_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "console.log"):
        (tmp_path / name).mkdir()
    line = r"cannot be opened \(Is a directory\); expected .*; mend its permissions, or set run\.output_dir$"
    with pytest.raises(UserError, match="metrics.jsonl " + line):
        MetricsRecord(tmp_path, resume_step=3)
    with pytest.raises(UserError, match="console.log " + line):
        add_log_file(tmp_path / "console.log", rank=0)


def test_what_is_no_line_of_a_record_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = MetricsRecord(tmp_path, resume_step=0)
    record.write(1, 1, {"loss/total": 1.0})
    record.close()
    with record.path.open("ab") as file:
        file.write(b'\xff\xfe\n1\n{"loss/total": 2}\n{"step": "2"}\n' + b"[" * 100_000 + b"\n")
    MetricsRecord(tmp_path, resume_step=4).close()
    assert [line["step"] for line in read_record(record.path.parent)] == [1]
    assert caplog.text.count("left out what is no line of a record") == 5


def test_one_wandb_run_over_three_starts_the_first_without_a_network(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setenv("STAND_IN_TROUBLE", "fails")
    run_start(run_dir, 1, 5)
    assert "wandb stopped before the end; nothing is lost: `python -m training.metrics replay" in caplog.text
    assert not stand_in.exists() and not (run_dir / "wandb_sent").exists()
    monkeypatch.delenv("STAND_IN_TROUBLE")
    (run_dir / "config.yaml").write_text("run: {name: x}\n")
    run_start(run_dir, 6, 9)
    assert steps(stand_in) == list(range(1, 10)), (
        "what the first start could not send follows with the second"
    )
    run_start(run_dir, 10, 12)
    assert steps(stand_in) == list(range(1, 13)), "what wandb has confirmed is not sent again"
    assert len({entry["id"] for entry in entries(stand_in)}) == 1
    assert entries(stand_in)[0]["config"] == {"run": {"name": "x"}, "commit": "abc"}


def test_offline_every_start_holds_the_whole_record(stand_in: Path, tmp_path: Path) -> None:
    run_start(tmp_path / "run", 1, 3, mode="offline")
    run_start(tmp_path / "run", 4, 5, mode="offline")
    assert steps(stand_in) == [1, 2, 3, 1, 2, 3, 4, 5]


def test_a_hanging_wandb_is_ended(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STAND_IN_TROUBLE", "hangs")
    started = time.monotonic()
    run_start(tmp_path / "run", 1, 3, timeout_s=0.5)
    assert time.monotonic() - started < 10
    assert "wandb did not finish within 0 s; nothing is lost" in caplog.text


def test_a_warning_signal_does_not_end_the_view(stand_in: Path, tmp_path: Path) -> None:
    record = MetricsRecord(tmp_path, resume_step=0)
    view = RecordView(tmp_path, "wandb", mode="online", project="p", facts={})
    deadline = time.monotonic() + 30
    while not stand_in.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        os.kill(view._follower.pid, number)
    record.write(1, 1, {"loss/total": 1.0})
    record.close()
    view.close(30)
    assert steps(stand_in) == [1]


def test_replay_sends_everything_again_into_the_same_run(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_start(tmp_path / "run", 1, 4)
    command = [sys.executable, "-m", "training.metrics", "replay", str(tmp_path / "run"), "mode=offline"]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout.startswith("replayed 4 lines"), done.stderr
    assert steps(stand_in) == [1, 2, 3, 4, 1, 2, 3, 4]
    assert len({entry["id"] for entry in entries(stand_in)}) == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "arguments are missing; expected replay"),
        (["replay", "/nowhere"], "/nowhere has no metrics.jsonl"),
        (["replay", "/nowhere", "mode=on"], "argument is 'mode=on'; expected view=wandb.*, mode=online"),
        (["replay", "/nowhere", "speed=2"], "argument is 'speed=2'"),
    ],
)
def test_replay_refuses_in_one_line(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        main(arguments)


def test_lines_that_a_full_disk_does_not_take_are_written_later(tmp_path, caplog):
    record = MetricsRecord(tmp_path, resume_step=0)
    record.write(1, 32, {"loss/total": 1.0})
    whole, record._file = record._file, Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115
    record.write(2, 64, {"loss/total": 2.0})
    record.write(3, 96, {"loss/total": 3.0})
    assert caplog.text.count("cannot be written: [Errno 28] No space left") == 1
    record._file.close()
    record._file = whole
    record.write(4, 128, {"loss/total": 4.0})
    assert record.num_bytes == (tmp_path / "metrics.jsonl").stat().st_size
    record.close()
    record.close()
    assert [line["step"] for line in read_record(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_costs_the_log_one_line_and_no_traceback(tmp_path, capsys):
    from runtime.logging_setup import _LogFile

    handler = _LogFile("/dev/full")
    for _ in range(3):
        handler.handle(logging.makeLogRecord({"msg": "a line", "levelno": logging.INFO}))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "/dev/full cannot be written: No space left on device" in said
    with contextlib.suppress(OSError):
        handler.close()
