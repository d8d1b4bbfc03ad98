"""What a resume does to the record and to a run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from runtime.config import load_config
from runtime.distributed import Process
from runtime.program import UserError
from runtime.record import read_record
from tests.helpers.digits import DEMO
from training.config import PretrainConfig
from training.metrics import MetricsRecord, keep_wandb_id, wandb_id
from training.run_directory import held_run_directory

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def write_lines(run_dir: Path, steps: range) -> list[int]:
    """Returns the length of the record after each line."""
    record = MetricsRecord(run_dir, resume_step=0)
    lengths = []
    for step in steps:
        record.write(step, 32 * step, {"loss/total": step / 3})
        lengths.append(record.num_bytes)
    record.close()
    return lengths


def test_the_record_goes_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    lengths = write_lines(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert lengths[-1] == len(before)
    record = MetricsRecord(tmp_path, resume_step=4, resume_bytes=lengths[3])
    assert record.num_bytes == lengths[3] and record.path.read_bytes() == before[: lengths[3]]
    record.write(5, 160, {"loss/total": 5 / 3})
    record.close()
    assert [line["step"] for line in read_record(record.path.parent)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("position", [10**6, 7, None])
def test_a_record_that_is_not_the_checkpoints_is_cut_by_steps(tmp_path: Path, position: int | None) -> None:
    write_lines(tmp_path, range(1, 8))
    MetricsRecord(tmp_path, resume_step=4, resume_bytes=position).close()
    assert [line["step"] for line in read_record(tmp_path)] == [1, 2, 3, 4]


def test_a_lost_wandb_id_comes_back_and_an_own_one_stays(tmp_path: Path) -> None:
    keep_wandb_id(tmp_path, "saved-id")
    assert wandb_id(tmp_path) == "saved-id"
    keep_wandb_id(tmp_path, "another")
    assert wandb_id(tmp_path) == "saved-id"


def test_starting_over_in_a_directory_with_checkpoints_is_refused(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, DEMO, ["run.resume=false"])
    with held_run_directory(config, tmp_path / "run", ALONE) as directory:
        directory.claim()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    with held_run_directory(config, tmp_path / "run", ALONE):
        pass  # nothing is committed
    (checkpoint / "COMMIT").write_text("x")
    refused = pytest.raises(ValueError, match=r"run\.resume is False.*step-00000100.*set run\.name")
    with refused, held_run_directory(config, tmp_path / "run", ALONE):
        pass
    with held_run_directory(load_config(PretrainConfig, DEMO, []), tmp_path / "run", ALONE):
        pass


def test_a_directory_that_somebody_deleted_ends_the_run_in_words(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, DEMO, [])
    with held_run_directory(config, tmp_path / "run", ALONE) as directory:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(
            UserError, match=r"run is gone; expected .*; set run\.name; this job ends without"
        ):
            directory.confirm()
    assert not (tmp_path / "run").exists()
