"""How long a run is: what of its length cannot work, and what a longer one changes."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from training.config import PretrainConfig
from training.schedules import StepSchedule, compute_schedule

logger = logging.getLogger(__name__)


def steps_per_epoch(config: PretrainConfig, num_samples: int) -> int:
    """Returns the optimizer steps that show about every image once."""
    return max(1, round(num_samples / config.batch.global_batch_size))


def ends_epoch(config: PretrainConfig, num_samples: int, step: int) -> bool:
    """Returns whether the k-th epoch, for some k, ends with this many steps: when a run of k epochs would end.

    Epochs differ by a step where the batch does not divide the images, so that none drifts past a run's last step.
    """
    epochs = round(step * config.batch.global_batch_size / num_samples)
    return epochs > 0 and step == round(epochs * num_samples / config.batch.global_batch_size)


def warmup_steps(config: PretrainConfig, num_samples: int) -> int:
    """Returns the optimizer steps of the learning rate's warm-up."""
    return round(config.optim.warmup_epochs * steps_per_epoch(config, num_samples))


def schedule_at(config: PretrainConfig, num_samples: int, step: int) -> StepSchedule:
    """Returns the scheduled numbers of a run's step."""
    return compute_schedule(
        config.optim,
        step=step,
        num_steps=config.num_steps(num_samples),
        warmup_steps=warmup_steps(config, num_samples),
        batch=config.batch.global_batch_size,
        frozen_steps=round(config.optim.prototype_frozen_epochs * steps_per_epoch(config, num_samples)),
    )


def check_length(config: PretrainConfig, num_samples: int) -> None:
    """Refuses a set that is smaller than a batch.

    Warns where the learning rate's warm-up, or a mixture's start from features, does not end within the run.

    Raises:
        ValueError: every batch would hold the same images several times.
    """
    if num_samples < config.batch.global_batch_size:
        raise ValueError(
            f"batch.global_batch_size is {config.batch.global_batch_size}; expected at most the {num_samples} images "
            f"of split {config.data.split!r}, or a batch holds an image more than once; set batch.global_batch_size"
        )
    warmup, steps = warmup_steps(config, num_samples), config.num_steps(num_samples)
    if warmup >= steps:
        logger.warning(
            "the warm-up takes %d steps and the run %d: the learning rate ends at %.3g of optim.lr and never comes "
            "down; set optim.warmup_epochs, or a longer run",
            warmup,
            steps,
            steps / warmup,
        )
    for section in dict.fromkeys(config.levels.values()):
        own = config.prototypes_of(section)
        init = own.gmm.init
        if not own.has_mixture or init.method == "sphere":
            continue
        rows = config.rows_per_image(section) * config.batch.global_batch_size
        placed = init.first_step(steps) + math.ceil(own.num_prototypes / rows)
        if placed > steps:
            logger.warning(
                "%s.gmm.init.method is %s, which has seen its %d features after step %d at the earliest; the run has "
                "%d: its mixture stands still; set gmm.init, or a longer run",
                section,
                init.method,
                own.num_prototypes,
                placed,
                steps,
            )


def report_extension(config: PretrainConfig, made_with: dict[str, Any], num_samples: int, step: int) -> None:
    """Says in one line what a longer run changes; silent where its length is that of the start before.

    Args:
        config: the configuration of this start.
        made_with: what the run directory's `config.yaml` held before.
        num_samples: images of an epoch.
        step: updates done.

    Raises:
        ValueError: the run would become shorter.
    """
    earlier = made_with.get("optim", {})
    length = {name: earlier.get(name, getattr(config.optim, name)) for name in ("epochs", "steps")}
    before = replace(config, optim=replace(config.optim, **length))
    was, now = before.num_steps(num_samples), config.num_steps(num_samples)
    if now == was:
        return
    if now < was:
        raise ValueError(
            f"the run has {now} steps with this configuration and had {was}; expected more with run.extend=true; set "
            "optim.steps or optim.epochs"
        )
    old, new = (schedule_at(one, num_samples, step) for one in (before, config))
    logger.warning(
        "run.extend: %d steps instead of %d, and every schedule over the new length: from step %d on the learning "
        "rate is %.3g instead of %.3g, weight decay %.3g instead of %.3g, EMA momentum %.6g instead of %.6g",
        now,
        was,
        step,
        new.lr,
        old.lr,
        new.weight_decay,
        old.weight_decay,
        new.ema_momentum,
        old.ema_momentum,
    )
