"""What needs a GPU: engines in bf16, memory beside the dry run, SyncBatchNorm, the mixture's share of a step.

Skipped by name where there is none. Nothing here has been run yet: the project was built on machines without a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.student_teacher import SelfSupervisedNetwork
from runtime.config import load_config
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.helpers.ranks import run_ranks
from training.config import PretrainConfig
from training.cost import measure_cost

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {
    **{f"zero{stage}": f"engine.deepspeed_config=ds_configs/zero{stage}_bf16.json" for stage in range(4)},
    "fsdp2": "engine.name=fsdp2",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_digit_shards(tmp_path_factory.mktemp("digits"))


def pretrain(out: Path, shards: str, *overrides: str, world_size: int = 1) -> dict[int, float]:
    arguments = [
        DEMO,
        *TINY,
        "run.device=cuda",
        f"data.shards={shards}",
        f"run.output_dir={out}",
        "run.name=run",
    ]
    arguments += ["model.head.use_bn=false", "optim.steps=8", "checkpoint.every_steps=4", *overrides]
    run_ranks("pretrain", arguments, world_size, log_dir=out / "logs", timeout_s=280)
    lines = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_trains_and_agrees_with_zero_0(shards: str, tmp_path: Path, engine: str) -> None:
    precision = "engine.precision=bf16"
    reference = pretrain(tmp_path / "reference", shards, ENGINES["zero0"])
    found = pretrain(tmp_path / engine, shards, ENGINES[engine], precision)
    assert found.keys() == reference.keys()
    for step, loss in reference.items():
        assert found[step] == pytest.approx(loss, rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_over_nccl_train(shards: str, tmp_path: Path, engine: str) -> None:
    assert len(pretrain(tmp_path, shards, ENGINES[engine], world_size=2)) == 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_use_one_batch_norm(shards: str, tmp_path: Path) -> None:
    options = ("model.head.use_bn=true", "engine.deepspeed_config=ds_configs/zero0_fp32.json")
    one = pretrain(tmp_path / "one", shards, *options)
    two = pretrain(tmp_path / "two", shards, *options, world_size=2)
    assert two[1] == pytest.approx(one[1], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_within_15_percent_of_the_peak(checkpointing: bool) -> None:
    config = load_config(
        PretrainConfig,
        "configs/pretrain_vitb16_imagenet_full.yaml",
        [f"model.activation_checkpointing={str(checkpointing).lower()}"],
    )
    cost = measure_cost(config)
    network = SelfSupervisedNetwork(config.model, "student").cuda()
    batch = 16
    crops = [
        torch.randn(2 * batch, 3, 224, 224, device="cuda"),
        torch.randn(config.data.num_local_crops * batch, 3, 96, 96, device="cuda"),
    ]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        projections, _ = network(crops)
    held = torch.cuda.memory_allocated() - before
    expected = cost.activations.per_image * batch + cost.activations.fixed
    if checkpointing:  # the recomputed block appears in the backward pass only, beside the gradients
        projections.sum().backward()
        gradients = sum(p.numel() * 4 for p in network.parameters())
        held = torch.cuda.max_memory_allocated() - before - gradients
    assert held == pytest.approx(expected, rel=0.15)


def test_step_benchmark_prints_its_table() -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.step",
        "--model",
        "vits",
        "--ranks",
        "1",
        "--precision",
        "bf16",
    ]
    command += ["--batch", "8", "--engines", "zero1", "--rounds", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert "mixture" in result.stdout and "of the measured" in result.stdout, result.stderr[-2000:]
