import json
from pathlib import Path

import pytest
import torch

from models.config import HeadConfig, ModelConfig
from models.heads import ProjectionHead
from models.student_teacher import SelfSupervisedNetwork
from runtime.files import sha256_of
from tests.helpers.digits import write_digit_shards
from training.checkpoints.exported_encoder import export_encoder


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """384 training and 96 test images of handwritten digits, 28 x 28, as shards."""
    return write_digit_shards(tmp_path_factory.mktemp("digits") / "shards")


def write_run(run_dir: Path, *, seed: int = 0, num_prototypes: int = 64, with_patches: bool = False) -> Path:
    """A run directory with one complete checkpoint of a tiny ViT, metrics and a projection head.

    `with_patches` adds a head and 48 prototypes of patches.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    head = HeadConfig(num_layers=2, hidden_dim=32, projection_dim=16)
    model = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=28,
        patch_size=7,
        embed_dim=24,
        depth=2,
        num_heads=2,
        channels=1,
        head=head,
    )
    network = SelfSupervisedNetwork(model, "teacher")
    checkpoint = run_dir / "checkpoints" / "step-00000010"
    export_encoder(
        network.backbone,
        checkpoint / "teacher",
        model=model,
        mean=(0.3,),
        std=(0.35,),
        prototypes={"means": torch.randn(num_prototypes, 16)},
        provenance={},
    )
    save_file(network.projection_head.state_dict(), checkpoint / "teacher" / "projection_head.safetensors")
    if with_patches:
        patch_head = ProjectionHead(24, HeadConfig(num_layers=2, hidden_dim=20, projection_dim=8))
        save_file(patch_head.state_dict(), checkpoint / "teacher" / "patch_head.safetensors")
        save_file({"means": torch.randn(48, 8)}, checkpoint / "teacher" / "patch_prototypes.safetensors")
    commit(checkpoint)
    lines = [
        {
            "step": step,
            "samples_seen": step * 32,
            "loss/total": 5 - step / 10,
            "loss/consistency": 3 - step / 10,
            "loss/entropy": 2.0,
            "prototypes/unique_0.025": 1.0,
            "prototypes/used": 0.5,
            "prototypes/used_by_mass": 0.4,
            "prototypes/used_by_logits": 0.9,
            "prototypes/used_ceiling": 1.0,
            "prototypes/usage_rows": 640,
            "prototypes/dead": 0.5,
            "prototypes/usage_perplexity": 0.25,
            "eval/knn20_top1": 0.5,
        }
        for step in range(11)
    ]
    for line in lines if with_patches else ():
        line |= {"patch_prototypes/used": 0.3, "patch_prototypes/usage_rows": 5000, "patch_gmm/beta": 1.0}
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def commit(checkpoint: Path) -> None:
    """Closes a checkpoint as a save does: hashes of all files in MANIFEST.json, its own in COMMIT."""
    files = [
        {
            "path": path.relative_to(checkpoint).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    ]
    manifest = {"schema": 1, "step": int(checkpoint.name[5:]), "world_size": 1, "facts": {}, "files": files}
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))
    (checkpoint / "COMMIT").write_text(sha256_of(checkpoint / "MANIFEST.json") + "\n")


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", seed=11)
