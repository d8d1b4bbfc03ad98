"""Figures are subtracted only where they were measured alike; else the row says why not."""

import copy
from pathlib import Path

import pytest
import torch

from evaluation.config import EvaluationConfig
from evaluation.results import read_predictions, read_results, write_result
from report.comparison import difference_rows, paired_difference, why_not_comparable
from report.sections import table_sections
from report.write import Run
from runtime.config import config_to_dict

LABELS = torch.arange(40) % 4


def write(directory, wrong, *, role="teacher", label="run", step=28):
    predicted = torch.where(torch.arange(40) < wrong, (LABELS + 1) % 4, LABELS)
    top1 = 1 - wrong / 40
    write_result(
        directory,
        "knn",
        encoder={"role": role, "label": label, "step": step, "spec": label, "weights_sha256": "0" * 64},
        figures={
            "headline": {"top1": top1, "k": 20, "feature": "embedding", "predictions": "embedding"},
            "features": {"embedding": {"top1": {"20": top1}, "top5": {"20": 1.0}}},
        },
        provenance={
            "manifest_hashes": {"a:train": "1" * 16, "a:test": "2" * 16},
            "config": config_to_dict(EvaluationConfig(encoder=label)),
        },
        seconds=1.0,
        predictions={"labels": LABELS, "embedding": predicted},
    )
    return read_results(directory)[0]


def as_run(name, result, controls=()):
    return Run(
        name=name,
        path=Path(name),
        metrics=[],
        results=[result],
        controls=list(controls),
        in_training=[],
        training={},
    )


def change(result, *keys, value):
    changed = copy.deepcopy(result)
    place = changed
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return changed


CHANGES = [
    (("provenance", "manifest_hashes", "a:train"), "3" * 16, "images"),
    (("provenance", "manifest_hashes", "a:test"), "3" * 16, "images"),
    (("provenance", "config", "data", "max_train_images"), 100, "max_train_images None and 100"),
    (("provenance", "config", "data", "max_test_images"), 40, "max_test_images"),
    (("provenance", "config", "knn", "temperature"), 0.1, "knn.temperature 0.07 and 0.1"),
    (("provenance", "config", "features", "precision"), "bf16", "precision fp32 and bf16"),
    (("figures", "headline", "k"), 5, "knn.k 20 and 5"),
    (("figures", "headline", "feature"), "mean", "features embedding and mean"),
    (("encoder", "step"), 112, "step 28 and 112"),
]


@pytest.mark.parametrize(("keys", "value", "reason"), CHANGES, ids=[case[2] for case in CHANGES])
def test_what_was_measured_otherwise_is_not_subtracted_and_says_why(keys, value, reason, tmp_path):
    first, second = write(tmp_path / "a", 8), write(tmp_path / "b", 4)
    other = change(second, *keys, value=value)
    assert paired_difference(first, other) is None
    (row,) = difference_rows([as_run("first", first), as_run("second", other)])
    assert (
        row["points"] == "none" and row["interval"].startswith("not compared: ") and reason in row["interval"]
    )


def test_what_was_measured_alike_is_subtracted(tmp_path):
    first, second = write(tmp_path / "a", 8), write(tmp_path / "b", 4)
    assert why_not_comparable(first, second) == ""
    (row,) = difference_rows([as_run("first", first), as_run("second", second)])
    assert row["points"] == "+10.00"
    # A released encoder has no step: there is nothing to agree on.
    assert why_not_comparable(first, write(tmp_path / "c", 4, role="released", step=None)) == ""


def test_a_control_of_other_data_is_left_out_of_the_table_and_named(tmp_path):
    result = write(tmp_path / "a", 8)
    control = write(tmp_path / "b", 4, role="control", label="raw-pixels", step=None)
    (alike,) = (s for s in table_sections([as_run("run", result, [control])]) if s.title == "k-NN: run")
    assert alike.rows[0]["raw pixels"] == "90.00"
    stale = change(control, "provenance", "manifest_hashes", "a:test", value="old")
    (section,) = (s for s in table_sections([as_run("run", result, [stale])]) if s.title == "k-NN: run")
    assert "raw pixels" not in section.rows[0]
    assert "raw-pixels is not compared: images" in section.text and "evaluate again" in section.text


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def of_another_evaluation(path):
    write(path.parent.parent / "other", 1)
    path.write_bytes((path.parent.parent / "other" / path.name).read_bytes())


@pytest.mark.parametrize("damage", [cut, of_another_evaluation])
def test_damaged_predictions_give_no_interval_and_say_so(damage, tmp_path, caplog):
    result = write(tmp_path / "a", 8)
    damage(tmp_path / "a" / "knn.predictions.safetensors")
    assert read_predictions(result) == {} and "evaluate again" in caplog.text
    (row,) = difference_rows([as_run("first", result), as_run("second", write(tmp_path / "b", 4))])
    assert "predictions are missing or damaged" in row["interval"]
