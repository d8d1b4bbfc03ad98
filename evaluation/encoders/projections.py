"""Embeddings to projections, for checkpoints that carry their projection head: prototypes live behind it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.config import HeadConfig
from models.heads import UNIT_LENGTH, ProjectionHead

if TYPE_CHECKING:
    from jaxtyping import Float

HEAD_FILE = "projection_head.safetensors"
PROTOTYPES_FILE = "prototypes.safetensors"
_BLOCK = 8192


def load_projection_head(folder: Path) -> ProjectionHead | None:
    """Returns the head saved beside an exported encoder, in eval mode; None where there is none.

    Its sizes are read from its tensors.

    Raises:
        ValueError: the tensors are no projection head of this project.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return None
    state = load_file(path)
    is_unit = state.pop(UNIT_LENGTH, None) is not None
    linear = [name for name, tensor in state.items() if name.endswith(".weight") and tensor.ndim == 2]
    if not linear or not all(name.startswith("mlp.") for name in linear):
        raise ValueError(
            f"{path} holds {', '.join(sorted(state)[:4])}; expected mlp.* tensors; export it again"
        )
    linear.sort(key=lambda name: int(name.split(".")[1]))
    head = ProjectionHead(
        state[linear[0]].shape[1],
        HeadConfig(
            num_layers=len(linear),
            hidden_dim=state[linear[0]].shape[0],
            projection_dim=state[linear[-1]].shape[0],
            use_bn=any(name.endswith("running_mean") for name in state),
            normalize_bottleneck=is_unit,
        ),
    )
    head.load_state_dict(state)
    return head.eval()


@torch.no_grad()
def project(folder: Path, embedding: Float[Tensor, "B D"]) -> Float[Tensor, "B P"] | None:
    """Returns the projections of embeddings under the head in `folder`; None where there is none.

    Where the prototypes were estimated from recentred projections, these are recentred the same way:
    (projection - input_shift) * input_scale, both beside the prototypes.
    """
    head = load_projection_head(folder)
    if head is None:
        return None
    projections = torch.cat([head(block) for block in embedding.split(_BLOCK)])
    path = folder / PROTOTYPES_FILE
    saved = load_file(path) if path.is_file() else {}
    if "input_shift" in saved:
        projections = projections - saved["input_shift"]
    if "input_scale" in saved:
        projections = projections * saved["input_scale"]
    return projections
