import json
import os
import re
import warnings

import numpy as np
import pytest
import torch

from evaluation.results import RESULT_SCHEMA
from report import charts as figures
from report import confusion, curves
from report.runs import (
    configuration_rows,
    difference_of_configurations,
    load_runs,
    run_rows,
)
from report.tables import markdown_table
from report.write import provenance_rows, write_report
from runtime.program import UserError


def make_run(path, *, steps=12, total=12, tail="", mode="full", lr=0.1):
    path.mkdir()
    lines = [
        {
            "step": step,
            "loss/total": 9.0 - 0.1 * step,
            "throughput/step_s": 2.0,
            "gmm/beta": 1.0,
            "x/none": None,
        }
        for step in range(4, steps + 1, 4)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(
        f"run: {{name: {path.name}, seed: 3}}\nprototypes: {{mode: {mode}, estimator: vmf, num_prototypes: 64}}\n"
        f"optim: {{lr: {lr}}}\n"
    )
    (path / "console.log").write_text(
        f"2026-01-02 03:04:05,006 I training.trainer | step {steps}/{total}  total 1.0\n{tail}"
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({}, "finished, 12 steps"),
        ({"total": 40}, "ended early at step 12 of 40"),
        (
            {"total": 40, "tail": "I training.trainer | stopping at step 12 after SIGTERM\n"},
            "preempted at step 12 of 40",
        ),
    ],
)
def test_a_run_says_how_it_ended(tmp_path, arguments, status):
    (row,) = run_rows(load_runs([make_run(tmp_path / "run", **arguments)]))
    assert row["status"] == status
    assert row["time in steps"] == "0 min 24 s"  # three lines of four steps, two seconds each
    assert (row["mode"], row["K"], row["seed"], row["started"]) == (
        "full, vmf",
        "64",
        "3",
        "2026-01-02 03:04",
    )


def test_a_sign_of_life_means_that_it_runs(tmp_path):
    run = make_run(tmp_path / "run", total=40)
    (run / "heartbeats").mkdir()
    (run / "heartbeats" / "rank-0").touch()
    assert run_rows(load_runs([run]))[0]["status"] == "running, step 12 of 40"


def test_differences_are_the_options_that_differ(tmp_path):
    runs = load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.2)])
    assert difference_of_configurations(runs) == [{"option": "optim.lr", "a": "0.1", "b": "0.2"}]
    assert {row["option"] for row in configuration_rows(runs)} >= {"run.name", "prototypes.mode", "optim.lr"}
    assert difference_of_configurations(runs[:1]) == []


def test_every_number_of_the_record_is_drawn(tmp_path, monkeypatch):
    drawn = []
    original = curves._draw_panel
    monkeypatch.setattr(
        curves,
        "_draw_panel",
        lambda axes, key, *rest, **options: (drawn.append(key), original(axes, key, *rest, **options)),
    )
    records = [
        {"step": 1, "loss/total": 2.0, "optim/lr": 0.1, "memory/new_figure": 1.0, "loss/auxiliary": None}
    ]
    charts = curves.draw_curves({"run": records})
    assert drawn == ["loss/total", "optim/lr", "memory/new_figure"]
    assert [chart.name for chart in charts] == ["loss_over_time", "optim_over_time", "memory_over_time"]


def test_the_loss_axis_shows_the_curve():
    from matplotlib import pyplot as plt

    _, axes = plt.subplots()
    curves._draw_panel(
        axes,
        "loss/total",
        "total",
        {"r": [{"step": s, "loss/total": 5 + 0.01 * s} for s in range(9)]},
        shares=False,
    )
    low, high = axes.get_ylim()
    assert low > 4.9 and high < 5.2


def test_names_in_legends_are_short_and_stay_unique():
    names = ["a" * 60 + "1", "a" * 60 + "2", "short"]
    short = figures.short_names(names)
    assert len(set(short)) == 3 and max(map(len, short)) <= 26 and short[2] == "short"
    twins = figures.short_names(["x" * 40 + "1" + "y" * 40, "x" * 40 + "2" + "y" * 40])
    assert twins[0] != twins[1]


def test_confusions_are_counted_by_class(tmp_path, monkeypatch):
    labels, found = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 2, 1, 2, 2, 2])
    monkeypatch.setattr(confusion, "read_predictions", lambda result: {"labels": labels, "knn": found})
    result = {"figures": {"headline": {"predictions": "knn"}}, "provenance": {"config": {}}}
    counts = confusion.count_confusions(result)
    assert np.array_equal(counts, [[1, 0, 1], [0, 1, 2], [0, 0, 1]])
    rows = confusion.confusion_rows(result)
    assert rows[0] == {"class": "1", "taken for": "2", "images": "2 of 3", "share %": "66.7"}
    assert len(rows) == 2


def test_lines_of_a_record_that_cannot_be_drawn_are_left_out_and_said(tmp_path, caplog):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    odd = [
        b'{"step": "5", "loss/total": 1}',
        b'{"step": null}',
        b"[1]",
        b"[" * 100_000,
        b'{"step": 1' + b"0" * 400 + b"}",
        b'{"step": 13, "a": "caf\xe9"}',
    ]
    path.write_bytes(path.read_bytes() + b"\n".join(odd) + b"\n")
    (run,) = load_runs([path.parent])
    assert [record["step"] for record in run.metrics] == [4, 8, 12, 13]
    assert sum("left out what is no line" in message for message in caplog.messages) == 5


@pytest.mark.parametrize(
    "text", ["prototypes: null\nrun: null\n", "prototypes: x\nrun: [1]\n", "prototypes: {mode: full}\n"]
)
def test_a_configuration_without_its_sections_still_has_a_row(tmp_path, text):
    path = make_run(tmp_path / "run")
    (path / "config.yaml").write_text(text)
    (row,) = run_rows(load_runs([path]))
    assert (row["status"], row["seed"]) == ("finished, 12 steps", "")
    write_report([path], tmp_path / "page")  # without crops


def test_a_loss_that_has_left_all_bounds_is_drawn():
    """The span from -1e308 to 1e308 is infinite, and an integer of 400 digits no float."""
    losses = [2.0, 1e308, -1e308, 10**400, float("nan")]
    records = [{"step": step, "loss/total": loss} for step, loss in enumerate(losses)]
    steps, values = figures.series(records, "loss/total")
    assert steps == [0, 1, 2, 3, 4] and values[:4] == [2.0, 1e300, -1e300, 1e300]
    (chart,) = curves.draw_curves({"run": records})
    assert chart.png.startswith(b"\x89PNG")


def test_a_name_that_is_no_utf8_can_be_written_into_the_page(tmp_path):
    path = make_run(tmp_path / "run").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    (run,) = load_runs([path])
    assert run.name == "café"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda result: result.pop("figures"),
        lambda result: result.update(figures="x"),
        lambda result: result["figures"].pop("headline"),
        lambda result: result["figures"]["headline"].pop("k"),
        lambda result: result["figures"].pop("features"),
        lambda result: result.update(probe="prototypes"),
        lambda result: result.update(probe="linear", figures={"headline": []}),
        lambda result: result.pop("encoder"),
        lambda result: result["provenance"].pop("manifest_hashes"),
        lambda result: result["encoder"].pop("label"),
        lambda result: result.pop("provenance"),
        lambda result: result.update(probe=["knn"]),
        lambda result: result.update(probe="../../knn"),
    ],
)
def test_a_result_that_lacks_a_part_is_left_out_and_said(tmp_path, caplog, spoil):
    path = make_run(tmp_path / "run")
    (path / "results").mkdir()
    whole = {
        "schema": RESULT_SCHEMA,
        "probe": "knn",
        "encoder": {"role": "teacher", "label": "run", "step": 12, "weights_sha256": "0"},
        "figures": {"headline": {"top1": 0.5, "k": 20}, "features": {}},
        "provenance": {"config": {}, "manifest_hashes": {}, "hardware": {}},
    }
    for name, result in (("whole", whole), ("spoilt", json.loads(json.dumps(whole)))):
        if name == "spoilt":
            spoil(result)
        (path / "results" / f"{name}.json").write_text(json.dumps(result))
    (run,) = load_runs([path])
    assert [result["path"].name for result in run.results] == ["whole.json"]
    assert len(provenance_rows([run])) == 1
    assert "spoilt.json is left out of the report: it has no" in caplog.text


def test_a_result_of_brackets_alone_is_left_out_and_said(tmp_path, caplog):
    path = make_run(tmp_path / "run")
    (path / "results").mkdir()
    (path / "results" / "x.json").write_text("[" * 100_000)
    assert load_runs([path])[0].results == [] and "x.json is left out of the report" in caplog.text


def test_a_record_that_is_a_folder_is_one_line(tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"^\S*metrics\.jsonl cannot be read \(Is a directory\); expected a run's"
    ):
        load_runs([tmp_path / "run"])


def test_what_is_no_time_of_a_step_is_not_counted(tmp_path):
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    odd = ('"a"', "null", "NaN", "Infinity", "1e300", "1" + "0" * 400, "[1]")
    lines = [
        f'{{"step": {20 + i}, "throughput/step_s": {v}, "throughput/images_per_s": "a"}}'
        for i, v in enumerate(odd)
    ]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    (row,) = run_rows(load_runs([path.parent]))
    assert (row["time in steps"], row["images/s"]) == ("0 min 24 s", "")


def test_a_record_of_step_0_alone_is_drawn_without_a_warning():
    with warnings.catch_warnings(action="error"):
        assert len(list(curves.draw_curves({"run": [{"step": 0, "loss/total": 1.0}]}))) == 1


def test_a_bar_in_a_name_stays_in_its_cell():
    table = markdown_table([{"class": "a|b", "x|y": "1"}, {"class": "c"}])
    assert table.splitlines() == [r"| class | x\|y |", "|---|---|", r"| a\|b | 1 |", "| c |  |"]


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"^--out is .*taken.*expected a folder that can be written"):
        write_report([make_run(tmp_path / "run")], tmp_path / "taken", with_images=False)


def test_a_page_is_written_where_nothing_else_lies(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "page"
    out.mkdir()
    for name in ("results.csv", "index.html"):
        mine = out / name
        mine.write_text("mine")
        with pytest.raises(ValueError, match=rf"^--out is .*page', which holds {name} and no page"):
            write_report([run], out, with_images=False)
        assert [path.name for path in out.iterdir()] == [name] and mine.read_text() == "mine"
        mine.unlink()
    write_report([run], out, with_images=False)
    (out / "notes.txt").write_text("mine")
    assert write_report([run], out, with_images=False) == out / "index.html"  # a former one's place


def test_file_names_are_short_and_stay_unique():
    long = ["é" * 150 + "1", "é" * 150 + "2"]
    assert len({figures.file_name(text) for text in long}) == 2
    assert all(len(figures.file_name(text).encode()) < 140 for text in long)
    assert figures.file_name("a_run-ö") == "a_run-ö"
    assert re.fullmatch("a_run_ö-[0-9a-f]{8}", figures.file_name("a run/ö"))
    assert len({figures.file_name(text) for text in ("a b", "a_b", "a.b", "a/b")}) == 4
