"""Encoders that timm builds: released ones, folders in its layout, our own exports, and fresh weights of those."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from data.views.config import PixelType
from evaluation.encoders.backbones import TimmFeatures
from evaluation.encoders.encoder import Encoder, LoadOptions, freeze
from evaluation.encoders.exported import (
    EncoderError,
    ExportedFolder,
    find_exported_folder,
    name_folder,
    one_line,
    read_json,
    require_folder,
    require_whole,
)
from evaluation.encoders.preprocessing import Preprocessing, from_timm_config
from evaluation.tensor_files import checksum
from models.config import WeightsSpec


def load_released(spec: WeightsSpec, options: LoadOptions) -> Encoder:
    """Returns timm's released encoder of this name."""
    return _load(spec.text, spec.name, spec.name, options)


def load_local_dir(spec: WeightsSpec, options: LoadOptions) -> Encoder:
    """Returns the encoder in a folder that `timm.models.save_for_hf` or an export of ours wrote."""
    require_folder(spec.path, spec.text)
    require_whole(spec.path)
    return _load(spec.text, f"local-dir:{spec.name}", spec.path.name, options, ExportedFolder(spec.path))


def load_exported(spec: WeightsSpec, options: LoadOptions) -> Encoder:
    """Returns the exported encoder of a run directory, of a checkpoint or of a folder.

    Raises:
        EncoderError: there is none, or not of this role.
    """
    folder = find_exported_folder(spec.name, options.role)
    if not (folder.path / "config.json").is_file():
        raise EncoderError(
            f"encoder is {spec.text!r}; expected an exported folder with config.json; set encoder to a run "
            "directory, a checkpoint, a folder, timm:NAME, hf:NAME or local-dir:PATH"
        )
    label = folder.run_dir.name if folder.run_dir else name_folder(folder.path)
    return _load(spec.text, f"local-dir:{folder.path}", label, options, folder, options.role)


def load_random_init(spec: WeightsSpec, options: LoadOptions) -> Encoder:
    """Returns the architecture of one of our exports with fresh weights."""
    return build_random_init(spec.text, find_exported_folder(spec.name, options.role), spec.seed, options)


def build_random_init(text: str, folder: ExportedFolder, seed: int, options: LoadOptions) -> Encoder:
    """Returns the architecture of an exported folder with the weights that `seed` draws; `text` is its name."""
    config = read_json(folder.path / "config.json")
    declared = resolve_data_config(pretrained_cfg=config["pretrained_cfg"], args={})
    transform = from_timm_config(declared, options.transform, config.get("pixels", "uint8"))
    arguments = config.get("model_args", {})
    return _build_fresh(text, config["architecture"], arguments, transform, seed, options, folder)


def build_untrained(encoder: Encoder, name: str, seed: int, options: LoadOptions) -> Encoder:
    """Returns the architecture of the released `encoder` with the weights that `seed` draws; `name` is timm's."""
    text = f"random-init:{encoder.spec}:{seed}"
    assert isinstance(encoder.transform, Preprocessing)
    return _build_fresh(text, name, {}, encoder.transform, seed, options)


def _build_fresh(
    text: str,
    name: str,
    arguments: dict[str, Any],
    transform: Preprocessing,
    seed: int,
    options: LoadOptions,
    folder: ExportedFolder | None = None,
) -> Encoder:
    """Returns fresh weights of an architecture, which is ours where it is that of an exported folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    return freeze(
        Encoder(
            spec=text,
            label=f"random-init-seed{seed}",
            role="control",
            module=TimmFeatures(model, options.num_blocks, is_ours=folder is not None),
            transform=transform,
            weights_sha256=checksum(model.state_dict()),
            run_dir=folder.run_dir if folder else None,
        )
    )


def _load(
    text: str,
    name: str,
    label: str,
    options: LoadOptions,
    folder: ExportedFolder | None = None,
    role: str = "released",
) -> Encoder:
    model = _load_timm_model(text, name)
    declared = resolve_data_config(model=model, args={})
    # Of our exports; timm has no name for it.
    written = read_json(folder.path / "config.json") if folder else {}
    pixels: PixelType = written.get("pixels", "uint8")
    size = options.transform.image_size
    if size is not None:
        _check_size(model, size, text)
    return freeze(
        Encoder(
            spec=text,
            label=label,
            role=role,
            module=TimmFeatures(model, options.num_blocks, is_ours=role != "released"),
            transform=from_timm_config(declared, options.transform, pixels),
            weights_sha256=checksum(model.state_dict()),
            folder=folder.path if folder else None,
            run_dir=folder.run_dir if folder else None,
            step=folder.step if folder else None,
        )
    )


def _load_timm_model(spec: str, name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:
        raise EncoderError(
            f"encoder is {spec!r}, which timm cannot load ({type(error).__name__}: {one_line(error)}); "
            "expected a released model or a folder that timm's save_for_hf wrote; set encoder"
        ) from error


def _check_size(model: nn.Module, size: int | tuple[int, int], spec: str) -> None:
    patch_embed = getattr(model, "patch_embed", None)
    fixed = getattr(patch_embed, "img_size", None)
    strict = getattr(patch_embed, "strict_img_size", False) and not getattr(model, "dynamic_img_size", False)
    if strict and fixed is not None and tuple(fixed) != ((size, size) if isinstance(size, int) else size):
        only = fixed[0] if fixed[0] == fixed[1] else list(fixed)
        raise EncoderError(
            f"transform.image_size is {size}; expected {only}, the only size that {spec} accepts; "
            "set transform.image_size"
        )
