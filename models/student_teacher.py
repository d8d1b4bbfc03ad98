"""Student and teacher: one network built alike twice, and the average that ties them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models import vit
from models.config import ModelConfig, OutputsConfig
from models.heads import ProjectionHead
from models.patches import give_patches
from models.predictor import Predictor

if TYPE_CHECKING:
    from jaxtyping import Float


class SelfSupervisedNetwork(nn.Module):
    """Backbone and projection heads; crops of several sizes in, projections of crops and of patches out.

    Args:
        config: what to build.
        role: `student` (with drop path) or `teacher` (without; no parameter requires a gradient). What stands for
            patches that are not seen, the mask token or the predictor, the student has alone.
        outputs: what `forward` returns.
    """

    def __init__(self, config: ModelConfig, role: str, outputs: OutputsConfig | None = None) -> None:
        super().__init__()
        self.outputs = outputs or OutputsConfig()
        self.backbone = vit.build_backbone(config, drop_path_rate=None if role == "student" else 0.0)
        embed_dim = vit.measure_embed_dim(config)
        self.projection_head = ProjectionHead(embed_dim, config.head)
        self.patch_head: ProjectionHead | None = None
        self.predictor: Predictor | None = None
        if self.outputs.patches != "none":
            give_patches(self.backbone)
            if config.patch_head is not None:
                self.patch_head = ProjectionHead(embed_dim, config.patch_head)
            if role == "student" and self.outputs.patches == "hidden":
                self.mask_token = nn.Parameter(torch.zeros(embed_dim))
            elif role == "student":
                self.predictor = Predictor(
                    embed_dim,
                    num_layers=config.predictor.depth,
                    num_heads=config.predictor.num_heads,
                    drop_path_rate=config.predictor.drop_path_rate,
                    activation_checkpointing=config.activation_checkpointing,
                )
        if role == "teacher":
            self.requires_grad_(False)

    def forward(
        self, crops: Sequence[Float[Tensor, "_ C _ _"]], patches: Mapping[str, Tensor] | None = None
    ) -> tuple[Float[Tensor, "N P"] | None, Float[Tensor, "M D"] | None, Float[Tensor, "R P"] | None]:
        """Returns projections of all crops in order, embeddings of the first group, and projections of patches; fp32.

        What `outputs` does not ask for is None.

        Args:
            crops: one tensor per resolution, each [images of that size, channels, height, width]. One backbone
                pass per resolution, a head once on all that it projects (its BatchNorm, if any, sees it together).
            patches: of the first group of N crops with n patches each: `rows` int64 [R], flat numbers of the patches
                to project; of the student also `hidden` bool [N, n], or `visible` int64 [N, L] and `predicted`
                int64 [N, M], whose projections come in that order in place of `rows`.
        """
        first, tokens = self._see(crops[0], patches)
        embeddings = torch.cat([first, *(self.backbone(group) for group in crops[1:])])
        given = [embeddings] if self.outputs.projections else []
        if tokens is not None and self.patch_head is None:
            given.append(tokens)
        projected = self.projection_head(torch.cat(given) if given[1:] else given[0]).float()
        of_patches = None
        if tokens is not None and self.patch_head is None:
            projected, of_patches = projected.tensor_split([len(projected) - len(tokens)])
        elif tokens is not None and self.patch_head is not None:
            of_patches = self.patch_head(tokens).float()
        return (
            projected if self.outputs.projections else None,
            first.float() if self.outputs.embeddings else None,
            of_patches,
        )

    def _see(
        self, crops: Float[Tensor, "N C H W"], patches: Mapping[str, Tensor] | None
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "R D"] | None]:
        """Returns the crops' embeddings, and the tokens of the patches that are projected."""
        if self.outputs.patches == "none" or patches is None:
            return self.backbone(crops), None
        if "visible" in patches:
            assert self.predictor is not None
            embedding, seen = self.backbone(crops, tokens=True, visible=patches["visible"])
            grid: Any = self.backbone.patch_embed.grid_size  # type: ignore[union-attr]
            predicted = self.predictor(seen, patches["visible"], patches["predicted"], grid)
            return embedding, predicted.flatten(0, 1)
        hiding = {"hidden": patches["hidden"], "mask_token": self.mask_token} if "hidden" in patches else {}
        embedding, seen = self.backbone(crops, tokens=True, **hiding)
        return embedding, seen.flatten(0, 1).index_select(0, patches["rows"])


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
