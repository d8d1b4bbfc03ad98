"""What TensorBoard's reader finds in the files of a run that went on."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.config import load_config
from runtime.distributed import Process
from runtime.program import UserError
from tests.helpers.digits import DEMO, TINY
from training.build import build_trainer
from training.config import PretrainConfig
from training.dry_run import describe_run
from training.metrics import MetricsRecord, RecordView, main, require_views
from training.run_directory import RunDirectory


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return {tag: [(e.step, round(e.value, 5)) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def start(run_dir: Path, first: int, last: int, loss: float) -> None:
    """One start of a run that is resumed at step `first - 1`."""
    record = MetricsRecord(run_dir, resume_step=first - 1)
    view = RecordView(run_dir, "tensorboard")
    for step in range(first, last + 1):
        values = {"loss/total": loss - step / 8} | ({"eval/knn20_top1": float("nan")} if step == 2 else {})
        record.write(step, 32 * step, values)
    record.close()
    view.close(30)


@pytest.mark.parametrize(
    ("view", "option"), [("tensorboard", "tensorboard=true"), ("wandb", "wandb_mode=offline")]
)
def test_without_its_package_a_view_is_refused_before_anything_starts(view, option, tmp_path, monkeypatch):
    config = load_config(PretrainConfig, DEMO, [*TINY, f"logging.{option}"])
    require_views(config.logging)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == view else find(name, *rest)
    )
    message = rf"^logging\.\w+ is .* and the package {view} is not installed; expected it; pip install {view}, or set"
    with pytest.raises(UserError, match=message):
        describe_run(config, Process(0, 1, 0, torch.device("cpu")))
    with pytest.raises(UserError, match=message):
        build_trainer(config, None, RunDirectory, None, None)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=f"package {view} is not installed"):
        main(["replay", str(tmp_path), f"view={view}"])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_shows_every_step_once_also_after_a_resume(tmp_path: Path) -> None:
    start(tmp_path, 1, 300, loss=9.0)
    found = curves(tmp_path)
    assert found["loss/total"] == [(step, 9.0 - step / 8) for step in range(1, 301)]
    assert found["samples_seen"][-1] == (300, 9600.0) and "eval/knn20_top1" not in found
    (first,) = (tmp_path / "tensorboard").iterdir()
    foreign = tmp_path / "tensorboard" / "events.out.tfevents.1.theirs"
    foreign.write_bytes(b"")
    # Killed after its checkpoint of step 4 and started again: steps 5 and 6 are done anew.
    start(tmp_path, 5, 6, loss=1.0)
    expected = [(step, 9.0 - step / 8) for step in range(1, 5)] + [(5, 0.375), (6, 0.25)]
    assert curves(tmp_path)["loss/total"] == expected
    files = list((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2 and first not in files and foreign in files


def test_a_run_made_without_one_gets_its_event_file_later(tmp_path: Path, capsys) -> None:
    lines = [{"step": step, "loss/total": step / 2} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(tmp_path), "view=tensorboard"]) == 0
    assert "replayed 4 lines" in capsys.readouterr().out
    assert curves(tmp_path) == {"loss/total": [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5)]}
