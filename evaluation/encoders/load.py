"""Any frozen encoder behind one interface: our runs, timm's, transformers', and the controls.

A name (`SPEC`) becomes an `Encoder`: a module from images to named features, the preprocessing that this very
encoder declares, and enough about both to key a cache and to stand in a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from data.views.pictures import fill_picture
from evaluation.config import TransformConfig
from evaluation.encoders.encoder import Encoder, LoadOptions
from evaluation.encoders.exported import EncoderError, ExportedFolder, Role
from evaluation.encoders.hf_models import load_hub
from evaluation.encoders.pixels import PATCH_SIZE, build_pixels, load_pixels
from evaluation.encoders.preprocessing import Preprocessing
from evaluation.encoders.timm_models import (
    build_random_init,
    build_untrained,
    load_exported,
    load_local_dir,
    load_random_init,
    load_released,
)
from evaluation.encoders.weights_files import load_weights_file
from models.config import WeightsKind, WeightsSpec, parse_weights_spec

Loader = Callable[[WeightsSpec, LoadOptions], Encoder]
LOADERS: dict[WeightsKind, Loader] = {
    "folder": load_exported,
    "timm": load_released,
    "hf": load_hub,
    "local-dir": load_local_dir,
    "random-init": load_random_init,
    "raw-pixels": load_pixels,
    "file": load_weights_file,
}


def load_encoder(
    text: str, *, role: Role = "teacher", transform: TransformConfig | None = None, num_blocks: int = 1
) -> Encoder:
    """Returns the encoder that `text` names, frozen and in eval mode, on the CPU in fp32.

    Args:
        text: see `EvaluationConfig.encoder`. A weights file has prototypes and no features.
        role: see `LoadOptions`, as what follows.
        transform: overrides of the encoder's own preprocessing.
        num_blocks: last blocks whose CLS token becomes the feature `blocks`.

    Raises:
        ValueError: nothing loadable has this name (EncoderError), or its preprocessing is unknown.
    """
    spec = parse_weights_spec(text, "encoder", LOADERS)
    return LOADERS[spec.kind](spec, LoadOptions(role, transform or TransformConfig(), num_blocks))


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
        encoder: one of ours (an exported folder) or one that timm releases for `random-init`; any for `raw-pixels`.
        names: `random-init`, `raw-pixels`.
        seeds: how many fresh initialisations.
        transform: overrides of the preprocessing, as `encoder` had them.
        num_blocks: as `encoder` had it.

    Raises:
        EncoderError: `random-init` is asked for beside an encoder whose architecture is not ours to rebuild.
    """
    options = LoadOptions(transform=transform or TransformConfig(), num_blocks=num_blocks)
    controls: list[Encoder] = []
    for name in names:
        if name == "raw-pixels":
            controls.append(_pixels_beside(encoder, options))
            continue
        named = parse_weights_spec(encoder.spec, "encoder", LOADERS)
        if named.kind == "timm":
            controls += [build_untrained(encoder, named.name, seed, options) for seed in range(seeds)]
            continue
        if encoder.folder is None:
            raise EncoderError(
                f"controls hold 'random-init' beside {encoder.spec}; expected a run, an exported folder or timm:NAME; "
                "set controls"
            )
        folder = ExportedFolder(encoder.folder, encoder.run_dir)
        controls += [
            build_random_init(f"random-init:{encoder.spec}:{seed}", folder, seed, options)
            for seed in range(seeds)
        ]
    return controls


def _pixels_beside(encoder: Encoder, options: LoadOptions) -> Encoder:
    """Returns exactly the pixels that another encoder sees, in its patches, where its preprocessing can be undone."""
    transform = encoder.transform
    if isinstance(transform, Preprocessing):
        return build_pixels(transform, _side_of_patch(encoder, transform) or PATCH_SIZE)
    return load_encoder("raw-pixels", transform=options.transform)


@torch.no_grad()
def _side_of_patch(encoder: Encoder, transform: Preprocessing) -> int | None:
    """Returns the side in pixels of one of the encoder's patches; None where it has no grid of square ones."""
    height, width = transform.height_and_width
    tokens = encoder.module.patch_tokens(transform(fill_picture((width, height), transform.format))[None])
    side = 0 if tokens is None else math.isqrt(height * width // max(1, tokens.shape[1]))
    if tokens is None or not side or height % side or width % side:
        return None
    return side if tokens.shape[1] * side**2 == height * width else None
