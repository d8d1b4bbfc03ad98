"""Anybody's weights file as named tensors: safetensors, or a pickle from which nothing but data is taken."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evaluation.encoders.backbones import NoFeatures
from evaluation.encoders.encoder import Encoder, LoadOptions
from evaluation.encoders.exported import EncoderError, one_line, require_whole
from evaluation.encoders.preprocessing import NoPreprocessing
from models.config import WeightsSpec
from runtime.files import sha256_of

# Optimizer states are many times the weights and hold no prototypes.
_SKIPPED = ("optimizer", "opt", "clustering_optimizer", "fp16_scaler", "amp")
# One rank's part of sharded weights: CAPI's and DINOv2's `model.N.rank_0.pth`, ZeRO-3's `zero_pp_rank_0_...`. What
# DeepSpeed calls `mp_rank_00` holds whole tensors where nothing else is sharded.
_RANK_PART = re.compile(r"(?<!mp)(?:^|[._-])rank[._-]?(\d+)(?=[._-])")
# What wrappers put between the names of modules: DDP and SimpleFSDP, torch.compile, FSDP1, activation checkpointing.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Classes that official checkpoints carry besides tensors (the command line, a loss as a NumPy number) and that
# only hold data: constructing them runs no code of the file. NumPy 1 and 2 name the second differently.
_NUMPY_SCALAR: Any = np._core.multiarray.scalar  # type: ignore[attr-defined]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int64DType,
]


class WeightsFileError(ValueError):
    """A weights file that cannot be read as data alone, or does not hold what was asked for; one line."""


def load_weights_file(spec: WeightsSpec, _: LoadOptions) -> Encoder:
    """Returns a weights file as an encoder without a network: its prototypes alone can be audited."""
    if not spec.path.is_file():
        raise EncoderError(
            f"encoder is {spec.text!r}; expected an existing weights file; set encoder to PATH or PATH#TENSOR"
        )
    return Encoder(
        spec=spec.text,
        label="-".join(part for part in (spec.path.name.split(".")[0], spec.tensor) if part),
        role="released",
        module=NoFeatures(),
        transform=NoPreprocessing(),
        weights_sha256=sha256_of(spec.path),
        weights_file=spec.text,
    )


def refuse_part(path: Path) -> None:
    """Raises WeightsFileError where a file's name says that it is one rank's part: its rows are not all there are."""
    found = _RANK_PART.search(path.name)
    if found is None:
        return
    before, after = path.name[: found.start(1)], path.name[found.end(1) :]
    beside = [
        other.name
        for other in path.parent.glob("*")
        if other != path and other.name.startswith(before) and other.name.endswith(after)
    ]
    parts = f"beside {len(beside)} others such as {min(beside)}" if beside else "the others are not beside it"
    raise WeightsFileError(
        f"{path} is the part of rank {found.group(1)} of a sharded checkpoint ({parts}); expected whole tensors; join "
        "the parts along dimension 0 into one file, or set PATH#TENSOR where this one is known to be whole"
    )


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Returns every tensor in a file under its dotted name, on the CPU; optimizer states are left out.

    Nested dictionaries become dots. What wrappers add to names (`module.`, `_orig_mod.`, ...) is taken out, and
    parametrised weights get the names that `torch.nn.utils.weight_norm` gave them: `weight_g` and `weight_v`.
    A pickle is opened with `weights_only=True`: a file that needs code to be read is refused.

    Raises:
        WeightsFileError: no such file, not a weights file, or a pickle that is more than data.
        EncoderError: the file lies in a checkpoint that is damaged.
    """
    if not path.is_file():
        raise WeightsFileError(
            f"weights file is {str(path)!r}; expected an existing file; set encoder or prototypes.weights to "
            "PATH or PATH#TENSOR"
        )
    require_whole(path.parent)  # prototypes of a run's checkpoint, named as a file
    content = _read_index(path) if path.name.endswith(".index.json") else _read_content(path)
    flat: dict[str, Tensor] = {}
    _flatten(content, "", flat, ())
    return {_plain_name(name): tensor for name, tensor in flat.items()}


def _read_content(path: Path) -> Any:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_index(path: Path) -> dict[str, Any]:
    """Returns what the files hold that an index of the hub's libraries lists (`weight_map`: tensor to file)."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        parts = [path.parent / name for name in sorted(set(places.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsFileError(
            f"{path} is no index of weights files ({type(error).__name__}: {one_line(error)}); expected a "
            "`weight_map` of tensor to file; fetch it again"
        ) from error
    missing = [part.name for part in parts if part.parent != path.parent or not part.is_file()]
    if missing:
        raise WeightsFileError(
            f"{path} names {len(missing)} files that are not beside it, as {missing[0]}; expected all; fetch them"
        )
    return {name: tensor for part in parts for name, tensor in _read_content(part).items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsFileError(
            f"{path} cannot be read as safetensors ({one_line(error)}); fetch the file again"
        ) from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"needs {found.group(1)} to be unpickled" if found else "is no pickle of plain tensors"
        raise WeightsFileError(
            f"{path} {what}; expected tensors and plain values, because a pickle can run code; save its state dict "
            "as .safetensors where you trust it and pass that file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsFileError(
            f"{path} cannot be read as a PyTorch weights file ({type(error).__name__}: {one_line(error)}); fetch the "
            "file again"
        ) from error


def require_real_matrix(tensor: Tensor, name: str) -> Tensor:
    """Returns a tensor in fp32.

    Raises:
        WeightsFileError: it has no values (meta), or such as are no plain real numbers.
    """
    dense = tensor.layout == torch.strided
    if tensor.is_meta or not dense or tensor.is_quantized or tensor.is_complex():
        what = "without values (meta)" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise WeightsFileError(
            f"tensor {name!r} is {what}; expected real numbers in a dense matrix; save it as one and pass that file"
        )
    return tensor.float()


def _flatten(value: Any, name: str, found: dict[str, Tensor], inside: tuple[int, ...]) -> None:
    if isinstance(value, Tensor):
        found[name] = value.detach()
    elif isinstance(value, Mapping) and id(value) not in inside:  # a mapping may hold itself
        for key, item in value.items():
            if str(key) not in _SKIPPED:
                _flatten(item, f"{name}.{key}" if name else str(key), found, (*inside, id(value)))


def _plain_name(name: str) -> str:
    name = _WRAPPERS.sub("", name)
    name = name.replace("parametrizations.weight.original0", "weight_g")
    name = name.replace("parametrizations.weight.original1", "weight_v")
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
