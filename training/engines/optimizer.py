"""The optimizer and its parameter groups; schedules are written into the groups by hand at every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import timm.optim
import torch
from torch import nn

from training.config import OptimConfig
from training.engines.interface import TrainedNetwork
from training.schedules import StepSchedule

# The tensors that an optimizer keeps per parameter, by `optim.optimizer` and by its class name.
MOMENTS_OF = {"adamw": ("exp_avg", "exp_avg_sq"), "lars": ("momentum_buffer",)}
MOMENTS = {"AdamW": MOMENTS_OF["adamw"], "Lars": MOMENTS_OF["lars"]}


def build_optimizer(student: TrainedNetwork, config: OptimConfig) -> torch.optim.Optimizer:
    """Returns AdamW or LARS over the student's parameter groups; rates are set per step by `set_schedule_`."""
    groups = build_parameter_groups(student, config)
    if config.optimizer == "lars":
        # You et al. 2017: a rate for each layer. timm gives one to what decays; prototypes have theirs too.
        for group in groups:
            group["always_adapt"] = group["decays"] or group["can_freeze"]
        return timm.optim.Lars(
            groups, lr=0.0, momentum=config.momentum, weight_decay=0.0, trust_coeff=config.trust_coefficient
        )
    # Fused: one kernel for all of a group's tensors, in which the step counter is read on the device as well.
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, weight_decay=0.0, fused=True)


def build_parameter_groups(student: TrainedNetwork, config: OptimConfig) -> list[dict[str, Any]]:
    """Returns parameter groups with `lr_scale`, `decays` (whether the weight decay applies) and `can_freeze`.

    The backbone's groups are timm's, made on the timm model itself (layer decay needs its group matcher): biases,
    norms, tokens and position embeddings do not decay. Of the heads and what else the network has beside the backbone
    matrices decay, vectors do not. Prototypes that the encoder's loss trains do not decay: only their direction counts.

    Raises:
        ValueError: the backbone has no patch embedding whose rate could be scaled.
    """
    backbone = student.network.backbone
    skip: set[str] = getattr(backbone, "no_weight_decay", set)()
    decay = 1.0  # a marker: the scheduled value replaces it
    if config.layer_decay != 1.0:
        groups = timm.optim.param_groups_layer_decay(
            backbone,
            weight_decay=decay,
            no_weight_decay_list=skip,
            layer_decay=config.layer_decay,
            weight_decay_exclude_1d=True,
        )
    else:
        groups = timm.optim.param_groups_weight_decay(backbone, weight_decay=decay, no_weight_decay_list=skip)
    groups = [part for group in groups for part in _slow_patch_embedding(group, backbone, config)]
    # Heads, mask token, predictor.
    rest = [p for name, p in student.network.named_parameters() if not name.startswith("backbone.")]
    groups.append({"params": [p for p in rest if p.ndim > 1], "weight_decay": decay})
    groups.append({"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0})
    for learned in (student.learned_prototypes, student.learned_patch_prototypes):
        if learned is not None:
            prototypes, scale = list(learned.parameters()), config.prototype_lr_scale
            groups.append({"params": prototypes, "weight_decay": 0.0, "lr_scale": scale, "can_freeze": True})
    return [
        {
            "params": [p for p in group["params"] if p.requires_grad],
            "decays": bool(group["weight_decay"]),
            "lr_scale": float(group.get("lr_scale", 1.0)),
            "can_freeze": bool(group.get("can_freeze", False)),
        }
        for group in groups
        if any(p.requires_grad for p in group["params"])
    ]


def _slow_patch_embedding(
    group: dict[str, Any], backbone: nn.Module, config: OptimConfig
) -> list[dict[str, Any]]:
    """Returns a group of the backbone's in two: the patch embedding's parameters with their own rate, and the others.

    DINOv2 (Oquab et al. 2023) moves them at .2 of the rate, as MoCo v3 (Chen et al. 2021) found training stabler the
    less they move.
    """
    scale = config.patch_embed_lr_scale
    if scale == 1.0:
        return [dict(group)]
    embedding = getattr(backbone, "patch_embed", None)
    if embedding is None:
        raise ValueError(
            f"optim.patch_embed_lr_scale is {scale:g}; expected 1 with {type(backbone).__name__}, which has no patch "
            "embedding; set optim.patch_embed_lr_scale"
        )
    own = {id(parameter) for parameter in embedding.parameters()}
    return [
        group
        | {
            "params": [p for p in group["params"] if id(p) in own],
            "lr_scale": group.get("lr_scale", 1.0) * scale,
        },
        group | {"params": [p for p in group["params"] if id(p) not in own]},
    ]


def set_schedule_(groups: Iterable[dict[str, Any]], schedule: StepSchedule) -> None:
    """Writes the step's learning rate and weight decay into the groups in place."""
    for group in groups:
        stays = group["can_freeze"] and not schedule.prototypes_move
        group["lr"] = 0.0 if stays else schedule.lr * group["lr_scale"]
        group["weight_decay"] = schedule.weight_decay if group["decays"] else 0.0


def count_parameters(module: nn.Module) -> int:
    """Returns the number of parameters, trained or not."""
    return sum(p.numel() for p in module.parameters())
