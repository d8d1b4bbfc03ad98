"""Vision models of transformers: loaded whole, asked for what they pool and where their patches begin.

A family is listed here when its tokens are known from its configuration; any other model type is refused by name:
a wrong guess (a register taken for CLS, a corner patch taken for the image) gives a figure without a sign of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from evaluation.config import TransformConfig
from evaluation.encoders.backbones import FeatureModule, Features
from evaluation.encoders.encoder import Encoder, LoadOptions, freeze
from evaluation.encoders.exported import EncoderError, one_line, read_json
from evaluation.encoders.preprocessing import Preprocessing, ProcessorTransform
from evaluation.encoders.timm_models import load_local_dir
from evaluation.tensor_files import checksum
from models.config import WeightsSpec
from runtime.requirements import require_packages

if TYPE_CHECKING:
    from jaxtyping import Float

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Where a model type's patch tokens begin, and what stands before them.

    Attributes:
        class_token: whether the first token is CLS.
        others: further tokens before the patches: a number, or the name of the option that holds it.
        norm: the norm behind the last block, for the CLS token of the blocks before it.
        columnar: one token per patch of `config.patch_size`, so that their number can be checked.
    """

    class_token: bool = False
    others: int | str = 0
    norm: str = ""
    columnar: bool = False

    def num_prefix_tokens(self, config: Any) -> int:
        """Returns how many tokens stand before the patches of a model of this configuration."""
        others = self.others if isinstance(self.others, int) else int(getattr(config, self.others))
        return int(self.class_token) + others


_GRID = Family()  # cells of a last grid, or tokens of merged patches: nothing stands before them
FAMILIES: dict[str, Family] = {
    "vit": Family(class_token=True, norm="layernorm", columnar=True),
    "vit_mae": Family(class_token=True, norm="layernorm", columnar=True),
    "vit_msn": Family(class_token=True, norm="layernorm", columnar=True),
    "deit": Family(class_token=True, others=1, norm="layernorm", columnar=True),  # the distillation token
    "beit": Family(class_token=True, norm="layernorm", columnar=True),
    "dinov2": Family(class_token=True, norm="layernorm", columnar=True),
    "dinov2_with_registers": Family(
        class_token=True, others="num_register_tokens", norm="layernorm", columnar=True
    ),
    "dinov3_vit": Family(class_token=True, others="num_register_tokens", norm="norm", columnar=True),
    "clip_vision_model": Family(class_token=True, norm="post_layernorm", columnar=True),
    "siglip_vision_model": Family(columnar=True),
    "ijepa": Family(columnar=True),
    "dinov3_convnext": Family(others=1),  # the pooled grid stands before its cells
    **dict.fromkeys(("swin", "swinv2", "hiera", "convnext", "convnextv2", "resnet", "regnet"), _GRID),
}
# Weights that training alone reads: a released encoder may lack them.
_UNUSED = ("mask_token",)


class TransformersFeatures(FeatureModule):
    """A vision model of transformers: `embedding` is its own pooled output.

    Where it has none (`vit_mae`, `vit_msn`, `ijepa`, or a pooler that the checkpoint does not hold) it is the CLS
    token, of a model without CLS the mean of the patches: what these models' own classifiers read. Patch tokens
    are the last hidden state's, as the model hands them on.

    Args:
        model: what `load_hub_model` returned.
        num_blocks: last blocks whose CLS token is kept.

    Raises:
        EncoderError: the model type is not among `FAMILIES`.
    """

    def __init__(self, model: nn.Module, num_blocks: int = 1) -> None:
        super().__init__()
        self.model: Any = model
        self.num_blocks = num_blocks
        config: Any = model.config
        self.family = family_of(config)
        self._num_prefix_tokens = self.family.num_prefix_tokens(config)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Returns embedding, and CLS and patch mean where the model has tokens."""
        return self.with_patches(images)[0]

    def with_patches(
        self, images: Float[Tensor, "B C H W"]
    ) -> tuple[Features, Float[Tensor, "B N D"] | None]:
        """Returns features and patch tokens of one pass."""
        blocks = self.num_blocks if self.family.class_token else 1
        output = self._ask(images, output_hidden_states=blocks > 1)
        last, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if last.ndim == 4:
            mean = last.mean(dim=(2, 3))
            embedding = mean if pooled is None else pooled.flatten(1)
            return {"embedding": embedding, "mean": mean}, self._cells(images, last)
        patches = self._cells(images, last)
        features = {"mean": patches.mean(dim=1)}
        if self.family.class_token:
            norm = getattr(self.model, self.family.norm)
            # CLIP hands on its tokens before the last norm, which is for CLS alone.
            own = norm(last[:, 0]) if self.family.norm == "post_layernorm" else last[:, 0]
            features["cls"] = torch.stack([*self._earlier(output, norm), own], dim=1)
        if pooled is not None:
            return {"embedding": pooled.flatten(1), **features}, patches
        own = features["cls"][:, -1] if self.family.class_token else features["mean"]
        return {"embedding": own, **features}, patches

    def patch_tokens(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"] | None:
        """Returns the last block's patch tokens, or the cells of the last grid."""
        return self._cells(images, self._ask(images).last_hidden_state)

    def _ask(self, images: Tensor, **options: Any) -> Any:
        if self.model.config.model_type == "vit_mae":
            # With mask_ratio 0 it still shuffles its patches, by this noise: in order, they stay where they are.
            grid = self.model.embeddings.patch_embeddings.num_patches
            options["noise"] = torch.arange(grid, device=images.device).float().expand(len(images), -1)
        return self.model(pixel_values=images, **options)

    def _cells(self, images: Tensor, tokens: Tensor) -> Tensor:
        if tokens.ndim == 4:
            return tokens.flatten(2).transpose(1, 2)
        patches = tokens[:, self._num_prefix_tokens :]
        size = self.model.config.patch_size if self.family.columnar else None
        if size is not None:
            height, width = size if isinstance(size, list | tuple) else (size, size)
            expected = (images.shape[2] // height) * (images.shape[3] // width)
            if patches.shape[1] != expected:
                raise EncoderError(
                    f"{self.model.config.model_type} gave {patches.shape[1]} patch tokens for {images.shape[3]} x "
                    f"{images.shape[2]} pixels; expected {expected}; load it through timm if it is there"
                )
        return patches

    def _earlier(self, output: Any, norm: nn.Module) -> list[Tensor]:
        """Returns the CLS token after each of the blocks before the last, oldest first, normed like the last."""
        if self.num_blocks == 1:
            return []
        depth = len(output.hidden_states) - 1
        if self.num_blocks > depth:
            raise EncoderError(
                f"features.num_blocks is {self.num_blocks}; expected at most {depth}, the encoder's blocks; "
                "set features.num_blocks"
            )
        return [norm(hidden[:, 0]) for hidden in output.hidden_states[-self.num_blocks : -1]]


def load_hub(spec: WeightsSpec, options: LoadOptions) -> Encoder:
    """Returns a vision model of transformers, by its name on the hub or its folder; timm's folders go to timm."""
    config_path = spec.path / "config.json"
    if config_path.is_file() and "pretrained_cfg" in read_json(config_path):
        return load_local_dir(replace(spec, text=f"local-dir:{spec.name}", kind="local-dir"), options)
    model = load_hub_model(spec.text, spec.name)
    return freeze(
        Encoder(
            spec=spec.text,
            label=spec.path.name,
            role="released",
            module=TransformersFeatures(model, options.num_blocks),
            transform=hub_transform(spec.text, spec.name, model.config, options.transform),
            weights_sha256=checksum(model.state_dict()),
        )
    )


def family_of(config: Any) -> Family:
    """Returns what is known of a vision model's tokens.

    Raises:
        EncoderError: nothing is known of this model type.
    """
    found = FAMILIES.get(config.model_type)
    if found is None:
        raise EncoderError(
            f"model type is {config.model_type!r}, whose tokens are not known here; expected one of "
            f"{', '.join(FAMILIES)}; set encoder to timm:NAME (timm:hf-hub:NAME for timm's own repositories)"
        )
    return found


def load_hub_model(spec: str, name: str) -> nn.Module:
    """Returns the vision tower of a model, every weight of it from the checkpoint, fp32, masking off.

    Raises:
        EncoderError: it cannot be loaded, its type is unknown, or the checkpoint lacks weights of it.
    """
    # Imported here: transformers takes seconds to load and most evaluations do not need it.
    require_packages("transformers")
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise _cannot_load(spec, error) from error
    family_of(getattr(config, "vision_config", config))
    try:
        model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:
        raise _cannot_load(spec, error) from error
    tower = getattr(model, "vision_model", model)
    missing = sorted(key for key in report["missing_keys"] if not key.endswith(_UNUSED))
    if tower is not model:
        missing = [key for key in missing if key.startswith("vision_model.")]
    lost = [key for key in missing if not key.startswith("pooler.")]
    if lost:
        raise EncoderError(
            f"encoder is {spec!r}, whose checkpoint lacks {len(lost)} tensors, as {lost[0]}; expected all of them, "
            "because the others would be random; set encoder to a whole checkpoint"
        )
    if missing:
        logger.info("%s has no weights for its pooler: its embedding is the CLS token", spec)
        tower.pooler = None
    if tower.config.model_type == "vit_mae":
        tower.config.mask_ratio = 0.0
    return tower


def _cannot_load(spec: str, error: Exception) -> EncoderError:
    return EncoderError(
        f"encoder is {spec!r}, which transformers cannot load ({type(error).__name__}: {one_line(error)}); "
        "expected a released vision model or its folder; set encoder"
    )


def hub_transform(
    spec: str, name: str, config: Any, overrides: TransformConfig
) -> Preprocessing | ProcessorTransform:
    """Returns the image processor beside a checkpoint, or what the overrides say in full.

    Raises:
        EncoderError: there is no processor and no full override, or overrides of a part of it.
    """
    if overrides.mean is not None and overrides.std is not None:
        size = overrides.image_size or getattr(config, "image_size", None)
        if size is None:
            raise EncoderError(
                f"transform.image_size is null; expected the size for {spec}; set transform.image_size"
            )
        return Preprocessing(
            channels=getattr(config, "num_channels", 3),
            image_size=(int(size[0]), int(size[1])) if isinstance(size, list | tuple) else int(size),
            crop_fraction=overrides.crop_fraction or 1.0,
            interpolation=overrides.interpolation or "bicubic",
            mean=overrides.mean,
            std=overrides.std,
            pixels=overrides.pixels or "uint8",
        )
    if overrides != TransformConfig():
        raise EncoderError(
            f"transform overrides only part of {spec}'s image processor; expected mean and std beside it, "
            "or no override; set transform.mean and transform.std"
        )
    from transformers import AutoImageProcessor

    try:
        return ProcessorTransform(AutoImageProcessor.from_pretrained(name))
    except Exception as error:
        # A guessed mean and std would give a wrong figure without a sign of it.
        raise EncoderError(
            f"encoder is {spec!r}, which carries no image processor; expected its own mean, std and size; "
            "set transform.mean, transform.std and transform.image_size, or save the processor beside the model"
        ) from error
