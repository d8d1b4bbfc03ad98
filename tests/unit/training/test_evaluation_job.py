"""A checkpoint that is due goes to sbatch; the run neither waits for it nor stops over it."""

import json
import os
import threading

import pytest

from runtime.config import ConfigError, load_config
from tests.helpers.digits import DEMO
from training.config import PretrainConfig
from training.evaluation_job import build_evaluation_job, read_scores

JOB = ("evaluation.runs_as=slurm_job", "evaluation.knn_every_steps=20", "checkpoint.every_steps=10")


def config(*overrides):
    return load_config(PretrainConfig, DEMO, [*JOB, *overrides])


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """An sbatch that notes how it was called; returns the file in which it does."""
    folder, record = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    program = folder / "sbatch"
    program.write_text(
        f'#!/bin/sh\n(printf "%s\\n" "$@"; env) > {record}.$$\nmv {record}.$$ {record}\necho Submitted batch job 7\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    return record


def save(tmp_path, step):
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
    (checkpoint / "teacher").mkdir(parents=True)
    (checkpoint / "teacher" / "model.safetensors").write_bytes(b"weights")
    return checkpoint


def finish():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(30)


def test_a_due_checkpoint_becomes_a_job(tmp_path, sbatch):
    run_dir = tmp_path / "run"
    hand_over = build_evaluation_job(config("evaluation.sbatch_options=[--partition=eval]"), run_dir)
    for step in (10, 20):
        hand_over(step, save(tmp_path, step))
    finish()
    folder = run_dir / "in_training" / "step-00000020"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000020"]
    called = sbatch.read_text().splitlines()
    assert "--partition=eval" in called and called.index("--partition=eval") < called.index(
        str(folder / "eval.yaml")
    )
    assert "SLURM_CONF=/somewhere/slurm.conf" in called
    assert not [
        line for line in called if line.startswith(("SLURM_JOB_ID", "SLURM_NTASKS", "RANK=", "MASTER_PORT"))
    ]
    assert (folder / "teacher" / "model.safetensors").read_bytes() == b"weights"
    assert (folder / "job.txt").read_text() == "Submitted batch job 7\n"


def test_the_job_evaluates_what_the_probe_in_process_would(tmp_path, sbatch):
    from evaluation.config import EvaluationConfig

    build_evaluation_job(config(), tmp_path / "run")(20, save(tmp_path, 20))
    finish()
    path = tmp_path / "run" / "in_training" / "step-00000020" / "eval.yaml"
    evaluation = load_config(EvaluationConfig, str(path))
    assert evaluation.probes == ("knn",) and evaluation.encoder.endswith("run/in_training/step-00000020")
    assert (evaluation.data.max_train_images, evaluation.data.max_test_images) == (6000, 1000)
    assert evaluation.output_dir.endswith("run/results/in_training/step-00000020")
    assert json.loads(path.read_text())["data"]["shards"] == "datasets/fashion-mnist"


def test_the_links_outlive_the_checkpoint_and_a_resumed_run_submits_once(tmp_path, sbatch):
    import shutil

    checkpoint = save(tmp_path, 20)
    hand_over = build_evaluation_job(config(), tmp_path / "run")
    hand_over(20, checkpoint)
    finish()
    shutil.rmtree(checkpoint)
    assert (tmp_path / "run" / "in_training" / "step-00000020" / "teacher" / "model.safetensors").is_file()
    sbatch.unlink()
    hand_over(20, checkpoint)
    finish()
    assert not sbatch.exists()


def test_a_refusal_of_sbatch_is_a_warning(tmp_path, sbatch, caplog):
    program = tmp_path / "bin" / "sbatch"
    program.write_text(
        '#!/bin/sh\necho "sbatch: error: Batch job submission failed: no partition" >&2\nexit 1\n'
    )
    build_evaluation_job(config(), tmp_path / "run")(20, save(tmp_path, 20))
    finish()
    assert "step 20 is not evaluated" in caplog.text and "no partition" in caplog.text


def test_no_job_is_asked_for(tmp_path):
    assert build_evaluation_job(config("evaluation.runs_as=process"), tmp_path) is None
    assert build_evaluation_job(config("evaluation.knn_every_steps=0"), tmp_path) is None


def test_mistakes_are_refused_before_the_run(tmp_path, monkeypatch, sbatch):
    with pytest.raises(ConfigError, match=r"expected a multiple of checkpoint\.every_steps 10"):
        config("evaluation.knn_every_steps=25")
    with pytest.raises(ConfigError, match="sbatch_options holds 'eval'"):
        config("evaluation.sbatch_options=[eval]")
    with pytest.raises(ValueError, match="sbatch_script is 'nowhere'"):
        build_evaluation_job(config("evaluation.sbatch_script=nowhere"), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="expected sbatch on PATH"):
        build_evaluation_job(config(), tmp_path)


def test_scores_are_those_of_the_record_and_of_the_jobs(tmp_path):
    lines = [
        '{"step": 10, "eval/knn20_top1": 0.5}',
        '{"step": 20, "loss/total": 1}',
        '{"step": 30, "eval/knn20_top1": null}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    result = tmp_path / "results" / "in_training" / "step-00000040" / "knn.json"
    assert read_scores(tmp_path) == {10: 0.5} and read_scores(tmp_path / "nowhere") == {}
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"figures": {"headline": {"top1": 0.75}}}))
    assert read_scores(tmp_path) == {10: 0.5, 40: 0.75}
    result.write_text("{")
    assert read_scores(tmp_path) == {10: 0.5}


def test_what_is_best_must_be_saved():
    with pytest.raises(
        ConfigError, match=r"keep_best is true and evaluation\.knn_every_steps 0; expected a multiple"
    ):
        load_config(PretrainConfig, DEMO, ["checkpoint.keep_best=true", "evaluation.knn_every_steps=0"])
    with pytest.raises(ConfigError, match=r"checkpoint\.every_steps 10"):
        config("checkpoint.keep_best=true", "evaluation.runs_as=process", "evaluation.knn_every_steps=15")
    assert config("checkpoint.keep_best=true").checkpoint.keep_best
