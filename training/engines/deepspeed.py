"""The student under DeepSpeed ZeRO 0 to 3; the teacher a plain fp32 replica beside it, or cut like it (stage 3).

The only module that imports deepspeed. DeepSpeed's own checkpoints are not used: they are pickles, bound to a
world size, and its `latest` file can name an unfinished one. States leave and enter as full tensors by name
(`Engine.iterate_state`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from models.student_teacher import update_ema_
from training.config import BatchConfig, OptimConfig
from training.engines.interface import Engine, NetworkOutput, TrainedNetwork, check_names
from training.engines.mechanics import read_mechanics
from training.engines.optimizer import MOMENTS, build_optimizer, set_schedule_
from training.engines.table import check_combination
from training.engines.zero3_partition import gather_pieces, value_piece, whole_shape, write_piece_
from training.schedules import StepSchedule

logger = logging.getLogger(__name__)


class DeepSpeedEngine(Engine):
    """See `Engine`. Stages 0 to 2 keep whole parameters on every rank, so the teacher is a plain replica.

    Stage 3 cuts student and teacher alike: the average moves on this rank's pieces and nothing is gathered.

    Args:
        student: the network to train, on this process's device.
        teacher: its average, built alike.
        optim: optimizer and clipping.
        batch: sizes, which DeepSpeed wants to know.
        world_size: number of ranks.
        deepspeed_config: path of the JSON file of mechanics.
    """

    def __init__(
        self,
        student: TrainedNetwork,
        teacher: TrainedNetwork,
        *,
        optim: OptimConfig,
        batch: BatchConfig,
        world_size: int,
        deepspeed_config: str,
    ) -> None:
        mechanics = read_mechanics(deepspeed_config)
        zero = mechanics.get("zero_optimization", {})
        self.stage = zero.get("stage", 0)
        # The check of the gradients takes their norm. DeepSpeed would take it again, parameter by parameter, and wait
        # for it with every group.
        self._clips_itself = self.stage in (1, 2)
        self._max_norm = optim.clip_grad_norm or 0.0
        if self._clips_itself:
            mechanics = mechanics | {"zero_optimization": zero | {"compute_grad_norm": False}}
            if "torch_autocast" in mechanics:
                # The modules named there would have their gradients averaged over ranks in bf16.
                autocast = mechanics["torch_autocast"] | {"lower_precision_safe_modules": []}
                mechanics = mechanics | {"torch_autocast": autocast}
        check_combination(f"zero{self.stage}", optim.optimizer, student)
        # DeepSpeed would compile a shared-memory all-reduce on first use on CPUs; a build that was killed leaves a
        # lock on which every later run hangs. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        optimizer = build_optimizer(student, optim)
        settings = mechanics | {
            "train_micro_batch_size_per_gpu": batch.micro_batch_size_per_gpu(world_size),
            "gradient_accumulation_steps": batch.gradient_accumulation_steps,
            "gradient_clipping": 0.0 if self._clips_itself else self._max_norm,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
        }
        self._rank = dist.get_rank()
        self._engine, self._optimizer = _initialize(student, optimizer, settings, deepspeed_config)
        self._engine.train()
        self.student = student
        self._device = next(student.parameters()).device
        self.teacher = teacher.to(self._device).train()
        self._teacher_engine = _cut_teacher(self.teacher, settings) if self.stage == 3 else None
        # The student may have more: what stands for patches that it does not see.
        students = dict(student.named_parameters())
        self._averages = list(self.teacher.parameters())
        self._averaged = [students[name] for name, _ in self.teacher.named_parameters()]
        self._autocast_dtype = _autocast_dtype(mechanics)
        if self.stage == 3:
            _gather_persistent_exactly(student)
            # Weights are gathered in bf16, which autocast rounds them to anyway; the sum over ranks is not.
            self._optimizer.get_param_comm_dtype = lambda parameter: torch.float32
        self._create_moments()

    def forward_student(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """See `Engine`."""
        return NetworkOutput(*self._engine(crops, patches))

    @torch.no_grad()
    def forward_teacher(
        self, crops: Sequence[Tensor], patches: Mapping[str, Tensor] | None = None
    ) -> NetworkOutput:
        """See `Engine`."""
        if self._teacher_engine is not None:
            return NetworkOutput(*self._teacher_engine(crops, patches))
        device_type = crops[0].device.type
        enabled = self._autocast_dtype is not None
        with torch.autocast(device_type, dtype=self._autocast_dtype, enabled=enabled):
            return NetworkOutput(*self.teacher(crops, patches))

    def backward(self, loss: Tensor, *, is_last_micro_step: bool) -> None:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(is_last_micro_step)
        self._engine.backward(loss, scale_wrt_gas=False)

    def gradients_are_finite(self) -> Tensor:
        """See `Engine`. DeepSpeed itself looks for non-finite gradients only under fp16, and waits for the answer."""
        if self.stage == 0:
            # Gradients are already averaged over ranks, a bad value of one rank is in everybody's sum.
            self._norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.student.parameters() if p.grad is not None]
            )
            return self._norm.isfinite()
        # Every rank has other pieces. Where it has none, the norm is on the CPU; its square may pass fp32's range.
        square = torch.nn.utils.get_total_norm(self._pieces()).to(self._device, torch.float64).square()
        dist.all_reduce(square)
        self._norm = square.sqrt().float()
        return self._norm.isfinite()

    def step(self, schedule: StepSchedule) -> Tensor:
        """See `Engine`."""
        set_schedule_(self._optimizer.param_groups, schedule)
        if self._clips_itself and self._max_norm > 0:
            pieces = self._pieces()
            if pieces:
                torch._foreach_mul_(pieces, (self._max_norm / (self._norm + 1e-6)).clamp(max=1.0))
        self._engine.step()
        if self.stage == 0 or self._clips_itself:
            return self._norm
        norm = self._engine.get_global_grad_norm()
        return torch.zeros(()) if norm is None else torch.as_tensor(norm)

    def _pieces(self) -> list[Tensor]:
        """Returns this rank's averaged gradients, which ZeRO 1 to 3 has cut."""
        pieces = itertools.chain.from_iterable(self._optimizer.averaged_gradients.values())
        return [piece for piece in pieces if piece is not None]

    def skip(self) -> None:
        """See `Engine`. Leaves the engine as its own fp16 overflow path would, without touching a parameter."""
        self._engine.zero_grad()
        if self.stage == 3:
            self._optimizer._partition_all_parameters()
            self._optimizer.zero_grad(set_to_none=True)
            self._optimizer.averaged_gradients = {}
            self._refresh_persistent()
        elif self.stage > 0:
            self._optimizer.zero_grad(set_to_none=True)
            self._optimizer._release_preflattened_grad_buffers()
            for index in self._optimizer.averaged_gradients:
                self._optimizer.averaged_gradients[index] = None
                self._optimizer.all_grad_tensors[index] = None
            self._optimizer.micro_step_id = -1

    def update_teacher(self, ema_momentum: float) -> None:
        """See `Engine`. Parameters only: each network's BatchNorm keeps its own buffers."""
        teacher: Iterable[Tensor] = self._averages
        student: Iterable[Tensor] = self._averaged
        if self._teacher_engine is not None:
            # A teacher that is still gathered from its forward pass would hide what its pieces become.
            self._teacher_engine.optimizer.partition_all_parameters()
            teacher, student = map(value_piece, self._averages), map(value_piece, self._averaged)
        update_ema_(teacher, student, ema_momentum)

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`. Under stage 3 no parameter has a replica."""
        if self.stage < 3:
            yield from _named_by_role(self.student, self.teacher)

    def iterate_state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        named = list(_named_by_role(self.student, self.teacher))
        if self.stage == 3:
            yield from gather_pieces(named, value_piece, _all_gather)
        else:
            yield from ((name, parameter.detach().cpu()) for name, parameter in named)
        for name, buffer in self._named_buffers():
            # BatchNorm without synchronisation differs over ranks: rank 0's is the one that counts.
            shared = buffer.detach().clone()
            dist.broadcast(shared, src=0)
            yield name, shared.cpu()
        parameters = list(self.student.named_parameters())
        for moment in self._moments:
            targets = [(f"optimizer/{name}/{moment}", parameter) for name, parameter in parameters]
            if self.stage == 3:
                yield from gather_pieces(targets, partial(self._moment_piece, moment=moment), _all_gather)
            else:
                yield from ((name, self._full_moment(p, moment).cpu()) for name, p in targets)
        yield "optimizer/step", self._step_counter().cpu()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        check_names(self._state_shapes(), state)
        with torch.no_grad():
            for name, parameter in _named_by_role(self.student, self.teacher):
                self._set_parameter(parameter, state[name])
            for name, buffer in self._named_buffers():
                buffer.copy_(state[name])
            for name, parameter in self.student.named_parameters():
                for moment in self._moments:
                    self._set_full_moment(parameter, moment, state[f"optimizer/{name}/{moment}"])
        for moments in self._inner_optimizer().state.values():
            if "step" in moments:
                moments["step"].copy_(state["optimizer/step"])
        self._refresh_persistent()

    @torch.no_grad()
    def write_parameter(self, name: str, whole: Tensor) -> None:
        """See `Engine`."""
        for module in (self.student, self.teacher):
            self._set_parameter(dict(module.named_parameters())[name], whole)
        self._refresh_persistent()

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        shape_of = whole_shape if self.stage == 3 else lambda p: tuple(p.shape)
        shapes = {name: shape_of(p) for name, p in _named_by_role(self.student, self.teacher)}
        shapes |= {name: tuple(buffer.shape) for name, buffer in self._named_buffers()}
        for name, parameter in self.student.named_parameters():
            shapes |= {f"optimizer/{name}/{moment}": shape_of(parameter) for moment in self._moments}
        return shapes | {"optimizer/step": ()}

    def _named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Persistent buffers (BatchNorm's) of both networks; ZeRO never cuts them."""
        for role, module in (("student", self.student), ("teacher", self.teacher)):
            parameters = dict(module.named_parameters())
            buffers = dict(module.named_buffers())
            kept = [name for name in module.state_dict(keep_vars=True) if name not in parameters]
            yield from ((f"{role}/{name}", buffers[name]) for name in kept)

    def _set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        if self.stage == 3:
            write_piece_(value_piece(parameter), whole, self._rank)
            if parameter.requires_grad:
                write_piece_(self._optimizer.get_local_fp32_param(parameter), whole, self._rank)
            return
        parameter.copy_(whole)
        if self.stage > 0 and parameter.requires_grad:
            safe_set_full_fp32_param(parameter, whole.to(parameter.device))

    def _refresh_persistent(self) -> None:
        """Gathers again the small parameters that stage 3 keeps whole between steps. Collective."""
        persistent = self._optimizer.persistent_parameters if self.stage == 3 else []
        if persistent:
            self._optimizer._partition_all_parameters()
            persistent[0].all_gather(persistent)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer if self.stage > 0 else self._optimizer

    def _create_moments(self) -> None:
        """Makes the moments exist from step 0 on, so that a state has the same names at every step."""
        optimizer = self._inner_optimizer()
        self._moments = MOMENTS[type(optimizer).__name__]
        tensors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.stage == 3:  # its groups hold these flat pieces only while it steps
            tensors = list(self._optimizer.fp32_partitioned_groups_flat)
        for tensor in tensors:
            moments: dict[str, Any] = {name: torch.zeros_like(tensor) for name in self._moments}
            if isinstance(optimizer, torch.optim.AdamW):
                moments["step"] = torch.zeros((), device=tensor.device)  # where the fused update counts
            optimizer.state[tensor] = moments
        if self.stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _step_counter(self) -> Tensor:
        for moments in self._inner_optimizer().state.values():
            if "step" in moments:
                return moments["step"].detach().clone().float()
        return torch.tensor(0.0)

    def _moment_piece(self, parameter: nn.Parameter, moment: str) -> Tensor:
        return self._optimizer.get_local_fp32_param(parameter, moment)

    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.stage > 0:
            return safe_get_full_optimizer_state(parameter, moment).detach()
        return self._optimizer.state[parameter][moment].detach()

    def _set_full_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        if self.stage == 3:
            write_piece_(self._moment_piece(parameter, moment), value, self._rank)
        elif self.stage > 0:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        else:
            self._optimizer.state[parameter][moment].copy_(value)


def _initialize(
    student: TrainedNetwork, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], path: str
) -> tuple[Any, Any]:
    """Returns DeepSpeed's engine and optimizer; a line for what it refuses of the file at `path`."""
    try:
        engine, wrapped, _, _ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=dict(settings), dist_init_required=False
        )
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        raise ValueError(f"{path} is refused by DeepSpeed ({found}); mend the file") from error
    return engine, wrapped


def _cut_teacher(teacher: TrainedNetwork, settings: Mapping[str, Any]) -> Any:
    """Returns an engine without optimizer that keeps the teacher cut as stage 3 cuts the student."""
    zero = dict(settings["zero_optimization"])
    # Nothing of the teacher stays whole between steps: its pieces move, and whole copies would be stale.
    zero |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
    mechanics = {key: settings[key] for key in (*sizes, "torch_autocast") if key in settings}
    engine, _, _, _ = deepspeed.initialize(
        model=teacher, config=mechanics | {"zero_optimization": zero}, dist_init_required=False
    )
    engine.train()
    return engine


def _gather_persistent_exactly(student: nn.Module) -> None:
    """Keeps parameters that stage 3 does not cut in fp32 on the wire.

    Under autocast DeepSpeed gathers them in bf16 in a process's first forward pass and in fp32 after every step:
    the first step after a restart would see other biases than the uninterrupted run.
    """
    for parameter in student.parameters():
        if getattr(parameter, "ds_persist", False) and hasattr(parameter, "comm_dtype"):
            del parameter.comm_dtype


def _named_by_role(student: nn.Module, teacher: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for role, module in (("student", student), ("teacher", teacher)):
        yield from ((f"{role}/{name}", parameter) for name, parameter in module.named_parameters())


def _all_gather(flat: Tensor, numel: int) -> Tensor:
    whole = flat.new_empty(dist.get_world_size() * numel)
    dist.all_gather_into_tensor(whole, flat)
    return whole


def _autocast_dtype(mechanics: Mapping[str, Any]) -> torch.dtype | None:
    return torch.bfloat16 if mechanics.get("torch_autocast", {}).get("enabled", False) else None
