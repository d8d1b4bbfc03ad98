"""What a checkpoint holds, read and checked before anything of the run is touched.

A hash says that bytes are as they were written, not that they are what this program understands: another version, a
tool or a hand may have written them and renewed the hash. Whatever is unusable here is a `CheckpointError` with its
reason, so that a start can pass the checkpoint over and take an older one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.distributed import Process
from training.checkpoints.files import CheckpointError, step_of
from training.checkpoints.snapshot import Progress, RecordPosition, rng_name
from training.checkpoints.state_files import ConsolidatedState, check_rng_state, load_tree, restore_rng_state
from training.prototype_sets import ESTIMATORS, modules_of
from training.step import TrainingStep


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint as this rank reads it.

    Attributes:
        checkpoint: its directory.
        progress: where the run was.
        record: how far its record was.
        state: the engine's full tensors by name, read when asked for.
        estimators: their states, by name.
        objective: what the objective remembers; empty where it remembers nothing.
        usage_counts: of the epoch so far, of all ranks together, by estimator; `restore` compares their shapes.
        spike_guard: the guard's window.
        rng: this rank's generators; None where the checkpoint was written by another number of ranks.
    """

    checkpoint: Path
    progress: Progress
    record: RecordPosition
    state: ConsolidatedState
    estimators: dict[str, dict[str, Any]]
    objective: dict[str, Any]
    usage_counts: dict[str, Tensor]
    spike_guard: dict[str, Any]
    rng: dict[str, Any] | None


def read_saved_run(checkpoint: Path, process: Process) -> SavedRun:
    """Returns a checkpoint's content; not collective, and nothing of the run changes.

    Raises:
        CheckpointError: a file is missing, cannot be read, or holds something else than a run's state.
    """
    saved = _mapping(load_tree(checkpoint, "progress"), "progress.json")
    progress = _read_progress(saved.get("progress"))
    if progress.step != step_of(checkpoint):
        raise CheckpointError(f"progress.json is of step {progress.step}; expected that of {checkpoint.name}")
    places = [
        place for place in ESTIMATORS if place == "estimator" or (checkpoint / f"{place}.json").exists()
    ]
    counts = {place: saved.get(_counts_of(place)) for place in places}
    if not all(isinstance(count, Tensor) for count in counts.values()):
        raise CheckpointError("progress.json holds no usage counts")
    guard = _mapping(saved.get("spike_guard"), "spike_guard of progress.json")
    losses = guard.get("losses")
    if not isinstance(losses, list) or not all(type(loss) is float for loss in losses):
        raise CheckpointError("spike_guard of progress.json holds no list of losses")
    name = rng_name(process)
    rng = None
    if (checkpoint / f"{name}.json").exists():
        rng = load_tree(checkpoint, name)
        check_rng_state(rng)
    return SavedRun(
        checkpoint=checkpoint,
        progress=progress,
        record=_read_record_position(load_tree(checkpoint, "record")),
        state=ConsolidatedState(checkpoint),
        estimators={place: _mapping(load_tree(checkpoint, place), f"{place}.json") for place in places},
        objective=_read_objective(checkpoint),
        usage_counts=counts,  # type: ignore[arg-type]
        spike_guard=guard,
        rng=rng,
    )


def restore(saved: SavedRun, training_step: TrainingStep, process: Process) -> None:
    """Puts a checkpoint's state into the engine, the estimator and the guards. Collective.

    Raises:
        ValueError: the state belongs to another model, other prototypes or another schema; on all ranks alike, and
            before a tensor has moved in the part that refuses.
    """
    estimators = modules_of(training_step.sets)
    if saved.estimators.keys() != estimators.keys():
        raise ValueError(
            f"the checkpoint holds the states {', '.join(saved.estimators)}; expected {', '.join(estimators)}; "
            "resume with the prototypes it was written with, or set run.resume=false"
        )
    counters = {f"{one.prefix}estimator": one.usage.counts for one in training_step.sets}
    for place, live in counters.items():
        counts = saved.usage_counts[place]
        if (counts.shape, counts.dtype) != (live.shape, live.dtype):
            raise ValueError(
                f"the checkpoint's usage counts have shape {tuple(counts.shape)}; expected {tuple(live.shape)}"
            )
    _check_objective(saved.objective, training_step.objective.state_dict())
    training_step.engine.load_state(saved.state)
    for place, estimator in estimators.items():
        estimator.load_state_dict(saved.estimators[place])
    training_step.objective.load_state_dict(saved.objective)
    # Usage counts were summed over ranks: one rank takes them over and the others start from zero.
    for place, live in counters.items():
        live.copy_(saved.usage_counts[place] * int(process.is_main))
    training_step.spike_guard.load_state_dict(saved.spike_guard)
    if saved.rng is not None:
        restore_rng_state(saved.rng)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _counts_of(place: str) -> str:
    return place.replace("estimator", "usage_counts")


def _read_objective(checkpoint: Path) -> dict[str, Any]:
    """Returns an objective's state, of which there is no file where it is empty."""
    if not (checkpoint / "objective.json").exists():
        return {}
    return _mapping(load_tree(checkpoint, "objective"), "objective.json")


def _check_objective(saved: dict[str, Any], live: Mapping[str, Tensor]) -> None:
    shapes = [
        {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}
        for state in (saved, live)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the checkpoint's state of the objective is {shapes[0] or 'empty'}; expected {shapes[1] or 'none'}; "
            "resume with the objective it was written with, or set run.resume=false"
        )


def _read_progress(value: Any) -> Progress:
    found = dict(_mapping(value, "progress of progress.json"))
    position = found.pop("position", None)
    if found.keys() != {field.name for field in fields(Progress)} - {"position"} or not all(
        map(_is_count, found.values())
    ):
        raise CheckpointError(f"progress.json holds {str(found)!r:.80}; expected the counts of a run")
    if position is not None:
        used = _mapping(_mapping(position, "position of progress.json").get("used"), "used of progress.json")
        if not all(str(lane).isdecimal() and _is_count(count) for lane, count in used.items()):
            raise CheckpointError("progress.json holds a data position without one count a lane")
        if not _is_count(position.get("samples_seen")):
            raise CheckpointError("progress.json holds a data position without samples_seen")
    return Progress(**found, position=position)


def _read_record_position(value: Any) -> RecordPosition:
    found = _mapping(value, "record.json")
    length, identity = found.get("metrics_bytes"), found.get("wandb_id")
    if not (length is None or _is_count(length)) or not (identity is None or isinstance(identity, str)):
        raise CheckpointError(f"record.json holds {str(found)!r:.80}; expected the length of a record")
    return RecordPosition(metrics_bytes=length, wandb_id=identity)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(f"{what} holds {value!r:.60}; expected names and values")
    return dict(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
