"""Writes the timeouts of all process groups of a built run, before and after they are limited.

RANK=.. WORLD_SIZE=.. python -m tests.distributed.timeout_ranks OUT.json SHARDS ENGINE_OPTION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from runtime import distributed
from runtime.config import load_config
from runtime.preemption import PreemptionFlag
from tests.helpers.digits import DEMO, TINY
from training.build import build_trainer
from training.config import PretrainConfig
from training.run_directory import held_run_directory

TIMEOUT_S = 77.0


def timeouts() -> list[float]:
    groups = dist.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def main(out: Path, shards: str, engine: str) -> None:
    overrides = [*TINY, f"data.shards={shards}", "optim.steps=2", "model.head.use_bn=false", engine]
    config = load_config(PretrainConfig, DEMO, overrides)
    process = distributed.start("cpu", timeout_s=TIMEOUT_S)
    with held_run_directory(config, out.parent / "run", process) as directory:
        build_trainer(config, process, directory, PreemptionFlag(), lambda *_: None)
        before = timeouts()
    process.limit_collectives()
    if process.is_main:
        out.write_text(json.dumps({"before": before, "after": timeouts()}))
    process.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
