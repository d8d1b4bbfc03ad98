"""Configurations of tiny runs, one for each way to combine the terms of the objective with modes of the prototypes."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch

from data.config import DataConfig, MaskConfig
from data.views.masking import Masks, draw_masks
from models.config import HeadConfig, ModelConfig, PredictorConfig
from prototypes.config import (
    CouplingConfig,
    InstanceConfig,
    ObjectiveConfig,
    PartitionConfig,
    PatchConfig,
    PrototypesConfig,
)
from training.config import BatchConfig, OptimConfig, PretrainConfig

SIDE, DIM = 16, 8
VIT = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=SIDE,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=2,
    channels=1,
    head=HeadConfig(num_layers=2, hidden_dim=32, projection_dim=DIM),
)
MASKS = {
    "none": MaskConfig(),
    "ibot": MaskConfig(kind="block", patch_size=4, crops=0.7, ratio=(0.2, 0.6), min_patches=1),
    "capi": MaskConfig(kind="inverse_block", patch_size=4, predicted=0.3),
}
TIE = CouplingConfig(tie=0.5)


def build_config(
    *,
    instance: InstanceConfig | None = None,
    patch: PatchConfig | None = None,
    patch_mode: str | None = None,
    koleo_weight: float = 0.0,
    model: ModelConfig = VIT,
    num_prototypes: int = 64,
    num_images: int = 16,
    accumulation: int = 1,
    how: str = "exact",
    max_rows_per_rank: int | None = None,
    **prototypes: Any,
) -> PretrainConfig:
    """Returns the configuration of a run on images of 16 x 16 with two global views and one local.

    Args:
        instance: the term on views; None is CARP's.
        patch: the term on patches, of which there are 16; None is none.
        patch_mode: mode of prototypes of their own for patches, with a head of their own; None shares both.
        koleo_weight: of KoLeo on embeddings.
        model: with patches of 8 x 8, unless there is a term on patches.
        num_prototypes: K, in blocks of a quarter.
        num_images: of the global batch.
        accumulation: micro-batches.
        how: they learn.
        max_rows_per_rank: of the patches' own prototypes.
        prototypes: further options of the prototypes.
    """
    own = PrototypesConfig(
        num_prototypes=num_prototypes,
        dim=model.head.projection_dim,
        partition=PartitionConfig(size=num_prototypes // 4),
        **prototypes,
    )
    patch_prototypes = None
    if patch_mode is not None:
        tie = TIE if patch_mode == "partial" else CouplingConfig()
        patch_prototypes = replace(
            own, mode=patch_mode, coupling=tie, max_rows_per_rank=max_rows_per_rank, num_prototypes=32
        )
        patch_prototypes = replace(patch_prototypes, partition=PartitionConfig(size=16))
        model = replace(model, patch_head=model.head)
    if patch is not None:
        model = replace(model, patch_size=4, predictor=PredictorConfig(depth=2, num_heads=2))
    return PretrainConfig(
        data=DataConfig(
            shards="none",
            channels=1,
            mean=(0.5,),
            std=(0.5,),
            global_crop_size=SIDE,
            local_crop_size=8,
            num_local_crops=0 if instance is not None and instance.name == "none" else 1,
            masks=MASKS["none" if patch is None else patch.name],
        ),
        model=model,
        prototypes=own,
        patch_prototypes=patch_prototypes,
        objective=ObjectiveConfig(
            instance=instance or InstanceConfig(), patch=patch or PatchConfig(), koleo_weight=koleo_weight
        ),
        batch=BatchConfig(
            global_batch_size=num_images,
            gradient_accumulation_steps=accumulation,
            accumulation=how,  # type: ignore[arg-type]
        ),
        optim=OptimConfig(steps=100),
    )


def masks_of(config: PretrainConfig, num_images: int, seed: int) -> Masks | None:
    """Returns masks of as many images, the same for the same seed."""
    return draw_masks(config.data, [zlib.crc32(f"{seed}/{index}".encode()) for index in range(num_images)])


def part_of(masks: Masks | None, index: int, number: int) -> Masks | None:
    """Returns one of `number` equal parts of the images' masks."""
    if masks is None:
        return None
    return Masks(*(part.chunk(number, 1)[index] for part in (masks.hidden, masks.predicted)))


def spread_(network: torch.nn.Module, factor: float) -> None:
    """Widens the projections of fresh heads, which give almost equal logits and gradients that cancel."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            is_last = name.endswith("mlp.2.weight")
            parameter.mul_(factor if is_last else 1.0)
