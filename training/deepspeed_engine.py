"""The student under DeepSpeed ZeRO 0, 1 or 2; the teacher a plain fp32 replica beside it.

The only module that imports deepspeed. DeepSpeed's own checkpoints are not used: they are pickles, bound to a
world size, and its `latest` file can name an unfinished one. States leave and enter as full tensors by name
(`Engine.iterate_state`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from models.student_teacher import update_ema_
from training.config import BatchConfig, OptimConfig
from training.engine import Engine, NetworkOutput, TrainedNetwork, check_names
from training.optimizer import MOMENTS, build_optimizer, set_schedule_
from training.schedules import StepSchedule

logger = logging.getLogger(__name__)

# What a JSON file under ds_configs/ may set: mechanics. Everything that changes the result is in our YAML.
ALLOWED_KEYS = frozenset(
    {"zero_optimization", "torch_autocast", "comms_logger", "flops_profiler", "wall_clock_breakdown"}
)


class DeepSpeedEngine(Engine):
    """See `Engine`. ZeRO stages 0 to 2 keep whole parameters on every rank, so the teacher is a plain replica.

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
        self.stage = int(mechanics.get("zero_optimization", {}).get("stage", 0))
        if optim.optimizer == "lars" and self.stage > 0:
            raise ValueError(
                f"optim.optimizer is lars under ZeRO-{self.stage}; expected ZeRO-0, because LARS needs the norm of "
                "whole tensors and ZeRO cuts them; set engine.deepspeed_config=ds_configs/zero0_fp32.json"
            )
        # DeepSpeed would compile a shared-memory all-reduce on first use on CPUs; a build that was killed leaves a
        # lock on which every later run hangs. gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        optimizer = build_optimizer(student, optim)
        settings = mechanics | {
            "train_micro_batch_size_per_gpu": batch.micro_batch_size_per_gpu(world_size),
            "gradient_accumulation_steps": batch.gradient_accumulation_steps,
            "gradient_clipping": optim.clip_grad_norm or 0.0,
            "steps_per_print": None,
            "zero_allow_untested_optimizer": True,
        }
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._engine.train()
        self.student = student
        self.teacher = teacher.to(next(student.parameters()).device).train()
        self._autocast_dtype = _autocast_dtype(mechanics)
        self._names = [name for name, _ in student.named_parameters()]
        self._create_moments()

    def forward_student(self, crops: Sequence[Tensor]) -> NetworkOutput:
        """See `Engine`."""
        return NetworkOutput(*self._engine(crops))

    @torch.no_grad()
    def forward_teacher(self, crops: Sequence[Tensor]) -> NetworkOutput:
        """See `Engine`."""
        device_type = crops[0].device.type
        enabled = self._autocast_dtype is not None
        with torch.autocast(device_type, dtype=self._autocast_dtype, enabled=enabled):
            return NetworkOutput(*self.teacher(crops))

    def backward(self, loss: Tensor, *, is_last_micro_step: bool) -> None:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(is_last_micro_step)
        self._engine.backward(loss)

    def gradients_are_finite(self) -> bool:
        """See `Engine`. DeepSpeed itself looks for non-finite gradients only under fp16."""
        if self.stage > 0:
            return not self._optimizer.has_overflow()
        # Stage 0: gradients are already averaged over ranks, a bad value of one rank is in everybody's sum.
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)).item())

    def step(self, schedule: StepSchedule) -> float:
        """See `Engine`."""
        set_schedule_(self._optimizer.param_groups, schedule)
        if self.stage == 0:
            gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self._engine.step()
            return norm
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def skip(self) -> None:
        """See `Engine`. Leaves the engine as its own fp16 overflow path would, without touching a parameter."""
        self._engine.zero_grad()
        if self.stage > 0:
            self._optimizer.zero_grad(set_to_none=True)
            self._optimizer._release_preflattened_grad_buffers()
            for index in self._optimizer.averaged_gradients:
                self._optimizer.averaged_gradients[index] = None
                self._optimizer.all_grad_tensors[index] = None
            self._optimizer.micro_step_id = -1

    def update_teacher(self, ema_momentum: float) -> None:
        """See `Engine`. Parameters only: each network's BatchNorm keeps its own buffers."""
        update_ema_(self.teacher.parameters(), self.student.parameters(), ema_momentum)

    def iterate_state(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        for role, module in (("student", self.student), ("teacher", self.teacher)):
            for name, tensor in module.state_dict().items():
                yield f"{role}/{name}", tensor.detach().cpu()
        for name, parameter in self.student.named_parameters():
            for moment in self._moments:
                yield f"optimizer/{name}/{moment}", self._full_moment(parameter, moment).cpu()
        yield "optimizer/step", self._step_counter().cpu()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        check_names({name: tuple(tensor.shape) for name, tensor in self.iterate_state()}, state)
        for role, module in (("student", self.student), ("teacher", self.teacher)):
            prefix = f"{role}/"
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            module.load_state_dict(own, strict=True)
        for name, parameter in self.student.named_parameters():
            if self.stage > 0:
                safe_set_full_fp32_param(parameter, state[f"student/{name}"].to(parameter.device))
            for moment in self._moments:
                self._set_full_moment(parameter, moment, state[f"optimizer/{name}/{moment}"])
        for moments in self._inner_optimizer().state.values():
            if "step" in moments:
                moments["step"].copy_(state["optimizer/step"])

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer.optimizer if self.stage > 0 else self._optimizer

    def _create_moments(self) -> None:
        """Makes the moments exist from step 0 on, so that a state has the same names at every step."""
        optimizer = self._inner_optimizer()
        self._moments = MOMENTS[type(optimizer).__name__]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                moments: dict[str, Any] = {name: torch.zeros_like(parameter) for name in self._moments}
                if isinstance(optimizer, torch.optim.AdamW):
                    moments["step"] = torch.tensor(0.0)
                optimizer.state[parameter] = moments
        if self.stage > 0:
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _step_counter(self) -> Tensor:
        for moments in self._inner_optimizer().state.values():
            if "step" in moments:
                return moments["step"].detach().clone().float()
        return torch.tensor(0.0)

    def _full_moment(self, parameter: nn.Parameter, moment: str) -> Tensor:
        if self.stage > 0:
            return safe_get_full_optimizer_state(parameter, moment).detach()
        return self._optimizer.state[parameter][moment].detach()

    def _set_full_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        if self.stage > 0:
            safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        else:
            self._optimizer.state[parameter][moment].copy_(value)


def read_mechanics(path: str) -> dict[str, Any]:
    """Returns the DeepSpeed mechanics in a JSON file.

    Raises:
        ValueError: no such file, no JSON, or a key that belongs into the YAML.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"engine.deepspeed_config is {path!r}; expected a JSON file; set engine.deepspeed_config"
        )
    try:
        mechanics = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"engine.deepspeed_config {path} is no JSON ({error}); mend the file") from error
    for key in sorted(set(mechanics) - ALLOWED_KEYS):
        raise ValueError(
            f"{path} sets {key}; expected only {', '.join(sorted(ALLOWED_KEYS))}: batch sizes, clipping, optimizer "
            "and schedule come from the YAML; remove the key"
        )
    return mechanics


def _autocast_dtype(mechanics: Mapping[str, Any]) -> torch.dtype | None:
    autocast = mechanics.get("torch_autocast", {})
    if not autocast.get("enabled", False):
        return None
    return getattr(torch, str(autocast.get("dtype", "bfloat16")).removeprefix("torch."))
