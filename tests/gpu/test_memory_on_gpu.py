"""A GPU's memory beside the dry run's, and the benchmark of a step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.student_teacher import SelfSupervisedNetwork
from runtime.config import load_config
from training.config import PretrainConfig
from training.cost import measure_cost

ROOT = Path(__file__).resolve().parents[2]


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
    for parameter in network.parameters():  # held before, or the peak would mix what comes and what goes
        parameter.grad = torch.zeros_like(parameter)
    crops = [
        torch.randn(2 * batch, 3, 224, 224, device="cuda"),
        torch.randn(config.data.num_local_crops * batch, 3, 96, 96, device="cuda"),
    ]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        projections, *_ = network(crops)
    held = torch.cuda.memory_allocated() - before
    expected = cost.activations.per_image * batch + cost.activations.fixed
    if checkpointing:  # the recomputed block appears in the backward pass only
        projections.sum().backward()
        held = torch.cuda.max_memory_allocated() - before
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
