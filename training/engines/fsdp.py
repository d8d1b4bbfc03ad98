"""Student and teacher under torch's FSDP2: every parameter is a DTensor cut along its first axis on one mesh."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from models.student_teacher import SelfSupervisedNetwork, update_ema_
from training.config import OptimConfig
from training.engines.interface import Engine, NetworkOutput, TrainedNetwork, check_names
from training.engines.optimizer import MOMENTS, build_optimizer, set_schedule_
from training.engines.table import check_combination
from training.schedules import StepSchedule


class FSDPEngine(Engine):
    """See `Engine`. Student and teacher are cut alike, so that the average moves on local shards.

    Units: each block of the backbone, the backbone's rest, a predictor, learned prototypes, the root (heads). All
    are cut again after the forward pass: nobody can see a stale whole copy after an update. Gradients are reduced after
    every micro-batch (memory does not grow with accumulation), in fp32.

    Args:
        student: the network to train, on this process's device.
        teacher: its average, built alike.
        optim: optimizer and clipping.
        world_size: number of ranks.
        precision: `fp32`, or `bf16` for compute and gathering; master weights, moments, gradients' reduction and
            the teacher stay fp32.
    """

    def __init__(
        self,
        student: TrainedNetwork,
        teacher: TrainedNetwork,
        *,
        optim: OptimConfig,
        world_size: int,
        precision: str,
    ) -> None:
        check_combination("fsdp2", optim.optimizer, student)
        device = next(student.parameters()).device
        mesh = init_device_mesh(device.type, (world_size,))
        for network in (student, teacher):
            _cut(network, mesh, precision)
        self.student = student.train()
        self.teacher = teacher.train()
        # The cut parameters: while a unit is gathered, `parameters()` would give its whole copies instead.
        self._student_parameters = dict(student.named_parameters())
        self._teacher_parameters = dict(teacher.named_parameters())
        self._optimizer = build_optimizer(student, optim)
        self._moments = MOMENTS[type(self._optimizer).__name__]
        for parameter in self._student_parameters.values():
            # From step 0 on, so that a state has the same names at every step.
            moments: dict[str, Any] = {name: torch.zeros_like(parameter) for name in self._moments}
            self._optimizer.state[parameter] = moments | {"step": torch.zeros((), device=device)}
        self._clip_grad_norm = optim.clip_grad_norm
        self._mesh = mesh

    def forward_student(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """See `Engine`."""
        return NetworkOutput(*self.student(crops, patches))

    @torch.no_grad()
    def forward_teacher(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """See `Engine`."""
        return NetworkOutput(*self.teacher(crops, patches))

    def backward(self, loss: Tensor, *, is_last_micro_step: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def gradients_are_finite(self) -> Tensor:
        """See `Engine`."""
        norm = torch.nn.utils.get_total_norm(self._gradients())
        self._norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return self._norm.isfinite()

    def step(self, schedule: StepSchedule) -> Tensor:
        """See `Engine`."""
        set_schedule_(self._optimizer.param_groups, schedule)
        if self._clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self._student_parameters.values(), self._clip_grad_norm, self._norm
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return self._norm

    def skip(self) -> None:
        """See `Engine`."""
        self._optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def update_teacher(self, ema_momentum: float) -> None:
        """See `Engine`."""
        update_ema_(
            [_local(parameter) for parameter in self._teacher_parameters.values()],
            [_local(self._student_parameters[name]) for name in self._teacher_parameters],
            ema_momentum,
        )

    def teacher_network(self) -> SelfSupervisedNetwork:
        """See `Engine`."""
        if self._mesh.device_type == "cuda":
            # Only the root's forward makes the gathering stream wait for this one, and probes call the backbone.
            torch.cuda.current_stream().synchronize()
        return super().teacher_network()

    def iterate_state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for name, parameter in self._named_parameters():
            yield name, _whole(parameter)
        for name, parameter in self._student_parameters.items():
            for moment in self._moments:
                yield f"optimizer/{name}/{moment}", _whole(self._optimizer.state[parameter][moment])
        yield "optimizer/step", self._step_counter().cpu().clone()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self._named_parameters()}
        for name, parameter in self._student_parameters.items():
            shapes |= {f"optimizer/{name}/{moment}": tuple(parameter.shape) for moment in self._moments}
        check_names(shapes | {"optimizer/step": ()}, state)
        with torch.no_grad():
            for name, parameter in self._named_parameters():
                _set_whole_(parameter, state[name])
            for name, parameter in self._student_parameters.items():
                moments = self._optimizer.state[parameter]
                for moment in self._moments:
                    _set_whole_(moments[moment], state[f"optimizer/{name}/{moment}"])
                moments["step"].copy_(state["optimizer/step"])

    @torch.no_grad()
    def write_parameter(self, name: str, whole: Tensor) -> None:
        """See `Engine`."""
        for parameters in (self._student_parameters, self._teacher_parameters):
            _set_whole_(parameters[name], whole)

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for role, parameters in (
            ("student", self._student_parameters),
            ("teacher", self._teacher_parameters),
        ):
            yield from ((f"{role}/{name}", parameter) for name, parameter in parameters.items())

    def _gradients(self) -> list[Any]:
        return [p.grad for p in self._student_parameters.values() if p.grad is not None]

    def _step_counter(self) -> Tensor:
        return next(iter(self._optimizer.state.values()))["step"]


def _cut(network: TrainedNetwork, mesh: DeviceMesh, precision: str) -> None:
    """Cuts a network's parameters over the mesh in place."""
    compute = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    backbone = network.network.backbone
    for block in getattr(backbone, "blocks", []):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(backbone, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if network.network.predictor is not None:
        fully_shard(network.network.predictor, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for learned in (network.learned_prototypes, network.learned_patch_prototypes):
        if learned is not None:
            # Prototypes and the logits against them are fp32 whatever the encoder computes in.
            fully_shard(learned, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _local(parameter: Any) -> Tensor:
    return parameter.to_local()


def _whole(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor().cpu()


def _set_whole_(target: Any, whole: Tensor) -> None:
    """Writes this rank's shard of a whole tensor that every rank has; nothing is sent."""
    device = target.to_local().device
    shard = distribute_tensor(whole.to(device), target.device_mesh, target.placements, src_data_rank=None)
    target.to_local().copy_(shard.to_local())
