"""Faults on demand around `pretrain.py`, which knows nothing of them.

    FAULT=name@rank:step:point[,...] python -m tests.faults.injection CONFIG.yaml [key.sub=value ...]

does what `python -m pretrain` does, and under torchrun and the like with `-m` too. Rank and step may be `*`.

| point | is reached | by wrapping |
|---|---|---|
| `forward` | before the step's first line | the step |
| `reduce` | when the reduction of the statistics has begun, before the student's pass | the engine |
| `loss` | when the objective's `total` is known | the objective |
| `backward` | after the last backward pass | the engine |
| `update` | when everything has moved, or is known not to | the engine |
| `replicas`, `teacher` | before the replicas are compared | the step |
| `save_begin`, `save_written`, `save_hashed` | around a rank's part of a save | the store's `write_part` |
| `save_manifest`, `save_commit`, `save_committed` | after each of these, on rank 0 | the store's `publish` |

`kill` is SIGKILL to itself, `stop` SIGSTOP, `enospc` the OSError of a full disk, `raise` a RuntimeError; `spike`, `nan`
and `inf` multiply the loss; `flip` changes a bit of a replicated tensor: of the estimator's first one at
`replicas`, of the teacher's at `teacher`.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pretrain
import training.build
from prototypes.objectives.interface import Objective, RankBatch
from runtime.program import UserError, run_program
from training.checkpoints import files, store
from training.step import StepOutcome, TrainingStep

FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 100.0}


@dataclass(frozen=True)
class Fault:
    """One planned fault: what happens, on which rank, at which step and point (`*` = any)."""

    name: str
    rank: str
    step: str
    point: str

    def strikes(self, point: str, step: int) -> bool:
        """Returns whether this fault belongs here and now, in this process."""
        rank = os.environ.get("RANK", "0")
        return self.point == point and self.step in ("*", str(step)) and self.rank in ("*", rank)


def planned_faults() -> list[Fault]:
    """Returns the faults that the environment asks for.

    Raises:
        UserError: FAULT is not `name@rank:step:point[,...]`.
    """
    text = os.environ.get("FAULT", "")
    found = []
    for item in filter(None, text.split(",")):
        try:
            name, place = item.split("@")
            found.append(Fault(name, *place.split(":", 2)))
        except (ValueError, TypeError):
            raise UserError(f"FAULT is {text!r}; expected name@rank:step:point; set FAULT") from None
    return found


def reach(point: str, step: int) -> None:
    """Carries out a fault planned for this point; returns at once where there is none."""
    for fault in planned_faults():
        if not fault.strikes(point, step):
            continue
        if fault.name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.name == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.name == "enospc":
            raise OSError(errno.ENOSPC, f"No space left on device (planned at {point})")
        elif fault.name == "raise":
            raise RuntimeError(f"planned fault at {point}, step {step}")


def strike(objective: Objective) -> Objective:
    """Lets an objective's `total` come out wrong where that is planned.

    A fault at a numbered step strikes once: a skipped step is tried again under the same number.
    """
    forward = objective.forward
    struck: set[Fault] = set()

    def faulty(batch: RankBatch, *, step: int, micro_step: int = 0) -> dict[str, Tensor]:
        terms = forward(batch, step=step, micro_step=micro_step)
        for fault in planned_faults():
            if fault.name in FACTORS and fault.strikes("loss", step) and fault not in struck:
                if fault.step != "*":
                    struck.add(fault)
                terms = terms | {"total": terms["total"] * FACTORS[fault.name]}
        return terms

    objective.forward = faulty  # type: ignore[method-assign]
    return objective


class FaultyStep(TrainingStep):
    """A step whose engine and objective fail where that is planned."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**(parts | {"objective": strike(parts["objective"])}))
        self._step = 0
        # The first line of the student's pass, of the update, and the last of either way that it can end.
        hook(self.engine, "forward_student", before=lambda: reach("reduce", self._step))
        hook(self.engine, "gradients_are_finite", before=lambda: reach("backward", self._step))
        hook(self.engine, "update_teacher", after=lambda: reach("update", self._step))
        hook(self.engine, "skip", after=lambda: reach("update", self._step))

    def __call__(self, crops: Any, step: int, schedule: Any, *meanwhile: Any) -> StepOutcome:
        self._step = step
        reach("forward", step)
        outcome = super().__call__(crops, step, schedule, *meanwhile)
        for fault in planned_faults():
            if fault.name == "flip" and fault.strikes("replicas", step):
                flip_bit_(
                    next(v for v in self.sets[0].estimator.state_dict().values() if isinstance(v, Tensor))
                )
            if fault.name == "flip" and fault.strikes("teacher", step):
                replicas = self.engine.replicated_tensors()
                flip_bit_(next(value for name, value in replicas if name.startswith("teacher/")))
        return outcome


def hook(
    owner: Any,
    name: str,
    *,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Puts something before or after a method of one object."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def hooked(*arguments: Any, **named: Any) -> Any:
        if before is not None:
            before()
        result = method(*arguments, **named)
        if after is not None:
            after()
        return result

    setattr(owner, name, hooked)


@torch.no_grad()
def flip_bit_(tensor: Tensor) -> None:
    """Flips one bit of a tensor's first number, in place: a device that computes wrongly.

    A high bit of the mantissa: the lowest one can be rounded away by the next update before anybody compares.
    """
    tensor.view(-1)[:1].view(torch.uint8)[tensor.element_size() - 2] ^= 8


def write_part(temporary: Path, rank: int, key: str, write: files.WriteFunction) -> files.Part:
    """The store's own, with its points."""
    step = files.step_of(temporary.with_suffix(""))

    def write_and_reach(directory: Path) -> None:
        reach("save_begin", step)
        write(directory)
        reach("save_written", step)

    part = files.write_part(temporary, rank, key, write_and_reach)
    reach("save_hashed", step)
    return part


def publish(root: Path, step: int, *arguments: Any) -> files.SaveOutcome:
    """The store's own, with its points."""
    points = {files.MANIFEST_NAME: "save_manifest", files.COMMIT_NAME: "save_commit"}
    original = files.write_atomically

    def write_and_reach(path: Path, content: str) -> None:
        original(path, content)
        reach(points[path.name], step)

    files.write_atomically = write_and_reach  # type: ignore[assignment]
    try:
        outcome = files.publish(root, step, *arguments)
    finally:
        files.write_atomically = original
    if outcome.error is None:
        reach("save_committed", step)
    return outcome


def main(arguments: list[str]) -> int:
    """Returns the exit code of one pretraining job that meets the planned faults."""
    planned_faults()  # a mistake in them is said before anything begins
    training.build.TrainingStep = FaultyStep  # type: ignore[misc]
    store.write_part, store.publish = write_part, publish
    return pretrain.main(arguments)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
