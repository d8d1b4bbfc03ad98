"""Everything that a resume needs, gathered from all ranks before a byte is written (`saved_run` reads it).

    checkpoints/step-00000100/
      state-00000-of-00002.safetensors ...   student, teacher, optimizer: full tensors by name, shared out to ranks
      estimator.{json,safetensors}           the estimator's state, equal on all ranks
      patch_estimator.{json,safetensors}     that of the patches' own prototypes, where they have some
      objective.{json,safetensors}           what the objective remembers (a centre), where it remembers anything
      progress.{json,safetensors}            counters, data position, usage counts, guard
      rng-00000-of-00002.{json,safetensors}  every generator of each rank
      record.json                            how far metrics.jsonl was, and wandb's id
      teacher/                               the exported encoder

Every step seeds its generators from (seed, step, rank), so that a run continues with any number of ranks. The saved
generators are put back where the number of ranks is the same: what draws between steps goes on as well.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.stream.pipeline import merge_positions
from prototypes.estimator import PrototypeEstimator, Role
from runtime.distributed import Process
from training.checkpoints.exported_encoder import HEADS, build_shell, export_encoder, mark_head
from training.checkpoints.state_files import (
    collect_rng_state,
    collect_share,
    save_tensors,
    save_tree,
    share_path,
)
from training.config import PretrainConfig
from training.engines.interface import Engine
from training.prototype_sets import SECTIONS, modules_of
from training.step import TrainingStep

_TEACHER_BACKBONE = "teacher/network.backbone."
_ROLES: tuple[Role, ...] = ("teacher", "student")


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: updates done.
        samples_seen: images consumed, skipped steps included.
        skipped_steps: steps that moved nothing, in all.
        skipped_in_row: the same, since the last step that moved.
        position: the data position after the last batch, of all ranks; None before the first.
    """

    step: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    position: dict[str, Any] | None = field(default=None, compare=False)

    def advanced(self, *, applied: bool, samples: int, position: dict[str, Any]) -> Progress:
        """Returns the progress after one step."""
        return replace(
            self,
            step=self.step + int(applied),
            samples_seen=self.samples_seen + samples,
            skipped_steps=self.skipped_steps + int(not applied),
            skipped_in_row=0 if applied else self.skipped_in_row + 1,
            position=position,
        )


@dataclass(frozen=True)
class RecordPosition:
    """How far rank 0's record was at a checkpoint.

    Attributes:
        metrics_bytes: length of `metrics.jsonl`; what was written later is done again after a resume.
        wandb_id: the run's identity in wandb, or None where it was never started.
    """

    metrics_bytes: int | None = None
    wandb_id: str | None = None


class Snapshot:
    """The state of a run in CPU memory, each rank with its share. Collective to make; `write` is not.

    `write` touches no generator and no device: it may run in a thread beside the next training steps.

    Args:
        config: the run's configuration, for the export.
        progress: where the run is; `position` is this rank's part.
        training_step: engine, sets of prototypes with their usage counts, objective and guard.
        process: this process.
        provenance: plain facts for the exported encoder's model card.
        record: how far the record is; rank 0's counts.
    """

    def __init__(
        self,
        config: PretrainConfig,
        progress: Progress,
        training_step: TrainingStep,
        process: Process,
        provenance: dict[str, Any],
        record: RecordPosition,
    ) -> None:
        self._config = config
        self._record = asdict(record)
        self._rng = collect_rng_state()
        self._process = process
        self._provenance = provenance
        self._teacher: dict[str, Tensor] = {}
        self._heads: dict[str, dict[str, Tensor]] = {name: {} for name in HEADS}
        self._prototypes: dict[str, dict[str, Tensor]] = {}
        self._learned: dict[str, dict[Role, Tensor]] = {section: {} for section in SECTIONS}
        self._share = collect_share(self._stream(training_step.engine), process.rank, process.world_size)
        parts = process.all_gather_object(progress.position)
        self._progress = {
            "progress": asdict(replace(progress, position=merge_positions([part for part in parts if part]))),
            **{
                f"{one.prefix}usage_counts": self._sum_over_ranks(one.usage.counts)
                for one in training_step.sets
            },
            "spike_guard": training_step.spike_guard.state_dict(),
        }
        self._estimators = {
            place: {
                name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
                for name, value in estimator.state_dict().items()
            }
            for place, estimator in modules_of(training_step.sets).items()
        }
        self._objective = {
            name: value.detach().to("cpu", copy=True)
            for name, value in training_step.objective.state_dict().items()
        }
        for one in training_step.sets if process.is_main else ():
            state = self._estimators[f"{one.prefix}estimator"]
            learned = self._learned[one.section]
            self._prototypes[one.section] = _exported_prototypes(one.estimator, state, learned)

    def write(self, directory: Path) -> None:
        """Writes this rank's files; rank 0 adds what is equal on all ranks and the exported teacher."""
        save_tensors(share_path(directory, self._process.rank, self._process.world_size), self._share)
        save_tree(directory, rng_name(self._process), self._rng)
        if not self._process.is_main:
            return
        for place, state in self._estimators.items():
            save_tree(directory, place, state)
        if self._objective:
            save_tree(directory, "objective", self._objective)
        save_tree(directory, "progress", self._progress)
        save_tree(directory, "record", self._record)
        model = self._config.model
        beside = {name: mark_head(model, name, head) for name, head in self._heads.items() if head}
        beside |= {name: own for name, own in self._prototypes.items() if name != "prototypes"}
        export_encoder(
            build_shell(model, self._teacher),
            directory / "teacher",
            model=model,
            mean=self._config.data.mean,
            std=self._config.data.std,
            pixels=self._config.data.pixels,
            prototypes=self._prototypes["prototypes"],
            beside=beside,
            levels=self._config.levels,
            provenance=self._provenance,
        )

    def _stream(self, engine: Engine) -> Any:
        """The engine's state; on the way rank 0 keeps what the export needs."""
        for name, tensor in engine.iterate_state():
            if self._process.is_main and name.startswith(_TEACHER_BACKBONE):
                self._teacher[name.removeprefix(_TEACHER_BACKBONE)] = tensor.detach().to("cpu", copy=True)
            for head in HEADS if self._process.is_main else ():
                prefix = f"teacher/network.{head}."
                if name.startswith(prefix):
                    self._heads[head][name.removeprefix(prefix)] = tensor.detach().to("cpu", copy=True)
            for role, section in itertools.product(_ROLES, SECTIONS) if self._process.is_main else ():
                if name.startswith(f"{role}/learned_{section}."):
                    self._learned[section][role] = tensor.detach().to("cpu", copy=True)
            yield name, tensor

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        """The epoch's usage so far. A copy: the counters themselves go on per rank."""
        return torch.stack(self._process.all_gather_object(counts.cpu())).sum(0)


def _exported_prototypes(
    estimator: PrototypeEstimator, state: dict[str, Any], learned: dict[Role, Tensor]
) -> dict[str, Tensor]:
    """Returns what evaluation reads: `means` of the teacher, with `student_means` where the student has its own.

    A mixture's means come as they are, beside `variances` and `mixing_weights`; where it models recentred
    projections, `input_shift` and `input_scale` say how: (projection - shift) * scale.
    """
    if not learned:
        names = ("means", "variances", "mixing_weights")
        found = {name: state[name].float() for name in names if name in state}
    else:
        unit = {role: torch.nn.functional.normalize(rows.float(), dim=1) for role, rows in learned.items()}
        device = next((t.device for t in estimator.buffers()), torch.device("cpu"))
        found = {
            "means" if role == "teacher" else "student_means": estimator.prototypes(role, rows.to(device))
            .detach()
            .float()
            .cpu()
            .clone()
            for role, rows in unit.items()
        }
    gmm = estimator.config.gmm
    if "input_mean" in state and (gmm.center or gmm.standardise):
        found["input_shift"] = state["input_mean"].float()
        if gmm.standardise:
            found["input_scale"] = state["input_variance"].float().clamp_min(1e-12).rsqrt()
    return found


def rng_name(process: Process) -> str:
    """Returns the name of the tree that holds a rank's generators."""
    return f"rng-{process.rank:05d}-of-{process.world_size:05d}"
