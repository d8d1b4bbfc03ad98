"""A pretraining job hands its checkpoints to jobs of their own, which evaluate them while it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.slurm.private_cluster import PrivateCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def test_checkpoints_are_evaluated_by_jobs_of_their_own(cluster: PrivateCluster, tmp_path: Path) -> None:
    shards = write_digit_shards(tmp_path / "digits")
    options = (
        f"data.shards={shards}",
        f"run.output_dir={tmp_path}",
        "run.name=watched",
        "optim.steps=40",
        "checkpoint.every_steps=10",
        "checkpoint.keep_last=1",
        "evaluation.runs_as=slurm_job",
        "evaluation.knn_every_steps=20",
        "evaluation.knn_train_images=384",
        "evaluation.knn_test_images=96",
        "evaluation.sbatch_options=[--gpus-per-node=0,--cpus-per-task=1,--time=10]",
    )
    command = [
        sys.executable,
        "-m",
        "slurm.submit",
        DEMO,
        *TINY,
        *options,
        "--cluster",
        "local_test",
        "--nodes",
        "1",
    ]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "watched"
    wanted = [run / "results" / "in_training" / f"step-{step:08d}" / "knn.json" for step in (20, 40)]
    found = cluster.wait_until(lambda: all(path.is_file() for path in wanted), timeout_s=300, interval_s=1)
    logs = "".join(
        path.read_text() for path in [*run.glob("slurm/*/*.log"), *run.glob("in_training/*/job.log")]
    )
    assert found, logs
    for step, path in zip((20, 40), wanted, strict=True):
        content = json.loads(path.read_text())
        assert content["encoder"]["step"] == step and content["figures"]["test_images"] == 96
        assert 0 < content["figures"]["headline"]["top1"] <= 1
    # The checkpoint of step 20 has been rotated away; what its job reads has not.
    assert not (run / "checkpoints" / "step-00000020").exists()
    assert (run / "in_training" / "step-00000020" / "teacher" / "model.safetensors").is_file()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "eval/knn20_top1" in line]
