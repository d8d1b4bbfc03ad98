"""What tells two configurations of one run apart. Imports no torch: submit asks before a job is queued."""

from __future__ import annotations

from typing import Any

# What may differ between two starts of one run: how and where it is executed, not what is learned.
MECHANICS = (
    "run.output_dir",
    "run.device",
    "run.resume",
    "run.dry_run",
    "run.dry_run_world_size",
    "run.collective_timeout_s",
    "batch.gradient_accumulation_steps",
    "data.shards",
    "data.num_workers",
    "model.activation_checkpointing",
    "model.compile_blocks",
    "engine.",
    "checkpoint.",
    "logging.",
    "evaluation.",
)


def find_difference(saved: dict[str, Any], current: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns (key, saved value, current value) of the first difference that changes what is learned, or None."""
    flat_saved, flat_current = _flatten(saved), _flatten(current)
    # A loss of each micro-batch depends on how many there are.
    is_science = flat_current.get("batch.accumulation") == "per_micro_batch"
    for key in sorted(flat_saved.keys() | flat_current.keys()):
        if key.startswith(MECHANICS) and not (is_science and key == "batch.gradient_accumulation_steps"):
            continue
        if flat_saved.get(key) != flat_current.get(key):
            return key, flat_saved.get(key), flat_current.get(key)
    return None


def describe_difference(run_dir: object, saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Returns the line that refuses `current` for a run directory made with `saved`; None where both are one run."""
    difference = find_difference(saved, current)
    if difference is None:
        return None
    key, before, now = difference
    return (
        f"{key} is {now!r}, but run directory {run_dir} was made with {before!r}; expected the same "
        f"configuration; set run.name to a new name, or remove {run_dir}"
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
