"""Somebody's weights as the start of a backbone of ours, adapted where both networks differ in a known way.

The donor is built by timm as it was released; its tensors are then fitted to the receiver: position embeddings,
prefix tokens, final norm and LayerScale here, because both networks are known; patch kernels and whatever else an
architecture has (Swin's and BEiT's position tables) by timm's own filter of that architecture; colours by timm's
`adapt_input_conv`. A tensor whose shape fits in no known way is refused by name.
"""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.config import INIT_KINDS, parse_weights_spec

_PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
_LAYER_SCALE = re.compile(r"(?P<block>.+\.)(ls[12]\.gamma|gamma_[12])")
_POSITION_STD = 0.02
_REGISTER_STD = 1e-6  # both as timm starts them


@dataclass(frozen=True)
class LoadedWeights:
    """What became of the donor's tensors.

    Attributes:
        loaded: names of the receiver's tensors that were written.
        missing: of the receiver, which the donor lacks; they keep their initialisation.
        unexpected: of the donor, for which the receiver has no place.
        adapted: what was changed on the way, one sentence each.
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)


def initialise_from(backbone: nn.Module, source: str) -> LoadedWeights:
    """Copies released weights into the backbone in place and returns what was loaded, missing and changed.

    On a meta backbone everything is done and checked but the copy. Registers that the donor lacks are drawn from
    torch's generator. Not collective.

    Args:
        backbone: a timm backbone without classifier.
        source: `timm:NAME`, `hf:NAME` (a timm model on the hub, fetched by timm), or the path of a folder in timm's
            layout (`config.json` with `architecture`, and `model.safetensors` or `pytorch_model.bin`).

    Raises:
        ValueError: the source cannot be read, or its weights do not fit the backbone; one line.
    """
    try:
        donor = _build_donor(source)
    except Exception as error:
        raise ValueError(
            f"model.init is {source!r}, which cannot be loaded ({type(error).__name__}: {_one_line(error)}); "
            "expected timm:NAME, hf:NAME, a run, or a folder in timm's layout; set model.init"
        ) from error
    adapted: list[str] = []
    try:
        state = _adapt(donor, backbone, adapted)
    except Exception as error:
        raise ValueError(
            f"model.init is {source!r}, whose weights do not fit the network: {_one_line(error)}"
        ) from error
    own = backbone.state_dict()
    loaded = sorted(set(state) & set(own))
    if not loaded:
        raise ValueError(
            f"model.init is {source!r}, which shares no tensor with the network; expected weights of the same "
            "architecture; set model.init or model.name"
        )
    with torch.no_grad():
        for key in loaded:
            own[key].copy_(state[key])
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    return LoadedWeights(loaded, missing, unexpected, adapted)


def _build_donor(source: str) -> nn.Module:
    spec = parse_weights_spec(source, "model.init", INIT_KINDS)
    if spec.kind in ("folder", "local-dir") and not spec.path.is_dir():
        raise FileNotFoundError(f"there is no folder {spec.path}")
    name = {"timm": spec.name, "hf": f"hf-hub:{spec.name}"}.get(spec.kind, f"local-dir:{spec.path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return timm.create_model(name, pretrained=True, num_classes=0)


def _adapt(donor: nn.Module, backbone: nn.Module, adapted: list[str]) -> dict[str, Tensor]:
    """Returns the donor's tensors as the backbone needs them.

    Raises:
        ValueError: a tensor does not fit; the message names it and what to set.
    """
    state, own = dict(donor.state_dict()), dict(backbone.state_dict())
    _move_final_norm(state, own, adapted)
    _fit_layer_scale(state, own, adapted)
    if isinstance(donor, VisionTransformer | Eva) and isinstance(backbone, VisionTransformer | Eva):
        _fit_prefix_and_positions(state, donor, backbone, adapted)
    state = _filter_as_timm_does(state, backbone, own, adapted)
    _fit_channels(state, donor, backbone, own, adapted)
    for key in sorted(set(state) & set(own)):
        if state[key].shape != own[key].shape:
            raise ValueError(
                f"{key} has shape {tuple(state[key].shape)}; expected {tuple(own[key].shape)}; set model.init, or "
                "model.name and the sizes under model to those of the weights"
            )
    return state


def _move_final_norm(state: dict[str, Tensor], own: dict[str, Tensor], adapted: list[str]) -> None:
    """Lets one final norm serve as the other: a ViT normalises its tokens (`norm`) or their average (`fc_norm`)."""
    for source, target in (("norm", "fc_norm"), ("fc_norm", "norm")):
        has_only_source = f"{source}.weight" in state and f"{target}.weight" not in state
        wants_only_target = f"{target}.weight" in own and f"{source}.weight" not in own
        if has_only_source and wants_only_target:
            for part in ("weight", "bias"):
                if f"{source}.{part}" in state:
                    state[f"{target}.{part}"] = state.pop(f"{source}.{part}")
            adapted.append(f"{source} serves as {target}, because the pooling differs")
            return


def _fit_layer_scale(state: dict[str, Tensor], own: dict[str, Tensor], adapted: list[str]) -> None:
    """Sets LayerScale to 1 in blocks of a donor without it, which leaves what they compute as it was.

    Raises:
        ValueError: the donor has LayerScale and the backbone does not.
    """
    lost = [key for key in state if _LAYER_SCALE.fullmatch(key) and key not in own]
    if any(_has_block(own, key) for key in lost):
        raise ValueError(
            f"{lost[0]} has no place: the weights have LayerScale and the network has not; expected a network with "
            "LayerScale; set model.init_values=1.0e-05"
        )
    new = [key for key in own if _LAYER_SCALE.fullmatch(key) and key not in state and _has_block(state, key)]
    for key in new:
        state[key] = torch.ones(own[key].shape)
    if new:
        adapted.append("LayerScale starts at 1, because the weights have none")


def _has_block(tensors: dict[str, Tensor], layer_scale: str) -> bool:
    match = _LAYER_SCALE.fullmatch(layer_scale)
    return match is not None and any(key.startswith(match["block"]) for key in tensors)


def _fit_prefix_and_positions(
    state: dict[str, Tensor], donor: Any, backbone: Any, adapted: list[str]
) -> None:
    """Fits class and register tokens and the position embeddings of both, in place.

    Where only one of the two networks adds position embeddings to its prefix tokens (`no_embed_class`), the sum of
    token and position stays what it was: the position goes into the token, or is 0.

    Raises:
        ValueError: the donor has more registers than the backbone.
    """
    held, wanted = _count_prefix_tokens(donor), _count_prefix_tokens(backbone)
    if held["reg_token"] > wanted["reg_token"]:
        raise ValueError(
            f"they have {held['reg_token']} register tokens and the network {wanted['reg_token']}; expected at "
            f"least as many; set model.num_registers={held['reg_token']}"
        )
    rows = _split_positions(state, donor, held)
    embeds_prefix = backbone.pos_embed is not None and not getattr(backbone, "no_embed_class", False)
    prefix: list[Tensor] = []
    width = donor.embed_dim
    for name in _PREFIX_TOKENS:
        num_new = wanted[name] - held[name]
        if num_new < 0:
            state.pop(name)
            adapted.append(f"{name} is left out, because the network has none")
            continue
        known = rows.get(name, torch.zeros(1, held[name], width))
        if not embeds_prefix and name in rows:
            state[name] = state[name] + known
        if num_new and held[name]:  # only registers come in numbers
            state[name] = torch.cat([state[name], _REGISTER_STD * torch.randn(1, num_new, width)], dim=1)
        if num_new:
            adapted.append(f"{name}: {num_new} of {wanted[name]} start from nothing")
        new = nn.init.trunc_normal_(torch.empty(1, num_new, width), std=_POSITION_STD)
        prefix.append(torch.cat([known, new], dim=1))
    if "pos_embed" not in state or backbone.pos_embed is None:
        return
    grid = state["pos_embed"][:, sum(held.values()) if rows else 0 :]
    sizes = tuple(tuple(network.patch_embed.grid_size) for network in (donor, backbone))
    if sizes[0] != sizes[1]:
        grid = resample_abs_pos_embed(grid, new_size=sizes[1], old_size=sizes[0], num_prefix_tokens=0)
        adapted.append(f"position embeddings are resampled from {sizes[0]} to {sizes[1]} patches")
    state["pos_embed"] = torch.cat([*prefix, grid], dim=1) if embeds_prefix else grid


def _split_positions(state: dict[str, Tensor], donor: Any, held: dict[str, int]) -> dict[str, Tensor]:
    """Returns the donor's position embeddings [1, tokens, D] of each kind of prefix token; none where it has none."""
    if "pos_embed" not in state or getattr(donor, "no_embed_class", False):
        return {}
    rows = state["pos_embed"][:, : sum(held.values())].split(list(held.values()), dim=1)
    return {name: part for name, part in zip(held, rows, strict=True) if held[name]}


def _count_prefix_tokens(network: nn.Module) -> dict[str, int]:
    tokens = {name: getattr(network, name, None) for name in _PREFIX_TOKENS}
    return {name: 0 if token is None else int(token.shape[1]) for name, token in tokens.items()}


def _filter_as_timm_does(
    state: dict[str, Tensor], backbone: nn.Module, own: dict[str, Tensor], adapted: list[str]
) -> dict[str, Tensor]:
    """Returns the state after timm's filter for this architecture, which resamples kernels and position tables."""
    shapes = {key: tensor.shape for key, tensor in state.items() if _differs_in_size(tensor, own.get(key))}
    # timm's convention: the module of an architecture holds the filter that its released weights go through.
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if not shapes or convert is None:
        return state
    filtered = dict(convert(dict(state), backbone))
    changed = [key for key, shape in shapes.items() if key in filtered and filtered[key].shape != shape]
    if changed:
        names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        adapted.append(f"resampled by timm: {names}")
    return filtered


def _differs_in_size(tensor: Tensor, own: Tensor | None) -> bool:
    """Whether shapes differ, the input channels of a kernel left aside."""
    if own is None or tensor.shape == own.shape:
        return False
    is_kernel = tensor.ndim == own.ndim == 4
    return not is_kernel or tensor.shape[:1] + tensor.shape[2:] != own.shape[:1] + own.shape[2:]


def _fit_channels(
    state: dict[str, Tensor], donor: Any, backbone: Any, own: dict[str, Tensor], adapted: list[str]
) -> None:
    """Sums the first kernel over channels for grey images, else repeats it, scaled, as timm does; in place."""
    names = backbone.pretrained_cfg.get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        key = f"{name}.weight"
        if key not in state or key not in own or state[key].shape[1:2] == own[key].shape[1:2]:
            continue
        # Stems that fold pixels into channels have a multiple of the image's channels.
        held, wanted = state[key].shape[1], own[key].shape[1]
        channels = held if held in (1, 3) else int(donor.pretrained_cfg["input_size"][0])
        state[key] = adapt_input_conv(wanted * channels // held, state[key], base_chans=channels)
        adapted.append(f"{key} is adapted from {held} to {wanted} channels")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
