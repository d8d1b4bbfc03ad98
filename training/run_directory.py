"""The run directory: made once, claimed by one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.config import config_to_dict, config_to_yaml, read_yaml
from runtime.distributed import Process
from runtime.files import write_atomically
from training.config import PretrainConfig

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


def prepare_run_directory(config: PretrainConfig, run_dir: Path, process: Process) -> None:
    """Makes the run directory and writes `config.yaml`, or checks that it is this configuration's. Collective.

    Raises:
        ValueError: the directory belongs to another configuration, or cannot be written; on all ranks.
    """
    problem = _prepare(config, run_dir) if process.is_main else None
    problem = process.broadcast_object(problem)
    if problem is not None:
        raise ValueError(problem)


def find_difference(saved: dict[str, Any], current: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Returns (key, saved value, current value) of the first difference that changes what is learned, or None."""
    flat_saved, flat_current = _flatten(saved), _flatten(current)
    for key in sorted(flat_saved.keys() | flat_current.keys()):
        if key.startswith(MECHANICS):
            continue
        if flat_saved.get(key) != flat_current.get(key):
            return key, flat_saved.get(key), flat_current.get(key)
    return None


def _prepare(config: PretrainConfig, run_dir: Path) -> str | None:
    path = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            difference = find_difference(read_yaml(str(path)), config_to_dict(config))
            if difference is not None:
                key, saved, current = difference
                return (
                    f"{key} is {current!r}, but run directory {run_dir} was made with {saved!r}; expected the same "
                    f"configuration; set run.name to a new name, or remove {run_dir}"
                )
        write_atomically(path, config_to_yaml(config))
    except OSError as error:
        return f"run directory {run_dir} cannot be written ({error.strerror}); set run.output_dir"
    return None


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
