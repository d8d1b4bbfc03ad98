"""Any frozen encoder behind one interface: our runs, timm's, transformers', and the controls.

A name (`SPEC`) becomes an `Encoder`: a module from images to named features, the preprocessing that this very
encoder declares, and enough about both to key a cache and to stand in a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import nn

from evaluation.config import TransformConfig
from evaluation.encoders.backbones import FeatureModule, NoFeatures, PixelFeatures, TimmFeatures
from evaluation.encoders.exported import (
    EncoderError,
    ExportedFolder,
    Role,
    find_exported_folder,
    one_line,
    read_json,
    require_folder,
)
from evaluation.encoders.hf_models import TransformersFeatures, hub_transform, load_hub_model
from evaluation.encoders.preprocessing import (
    NoPreprocessing,
    Preprocessing,
    ProcessorTransform,
    from_timm_config,
)
from evaluation.encoders.weights_files import is_weights_file, split_name
from evaluation.tensor_files import checksum
from runtime.files import sha256_of

Transform = Preprocessing | ProcessorTransform | NoPreprocessing
# Height, width and channels of the pictures of noise on which an encoder is tried.
_TRIAL_SIZE = (80, 96, 3)


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and what a reader of its results must know.

    Attributes:
        spec: the name under which it was asked for.
        label: short name for tables and directories.
        role: teacher or student, for our checkpoints; `released` for others; `control`.
        module: images to named features, in eval mode, without gradients.
        transform: its own preprocessing.
        weights_sha256: over every tensor's name, type, shape and bytes.
        folder: the exported folder with `prototypes.safetensors`, where it is one of ours.
        weights_file: `PATH` or `PATH#TENSOR` where it is a weights file, of which prototypes alone can be audited.
        run_dir: the run that it belongs to.
        step: optimizer updates behind it, where known.
    """

    spec: str
    label: str
    role: str
    module: FeatureModule
    transform: Transform
    weights_sha256: str
    folder: Path | None = None
    weights_file: str | None = None
    run_dir: Path | None = None
    step: int | None = None

    def describe(self) -> dict[str, Any]:
        """Returns what every result says about its encoder."""
        return {
            "spec": self.spec,
            "label": self.label,
            "role": self.role,
            "step": self.step,
            "weights_sha256": self.weights_sha256,
            "num_parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "transform": self.transform.describe(),
        }


def load_encoder(
    spec: str, *, role: Role = "teacher", transform: TransformConfig | None = None, num_blocks: int = 1
) -> Encoder:
    """Returns the encoder that `spec` names, frozen and in eval mode, on the CPU in fp32.

    Args:
        spec: a run directory (its newest complete checkpoint), a checkpoint, an exported folder, `timm:NAME`,
            `hf:NAME_OR_PATH`, `local-dir:PATH` (timm's layout), `random-init:RUN[:SEED]`, `raw-pixels`, or a weights
            file `PATH[#TENSOR]`, which has prototypes and no features.
        role: teacher or student; only checkpoints of ours can hold both.
        transform: overrides of the encoder's own preprocessing.
        num_blocks: last blocks whose CLS token becomes the feature `blocks`.

    Raises:
        EncoderError: nothing loadable has this name, or its preprocessing is unknown.
    """
    overrides = transform or TransformConfig()
    if spec == "raw-pixels":
        return _raw_pixels(overrides)
    if spec.startswith("random-init:"):
        return _random_init_by_name(spec, role, overrides, num_blocks)
    if spec.startswith("timm:"):
        name = spec.removeprefix("timm:")
        return _from_timm(spec, name, name, ExportedFolder(Path()), "released", overrides, num_blocks)
    if spec.startswith("local-dir:"):
        path = Path(spec.removeprefix("local-dir:"))
        require_folder(path, spec)
        return _from_timm(spec, spec, path.name, ExportedFolder(path), "released", overrides, num_blocks)
    if spec.startswith("hf:"):
        return _from_hub(spec, overrides, num_blocks)
    if is_weights_file(spec):
        return _from_weights_file(spec)
    folder = find_exported_folder(spec, role)
    if not (folder.path / "config.json").is_file():
        raise EncoderError(
            f"encoder is {spec!r}; expected an exported folder with config.json; set encoder to a run directory, "
            "a checkpoint, a folder, timm:NAME, hf:NAME or local-dir:PATH"
        )
    label = folder.run_dir.name if folder.run_dir else folder.path.name
    return _from_timm(spec, f"local-dir:{folder.path}", label, folder, role, overrides, num_blocks)


def _from_weights_file(spec: str) -> Encoder:
    path, name = split_name(spec)
    if not path.is_file():
        raise EncoderError(
            f"encoder is {spec!r}; expected an existing weights file; set encoder to PATH or PATH#TENSOR"
        )
    return Encoder(
        spec=spec,
        label="-".join(part for part in (path.name.split(".")[0], name) if part),
        role="released",
        module=NoFeatures(),
        transform=NoPreprocessing(),
        weights_sha256=sha256_of(path),
        weights_file=spec,
    )


def _from_timm(
    spec: str,
    name: str,
    label: str,
    folder: ExportedFolder,
    role: str,
    overrides: TransformConfig,
    num_blocks: int,
) -> Encoder:
    model = _load_timm_model(spec, name)
    declared = resolve_data_config(model=model, args={})
    size = overrides.image_size
    if size is not None:
        _check_size(model, size, spec)
    ours = folder.path != Path()
    return _freeze(
        Encoder(
            spec=spec,
            label=label,
            role=role,
            module=TimmFeatures(model, num_blocks),
            transform=from_timm_config(declared, overrides),
            weights_sha256=checksum(model.state_dict()),
            folder=folder.path if ours else None,
            run_dir=folder.run_dir,
            step=folder.step,
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


def _check_size(model: nn.Module, size: int, spec: str) -> None:
    patch_embed = getattr(model, "patch_embed", None)
    fixed = getattr(patch_embed, "img_size", None)
    strict = getattr(patch_embed, "strict_img_size", False) and not getattr(model, "dynamic_img_size", False)
    if strict and fixed is not None and tuple(fixed) != (size, size):
        raise EncoderError(
            f"transform.image_size is {size}; expected {fixed[0]}, the only size that {spec} accepts; "
            "set transform.image_size"
        )


def _from_hub(spec: str, overrides: TransformConfig, num_blocks: int) -> Encoder:
    name = spec.removeprefix("hf:")
    local = Path(name)
    config_path = local / "config.json"
    if local.is_dir() and config_path.is_file() and "pretrained_cfg" in read_json(config_path):
        return load_encoder(f"local-dir:{name}", transform=overrides, num_blocks=num_blocks)
    model = load_hub_model(spec, name)
    return _freeze(
        Encoder(
            spec=spec,
            label=local.name,
            role="released",
            module=TransformersFeatures(model, num_blocks),
            transform=hub_transform(spec, name, model.config, overrides),
            weights_sha256=checksum(model.state_dict()),
        )
    )


def load_controls(
    encoder: Encoder,
    names: Sequence[str],
    *,
    seeds: int,
    transform: TransformConfig | None = None,
    num_blocks: int = 1,
) -> list[Encoder]:
    """Returns the control encoders that stand beside `encoder`, with its own preprocessing.

    Args:
        encoder: one of ours (an exported folder) for `random-init`; any for `raw-pixels`.
        names: `random-init`, `raw-pixels`.
        seeds: how many fresh initialisations.
        transform: overrides of the preprocessing, as `encoder` had them.
        num_blocks: as `encoder` had it.

    Raises:
        EncoderError: `random-init` is asked for beside an encoder whose architecture is not ours to rebuild.
    """
    overrides = transform or TransformConfig()
    controls: list[Encoder] = []
    for name in names:
        if name == "raw-pixels":
            controls.append(_raw_pixels(overrides, like=encoder.transform))
            continue
        if encoder.folder is None:
            raise EncoderError(
                f"controls hold 'random-init' beside {encoder.spec}; expected a run or an exported folder; set controls"
            )
        folder = ExportedFolder(encoder.folder, encoder.run_dir)
        controls += [
            _random_init(f"random-init:{encoder.spec}:{seed}", folder, seed, overrides, num_blocks)
            for seed in range(seeds)
        ]
    return controls


def _random_init_by_name(spec: str, role: Role, overrides: TransformConfig, num_blocks: int) -> Encoder:
    source, _, seed_text = spec.removeprefix("random-init:").partition(":")
    if seed_text and not seed_text.isdigit():
        raise EncoderError(
            f"encoder is {spec!r}; expected random-init:RUN[:SEED] with a whole seed; set encoder"
        )
    folder = find_exported_folder(source, role)
    return _random_init(spec, folder, int(seed_text or 0), overrides, num_blocks)


def _random_init(
    spec: str, folder: ExportedFolder, seed: int, overrides: TransformConfig, num_blocks: int
) -> Encoder:
    config = read_json(folder.path / "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(
            config["architecture"], pretrained=False, num_classes=0, **config.get("model_args", {})
        )
    declared = resolve_data_config(pretrained_cfg=config["pretrained_cfg"], args={})
    return _freeze(
        Encoder(
            spec=spec,
            label=f"random-init-seed{seed}",
            role="control",
            module=TimmFeatures(model, num_blocks),
            transform=from_timm_config(declared, overrides),
            weights_sha256=checksum(model.state_dict()),
            run_dir=folder.run_dir,
        )
    )


def _raw_pixels(overrides: TransformConfig, like: Transform | None = None) -> Encoder:
    """Returns the pixels in 0..1; beside another encoder, exactly those that it sees."""
    if isinstance(like, Preprocessing):
        transform = like
    elif overrides.image_size is not None:
        transform = Preprocessing(
            channels=3,
            image_size=overrides.image_size,
            crop_fraction=overrides.crop_fraction or 1.0,
            interpolation=overrides.interpolation or "bicubic",
            mean=overrides.mean or (0.0,),
            std=overrides.std or (1.0,),
        )
    else:
        raise EncoderError(
            "transform.image_size is null; expected the size at which raw pixels are compared; "
            "set transform.image_size"
        )
    return _freeze(
        Encoder(
            spec="raw-pixels",
            label="raw-pixels",
            role="control",
            module=PixelFeatures(transform.mean, transform.std),
            transform=transform,
            weights_sha256="none",
        )
    )


def _freeze(encoder: Encoder) -> Encoder:
    encoder.module.eval().requires_grad_(False)
    if encoder.spec != "raw-pixels":
        _require_same_twice(encoder)
    return encoder


@torch.no_grad()
def _require_same_twice(encoder: Encoder) -> None:
    """Raises EncoderError unless the encoder takes images of its own preprocessing and gives the same features twice.

    A network that masks, samples or drops in eval mode has no features: every figure would be a draw.
    """
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(256, size=_TRIAL_SIZE, dtype=np.uint8)) for _ in range(2)]
    try:
        images = torch.stack([encoder.transform(picture) for picture in pictures])
        first, second = encoder.module(images), encoder.module(images)
    except EncoderError:
        raise
    except Exception as error:
        raise EncoderError(
            f"encoder is {encoder.spec!r}, which cannot take images of its preprocessing "
            f"({type(error).__name__}: {one_line(error)}); expected a size that fits; set transform.image_size"
        ) from error
    for name, features in first.items():
        if not torch.allclose(features, second[name], rtol=1e-3, atol=1e-5, equal_nan=True):
            raise EncoderError(
                f"encoder is {encoder.spec!r}, whose feature {name!r} differs between two forwards of the same images; "
                "expected a network without random masking or dropout in eval mode; set encoder"
            )
