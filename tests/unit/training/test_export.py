"""The exported folder is a timm and a transformers checkpoint with the live network's features."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from models import vit
from models.config import ModelConfig
from runtime.config import config_to_yaml, load_config
from runtime.distributed import Process
from runtime.program import UserError, run_program
from tests.helpers.digits import DEMO, TINY
from training.checkpoints.exported_encoder import assemble_backbone, export_encoder, load_exported
from training.checkpoints.files import CheckpointError
from training.checkpoints.state_files import save_tensors, share_path
from training.checkpoints.store import check_checkpoint, save_checkpoint
from training.config import PretrainConfig
from training.export import main

CONFIGS = {
    "small ViT, grey": ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=28,
        patch_size=4,
        embed_dim=48,
        depth=2,
        num_heads=3,
        channels=1,
    ),
    "small ViT, colour, registers": ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=28,
        patch_size=4,
        embed_dim=48,
        depth=2,
        num_heads=3,
        init_values=1e-5,
        num_registers=4,
        global_pool="avg",
    ),
    "resnet50": ModelConfig(name="resnet50", image_size=64),
}


def live_backbone(config: ModelConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = vit.build_backbone(config)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        backbone.train()(
            torch.randn(8, config.channels, config.image_size, config.image_size)
        )  # BatchNorm buffers
    return backbone.eval()


def export(config: ModelConfig, backbone: torch.nn.Module, out: Path) -> None:
    export_encoder(
        backbone,
        out,
        model=config,
        mean=(0.3,),
        std=(0.4,) * config.channels,
        prototypes={"means": torch.randn(16, 8)},
        beside={"patch_prototypes": {"means": torch.randn(5, 8)}},
        levels={"instance": "prototypes", "patch": "patch_prototypes"},
        provenance={"run": "a test", "step": 12},
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_timm_transformers_and_we_load_the_same_features(name: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    config = CONFIGS[name]
    backbone = live_backbone(config)
    export(config, backbone, tmp_path / "out")
    images = torch.randn(4, config.channels, config.image_size, config.image_size)
    with torch.no_grad():
        live = backbone(images)
        from_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images)
        from_transformers = AutoModel.from_pretrained(tmp_path / "out").eval()(images).pooler_output
        ours, prototypes = load_exported(tmp_path / "out")
        from_us = ours(images)
    assert live.std() > 1e-3
    for features in (from_timm, from_transformers.flatten(1), from_us):
        assert (features - live).abs().max() < 1e-5
    assert prototypes["means"].shape == (16, 8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor is not None


def test_other_crop_sizes_give_the_same_features(tmp_path: Path) -> None:
    config = CONFIGS["small ViT, grey"]
    backbone = live_backbone(config)
    export(config, backbone, tmp_path / "out")
    images = torch.randn(2, 1, 20, 20)
    with torch.no_grad():
        reloaded = load_exported(tmp_path / "out")[0](images)
        assert (reloaded - backbone(images)).abs().max() < 1e-5


def test_the_card_and_the_config_tell_the_truth(tmp_path: Path) -> None:
    config = CONFIGS["small ViT, grey"]
    export(config, live_backbone(config), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "num_classes" not in written["model_args"] and "tag" not in written["pretrained_cfg"]
    assert written["pretrained_cfg"]["input_size"] == [1, 28, 28]
    assert written["pretrained_cfg"]["mean"] == pytest.approx([0.3])
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("library_name: timm", "pipeline_tag: image-feature-extraction", "license: apache-2.0"):
        assert line in card
    assert "| run | a test |" in card and "| `prototypes.safetensors` | `means` | 16 x 8 |" in card
    assert "| `patch_prototypes.safetensors` | `means` | 5 x 8 |" in card
    assert written["levels"] == {"instance": "prototypes", "patch": "patch_prototypes"}


def test_a_live_backbone_stays_as_it_is_and_half_weights_become_fp32(tmp_path: Path) -> None:
    config = CONFIGS["small ViT, grey"]
    backbone = live_backbone(config).bfloat16()
    export(config, backbone, tmp_path / "out")
    assert next(backbone.parameters()).dtype == torch.bfloat16
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_what_cannot_be_exported_or_loaded_is_an_error(tmp_path: Path) -> None:
    config = CONFIGS["small ViT, grey"]
    backbone = live_backbone(config)
    with torch.no_grad():
        backbone.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"norm\.weight holds NaN"):
        export(config, backbone, tmp_path / "out")
    with pytest.raises(CheckpointError, match="lacks"):
        load_exported(tmp_path / "out")
    export(config, live_backbone(config), tmp_path / "good")
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_exported(tmp_path / "good")


def test_a_backbone_is_assembled_strictly_from_a_checkpoint_state() -> None:
    config = CONFIGS["small ViT, grey"]
    backbone = live_backbone(config)
    state = {f"teacher/network.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    rebuilt = assemble_backbone(config, state, "teacher")
    assert all(torch.equal(a, b) for a, b in zip(rebuilt.parameters(), backbone.parameters(), strict=True))
    del state["teacher/network.backbone.norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        assemble_backbone(config, state, "teacher")


def test_a_file_s_name_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the name of a folder; set --format onnx"):
        main([str(tmp_path / "run"), str(tmp_path / "x.onnx")])


ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one checkpoint, as a save leaves it; its name is like a checkpoint's."""
    config = load_config(PretrainConfig, DEMO, [*TINY, "data.shards=nowhere"])
    backbone = vit.build_backbone(config.model)
    state = {f"teacher/network.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}

    def write(directory: Path) -> None:
        save_tensors(share_path(directory, 0, 1), state)
        export(config.model, backbone, directory / "teacher")

    folder = tmp_path / "step-by-step"
    folder.mkdir()
    (folder / "config.yaml").write_text(config_to_yaml(config))
    assert save_checkpoint(folder / "checkpoints", 3, write, ALONE).error is None
    return folder


def tree(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*"))


@pytest.mark.parametrize(
    "place",
    [
        "checkpoints/step-00000003/teacher",
        "checkpoints/step-00000003/new",
        "checkpoints/step-00000003/x.onnx",
        "checkpoints/new",
        "in_training/step-00000003/teacher",
        "renamed/teacher",
        "link",
    ],
)
def test_a_checkpoint_is_no_place_for_an_export(
    run_dir: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.export.require_onnx", lambda: None)
    shutil.copytree(run_dir / "checkpoints" / "step-00000003", run_dir / "renamed")
    (run_dir / "link").symlink_to(run_dir / "checkpoints" / "step-00000003" / "teacher")
    before = tree(run_dir)
    options = ["--format", "onnx"] if place.endswith("onnx") else []
    with pytest.raises(
        UserError, match=r"^OUT is .*, which lies in .*; expected a place outside of checkpoi"
    ):
        main([str(run_dir), str(run_dir / place), *options])
    assert tree(run_dir) == before
    check_checkpoint(run_dir / "checkpoints" / "step-00000003", ALONE)


def test_the_folder_that_out_names_is_the_one_that_is_filled(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new name, a link to an empty folder, the folder one stands in, and each of them once more."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in ("../new", "../link", ".") * 2:
        assert main([str(run_dir), out]) == 0
        load_exported(Path(out))
    assert (tmp_path / "link").is_symlink() and not list(tmp_path.glob(".*"))
    assert main([str(run_dir / "checkpoints" / "step-00000003"), "../step-00000003"]) == 0


def test_a_disk_without_room_is_one_line_and_nothing_stays(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert run_program(main, [str(run_dir), str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert "which cannot be written (File too large); expected a place with room" in line
    assert tree(tmp_path) == before
