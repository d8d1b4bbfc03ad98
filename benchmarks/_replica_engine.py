"""The peer of `benchmarks.step`: plain data parallel training, as torch's own documentation has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.student_teacher import update_ema_
from training.config import OptimConfig
from training.engines.interface import Engine, NetworkOutput, TrainedNetwork
from training.engines.optimizer import build_optimizer, set_schedule_
from training.schedules import StepSchedule


class ReplicaEngine(Engine):
    """The peer: torch's DistributedDataParallel and AdamW, nothing of ours but the average."""

    def __init__(
        self, student: TrainedNetwork, teacher: TrainedNetwork, optim: OptimConfig, precision: str
    ) -> None:
        self.student = student
        self.teacher = teacher
        self._parallel = nn.parallel.DistributedDataParallel(student)
        self._optimizer = build_optimizer(student, optim)
        self._clip = optim.clip_grad_norm or float("inf")
        device = next(student.parameters()).device.type
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def forward_student(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """See `Engine`."""
        with self._autocast:
            return NetworkOutput(*self._parallel(crops, patches))

    @torch.no_grad()
    def forward_teacher(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """See `Engine`."""
        with self._autocast:
            return NetworkOutput(*self.teacher(crops, patches))

    def backward(self, loss: Tensor, *, is_last_micro_step: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def gradients_are_finite(self) -> Tensor:
        """See `Engine`; gradients are averaged already, so that all ranks see the same."""
        self._norm = nn.utils.clip_grad_norm_(self.student.parameters(), self._clip)
        return self._norm.isfinite()

    def step(self, schedule: StepSchedule) -> Tensor:
        """See `Engine`."""
        set_schedule_(self._optimizer.param_groups, schedule)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._norm

    def skip(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad(set_to_none=True)

    def update_teacher(self, ema_momentum: float) -> None:
        """See `Engine`."""
        students = dict(self.student.named_parameters())
        teachers = dict(self.teacher.named_parameters())
        update_ema_(teachers.values(), [students[name] for name in teachers], ema_momentum)

    def iterate_state(self) -> Any:
        """Not part of the race."""
        raise NotImplementedError

    def load_state(self, state: Any) -> None:
        """Not part of the race."""
        raise NotImplementedError

    def write_parameter(self, name: str, whole: Tensor) -> None:
        """Not part of the race."""
        raise NotImplementedError
