"""What needs a GPU: engines in bf16, SyncBatchNorm, two GPUs over NCCL.

Skipped by name where there is none. What needs two has not been run yet.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.digits import DEMO, TINY, write_digit_shards
from tests.helpers.ranks import run_ranks

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
    run_ranks("pretrain", arguments, world_size, log_dir=out / "logs", timeout_s=280, forked=False)
    lines = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


@pytest.fixture(scope="module")
def reference(shards: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return pretrain(tmp_path_factory.mktemp("reference"), shards, ENGINES["zero0"])


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_trains_and_agrees_with_zero_0(
    shards: str, tmp_path: Path, reference: dict[int, float], engine: str
) -> None:
    precision = "engine.precision=bf16"
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
