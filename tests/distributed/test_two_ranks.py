"""Two gloo ranks under ZeRO-1 do what one rank does on the concatenated batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import starts
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.helpers.ranks import run_ranks


@pytest.fixture(scope="module")
def digit_shards(tmp_path_factory):
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def train(out, shards, world_size, steps, *overrides):
    out.mkdir(parents=True)
    run_ranks(
        "tests.helpers.two_ranks",
        [str(out), shards, str(steps), *overrides],
        world_size,
        log_dir=out / "logs",
    )
    return [load_file(out / f"rank-{rank}.safetensors") for rank in range(world_size)]


@pytest.mark.parametrize("mode", ["full", "joint"])
def test_first_step_equals_one_rank_on_the_whole_batch(digit_shards, tmp_path, mode):
    # BatchNorm would see half a batch on each CPU rank; drop path draws per rank; a start on the data picks rows in
    # the order in which ranks hold them.
    options = (f"prototypes.mode={mode}", "model.head.use_bn=false", "model.drop_path_rate=0")
    options = (*options, "prototypes.gmm.init.method=sphere")
    (one,) = train(tmp_path / "one", digit_shards, 1, 1, *options)
    two = train(tmp_path / "two", digit_shards, 2, 1, *options)
    # The record is the job's, whichever rank writes it.
    recorded = [name for name in one if name.startswith(("loss/", "features/"))]
    assert len(recorded) == 4
    for name in recorded:
        assert torch.equal(two[0][name], two[1][name]), name
        torch.testing.assert_close(two[0][name], one[name], rtol=1e-5, atol=0)
    gradients = [name for name in one if name.startswith("gradient/")]
    assert any("backbone" in name for name in gradients)
    assert any("learned_prototypes" in name for name in gradients) == (mode == "joint")
    # Relative to the largest entry of the whole gradient: entries that cancel to nothing have no relative error.
    scale = max(float(one[name].abs().max()) for name in gradients)
    for name in gradients:
        assert float((two[0][name] - one[name]).abs().max()) <= 1e-5 * scale, name
        assert float(one[name].abs().max()) > 0, f"{name} has no gradient"


def read_figures(run_dir):
    """The losses and the features' figures of every step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name: line[name] for name in line if name.startswith(("loss/", "features/"))}
        for line in lines
        if "loss/total" in line
    }


def test_mixture_is_bitwise_equal_on_both_ranks_after_20_steps(digit_shards, tmp_path):
    first, second = train(tmp_path / "run", digit_shards, 2, 20)
    names = [name for name in first if name.startswith("estimator/")]
    assert {"estimator/means", "estimator/variances", "estimator/mixing_weights"} <= set(names)
    for name in names:
        assert torch.equal(first[name], second[name]), name


def test_torchrun_trains_zero_1_and_half_the_ranks_continue_with_twice_the_micro_batches(
    digit_shards, tmp_path
):
    options = [
        *TINY,
        f"data.shards={digit_shards}",
        f"run.output_dir={tmp_path}",
        "optim.steps=6",
        "checkpoint.every_steps=3",
        "model.head.use_bn=false",
        "model.drop_path_rate=0",
        # A start on the data takes rows in the order in which ranks hold them.
        "prototypes.gmm.init.method=sphere",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    stopped = subprocess.run(
        [*torchrun, "-m", "tests.faults.injection", DEMO, *options, "run.name=elastic"],
        cwd=starts.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FAULT": "raise@1:4:forward"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert stopped.returncode == 1, stopped.stderr[-3000:]
    assert (tmp_path / "elastic/checkpoints/step-00000003/COMMIT").exists()
    halved = [DEMO, *options, "run.name=elastic", "batch.gradient_accumulation_steps=2"]
    result = starts.run("pretrain", halved)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "3 steps done" in result.stderr
    assert (tmp_path / "elastic/checkpoints/step-00000006/COMMIT").exists()
    whole = starts.run("pretrain", [DEMO, *options, "run.name=whole"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    expected, found = (read_figures(tmp_path / name) for name in ("whole", "elastic"))
    assert sorted(found) == sorted(expected) == list(range(1, 7))
    for step, figures in expected.items():
        assert len(figures) == 6
        assert found[step] == pytest.approx(figures, rel=1e-4), step
