"""What tells two configurations of one run apart. Imports no torch: submit asks before a job is queued."""

from __future__ import annotations

import json
from typing import Any

from runtime.config import ConfigError, build_config, config_to_dict
from training.config import PretrainConfig
from training.unread import find_idle

# What may differ between two starts of one run: how and where it is executed, not what is learned.
MECHANICS = (
    "run.output_dir",
    "run.device",
    "run.resume",
    "run.extend",
    "run.adopt",
    "run.dry_run",
    "run.dry_run_world_size",
    "run.collective_timeout_s",
    "batch.gradient_accumulation_steps",
    "data.images",
    "data.shards",
    "data.cache_",
    "data.num_workers",
    "model.activation_checkpointing",
    "model.compile_blocks",
    "prototypes.partition.blocks_per_chunk",
    "patch_prototypes.partition.blocks_per_chunk",
    "engine.",
    "checkpoint.",
    "logging.",
    "evaluation.",
)
LENGTH = ("optim.epochs", "optim.steps")
# Option to what runs did before there was the option, where that is not its default.
BEFORE = {"batch.accumulation": "per_micro_batch"}


def find_differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns key to (saved value, current value) of what changes what is learned or what the run is called."""
    flat_saved, flat_current = _flatten(saved), _flatten(current)
    differences = {
        key: (flat_saved.get(key), flat_current.get(key))
        for key in sorted(flat_saved.keys() | flat_current.keys())
        if flat_saved.get(key) != flat_current.get(key)
    }
    # Where there is one loss of the whole batch, in how many parts it is computed is mechanics.
    parts, kind = "batch.gradient_accumulation_steps", "batch.accumulation"
    is_one_loss = all(
        flat.get(kind) == "exact" or flat.get(parts) == 1 for flat in (flat_saved, flat_current)
    )
    if is_one_loss:
        differences.pop(kind, None)
    science = () if is_one_loss else (parts,)
    return {key: p for key, p in differences.items() if key in science or not key.startswith(MECHANICS)}


def differences_of_run(made_with: dict[str, Any], current: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns what `find_differences` does, of what a run directory's `config.yaml` holds, written by any version.

    An option that there was not yet has its default, which is what was done before it; or see `BEFORE`. One that
    neither run reads tells nothing apart.

    Raises:
        ConfigError: `made_with` has what this version does not know.
    """
    former = build_config(PretrainConfig, made_with)
    flat, named = _flatten(config_to_dict(former)), _flatten(made_with)
    flat |= {key: value for key, value in BEFORE.items() if key not in named}
    idle = tuple(find_idle(former).keys() & find_idle(build_config(PretrainConfig, current)).keys())
    found = find_differences(flat, current)
    return {key: pair for key, pair in found.items() if not key.startswith(idle)}


def describe_difference(run_dir: object, saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Returns the line that refuses `current` for a run directory made with `saved`; None where both are one run.

    A longer run is the same one with `run.extend`, another name with `run.adopt`.
    """
    try:
        differences = differences_of_run(saved, current)
    except ConfigError as error:
        return (
            f"run directory {run_dir} is of a former version, or not of this program: {error}, or set run.name to a "
            "new name"
        )
    longer = _is_longer(differences)
    if longer and current["run"].get("extend"):
        differences = {key: pair for key, pair in differences.items() if key not in LENGTH}
    if current["run"].get("adopt"):
        differences.pop("run.name", None)
    if not differences:
        return None
    # What no switch allows comes first.
    key = min(differences, key=lambda name: (name in LENGTH) + 2 * (name == "run.name"))
    before, now = differences[key]
    if key == "run.name":
        rule, remedy = "the name it was made with", "set run.adopt=true to go on with it under its new name"
    elif key in LENGTH and longer:
        rule, remedy = (
            "the same length",
            "set run.extend=true to lengthen that run, or run.name to a new name",
        )
    elif key in LENGTH:
        rule, remedy = "the same length or, with run.extend=true, a longer one", "set run.name to a new name"
    else:
        # As YAML writes it.
        former = json.dumps(before)
        rule = "the same configuration"
        remedy = f"set {key}={former} to go on with that run, or run.name to a new name"
    return (
        f"{key} is {now!r}, but run directory {run_dir} was made with {before!r}; expected {rule}; {remedy}"
    )


def _is_longer(differences: dict[str, tuple[Any, Any]]) -> bool:
    """Whether the run's length grows; between steps and epochs only the data can tell, which the start does."""
    if "optim.steps" in differences:
        before, now = differences["optim.steps"]
        return before is None or now is None or (type(before) is int and now > before)
    before, now = differences.get("optim.epochs", (0, 0))
    return isinstance(before, int | float) and now > before


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
