"""Features to projections, for checkpoints that carry their projection heads: prototypes live behind one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from evaluation.encoders.exported import read_json
from evaluation.tensor_files import read_exported
from models.config import HeadConfig
from models.heads import UNIT_LENGTH, ProjectionHead
from runtime.config import read_yaml

if TYPE_CHECKING:
    from jaxtyping import Float

HEAD_FILE = "projection_head.safetensors"
PROTOTYPES_FILE = "prototypes.safetensors"
PATCH_HEAD_FILE = "patch_head.safetensors"
PATCH_PROTOTYPES_FILE = "patch_prototypes.safetensors"
_BLOCK = 8192


@dataclass(frozen=True)
class Space:
    """Where the rows of one level are compared with prototypes.

    Attributes:
        level: `instance` (rows of images, by their embedding) or `patch` (of patch tokens).
        head: file of the head in front.
        prototypes: file of the prototypes: the level's own, or what both share.
    """

    level: Literal["instance", "patch"]
    head: str
    prototypes: str


def find_spaces(folder: Path, run_dir: Path | None) -> dict[str, Space]:
    """Returns the spaces of an exported folder by level: of the terms that its run was trained with.

    The folder says which (`levels` of its `config.json`); where an older one does not, the run's configuration does,
    and without that there is a space of images, and one of patches where they have prototypes of their own.
    """
    has_own = (folder / PATCH_PROTOTYPES_FILE).is_file()
    described = folder / "config.json"
    levels = read_json(described).get("levels") if described.is_file() else None
    if levels is None:
        instance, patch = "carp", "ibot" if has_own else "none"
        if run_dir is not None and (run_dir / "config.yaml").is_file():
            objective = read_yaml(str(run_dir / "config.yaml")).get("objective", {})
            instance = objective.get("instance", {}).get("name", "carp")
            patch = objective.get("patch", {}).get("name", "none")
        levels = [level for level, name in (("instance", instance), ("patch", patch)) if name != "none"]
    spaces = {}
    if "instance" in levels:
        spaces["instance"] = Space("instance", HEAD_FILE, PROTOTYPES_FILE)
    if "patch" in levels:
        head = PATCH_HEAD_FILE if (folder / PATCH_HEAD_FILE).is_file() else HEAD_FILE
        spaces["patch"] = Space("patch", head, PATCH_PROTOTYPES_FILE if has_own else PROTOTYPES_FILE)
    return spaces


def load_projection_head(folder: Path, name: str = HEAD_FILE) -> ProjectionHead | None:
    """Returns a head saved beside an exported encoder, in eval mode; None where there is none.

    Its sizes are read from its tensors.

    Raises:
        ValueError: the file cannot be read, or its tensors are no projection head of this project.
    """
    path = folder / name
    if not path.is_file():
        return None
    state = read_exported(path)
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
def project(folder: Path, features: Float[Tensor, "B D"], space: Space) -> Float[Tensor, "B P"] | None:
    """Returns the projections of embeddings or patch tokens under a space's head; None where `folder` has none.

    Where the prototypes were estimated from recentred projections, these are recentred the same way:
    (projection - input_shift) * input_scale, both beside the prototypes.
    """
    head = load_projection_head(folder, space.head)
    if head is None:
        return None
    projections = torch.cat([head(block) for block in features.split(_BLOCK)])
    path = folder / space.prototypes
    saved = read_exported(path) if path.is_file() else {}
    if "input_shift" in saved:
        projections = projections - saved["input_shift"]
    if "input_scale" in saved:
        projections = projections * saved["input_scale"]
    return projections
