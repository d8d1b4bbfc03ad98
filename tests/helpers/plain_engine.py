"""An engine of one process without any sharding library: what the others must equal, cheap enough for unit tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks._replica_engine import ReplicaEngine
from training.engines.interface import NetworkOutput, TrainedNetwork
from training.schedules import StepSchedule


class PlainEngine(ReplicaEngine):
    """Plain gradient descent, so that a gradient's rounding stays as small in the weights. Keeps each step's gradients.

    Attributes:
        gradients: of every parameter, before the last update.
        num_passes: forward passes of the student so far.
    """

    def __init__(self, student: TrainedNetwork, teacher: TrainedNetwork) -> None:
        self.student, self.teacher = student.train(), teacher.train()
        self._parallel, self._autocast = self.student, nullcontext()  # type: ignore[assignment]
        self.gradients: dict[str, Tensor] = {}
        self.num_passes = 0

    def forward_student(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        self.num_passes += 1
        return super().forward_student(crops, patches)

    def gradients_are_finite(self) -> Tensor:
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.student.named_parameters()
            if parameter.grad is not None
        }
        return torch.nn.utils.get_total_norm(list(self.gradients.values())).isfinite()

    def step(self, schedule: StepSchedule) -> Tensor:
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.sub_(schedule.lr * self.gradients[name])
        self.skip()
        return torch.nn.utils.get_total_norm(list(self.gradients.values()))

    def skip(self) -> None:
        self.student.zero_grad(set_to_none=True)

    def iterate_state(self) -> Any:
        return iter(self.student.state_dict().items())

    def load_state(self, state: Any) -> None:
        self.student.load_state_dict(state)
