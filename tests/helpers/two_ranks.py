"""Trains the tiny demo for some steps on every rank and writes what each rank ended with.

    RANK=.. WORLD_SIZE=.. python -m tests.helpers.two_ranks OUT_DIR SHARDS STEPS [key.sub=value ...]

Writes `rank-N.safetensors`: `loss/total/STEP` and `features/.../STEP` as the record has them, `gradient/PARAMETER` of
the first step as the optimizer sees it (averaged over ranks), and every tensor of the estimator's state at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from runtime import distributed
from runtime.config import load_config
from runtime.preemption import PreemptionFlag
from runtime.seeding import seed_everything
from tests.helpers.digits import DEMO, TINY
from training.build import build_trainer
from training.config import PretrainConfig
from training.run_directory import held_run_directory

SPREAD = 50.0


def main(out_dir: Path, shards: str, steps: int, overrides: list[str]) -> None:
    config = load_config(
        PretrainConfig,
        DEMO,
        [*TINY, f"data.shards={shards}", f"optim.steps={steps}", "run.resume=false", *overrides],
    )
    process = distributed.start("cpu", timeout_s=60)
    with held_run_directory(config, out_dir / "run", process) as directory:
        trainer = build_trainer(config, process, directory, PreemptionFlag(), lambda *_: None)
    step, engine, found = trainer.training_step, trainer.training_step.engine, {}
    # A fresh head gives almost equal logits, and gradients that are differences of almost equal numbers; wider
    # projections make the comparison one of the algebra and not of cancellation.
    with torch.no_grad():
        for network in (engine.student.network, engine.teacher.network):
            network.projection_head.mlp[-1].weight.mul_(SPREAD)
    check = engine.gradients_are_finite

    def capture() -> torch.Tensor:
        if "loss/total/0" not in found:
            for name, parameter in engine.student.named_parameters():
                gradient = safe_get_full_grad(parameter)
                found[f"gradient/{name}"] = gradient.detach().float().cpu().clone().contiguous()
        return check()

    engine.gradients_are_finite = capture
    for index in range(steps):
        seed_everything(config.run.seed, "step", index, process.rank)
        schedule = trainer._schedule()
        outcome = step(trainer._feed.take().crops, index, schedule)
        assert outcome.applied
        recorded = trainer._step_values(outcome, schedule)
        for name in ("loss/total", "features/norm", "features/effective_rank", "features/mean_cosine"):
            found[f"{name}/{index}"] = torch.tensor([recorded[name]], dtype=torch.float64)
    state = {
        name: value
        for name, value in step.sets[0].estimator.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    found |= {f"estimator/{name}": value.detach().clone().contiguous() for name, value in state.items()}
    save_file(found, str(out_dir / f"rank-{process.rank}.safetensors"))
    process.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
