"""Options that are set and that a run does not read, because another one leaves them out. Imports no torch.

They are named and not refused: a configuration laid over another one, as an audit's arms are, has them by right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prototypes.config import PrototypesConfig
from training.config import PretrainConfig


class _Rule(NamedTuple):
    """Options, each by its key or by the section that holds it, that a run reads beside others alone."""

    options: tuple[str, ...]
    beside: str
    holds: Callable[[Any], bool]


_OF_RUN = (
    _Rule(
        ("batch.accumulation",),
        "batch.gradient_accumulation_steps > 1",
        lambda run: run.batch.gradient_accumulation_steps > 1,
    ),
    _Rule(
        ("data.local_crop_size", "data.augmentation.local_"),
        "data.num_local_crops > 0",
        lambda run: run.data.num_local_crops > 0,
    ),
    _Rule(("data.masks.",), "a term on patches", lambda run: run.objective.patch.name != "none"),
    _Rule(("data.prefetch_factor",), "data.num_workers > 0", lambda run: run.data.num_workers > 0),
    _Rule(("model.predictor.",), "objective.patch.name=capi", lambda run: run.objective.patch.name == "capi"),
    _Rule(("optim.betas",), "optim.optimizer=adamw", lambda run: run.optim.optimizer == "adamw"),
    _Rule(
        ("optim.momentum", "optim.trust_coefficient"),
        "optim.optimizer=lars",
        lambda run: run.optim.optimizer == "lars",
    ),
    _Rule(
        ("optim.prototype_lr_scale", "optim.prototype_frozen_epochs"),
        "prototypes that the loss trains",
        lambda run: any(_learns(run.prototypes_of(name)) for name in run.levels.values()),
    ),
    _Rule(("engine.deepspeed_config",), "engine.name=deepspeed", lambda run: run.engine.name == "deepspeed"),
    _Rule(("engine.precision",), "engine.name=fsdp2", lambda run: run.engine.name == "fsdp2"),
    _Rule(
        ("logging.wandb_project",),
        "logging.wandb_mode other than disabled",
        lambda run: run.logging.wandb_mode != "disabled",
    ),
    _Rule(
        ("evaluation.",),
        "evaluation.knn_every_steps > 0",
        lambda run: run.evaluation.knn_every_steps > 0,
    ),
    _Rule(
        ("evaluation.sbatch_",),
        "evaluation.runs_as=slurm_job",
        lambda run: run.evaluation.runs_as == "slurm_job",
    ),
)
_MIXTURE = "mode=full and a mixture"
_OF_PROTOTYPES = (
    _Rule(("estimator",), "mode=full", lambda own: own.mode == "full"),
    _Rule(("gmm.",), _MIXTURE, lambda own: own.has_mixture),
    _Rule(
        ("clustering.",),
        "mode=partial, or mode=full and estimator=sinkhorn",
        lambda own: own.mode == "partial" or (own.mode == "full" and own.estimator == "sinkhorn"),
    ),
    _Rule(("koleo_weight",), "mode=joint_kp", lambda own: own.mode == "joint_kp"),
    _Rule(
        ("gmm.memory.epochs", "gmm.memory.minimum", "gmm.memory.maximum"),
        "gmm.memory.samples=null",
        lambda own: own.gmm.memory.samples is None,
    ),
    _Rule(
        ("gmm.beta.start", "gmm.beta.fraction"),
        "gmm.beta.schedule=geometric",
        lambda own: own.gmm.beta.schedule == "geometric",
    ),
    _Rule(
        ("gmm.init.spread_distance", "gmm.init.warmup_fraction"),
        "gmm.init.method=data_spread",
        lambda own: own.gmm.init.method == "data_spread",
    ),
    _Rule(("gmm.uniform_rate",), "gmm.forgetting=uniform", lambda own: own.gmm.forgetting == "uniform"),
    _Rule(
        ("gmm.mixing_weights.floor",),
        "gmm.mixing_weights.mode=tracked",
        lambda own: own.gmm.mixing_weights.mode == "tracked",
    ),
    _Rule(
        ("gmm.revival.",),
        "gmm.revival.method=split or reseed",
        lambda own: own.gmm.revival.method != "off",
    ),
    _Rule(("gmm.variational.",), "estimator=vb_gmm", lambda own: own.estimator == "vb_gmm"),
    _Rule(("gmm.tied_concentration",), "estimator=vmf", lambda own: own.estimator == "vmf"),
    _Rule(("gmm.kmeans_",), "estimator=sph_kmeans", lambda own: own.estimator == "sph_kmeans"),
)


def find_unread(config: PretrainConfig) -> dict[str, str]:
    """Returns the options that are not what they are by default and that the run does not read.

    Args:
        config: of the run.

    Returns:
        Dotted key to the option, or the state of affairs, that would have it read; in the configuration's order.
    """
    idle = find_idle(config)
    found = (
        (key, next((idle[option] for option in idle if key.startswith(option)), None))
        for key in _changed(config)
    )
    return {key: beside for key, beside in found if beside is not None}


def find_idle(config: PretrainConfig) -> dict[str, str]:
    """Returns the options, each by its key or by the start of several, that the run leaves out, whatever their values.

    Args:
        config: of the run.

    Returns:
        Option to the one, or the state of affairs, that would have it read.
    """
    idle = {option: rule.beside for rule in _OF_RUN if not rule.holds(config) for option in rule.options}
    for section in dict.fromkeys(config.levels.values()):
        own = config.prototypes_of(section)
        if config.model.init_head:  # a run's own prototypes go on
            idle[f"{section}.coupling.start"] = "model.init_head=false"
        for rule in _OF_PROTOTYPES:
            if not rule.holds(own):
                beside = f"{section}.{rule.beside}"
                idle |= {f"{section}.{option}": beside for option in rule.options}
    return idle


def describe_unread(config: PretrainConfig) -> str:
    """Returns a line that names them; empty where there are none."""
    keys: dict[str, list[str]] = {}
    for key, beside in find_unread(config).items():
        keys.setdefault(beside, []).append(key)
    named = "; ".join(f"{', '.join(those)} (only with {beside})" for beside, those in keys.items())
    return f"set, and not read in this run: {named}" if keys else ""


def _learns(own: PrototypesConfig) -> bool:
    return own.mode in ("joint", "joint_kp", "partial") or own.coupling.strength > 0


def _changed(section: Any, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of the options of a section that are not what they are by default."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _changed(value, f"{key}.")
        elif value != field.default:
            yield key
