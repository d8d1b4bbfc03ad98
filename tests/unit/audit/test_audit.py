"""An audit: cells, what is kept and what is run again, paired differences, the page, one command line."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from audit import run as audit
from audit import write as audit_report
from audit.cells import ROOT, Cell, iterate_cells
from audit.checks import check_cells
from audit.config import AuditConfig
from audit.run import run_missing, submit_commands
from audit.write import difference_rows, spread, write_audit
from data.shards import load_manifest
from evaluation.config import EvaluationConfig
from evaluation.results import write_result
from runtime.children import Children
from runtime.config import config_to_dict, config_to_yaml, load_config
from runtime.program import UserError, run_program
from slurm import submit as slurm_submit
from tests.helpers.digits import write_digit_shards
from training.config import PretrainConfig

PROBES = ("prototypes", "knn", "linear", "long_tail")
GROUPS = ["head", "head", "medium", "tail"]


def make_config(tmp_path, **options):
    values = {
        "name": "audit",
        "output_dir": str(tmp_path),
        "pretrain": "configs/pretrain_vit-mini_fashion-mnist_full.yaml",
        "evaluate": "configs/eval_fashion_mnist.yaml",
        "probes": PROBES,
        "seeds": (0, 1),
        "arms": {"joint": ("prototypes.mode=joint",), "full": ("prototypes.mode=full",)},
        "references": ("joint",),
        # A checkout in which `make demo` ran has the configurations' own shards.
        "overrides": (f"data.shards={tmp_path}/none",),
        "evaluate_overrides": (f"data.shards={tmp_path}/none",),
    }
    return AuditConfig(**{**values, **options})


def write_run(directory: Path, *, used: float, right: list[bool]) -> None:
    """Writes what a finished run leaves, small: four test images, one of each class."""
    results = directory / "results"
    results.mkdir(parents=True)
    records = [
        {"step": 0, "prototypes/unique_0.025": 1.0},
        {"step": 10, "prototypes/unique_0.025": 0.9, "eval/knn20_top1": 0.5},
        {
            "step": 100,
            "prototypes/unique_0.025": 0.8,
            "prototypes/used": used,
            "prototypes/cosine_to_start": 0.99996,
            "prototypes/cosine_to_start_min": -0.25,
            "features/effective_rank": 3.0,
        },
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    teacher = {
        "unique_fraction": {"0.025": 0.8, "0.1": 0.5, "0.5": 0.1},
        "angle_density": [0.1, 0.2],
        "angle_density_max_over_min": 2.0,
    }
    per_class = [{"class": str(c), "group": group} for c, group in enumerate(GROUPS)]
    figures = {
        "prototypes": {"roles": {"teacher": teacher}},
        "knn": {"headline": {"top1": sum(right) / 4, "predictions": "p", "k": 20}, "features": {}},
        "linear": {"headline": {"top1": sum(right) / 4, "predictions": "p"}},
        "long_tail": {
            "headline": {},
            "per_class": per_class,
            "classifier": "linear",
            **{key: {} for key in ("groups", "balanced_accuracy", "tail_minus_head")},
        },
    }
    provenance = {
        "manifest_hashes": {"shards:train": "a", "shards:test": "b"},
        "hardware": {"machine": "x", "cpu_threads": 1},
        "commit": "c",
        "config": {},
        "config_hash": "h",
        "versions": {"torch": "t"},
        "finished_utc": "now",
    }
    encoder = {"role": "teacher", "step": 100, "weights_sha256": "0" * 64, "label": "run"}
    labels = torch.arange(4, dtype=torch.int32)
    predicted = torch.where(torch.tensor(right), labels, (labels + 1) % 4).to(torch.int32)
    for probe, found in figures.items():
        write_result(
            results,
            probe,
            encoder=encoder,
            figures=found,
            provenance=provenance,
            seconds=1.0,
            predictions={"p": predicted, "labels": labels},
        )


def write_all(tmp_path):
    for seed, (joint, full) in enumerate(((2, 3), (1, 3))):
        for arm, number in (("joint", joint), ("full", full)):
            right = [position < number for position in range(4)]
            write_run(tmp_path / "audit" / f"{arm}-seed{seed}", used=0.25 * number, right=right)


def test_an_arm_may_start_elsewhere_and_its_patches_be_measured(tmp_path):
    arms = {"joint": ("configs/other.yaml", "optim.lr=1"), "full": ()}
    config = make_config(
        tmp_path, arms=arms, overrides=("optim.steps=3",), segment="configs/eval_camvid.yaml"
    )
    pretrain, _, segment = Cell(config, "joint", 0).commands()
    assert pretrain[2:5] == ["configs/other.yaml", "optim.steps=3", "optim.lr=1"]
    assert segment[2] == "configs/eval_camvid.yaml" and segment[-1] == "probes=[segmentation]"
    assert "configs/other.yaml" in submit_commands(replace(config, segment=""), [])[0]
    write_all(tmp_path)
    assert not Cell(config, "joint", 0).is_done
    with pytest.raises(
        ValueError, match=r"arms.full is without a configuration; expected pretrain, or FILE.yaml"
    ):
        make_config(tmp_path, arms=arms, pretrain="")


def test_spread_of_three_is_students():
    found = spread([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.deviation == 1
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert spread([1.0]).half_width == math.inf
    # Eleven seeds: the normal's quantile would be an eighth too narrow.
    assert spread([float(seed) for seed in range(11)]).half_width == pytest.approx(2.228)


def test_differences_are_paired_by_seed():
    figures = {"a": {"0": {"k-NN": 0.5}, "1": {"k-NN": 0.7}}, "b": {"1": {"k-NN": 0.71}, "2": {"k-NN": 0.1}}}
    (row,) = difference_rows(figures, "a")
    assert row == {"arm": "b", "seeds": "1", "k-NN": "+1.00"}


def test_page_and_tables_hold_every_arm(tmp_path):
    write_all(tmp_path)
    text = write_audit(make_config(tmp_path))
    assert "joint" in text and "37.5 ± 17.7" in text  # k-NN of joint: 2 and 1 of 4
    assert "+37.50 ± " in text and "(2 of 2 > 0)" in text
    # Over images: differences 0, .5, 1 and 0. Of the 256 resamples a sixteenth is 0, and one in 50 above .75.
    header, cells = (
        row.split(" | ")
        for row in text.splitlines()
        if row.startswith(("| arm | seeds | k-NN |", "| full | 2 | +"))
    )
    assert cells[header.index("k-NN over images")] == "+0.00 to +75.00"
    # An arm that did not move must not look as if it had: no rounding to percent.
    titles, _, *rows = (row.split(" | ") for row in text.splitlines()[4:8])
    assert [row[titles.index("cosine to start")] for row in rows] == ["0.99996 ± 0.00000"] * 2
    assert [row[titles.index("smallest cosine to start")] for row in rows] == ["-0.25000 ± 0.00000"] * 2
    figures = json.loads((tmp_path / "audit" / "report" / "results.json").read_text())
    assert figures["full"]["1"]["k-NN head"] == 1.0 and figures["full"]["1"]["k-NN tail"] == 0.0
    assert figures["joint"]["0"]["u(0.025) early"] == 0.9
    page = (tmp_path / "audit" / "report" / "index.html").read_text()
    names = ("used_over_time", "unique_over_time", "used_and_unique", "groups_knn", "angle_density")
    for name in names:
        assert (tmp_path / "audit" / "report" / f"{name}.png").is_file() and f'id="{name}"' in page


def test_finished_cells_are_not_run_again_and_failures_are_named(tmp_path, monkeypatch):
    write_all(tmp_path)
    config = make_config(tmp_path, seeds=(0, 1, 2), processes=1)
    started = []
    monkeypatch.setattr(Children, "run", lambda self, command, **_: started.append(command) or 1)
    assert [cell.name for cell in run_missing(config, Children())] == ["joint-seed2", "full-seed2"]
    assert all("run.seed=2" in command for command in started) and len(started) == 2


def test_seeds_come_first_and_commands_hold_the_arm(tmp_path):
    config = make_config(
        tmp_path, overrides=("optim.steps=3",), evaluate_overrides=("data.shards=datasets/mine",)
    )
    assert [cell.name for cell in iterate_cells(config, config.chosen_arms)] == [
        "joint-seed0",
        "full-seed0",
        "joint-seed1",
        "full-seed1",
    ]
    pretrain, evaluate = Cell(config, "full", 1).commands()
    assert pretrain[3:5] == ["optim.steps=3", "prototypes.mode=full"] and "run.name=full-seed1" in pretrain
    assert f"encoder={tmp_path}/audit/full-seed1" in evaluate
    lines = submit_commands(config, ["--nodes", "2"])
    assert len(lines) == 2 and "--array seeds=0,1" in lines[1] and lines[1].endswith("--nodes 2")
    written = tmp_path / "audit" / "evaluate.yaml"
    assert f"--evaluate-config {written}" in lines[0]
    assert load_config(EvaluationConfig, str(written)).data.shards == "datasets/mine"
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("probes: [knn]\n")
    submit_commands(replace(config, evaluate=str(nameless)), [])  # the jobs name their encoders
    with pytest.raises(
        UserError, match=r"^segment is configs/eval_camvid_small.yaml with --slurm; .*take segment out here"
    ):
        submit_commands(replace(config, segment="configs/eval_camvid_small.yaml"), [])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"arms": {}}, "arms"),
        ({"arms": {"../x": ()}}, "name"),
        ({"arms": {"a": ("run.seed=3",)}, "references": ()}, "arms.a"),
        ({"only": ("nobody",)}, "only"),
        ({"seeds": ()}, "seeds"),
        ({"probes": ("nothing",)}, "probes"),
        ({"probes": ()}, "probes"),
        *(
            ({"evaluate_overrides": ("knn.k=[5]", override)}, "evaluate_overrides")
            for override in ("probes=[linear]", "controls=[raw-pixels]", "encoder=outputs/other")
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, options, key):
    with pytest.raises(ValueError, match=rf"^{key} is .*; expected .*; set {key}$"):
        make_config(tmp_path, **options)


def test_patches_alone_are_an_audit(tmp_path):
    assert make_config(tmp_path, probes=(), segment="configs/eval_camvid.yaml").measured == ("segmentation",)


def test_behind_slurm_stands_how_an_array_runs_and_not_what(tmp_path, capsys):
    config = make_config(tmp_path)
    for wrong in (
        ["seeds=[4]"],
        ["--dry-run", "seeds=[4]"],
        ["--nodes"],
        ["--time", "--dry-run"],
        ["--tables"],
    ):
        with pytest.raises(
            UserError, match=r"^'.*' stands behind --slurm; expected .*; write what is of the audit"
        ):
            submit_commands(config, wrong)
    with pytest.raises(SystemExit):
        slurm_submit._parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out.split("positional arguments")[1]))
    ours = {"--help", "--array", "--evaluate", "--evaluate-config"}
    assert known - ours == {*audit._SUBMIT_OPTIONS, "--dry-run"}
    line = submit_commands(config, ["--nodes", "2", "--time=1:00:00", "--dry-run"])[0]
    assert line.endswith("--nodes 2 --time=1:00:00 --dry-run")


def claim(config, arm, seed):
    """Writes what a run and its k-NN leave."""
    cell = Cell(config, arm, seed)
    path, options = cell.pretraining
    (cell.directory / "results").mkdir(parents=True)
    made = config_to_yaml(load_config(PretrainConfig, path, options))
    (cell.directory / "config.yaml").write_text(made)
    path, options = cell.evaluations[0]
    asked = config_to_dict(load_config(EvaluationConfig, path, options))
    (cell.directory / "metrics.jsonl").write_text('{"step": 3}\n')
    result = {
        "schema": 1,
        "probe": "knn",
        "encoder": {"label": cell.name, "step": 3, "role": "teacher", "weights_sha256": "0" * 64},
        "figures": {"headline": {"top1": 0.5}},
        "seconds": 1.0,
        "provenance": {"config": asked, "manifest_hashes": {"train": "a", "test": "b"}},
    }
    cell.result("knn").write_text(json.dumps(result))
    return cell.result("knn")


def test_runs_of_another_configuration_do_not_stand_among_todays(tmp_path):
    config = make_config(tmp_path, overrides=("optim.steps=3",))
    claim(config, "full", 0)
    check_cells(config)
    check_cells(replace(config, overrides=("optim.steps=3", "data.num_workers=7", "data.shards=elsewhere")))
    # Of another estimator: read by nobody.
    still = replace(config, overrides=("optim.steps=3", "prototypes.gmm.variational.mean_strength=3"))
    check_cells(still)
    with pytest.raises(
        UserError, match=r"^optim.steps is 4 for arm full, but .*full-seed0 was made with 3; .*set name to"
    ):
        check_cells(replace(config, overrides=("optim.steps=4",)))
    with pytest.raises(UserError, match=r"^prototypes.gmm.balance is 2.0 for arm full"):
        check_cells(
            replace(config, arms=config.arms | {"full": ("prototypes.mode=full", "prototypes.gmm.balance=2")})
        )


def test_results_of_another_protocol_or_other_images_do_not_stand_among_todays(tmp_path):
    config = make_config(tmp_path)
    claim(config, "full", 0)
    check_cells(
        replace(
            config,
            evaluate_overrides=(*config.evaluate_overrides, "data.num_workers=0", "features.reuse=false"),
        )
    )
    with pytest.raises(UserError, match=r"^knn.temperature is 0.5, but .*knn.json was measured with 0.07; "):
        check_cells(replace(config, evaluate_overrides=(*config.evaluate_overrides, "knn.temperature=0.5")))
    check_cells(replace(config, evaluate_overrides=(*config.evaluate_overrides, "logistic.max_iterations=7")))
    other = claim(config, "joint", 0)
    check_cells(config)
    with pytest.raises(
        UserError, match=r"knn.json is of 'full-seed0'; expected a result of joint-seed0; .*move "
    ):
        edit(other, lambda found: found["encoder"].update(label="full-seed0"), config)
    with pytest.raises(
        UserError, match=r"knn.json is of step 2; expected the last one of the run's record, 3; "
    ):
        edit(other, lambda found: found["encoder"].update(step=2), config)
    with pytest.raises(
        UserError, match=r"images of joint-seed0 is \['a', 'b'\]|images of full-seed0 is \['a', 'b'\]"
    ):
        edit(other, lambda found: found["provenance"]["manifest_hashes"].update(train="c"), config)
    # An encoder that is somewhere else by now, and an audit of prototypes that needs no images, say nothing.
    edit(other, lambda found: found["provenance"]["config"].update(encoder="/gone/x"), config)
    edit(other, lambda found: found["provenance"].update(manifest_hashes={}), config)
    with pytest.raises(UserError, match=r"knn.json is no whole result of knn; "):
        edit(other, lambda found: found.update(probe="linear"), config)
    for damaged in ({}, {"headline": 3}, {"headline": {"top1": math.nan}}, None):
        with pytest.raises(UserError, match=r"knn.json is no whole result of knn; "):
            edit(other, lambda found, damaged=damaged: found.update(figures=damaged), config)
    other.write_text("torn")
    with pytest.raises(UserError, match=r"knn.json is no whole result of knn; expected .*; move "):
        check_cells(config)
    other.unlink()
    check_cells(config)  # not done: it will be measured
    Cell(config, "full", 0).directory.joinpath("config.yaml").unlink()
    with pytest.raises(UserError, match=r"full-seed0 has results and no config.yaml; "):
        check_cells(replace(config, probes=("knn",)))


def test_other_images_than_those_asked_for_are_found_before_anything_runs(tmp_path):
    shards = write_digit_shards(tmp_path / "digits", num_train=8, num_test=4, per_shard=8)
    train, test = (load_manifest(shards, split).hash for split in ("train", "test"))
    config = make_config(tmp_path)
    result = claim(config, "full", 0)
    checkpoint = Cell(config, "full", 0).directory / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    asked = replace(config, overrides=(f"data.shards={shards}",))
    for seen, agrees in ((train, True), ("other", False)):
        (checkpoint / "MANIFEST.json").write_text(json.dumps({"facts": {"data_hash": seen}}))
        if agrees:
            check_cells(asked)
        else:
            with pytest.raises(UserError, match=rf"holds images {train}, but .*full-seed0 has seen other; "):
                check_cells(asked)
    asked = replace(config, evaluate_overrides=(f"data.shards={shards}",))
    with pytest.raises(UserError, match=r"^data.shards is .*, but .*knn.json was measured on \['a', 'b'\]; "):
        check_cells(asked)
    edit(
        result,
        lambda found: found["provenance"].update(manifest_hashes={"train": train, "test": test}),
        asked,
    )


def edit(path, change, config):
    """Checks an audit with one result changed, and puts it back."""
    text = path.read_text()
    found = json.loads(text)
    change(found)
    path.write_text(json.dumps(found))
    try:
        check_cells(config)
    finally:
        path.write_text(text)


def test_seeds_of_an_arm_saw_one_set_of_images(tmp_path):
    config = make_config(tmp_path)
    for seed, data in ((0, "a"), (1, "b")):
        claim(config, "full", seed)
        checkpoint = Cell(config, "full", seed).directory / "checkpoints" / "step-00000003"
        checkpoint.mkdir(parents=True)
        (checkpoint / "MANIFEST.json").write_text(json.dumps({"facts": {"data_hash": data}}))
    with pytest.raises(
        UserError, match=r"^training data of full-seed1 is 'b'; expected 'a' as of full-seed0"
    ):
        check_cells(config)


def test_tables_read_what_was_checked_and_nothing_beside_it(tmp_path):
    write_all(tmp_path)
    config = make_config(tmp_path)
    before = write_audit(config)
    cell = Cell(config, "full", 0)
    stale = json.loads(cell.result("knn").read_text())
    stale["figures"]["headline"]["top1"] = 0.0
    (cell.directory / "results" / "former").mkdir()
    for name in ("knn-former.json", "former/knn.json"):
        (cell.directory / "results" / name).write_text(json.dumps(stale))
    assert write_audit(config) == before
    text = write_audit(replace(config, probes=("prototypes", "knn")))
    assert "| k-NN |" in text and "linear" not in text


def test_a_cell_that_leaves_no_results_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(Children, "run", lambda self, command, **_: 0)
    config = make_config(tmp_path, seeds=(0,), processes=1)
    assert [cell.name for cell in run_missing(config, Children())] == ["joint-seed0", "full-seed0"]
    with pytest.raises(
        UserError, match=r"^output_dir of configs/eval_fashion_mnist.yaml is '/x'; expected null"
    ):
        check_cells(replace(config, evaluate_overrides=("output_dir=/x",)))


# An audit whose programs write that they run, save on SIGTERM and end with 75, as pretrain.py does.
STOPPED = """
import signal, sys
# Whoever runs the tests may ignore these, as nohup does, and then the audit does too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from audit import run
from audit.cells import Cell
from runtime.program import run_program
program = '''
import signal, sys, time
from pathlib import Path
place = Path(sys.argv[1])
def save(*_):
    time.sleep(0.5)
    place.with_suffix(".saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
place.touch()
time.sleep(60)
'''
Cell.commands = lambda cell: [[sys.executable, "-c", program, str(Path(sys.argv[1]) / cell.name)]] * 2
sys.exit(run_program(run.main, sys.argv[2:]))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_an_audit_that_is_stopped_waits_until_its_runs_have_saved(tmp_path, name, code):
    options = ["configs/audit_fashion-mnist.yaml", f"output_dir={tmp_path / 'out'}", "processes=2"]
    audit_of = [sys.executable, "-c", STOPPED, str(tmp_path), *options]
    with subprocess.Popen(
        audit_of, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*-seed0"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(started.pid, getattr(signal, name))  # as a terminal does
        said = started.communicate(timeout=60)[1]
    assert started.returncode == code, said
    assert said.splitlines()[-1] == f"stopped by {name}: the runs have ended; the same command goes on"
    assert len(list(tmp_path.glob("*-seed0"))) == len(list(tmp_path.glob("*.saved"))) == 2
    assert "Traceback" not in said


def test_a_mistake_in_the_last_arm_is_found_before_the_first_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "run_missing", lambda *_: pytest.fail("something was run"))
    path = tmp_path / "audit.yaml"
    text = "pretrain: configs/pretrain_vit-mini_fashion-mnist_full.yaml\nevaluate: configs/eval_fashion_mnist.yaml\n"
    path.write_text(text + "arms: {good: [], bad: [optim.epoks=3]}\n")
    for way in ([], ["--slurm"], ["--tables"]):
        assert run_program(audit.main, [str(path), f"output_dir={tmp_path}", *way]) == 2
        assert (
            capsys.readouterr().err.splitlines()[-1].startswith("error: arm bad: unknown key optim.epoks; ")
        )


def test_where_every_run_fails_each_is_named_with_its_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Children, "run", lambda self, command, **_: 1)
    options = [f"output_dir={tmp_path}", "seeds=[0]", "only=[joint,full]"]
    assert run_program(audit.main, ["configs/audit_fashion-mnist.yaml", *options]) == 1
    logs = tmp_path / "audit-fashion-mnist" / "logs"
    named = [f"error: {arm}-seed0 failed; read {logs / f'{arm}-seed0.log'}" for arm in ("joint", "full")]
    assert capsys.readouterr().err.splitlines()[-2:] == named


def test_an_audit_without_runs_is_a_mistake(tmp_path, capsys):
    code = run_program(audit.main, ["configs/audit_fashion-mnist.yaml", f"output_dir={tmp_path}", "--tables"])
    assert code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert audit_report.load_finished(make_config(tmp_path)) == {}
