"""What a sharding engine must do for one training step; `deepspeed` and `fsdp` do it.

An engine owns the student, its optimizer and the teacher. It knows nothing of losses, prototypes' statistics or
data. All states leave and enter it in one world-size-independent format: full fp32 tensors by parameter name, of
which every rank hands over (and writes) its share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.student_teacher import SelfSupervisedNetwork
from training.schedules import StepSchedule


class NetworkOutput(NamedTuple):
    """What one forward pass gives; None where the objective does not ask for it.

    Attributes:
        projections: [N, P] fp32, all crops in order.
        learned_prototypes: [K, P] unit rows where the encoder's loss trains prototypes.
        patch_projections: [R, P] fp32, of patches of the global crops: by crop, then by place.
        learned_patch_prototypes: as `learned_prototypes`, where the term on patches has its own.
        embeddings: [M, D] fp32, of the global crops.
    """

    projections: Tensor | None
    learned_prototypes: Tensor | None = None
    patch_projections: Tensor | None = None
    learned_patch_prototypes: Tensor | None = None
    embeddings: Tensor | None = None


class TrainedNetwork(nn.Module):
    """What an engine wraps: the network and, in modes that train prototypes with it, the prototypes.

    The prototypes' unit rows are computed inside `forward`, so that an engine's gather hooks see their use.
    """

    def __init__(
        self,
        network: SelfSupervisedNetwork,
        learned_prototypes: nn.Module | None,
        learned_patch_prototypes: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.learned_prototypes = learned_prototypes
        self.learned_patch_prototypes = learned_patch_prototypes

    def forward(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Returns the fields of a `NetworkOutput`; a plain tuple, which engines take apart and put together again."""
        prototypes, patch_prototypes = (
            None if learned is None else learned()
            for learned in (self.learned_prototypes, self.learned_patch_prototypes)
        )
        projections, embeddings, patch_projections = self.network(crops, patches)
        return projections, prototypes, patch_projections, patch_prototypes, embeddings

    def begin_as(self, other: TrainedNetwork) -> None:
        """Takes over the weights of another network that has all of this one's and maybe more: teacher of student."""
        state = other.state_dict()
        self.load_state_dict({name: state[name] for name in self.state_dict()})


class Engine(ABC):
    """One student under one optimizer, one teacher, sharded or not.

    Attributes:
        student: the student's module as the engine holds it.
        teacher: the teacher's module, fp32, in train mode with its own BatchNorm buffers and no gradient.
    """

    student: nn.Module
    teacher: nn.Module

    @abstractmethod
    def forward_student(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """Returns the student's output with its graph. Collective under sharded parameters.

        Args:
            crops: one tensor per resolution.
            patches: which patches of the first are hidden and projected, as `SelfSupervisedNetwork.forward` takes it.
        """

    def forward_student_without_graph(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """Returns what `forward_student` would, without its graph; BatchNorm's running statistics stay."""
        with torch.no_grad(), running_statistics_held(self.student):
            return self.forward_student(crops, patches)

    @abstractmethod
    def forward_teacher(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """Returns the teacher's output, no gradient. Collective under sharded parameters."""

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last_micro_step: bool) -> None:
        """Adds this scalar's gradients to the step's. Collective.

        Gradients are averaged over ranks by the time the last micro-step returns; over micro-batches they are summed.
        """

    @abstractmethod
    def gradients_are_finite(self) -> Tensor:
        """Returns whether every gradient on every rank is finite, as a scalar on the device, which is not waited for.

        A gradient whose 2-norm overflows counts as not finite: no step could be made of it. Collective; call before
        `step` or `skip`.
        """

    @abstractmethod
    def step(self, schedule: StepSchedule) -> Tensor:
        """Updates the student and returns the gradient's 2-norm before clipping, a scalar. Collective."""

    @abstractmethod
    def skip(self) -> None:
        """Drops the accumulated gradients; parameters and moments keep every bit. Not collective."""

    @abstractmethod
    def update_teacher(self, ema_momentum: float) -> None:
        """Moves the teacher's parameters towards the student's, on local shards, in fp32. Not collective."""

    @abstractmethod
    def iterate_state(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, full CPU tensor) of everything a resume needs. Collective.

        Names are `student/PARAMETER`, `teacher/PARAMETER`, `optimizer/PARAMETER/MOMENT` (fp32) and, for buffers,
        `student/BUFFER`, `teacher/BUFFER`. Every rank takes part in every gather; a rank may let go of a tensor
        that it does not write before it asks for the next.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `iterate_state` gave, under any world size and engine. Collective.

        Raises:
            ValueError: a name is missing, unknown, or of another shape.
        """

    @abstractmethod
    def write_parameter(self, name: str, whole: Tensor) -> None:
        """Overwrites a parameter of the student and the teacher's copy of it; the optimizer's moments stay.

        Collective; call between steps.

        Args:
            name: as the student's module has it.
            whole: the full tensor, the same on every rank.
        """

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) of what must be bitwise equal on all ranks; shards have no replica."""
        return iter(())

    def teacher_network(self) -> SelfSupervisedNetwork:
        """Returns the teacher's network, for evaluation and export; parameters may be shards."""
        network = self.teacher.network
        assert isinstance(network, SelfSupervisedNetwork)
        return network


@contextmanager
def running_statistics_held(module: nn.Module) -> Iterator[None]:
    """Lets BatchNorm in train mode use the batch's statistics, as ever, without adding them to its running ones."""
    tracking = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    for layer in tracking:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in tracking:
            layer.track_running_stats = True


def check_names(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raises a one-line ValueError unless `state` has exactly the expected names and shapes."""
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"has the unknown {unknown[0]}"
        raise ValueError(
            f"the checkpoint {problem} ({len(missing)} missing, {len(unknown)} unknown tensors); "
            "expected the state of the same model and prototypes; set run.name to a new run"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)} in the checkpoint; expected {shape}; "
                "set run.name to a new run"
            )
