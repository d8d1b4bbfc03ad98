"""An exported encoder: what timm and transformers load, with its heads, its prototypes and a model card."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import Tensor, nn

from data.views.config import PixelType
from models import vit
from models.config import ModelConfig
from models.heads import UNIT_LENGTH
from prototypes.config import Level
from runtime.files import write_atomically
from training.checkpoints.files import CheckpointError
from training.checkpoints.state_files import (
    as_os_error,
    load_tensors,
    save_tensors,
)

logger = logging.getLogger(__name__)

PROTOTYPES_NAME = "prototypes.safetensors"
CARD_NAME = "README.md"
_CARD_PHRASE = "pretrained with prototypical self-supervision"
HEADS = ("projection_head", "patch_head")
# What may lie beside the encoder, by the names of their files: for whoever asks which prototype an image, or a patch,
# is nearest to.
BESIDE = (*HEADS, "patch_prototypes")
# What an export writes, and all that a later export to the same folder replaces.
EXPORTED_NAMES = frozenset(
    {
        "config.json",
        "model.safetensors",
        PROTOTYPES_NAME,
        CARD_NAME,
        *(f"{name}.safetensors" for name in BESIDE),
    }
)


def export_encoder(
    backbone: nn.Module,
    out_dir: Path,
    *,
    model: ModelConfig,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str = "bicubic",
    pixels: PixelType = "uint8",
    prototypes: Mapping[str, Tensor],
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
    levels: Mapping[Level, str] | None = None,
    provenance: Mapping[str, Any],
    license_name: str = "apache-2.0",
) -> None:
    """Writes a backbone, its heads and prototypes and a model card into `out_dir`. Not collective: call on one rank.

    Args:
        backbone: a timm model with `num_classes=0` and whole (unsharded) parameters; saved in fp32.
        out_dir: the folder; made if missing, files in it are replaced.
        model: the options that built the backbone; written so that the same network is rebuilt.
        mean: of pixels divided by their type's largest, one number for all channels or one per channel.
        std: standard deviation, likewise.
        interpolation: of the resize to `model.image_size`.
        pixels: type of the images' numbers.
        prototypes: name to tensor, e.g. `means` [K, P], `variances` [K, P], `mixing_weights` [K].
        beside: further files of tensors, by name: some of `BESIDE`; heads as `mark_head` gives them.
        levels: which prototypes images (`instance`) and patches (`patch`) are compared with; kept in `config.json`.
        provenance: JSON-able facts for the model card: run, step, data, method, configuration hash.
        license_name: of the weights, as the model hub writes it.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: a parameter is not finite, or lives on the meta device.
    """
    state = {name: _whole(name, tensor) for name, tensor in backbone.state_dict().items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    data_config = {
        "input_size": (model.channels, *model.height_and_width),
        "mean": per_channel(mean, model.channels),
        "std": per_channel(std, model.channels),
        "interpolation": interpolation,
        "crop_pct": 1.0,
    }
    with as_os_error(out_dir.name):
        # save_for_hf takes the tensors from the model; a stand-in keeps a live model on its device.
        save_for_hf(
            _StandIn(backbone, state),  # type: ignore[arg-type]
            str(out_dir),
            model_args=vit.backbone_arguments(model),
            safe_serialization=True,
            data_config=data_config,
        )
    _mend_config(out_dir / "config.json", pixels, levels)
    files = {"prototypes": prototypes, **(beside or {})}
    for name, tensors in files.items():
        save_tensors(out_dir / f"{name}.safetensors", dict(tensors))
    about = (backbone, vit.measure_embed_dim(model), data_config, pixels, files, provenance, license_name)
    write_atomically(out_dir / CARD_NAME, _model_card(*about))


def is_export(directory: Path) -> bool:
    """Whether a folder holds an export and nothing else, by its card: other programs write `config.json` as well."""
    card = directory / CARD_NAME
    others = {path.name for path in directory.iterdir()} - EXPORTED_NAMES
    return not others and card.is_file() and _CARD_PHRASE in card.read_text(errors="replace")


def load_exported(directory: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """Returns (backbone in eval mode, prototypes by name) of an exported folder.

    Raises:
        CheckpointError: a file is missing or damaged, or weights and configuration do not belong together.
    """
    for name in ("config.json", "model.safetensors", PROTOTYPES_NAME):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}; expected a folder that training.export wrote")
    try:
        backbone = timm.create_model(f"local-dir:{directory}", pretrained=True)
    except (RuntimeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    return backbone.eval(), load_tensors(directory / PROTOTYPES_NAME)


def assemble_backbone(config: ModelConfig, state: Mapping[str, Tensor], which: str) -> nn.Module:
    """Returns the backbone of one role from a checkpoint's full tensors, to export it; strictly.

    Args:
        config: the run's model options.
        state: full tensors by name, as `Engine.iterate_state` names them.
        which: `teacher` or `student`.

    Raises:
        CheckpointError: the state lacks tensors of this backbone, or has others.
    """
    prefix = f"{which}/network.backbone."
    return build_shell(
        config, {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    )


def assemble_heads(
    config: ModelConfig, state: Mapping[str, Tensor], which: str
) -> dict[str, dict[str, Tensor]]:
    """Returns the heads of one role by name, as `export_encoder` takes them, from a checkpoint's full tensors."""
    found = {}
    for head in HEADS:
        prefix = f"{which}/network.{head}."
        tensors = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
        if tensors:
            found[head] = mark_head(config, head, tensors)
    return found


def mark_head(config: ModelConfig, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a head's tensors and, where its rows have unit length, the mark that says so."""
    options = config.head if name == "projection_head" else config.patch_head
    is_unit = options is not None and options.normalize_bottleneck
    return {**tensors, **({UNIT_LENGTH: torch.ones(())} if is_unit else {})}


def build_shell(config: ModelConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """Returns a backbone that holds the given tensors themselves: to export, not to run. Draws no random number.

    Raises:
        CheckpointError: the state lacks tensors of this backbone, or has others.
    """
    with torch.device("meta"):
        backbone = vit.build_backbone(config, drop_path_rate=0.0)
    try:
        backbone.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint holds another backbone than {config.name}: {error}") from error
    return backbone


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Returns one number per channel from one number or one per channel."""
    return tuple(values) * channels if len(values) == 1 else tuple(values)


class _StandIn:
    """A timm model with other tensors: attributes of the model, `state_dict` from the side."""

    def __init__(self, backbone: nn.Module, state: dict[str, Tensor]) -> None:
        self._backbone = backbone
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def state_dict(self) -> dict[str, Tensor]:
        return self._state


def _whole(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(f"{name} lives on the meta device; expected whole parameters; gather them first")
    whole = tensor.detach().to(
        "cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True
    )
    if not bool(torch.isfinite(whole).all()):
        raise ValueError(
            f"{name} holds NaN or infinity; expected finite weights; export an earlier checkpoint"
        )
    return whole.contiguous()


def _mend_config(path: Path, pixels: PixelType, levels: Mapping[Level, str] | None) -> None:
    """Removes what breaks or misleads readers of timm's config.json, and adds what it has no name for.

    transformers passes `num_classes=0` itself and fails on a second one in `model_args`; the tag names the
    released weights of the same architecture, which these are not.
    """
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    for key in ("tag", "license", "origin_url", "paper_ids", "paper_name"):
        config["pretrained_cfg"].pop(key, None)
    if pixels != "uint8":
        config["pixels"] = pixels
    if levels is not None:
        config["levels"] = dict(levels)
    write_atomically(path, json.dumps(config, indent=2))


def _model_card(
    backbone: nn.Module,
    embed_dim: int,
    data_config: Mapping[str, Any],
    pixels: PixelType,
    files: Mapping[str, Mapping[str, Tensor]],
    provenance: Mapping[str, Any],
    license_name: str,
) -> str:
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    facts = [f"| {key} | {value} |" for key, value in provenance.items()]
    channels, height, width = data_config["input_size"]
    unit = {
        "uint8": "pixels in [0, 1]",
        "uint16": "pixels divided by 65535",
        "float32": "numbers as they are",
    }
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-feature-extraction",
        f"license: {license_name}",
        "tags:",
        "- timm",
        "- transformers",
        "- self-supervised-learning",
        "---",
        "",
        f"# {backbone.pretrained_cfg['architecture']}, {_CARD_PHRASE}",  # type: ignore[index]
        "",
        f"{parameters:,} parameters, embedding of {embed_dim} numbers, no classifier. "
        f"Input: {channels} x {height} x {width}, {unit[pixels]}, normalised with mean {list(data_config['mean'])} "
        f"and standard deviation {list(data_config['std'])}.",
        "",
        "```python",
        "import timm",
        'encoder = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()',
        "",
        "from transformers import AutoModel",
        'encoder = AutoModel.from_pretrained("THIS_FOLDER")  # pooler_output is the same embedding',
        "```",
        "",
        "## Provenance",
        "",
        "| fact | value |",
        "|---|---|",
        *facts,
        "",
        "## Prototypes and the heads before them",
        "",
        "| file | tensor | shape |",
        "|---|---|---|",
        *_describe_tensors(files),
        "",
    ]
    return "\n".join(lines)


def _describe_tensors(files: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Returns the lines of a table: file, tensor and shape."""
    return [
        f"| `{file}.safetensors` | `{name}` | {' x '.join(map(str, tensor.shape)) or 'a mark'} |"
        for file, tensors in files.items()
        for name, tensor in tensors.items()
    ]
