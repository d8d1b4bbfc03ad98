"""Run directories as a user treats them: two starts at once, renamed, lengthened, damaged, refused, a full disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.encoders.exported import find_exported_folder
from runtime.distributed import Process
from runtime.program import UserError
from tests.helpers import starts
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from training.checkpoints.exported_encoder import EXPORTED_NAMES
from training.checkpoints.files import CheckpointError, list_committed
from training.checkpoints.saved_run import read_saved_run
from training.export import export_from_run

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
STEPS, EVERY = 6, 3


def arguments_of(shards: str, run_dir: Path, *overrides: str) -> list[str]:
    return [
        DEMO,
        *TINY,
        f"data.shards={shards}",
        f"run.output_dir={run_dir.parent}",
        f"run.name={run_dir.name}",
        f"optim.steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        *overrides,
    ]


def run(shards: str, run_dir: Path, *overrides: str, expect: int = 0, fault: str = "") -> str:
    """Runs pretrain.py, under a fault if one is planned, and returns what it said on stderr."""
    module = "tests.faults.injection" if fault else "pretrain"
    done = starts.run(module, arguments_of(shards, run_dir, *overrides), environment={"FAULT": fault})
    assert done.returncode == expect, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr


def steps_of_record(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def content(run_dir: Path) -> dict[str, bytes]:
    """Every file of a run but its log and the signs of life."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name != "console.log" and "heartbeats" not in path.parts
    }


def renew_hashes(checkpoint: Path) -> None:
    """Makes a changed checkpoint consistent again: sizes, hashes, COMMIT."""
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        data = (checkpoint / entry["path"]).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))
    (checkpoint / "COMMIT").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + "\n")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def finished(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints of steps 3 and 6; tests work on copies."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run(shards, run_dir)
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_finished_run_is_lengthened_and_a_renamed_one_continued_on_purpose(shards: str, copy: Path) -> None:
    renamed = copy.rename(copy.with_name("renamed"))
    before = content(renamed)
    refused = run(shards, renamed, expect=2)
    assert "run.name is 'renamed'" in refused and "set run.adopt=true" in refused and "remove" not in refused
    assert content(renamed) == before
    said = run(shards, renamed, "optim.steps=8", "run.extend=true", "run.adopt=true")
    assert said.count("run.extend: 8 steps instead of 6") == 1 and "learning rate is" in said
    assert said.count("was made as 'run' and goes on as 'renamed'") == 1
    assert steps_of_record(renamed) == list(range(9))
    assert list_committed(renamed / "checkpoints")[0].name == "step-00000008"
    saved = (renamed / "config.yaml").read_text()
    assert "name: renamed" in saved and "  steps: 8\n" in saved, (
        "the same command without switches goes on now"
    )


def test_checkpoints_that_do_not_fit_are_passed_over_and_without_a_good_one_nothing_is_touched(
    shards: str, finished: Path, copy: Path
) -> None:
    newest, older = list_committed(copy / "checkpoints")
    state = load_file(newest / "state-00000-of-00001.safetensors")
    state.pop(next(name for name in state if name.startswith("student/")))
    save_file(state, newest / "state-00000-of-00001.safetensors")
    renew_hashes(newest)
    assert read_saved_run(newest, ALONE), "only the network can tell that a tensor is missing"
    said = run(shards, copy)
    assert "passing over" in said and "lacks student/" in said and f"{older.name}: 3 steps done" in said
    assert (newest / "teacher" / "model.safetensors").read_bytes() == (
        finished / "checkpoints" / newest.name / "teacher" / "model.safetensors"
    ).read_bytes(), "the steps were done again, bit for bit"
    for checkpoint in list_committed(copy / "checkpoints"):
        (checkpoint / "record.json").write_text('{"dict": [["metrics_bytes", "many"]]}')
        renew_hashes(checkpoint)
    before = content(copy)
    said = run(shards, copy, expect=2)
    assert said.count("passing over checkpoint") == 2 and said.count("record.json holds") == 2
    assert "holds 2 checkpoint(s) and none can be used" in said.splitlines()[-1]
    assert content(copy) == before


DAMAGES: dict[str, Any] = {
    "progress": [
        None,
        [],
        {"dict": []},
        {"dict": [["progress", {"dict": [["step", 6]]}]]},
        3,
        {"tensor": "x"},
    ],
    "record": [None, {"dict": [["metrics_bytes", -1]]}, {"dict": [["wandb_id", 3]]}, {"list": []}],
    "estimator": [None, [], {"list": [1]}, {"tensor": "nowhere"}],
    "rng-00000-of-00001": [None, {"dict": []}, {"dict": [["python", 1], ["numpy", 2]]}, "x"],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_read_at_a_resume_is_refused_with_its_reason(copy: Path, name: str) -> None:
    newest = list_committed(copy / "checkpoints")[0]
    assert read_saved_run(newest, ALONE).progress.step == STEPS
    for damage in DAMAGES[name]:
        (newest / f"{name}.json").write_text(json.dumps(damage))
        with pytest.raises(CheckpointError):
            read_saved_run(newest, ALONE)


@pytest.mark.parametrize("change", ["step", "used", "samples_seen", "hits", "losses"])
def test_progress_of_another_shape_is_refused(copy: Path, change: str) -> None:
    newest = list_committed(copy / "checkpoints")[0]
    text = (newest / "progress.json").read_text()
    old, new = {
        "step": ('["step", 6]', '["step", 3]'),
        "used": ('["0", ', '["0", -'),
        "samples_seen": ('"samples_seen", 192]], ', '"samples_seen", null]], '),
        "hits": ('{"tensor": "/usage_counts"}', "[1, 2]"),
        "losses": ('["losses", {"list": []}]', '["losses", {"list": ["x"]}]'),
    }[change]
    if old not in text:  # the window of losses is empty or not, as the guard decides
        old, new = '"losses"', '"other"'
    (newest / "progress.json").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError):
        read_saved_run(newest, ALONE)


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"x" * 100])
def test_a_state_file_that_is_none_is_refused(copy: Path, damage: bytes) -> None:
    newest = list_committed(copy / "checkpoints")[0]
    for name in ("state-00000-of-00001", "progress", "estimator"):
        whole = (newest / f"{name}.safetensors").read_bytes()
        (newest / f"{name}.safetensors").write_bytes(damage)
        if name == "state-00000-of-00001" and damage.startswith(b"\x08"):
            assert len(read_saved_run(newest, ALONE).state) == 0  # a whole file without a tensor
        else:
            with pytest.raises(CheckpointError):
                read_saved_run(newest, ALONE)
        (newest / f"{name}.safetensors").write_bytes(whole)


def wait_until(happened: Callable[[], bool], timeout_s: float = 150) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_second_start_is_refused_and_names_the_holder_and_a_dead_holder_is_followed(
    shards: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ("optim.steps=100000", f"checkpoint.every_steps={EVERY}")
    first = starts.start("pretrain", arguments_of(shards, run_dir, *options))
    try:
        wait_until(lambda: len(list_committed(run_dir / "checkpoints")) == 2)
        refused = run(shards, run_dir, *options, expect=2)
        errors = [line for line in refused.splitlines() if line.startswith("error")]
        assert len(errors) == 1 and f"is held by process {first.pid} on host" in errors[0]
        # Whoever reads a run, or writes its results beside it, asks nobody.
        (run_dir / "results").mkdir()
        (run_dir / "results" / "knn.json").write_text("{}")
        newest = max(steps_of_record(run_dir))
        wait_until(lambda: max(steps_of_record(run_dir)) > newest + EVERY)
        assert first.poll() is None, "the second start did the first no harm"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    found = list_committed(run_dir / "checkpoints")[0]
    said = run(shards, run_dir, *options, "optim.max_skipped_steps=1", expect=2)
    assert "optim.max_skipped_steps" in said and "taking over" in said, "a dead holder does not refuse"
    assert list_committed(run_dir / "checkpoints")[0] == found and not (run_dir / "LOCK").exists()


def test_a_failed_start_leaves_nothing_that_refuses_the_corrected_command(
    shards: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run(shards, run_dir, "model.init=timm:no_such_model", "optim.lr=0.1", expect=2)
    assert not (run_dir / "config.yaml").exists() and not (run_dir / "LOCK").exists()
    run(shards, run_dir, "optim.steps=1")
    assert "init: random" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_run_whose_last_save_failed_says_so_in_its_exit_code(
    shards: str, tmp_path: Path, asynchronous: str
) -> None:
    said = run(
        shards,
        tmp_path / "run",
        f"checkpoint.asynchronous={asynchronous}",
        expect=1,
        fault=f"enospc@0:{STEPS}:save_written",
    )
    last = said.splitlines()[-1]
    assert f"the run is done, but step {STEPS} is not saved" in last
    assert "the newest whole checkpoint is that of step 3" in last


def test_a_run_that_only_skips_says_what_is_saved(shards: str, tmp_path: Path) -> None:
    said = run(shards, tmp_path / "run", "optim.max_skipped_steps=3", expect=1, fault="nan@0:*:loss")
    assert (
        "3 steps in a row were skipped; the newest whole checkpoint is that of step 0"
        in said.splitlines()[-1]
    )


def test_a_set_smaller_than_a_batch_is_refused_and_a_warm_up_longer_than_the_run_said(
    shards: str, tmp_path: Path
) -> None:
    said = run(shards, tmp_path / "run", "batch.global_batch_size=512", expect=2)
    assert "batch.global_batch_size is 512; expected at most the 384 images of split 'train'" in said
    said = run(shards, tmp_path / "run", "optim.warmup_epochs=1", "optim.steps=1")
    assert said.count("the warm-up takes 12 steps and the run 1") == 1


def test_an_export_replaces_an_export_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    out, neighbour = tmp_path / "out", tmp_path / "out.tmp"
    neighbour.mkdir()
    (neighbour / "mine").write_text("x")
    before = content(finished)
    for _ in range(2):
        export_from_run(finished, out, "teacher")
    of_patches = {"patch_head.safetensors", "patch_prototypes.safetensors"}
    assert {path.name for path in out.iterdir()} == EXPORTED_NAMES - of_patches and (
        neighbour / "mine"
    ).exists()
    assert content(finished) == before, "an export beside a running training only reads"
    (out / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"OUT is .*, which holds notes\.txt"):
        export_from_run(finished, out, "teacher")
    assert (out / "notes.txt").exists()
    with pytest.raises(UserError, match=r"OUT is .*notes\.txt, which is a file; expected an empty folder"):
        export_from_run(finished, out / "notes.txt", "teacher")
    foreign = tmp_path / "a model of somebody's"
    foreign.mkdir()
    for name in ("config.json", "model.safetensors"):  # what other programs call theirs too
        (foreign / name).write_text("x")
    with pytest.raises(UserError, match=r"OUT is .*, which holds config\.json and is no export; "):
        export_from_run(finished, foreign, "teacher")
    assert {path.read_text() for path in foreign.iterdir()} == {"x"}
    assert (out / "notes.txt").read_text() == "x" and [path.name for path in out.glob(".*")] == []


def test_evaluation_takes_the_newest_step_and_no_directory_that_no_save_made(copy: Path) -> None:
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step-00000003", checkpoints / "step-000000099")
    assert find_exported_folder(str(copy)).step == STEPS
    shutil.copytree(checkpoints / "step-00000003", checkpoints / "step-100000000")
    assert find_exported_folder(str(copy)).step == 10**8
