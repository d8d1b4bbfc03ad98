"""Prototypes in other projects' state dicts: where each family keeps them, and how its projections are made.

Read from the official code, repository@commit file:line:

- DINO: `{student,teacher}.head.last_layer`, weight-norm; facebookresearch/dino@7c446df vision_transformer.py:276,
  main_dino.py:279-280.
- CARP: the same names; sthalles/carp@c9b068b modules/carp_head.py:26, main_carp.py:255-256.
- iBOT: the same, and `last_layer2` for patches (a teacher may share one layer for both); bytedance/ibot@da316d8
  models/head.py:97 and :163, main_ibot.py:349-350.
- DINOv2: `{student,teacher}.{dino,ibot}_head.last_layer`, weight-norm; facebookresearch/dinov2@b8931f7
  dinov2/layers/dino_head.py:27, dinov2/train/ssl_meta_arch.py:82 and :108, dinov2/train/train.py:131.
- DINOv3: the same without weight-norm; facebookresearch/dinov3@6876159 dinov3/layers/dino_head.py:32,
  dinov3/train/ssl_meta_arch.py:80 and :124, dinov3/train/train.py:264.
- CAPI: `teacher.head.layer` (clustering) and `{student,student_ema}.head.last_layer` (its predictor), under `model.`
  or without the role; facebookresearch/capi@98b4fa1 model.py:544 and :475, train_capi.py:148-150, :346 and :384.
- SwAV: `prototypes`, or `prototypes.prototypes{i}` of several heads; facebookresearch/swav@06b1b7c
  src/resnet50.py:217 and :331, main_swav.py:241.
- MSN: the tensor `prototypes` beside `encoder` and `target_encoder`; facebookresearch/msn@4388dc1
  src/msn_train.py:221 and :285-288. PMSN: no code of its authors was found; its paper changes MSN's prior only.

`evaluate.py encoder=PATH probes=[prototypes]` audits all that are found, `PATH#TENSOR` one of any name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, gelu, layer_norm, linear, normalize, relu

from evaluation.encoders.weights_files import (
    WeightsFileError,
    read_weights_file,
    refuse_part,
    require_real_matrix,
)
from models.config import WeightsKind, parse_weights_spec

if TYPE_CHECKING:
    from jaxtyping import Float

_KINDS: tuple[WeightsKind, ...] = ("file",)
_BLOCK = 8192
_LISTED = 6


@dataclass(frozen=True)
class Layout:
    """Where one family keeps its prototypes.

    Attributes:
        pattern: of the tensor's whole name; groups `role` and `head` go into the matrix's name.
        weight_norm: whether the weight must be (True) or must not be (False) split into `weight_g` and `weight_v`;
            None takes both.
        mlp: end of the tensor's name, and what replaces it in the names of the MLP in front; None where the
            prototypes do not stand behind one embedding per image (patch heads).
        activation: between the MLP's linear layers.
        unit: whether the method L2-normalises the prototypes before its logits.
    """

    pattern: str
    weight_norm: bool | None = None
    mlp: tuple[str, str] | None = None
    activation: Literal["gelu", "relu"] = "gelu"
    unit: bool = False


_DINO = r"(?P<role>student|teacher)\.head\.(?P<head>%s)\.weight"
_DINOV2 = r"(?:model\.)?(?:(?P<role>student|teacher|model_ema)\.)?(?P<head>%s)\.last_layer\.weight"
_CAPI = r"(?:model\.)?(?:(?P<role>%s)\.)?head\.(?P<head>%s)\.weight"
_SWAV = r"(?:state_dict\.)?prototypes(?:\.(?P<head>prototypes\d+))?\.weight"
_MLP = (r"last_layer\.weight", "mlp.")
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    # With norm_last_layer=False the lengths (weight_g) are learned and count in the logits: not `unit`.
    "DINO or CARP": (Layout(_DINO % "last_layer", True, _MLP),),
    "iBOT": (Layout(_DINO % "last_layer", True, _MLP), Layout(_DINO % "last_layer2", True)),
    "DINOv2": (Layout(_DINOV2 % "dino_head", True, _MLP), Layout(_DINOV2 % "ibot_head", True)),
    "DINOv3": (Layout(_DINOV2 % "dino_head", False, _MLP), Layout(_DINOV2 % "ibot_head", False)),
    "CAPI": (
        Layout(_CAPI % ("teacher", "layer"), False),
        Layout(_CAPI % ("student_ema|student", "last_layer")),
    ),
    "SwAV": (Layout(_SWAV, False, (r"prototypes(\.prototypes\d+)?\.weight", "projection_head."), "relu"),),
    "MSN or PMSN": (Layout("prototypes", False, ("prototypes", "target_encoder.fc."), unit=True),),
}


@dataclass(frozen=True)
class PrototypeMatrix:
    """Prototypes found in a weights file.

    Attributes:
        name: such as `teacher` or `student ibot_head`.
        family: of the layout, or `named tensor`.
        tensor: the effective weights, fp32 [K, P].
        mlp: tensors of the head in front, by their names below it; empty where there is none.
        activation: of that head.
        unit: see `Layout`.
    """

    name: str
    family: str
    tensor: Float[Tensor, "K P"]
    mlp: Mapping[str, Tensor]
    activation: str = "gelu"
    unit: bool = False


def read_prototypes(spec: str) -> list[PrototypeMatrix]:
    """Returns the prototype matrices in a weights file, or the one that `PATH#NAME` names.

    Raises:
        WeightsFileError: nothing in the file looks like prototypes of a known family, no such matrix, or the file is
            one rank's part and no matrix is named.
    """
    named = parse_weights_spec(spec, "prototypes.weights", _KINDS)
    path, name = named.path, named.tensor
    if name is None:
        refuse_part(path)
    tensors = _compose_weight_norm(read_weights_file(path))
    if name is not None:
        return [_named(path, name, {key: value for key, (value, _) in tensors.items()})]
    matrices = find_prototypes(tensors)
    if not matrices:
        raise WeightsFileError(
            f"{path} holds no prototypes of a known layout ({', '.join(LAYOUTS)}); found {_largest(tensors)}; "
            "set encoder or prototypes.weights to PATH#TENSOR"
        )
    return matrices


def find_prototypes(tensors: Mapping[str, tuple[Tensor, bool]]) -> list[PrototypeMatrix]:
    """Returns the matrices of the first family all of whose parts fit; empty where none does.

    Args:
        tensors: effective tensor by name, and whether it was composed of `weight_g` and `weight_v`.
    """
    has_patch_layer = any(name.endswith("head.last_layer2.weight") for name in tensors)
    is_msn = any(name.startswith("target_encoder.") for name in tensors)
    for family, layouts in LAYOUTS.items():
        if (family == "DINO or CARP" and has_patch_layer) or (family == "MSN or PMSN" and not is_msn):
            continue
        found = [
            _matrix(family, layout, match, tensors)
            for layout in layouts
            for name, (tensor, composed) in tensors.items()
            if tensor.ndim == 2
            and layout.weight_norm in (None, composed)
            and (match := re.fullmatch(layout.pattern, name))
        ]
        if found:
            return _without_copies(found) if family == "iBOT" else found
    return []


def _matrix(
    family: str, layout: Layout, match: re.Match[str], tensors: Mapping[str, tuple[Tensor, bool]]
) -> PrototypeMatrix:
    groups = {key: value for key, value in match.groupdict().items() if value}
    role, head = groups.get("role"), groups.get("head", "")
    # `last_layer` and `layer` are the only head of their role: the role says enough.
    name = " ".join(part for part in (role, "" if role and head in ("last_layer", "layer") else head) if part)
    mlp: dict[str, Tensor] = {}
    if layout.mlp is not None:
        end, replacement = layout.mlp
        prefix = re.sub(f"(?:{end})$", replacement, match.string)
        mlp = {key.removeprefix(prefix): t for key, (t, _) in tensors.items() if key.startswith(prefix)}
    tensor = require_real_matrix(tensors[match.string][0], match.string)
    return PrototypeMatrix(name or "prototypes", family, tensor, mlp, layout.activation, layout.unit)


def _without_copies(found: list[PrototypeMatrix]) -> list[PrototypeMatrix]:
    """Leaves out what is the same matrix under a second name: iBOT's teacher shares its two last layers."""
    kept: list[PrototypeMatrix] = []
    for matrix in found:
        if not any(
            other.tensor.shape == matrix.tensor.shape and torch.equal(other.tensor, matrix.tensor)
            for other in kept
            if other.name.split()[0] == matrix.name.split()[0]
        ):
            kept.append(matrix)
    return kept


def _compose_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, bool]]:
    """Returns every tensor, and for each pair of `weight_g`, `weight_v` the weight g * v / |v| that they make."""
    composed: dict[str, tuple[Tensor, bool]] = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_v") and name.removesuffix("v") + "g" in tensors:
            gain = tensors[name.removesuffix("v") + "g"].float()
            composed[name.removesuffix("_v")] = (gain * normalize(tensor.float(), dim=1), True)
        elif not (name.endswith("weight_g") and name.removesuffix("g") + "v" in tensors):
            composed[name] = (tensor, False)
    return composed


def _named(path: Path, name: str, tensors: Mapping[str, Tensor]) -> PrototypeMatrix:
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim != 2:
        shape = "absent" if tensor is None else f"of shape {list(tensor.shape)}"
        raise WeightsFileError(
            f"tensor {name!r} of {path} is {shape}; expected a matrix [K, P]; found "
            f"{_largest({key: (value, False) for key, value in tensors.items()})}; set PATH#TENSOR"
        )
    return PrototypeMatrix(name, "named tensor", require_real_matrix(tensor, name), {})


def _largest(tensors: Mapping[str, tuple[Tensor, bool]]) -> str:
    matrices = [(name, tensor) for name, (tensor, _) in tensors.items() if tensor.ndim == 2]
    matrices.sort(key=lambda item: item[1].shape[0], reverse=True)
    listed = [f"{name} {list(tensor.shape)}" for name, tensor in matrices[:_LISTED]]
    return ", ".join(listed) if listed else "no matrix"


@torch.no_grad()
def project_by_state(matrix: PrototypeMatrix, embedding: Float[Tensor, "B D"]) -> Float[Tensor, "B P"]:
    """Returns the projections of embeddings under the MLP in front of a prototype matrix, in eval mode.

    Linear layers with a norm and an activation between them, in the order of the numbers in their names. The L2
    normalisation that most methods put behind it is left out: it scales all logits of an image alike.

    Raises:
        WeightsFileError: the head takes another number of features.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in matrix.mlp.items():
        below, _, leaf = name.rpartition(".")
        layers.setdefault(below, {})[leaf] = tensor.float()
    ordered = [layers[name] for name in sorted(layers, key=_position)]
    linears = [index for index, layer in enumerate(ordered) if layer["weight"].ndim == 2]
    expected = ordered[linears[0]]["weight"].shape[1]
    if embedding.shape[1] != expected:
        raise WeightsFileError(
            f"the features have {embedding.shape[1]} dimensions; expected {expected}, what the head in the weights "
            "file takes; set encoder to the backbone of that file, or prototypes.use_images=false"
        )
    activate = gelu if matrix.activation == "gelu" else relu
    blocks = []
    for block in embedding.float().split(_BLOCK):
        hidden = block
        for index, layer in enumerate(ordered):
            if layer["weight"].ndim == 2:
                hidden = linear(hidden, layer["weight"], layer.get("bias"))
            elif "running_mean" in layer:
                hidden = batch_norm(
                    hidden, layer["running_mean"], layer["running_var"], layer["weight"], layer["bias"]
                )
            else:
                hidden = layer_norm(hidden, hidden.shape[1:], layer["weight"], layer["bias"])
            ends_block = index + 1 == len(ordered) or index + 1 in linears
            if ends_block and index < linears[-1]:
                hidden = activate(hidden)
        blocks.append(hidden)
    return torch.cat(blocks)


def _position(name: str) -> tuple[int, bool]:
    """Returns where a layer stands: by the number in its name, a norm (`bn1`) behind its linear layer (`fc1`)."""
    number = re.search(r"\d+", name)
    return (int(number.group()) if number else 0, name.startswith(("bn", "norm", "ln")))
