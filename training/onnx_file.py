"""An encoder as one ONNX file that says how its images are prepared, compared with the encoder before it is kept."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.views.config import FULL_SCALE, PixelType
from runtime.program import UserError

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4  # of every output against the encoder's, absolute and relative
OPSET = 20
_LARGEST_BYTES = 2 * 10**9  # what one protobuf file can hold
_DYNAMIC_BATCHES = (1, 3)


class _Outputs(nn.Module):
    """`embedding` [B, D], and `patch_tokens` [B, N, D] where the network has tokens that it can tell apart.

    Tokens as training gives them to a head: models that pool patches have their last norm behind the pooling.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.num_prefix_tokens = getattr(backbone, "num_prefix_tokens", None)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        tokens = self.backbone.forward_features(images)
        embedding = self.backbone.forward_head(tokens, pre_logits=True)
        if tokens.ndim != 3 or self.num_prefix_tokens is None:
            return (embedding,)
        patches = tokens[:, self.num_prefix_tokens :]
        norm = getattr(self.backbone, "fc_norm", None)
        return embedding, patches if norm is None else norm(patches)


def require_onnx() -> None:
    """Raises UserError unless the packages that write and run ONNX files are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format is onnx, and {', '.join(missing)} cannot be imported; expected {', '.join(PACKAGES)}; install "
            f"them with pip install {' '.join(missing)}"
        )


def write_onnx(
    backbone: nn.Module, out: Path, *, pixels: PixelType = "uint8", facts: Mapping[str, Any]
) -> str:
    """Writes a backbone as an ONNX file and returns in words what it takes.

    The batch is free; height and width are where the network allows, which is tried: the file is run by onnxruntime at
    several shapes, and every output compared with the backbone's. The file's metadata hold `preprocessing` (JSON) as
    the backbone's `pretrained_cfg` declares it, and `provenance`.

    Args:
        backbone: a timm model with `num_classes=0`, in eval mode, on the CPU.
        out: the file; written whole or not at all.
        pixels: type of the images' numbers; see `data.views.config.FULL_SCALE`.
        facts: plain values for the metadata's `provenance`.

    Raises:
        UserError: a package or an operator is missing, the weights are too many for one file, `out` exists, or its
            outputs differ from the backbone's.
    """
    require_onnx()
    size = sum(tensor.numel() * tensor.element_size() for tensor in backbone.state_dict().values())
    if size > _LARGEST_BYTES:
        raise UserError(
            f"--format is onnx, and the weights are {size / 1e9:.1f} GB; expected at most {_LARGEST_BYTES / 1e9:g}, "
            "what one such file can hold; leave --format out"
        )
    if out.exists():
        raise UserError(f"OUT is {out}, which exists; expected a new name; set OUT")
    declared = backbone.pretrained_cfg
    assert isinstance(declared, Mapping)
    shape = tuple(declared["input_size"])
    network = _Outputs(backbone).eval()
    metadata = {
        "preprocessing": json.dumps(_preprocessing(declared, pixels)),
        "provenance": json.dumps(dict(facts)),
    }
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        for free_size in (True, False):
            _export(network, shape, temporary, metadata, free_size=free_size)
            difference, free_size = _compare(network, temporary, shape, free_size=free_size)
            if difference is None:
                temporary.replace(out)
                side = (
                    "height and width that its patches divide"
                    if free_size
                    else f"{shape[1]} x {shape[2]} pixels"
                )
                return f"any batch, {side}; outputs within {TOLERANCE:g} of the encoder's in onnxruntime"
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror}); expected a place to write; set OUT"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    raise UserError(
        f"the ONNX file's {difference}; expected at most {TOLERANCE:g}; nothing was kept; leave --format out"
    )


def _preprocessing(declared: Mapping[str, Any], pixels: PixelType) -> dict[str, Any]:
    names = ("input_size", "interpolation", "crop_pct", "mean", "std")
    scale = FULL_SCALE[pixels]
    return {name: declared[name] for name in names} | {
        "pixels": pixels,
        "text": "resize so that the image covers input_size / crop_pct, crop the centre, "
        f"divide {pixels} numbers by {scale:g}, subtract mean, divide by std; float32 [batch, channels, height, width]",
    }


def _export(
    network: _Outputs, shape: tuple[int, ...], path: Path, metadata: Mapping[str, str], *, free_size: bool
) -> None:
    side = torch.export.Dim.AUTO if free_size else None
    with torch.no_grad(), _quiet():
        images = torch.randn(max(_DYNAMIC_BATCHES), *shape)
        try:
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["embedding", "patch_tokens"][: len(network(images))],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 2: side, 3: side},),
            )
        except (
            Exception
        ) as error:  # of the exporter's many kinds: an operator without a translation, a branch on values
            said = str(error.__cause__ or error).strip().split("\n")[0]
            raise UserError(
                f"the network cannot be written as ONNX ({type(error).__name__}: {said[:200]}); expected operators "
                "that torch.onnx translates; leave --format out"
            ) from error
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(path, external_data=False)


def _compare(
    network: _Outputs, path: Path, shape: tuple[int, ...], *, free_size: bool
) -> tuple[str | None, bool]:
    """Returns which output differs most beyond the tolerance, None where none does; and whether sizes are free."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    channels, height, width = shape
    free_size = free_size and all(isinstance(side, str) for side in session.get_inputs()[0].shape[2:])
    shapes = [(batch, *shape) for batch in _DYNAMIC_BATCHES]
    if free_size:
        shapes.append((2, channels, 2 * height, 3 * width))
    generator = torch.Generator().manual_seed(0)
    for tried in shapes:
        images = torch.randn(tried, generator=generator)
        try:
            with torch.no_grad():
                expected = network(images)
            found = session.run(None, {"images": images.numpy()})
        except (
            Exception
        ) as error:  # either's refusal of another size: torch's of many kinds, onnxruntime's of its own
            if tried[2:] == shape[1:]:
                raise
            return f"size is fixed ({type(error).__name__} at {list(tried)})", free_size
        for output, theirs, ours in zip(session.get_outputs(), found, expected, strict=True):
            if not torch.allclose(torch.from_numpy(theirs), ours, rtol=TOLERANCE, atol=TOLERANCE):
                largest = float((torch.from_numpy(theirs) - ours).abs().max())
                return f"{output.name} differs by {largest:.3g} at {list(tried)}", free_size
    return None, free_size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its steps on stdout, and libraries that it calls their deprecations."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
