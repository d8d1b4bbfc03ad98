"""An ONNX file is kept only where onnxruntime gives the encoder's outputs, and says how images are prepared."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from runtime.program import UserError
from training import onnx_file
from training.onnx_file import write_onnx

SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def small_vit(**options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, **options)
    model.pretrained_cfg = {
        "input_size": (3, 28, 28),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.3, 0.3, 0.3),
        "std": (0.4, 0.4, 0.4),
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def run(path: Path, images: torch.Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images.numpy()}), strict=True))


def test_any_batch_and_size_of_a_vit_with_registers(tmp_path: Path) -> None:
    backbone = small_vit(dynamic_img_size=True, reg_tokens=4, global_pool="avg")
    said = write_onnx(backbone, tmp_path / "encoder.onnx", facts={"run": "mine", "step": 7})
    assert said.startswith("any batch, height and width that its patches divide")
    for batch, height, width in ((1, 28, 28), (5, 28, 28), (2, 42, 14)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            embedding = backbone(images)
            tokens = backbone.fc_norm(backbone.forward_features(images)[:, 5:])
        found = run(tmp_path / "encoder.onnx", images)
        np.testing.assert_allclose(found["embedding"], embedding, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["patch_tokens"], tokens, rtol=1e-4, atol=1e-4)
        assert tokens.shape[1] == height * width // 49
    metadata = (
        onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx")).get_modelmeta().custom_metadata_map
    )
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["mean"] == [0.3] * 3 and preprocessing["input_size"] == [3, 28, 28]
    assert json.loads(metadata["provenance"]) == {"run": "mine", "step": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    with pytest.raises(UserError, match="which exists"):
        write_onnx(backbone, tmp_path / "encoder.onnx", facts={})


@pytest.mark.slow  # two exports
def test_a_network_of_one_size_is_written_for_that_size(tmp_path: Path) -> None:
    said = write_onnx(small_vit(), tmp_path / "encoder.onnx", facts={})
    assert said.startswith("any batch, 28 x 28 pixels")
    assert run(tmp_path / "encoder.onnx", torch.randn(2, 3, 28, 28))["embedding"].shape == (2, 24)


class WithoutTranslation(nn.Module):
    """Of an operator that ONNX has no word for."""

    pretrained_cfg = small_vit().pretrained_cfg

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(images @ images.mT)

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return tokens.flatten(1)


def test_an_operator_without_translation_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the network cannot be written as ONNX") as refused:
        write_onnx(WithoutTranslation(), tmp_path / "encoder.onnx", facts={})
    assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []


@pytest.mark.slow  # two exports
def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = onnx_file._export

    def export_another(network, shape, path, *rest, **options):
        export(network, shape, path, *rest, **options)
        with torch.no_grad():
            network.backbone.cls_token.mul_(2)

    monkeypatch.setattr(onnx_file, "_export", export_another)
    with pytest.raises(UserError, match=r"the ONNX file's embedding differs by .* at \[1, 3, 28, 28\]"):
        write_onnx(small_vit(), tmp_path / "encoder.onnx", facts={})
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(UserError, match="pip install onnxscript"):
        onnx_file.require_onnx()
