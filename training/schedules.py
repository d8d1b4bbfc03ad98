"""Learning rate, weight decay and EMA momentum as pure functions of the step: nothing to save, nothing to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from training.config import OptimConfig


@dataclass(frozen=True)
class StepSchedule:
    """The scheduled numbers of one optimizer step.

    Attributes:
        lr: learning rate, scaled to the global batch.
        weight_decay: decoupled weight decay of parameters that have one.
        ema_momentum: the teacher's momentum.
        prototypes_move: whether prototypes that the encoder's loss trains have a learning rate.
    """

    lr: float
    weight_decay: float
    ema_momentum: float
    prototypes_move: bool = True


def compute_schedule(
    config: OptimConfig, *, step: int, num_steps: int, warmup_steps: int, batch: int, frozen_steps: int = 0
) -> StepSchedule:
    """Returns the schedule's numbers at `step` (zero-based).

    The learning rate rises linearly over `warmup_steps`, then follows half a cosine to `min_lr`; both are given
    per 256 images (Goyal et al. 2017, section 2.1). Weight decay and momentum follow half a cosine over the whole
    run (Caron et al. 2021, DINO, section 3.2).

    Args:
        config: peak and final values.
        step: updates done so far.
        num_steps: updates of the run.
        warmup_steps: updates of the warm-up.
        batch: images per update over all ranks.
        frozen_steps: updates at the start that leave learned prototypes where they are.
    """
    scale = batch / 256
    if step < warmup_steps:
        lr = config.lr * (step + 1) / warmup_steps
    else:
        lr = cosine(config.lr, config.min_lr, step - warmup_steps, num_steps - warmup_steps)
    return StepSchedule(
        lr=lr * scale,
        weight_decay=cosine(config.weight_decay, config.weight_decay_end, step, num_steps),
        ema_momentum=cosine(config.ema_momentum, config.ema_momentum_end, step, num_steps),
        prototypes_move=step >= frozen_steps,
    )


def cosine(start: float, end: float, step: int, num_steps: int) -> float:
    """Returns the value at `step` of half a cosine from `start` (step 0) to `end` (step `num_steps`)."""
    progress = min(max(step / max(num_steps, 1), 0.0), 1.0)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
