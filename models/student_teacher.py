"""Student and teacher: one network built alike twice, and the average that ties them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models import vit
from models.config import ModelConfig, OutputsConfig
from models.heads import ProjectionHead

if TYPE_CHECKING:
    from jaxtyping import Float


class SelfSupervisedNetwork(nn.Module):
    """Backbone and projection head; crops of several sizes in, projections out.

    Args:
        config: what to build.
        role: `student` (with drop path) or `teacher` (without; no parameter requires a gradient).
        outputs: what `forward` returns beside projections.
    """

    def __init__(self, config: ModelConfig, role: str, outputs: OutputsConfig | None = None) -> None:
        super().__init__()
        self.outputs = outputs or OutputsConfig()
        self.backbone = vit.build_backbone(config, drop_path_rate=None if role == "student" else 0.0)
        self.projection_head = ProjectionHead(vit.measure_embed_dim(config, config.image_size), config.head)
        if role == "teacher":
            self.requires_grad_(False)

    def forward(
        self, crops: Sequence[Float[Tensor, "_ C _ _"]]
    ) -> tuple[Float[Tensor, "N P"], Float[Tensor, "M D"] | None]:
        """Returns the projections of all crops, in order, and the embeddings of the first group or None; fp32.

        Args:
            crops: one tensor per resolution, each [images of that size, channels, height, width]. One backbone
                pass per resolution, the head once on all embeddings (its BatchNorm, if any, sees them together).
        """
        embeddings = [self.backbone(group) for group in crops]
        projections = self.projection_head(torch.cat(embeddings)).float()
        return projections, embeddings[0].float() if self.outputs.embeddings else None


@torch.no_grad()
def update_ema_(teacher: Iterable[Tensor], student: Iterable[Tensor], ema_momentum: float) -> None:
    """Moves `teacher <- m * teacher + (1 - m) * student` in place, in fp32.

    A bf16 teacher would stall: 1 - m is around or below bf16's relative step of 2^-8. Tensors may be shards, as
    long as both sides are cut alike: nothing is gathered. Not collective.

    Args:
        teacher: fp32 tensors, changed in place.
        student: tensors of the same shapes, in the same order.
        ema_momentum: m, 0 <= m <= 1.

    Raises:
        ValueError: a teacher tensor is not fp32, or the two sides differ in number.
    """
    teacher_tensors, student_tensors = list(teacher), list(student)
    if len(teacher_tensors) != len(student_tensors):
        raise ValueError(f"teacher has {len(teacher_tensors)} tensors and student {len(student_tensors)}")
    if any(tensor.dtype != torch.float32 for tensor in teacher_tensors):
        raise ValueError("the teacher's tensors are not all fp32; an average in lower precision stalls")
    if teacher_tensors:
        sources = [tensor.detach().to(torch.float32) for tensor in student_tensors]
        torch._foreach_lerp_(teacher_tensors, sources, 1.0 - ema_momentum)
