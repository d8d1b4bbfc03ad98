"""A head that was saved beside an encoder projects as it did in training."""

import pytest
import torch
from safetensors.torch import save_file

from evaluation.encoders.backbones import TimmFeatures
from evaluation.encoders.load import load_encoder
from evaluation.encoders.projections import (
    HEAD_FILE,
    PATCH_HEAD_FILE,
    PATCH_PROTOTYPES_FILE,
    PROTOTYPES_FILE,
    Space,
    find_spaces,
    load_projection_head,
    project,
)
from evaluation.features.patches import PatchTokens
from evaluation.probes.prototype_audit import load_exported_prototypes
from models.config import HeadConfig, ModelConfig, OutputsConfig
from models.heads import UNIT_LENGTH, ProjectionHead
from models.student_teacher import SelfSupervisedNetwork
from training.checkpoints.exported_encoder import export_encoder


@pytest.mark.parametrize("is_unit", [False, True])
def test_a_saved_head_keeps_its_unit_length(tmp_path, is_unit):
    config = HeadConfig(num_layers=2, hidden_dim=6, projection_dim=4, normalize_bottleneck=is_unit)
    head, rows = ProjectionHead(5, config).eval(), torch.randn(3, 5)
    mark = {UNIT_LENGTH: torch.ones(())} if is_unit else {}
    save_file(head.state_dict() | mark, tmp_path / HEAD_FILE)
    found = load_projection_head(tmp_path)
    assert torch.equal(found(rows), head(rows))
    lengths = found(rows).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(3)) == is_unit


INSTANCE = Space("instance", HEAD_FILE, PROTOTYPES_FILE)


@pytest.mark.parametrize(
    ("objective", "files", "expected"),
    [
        ("", (), {"instance": INSTANCE}),
        ("", (PATCH_HEAD_FILE, PATCH_PROTOTYPES_FILE), "both apart"),
        ("{}", (), {"instance": INSTANCE}),
        ("{patch: {name: ibot}}", (), "shared"),
        ("{patch: {name: ibot}}", (PATCH_HEAD_FILE,), "prototypes shared"),
        ("{patch: {name: ibot}}", (PATCH_HEAD_FILE, PATCH_PROTOTYPES_FILE), "both apart"),
        ("{instance: {name: none}, patch: {name: capi}}", (), "alone"),
    ],
)
def test_what_is_compared_with_prototypes_is_what_the_run_had_terms_on(tmp_path, objective, files, expected):
    own = {
        "both apart": Space("patch", PATCH_HEAD_FILE, PATCH_PROTOTYPES_FILE),
        "shared": Space("patch", HEAD_FILE, PROTOTYPES_FILE),
        "prototypes shared": Space("patch", PATCH_HEAD_FILE, PROTOTYPES_FILE),
        "alone": Space("patch", HEAD_FILE, PROTOTYPES_FILE),
    }
    if isinstance(expected, str):
        expected = {"patch": own[expected]} | ({} if expected == "alone" else {"instance": INSTANCE})
    for name in files:
        (tmp_path / name).write_bytes(b"")
    if objective:
        (tmp_path / "config.yaml").write_text(f"objective: {objective}\n")
    assert find_spaces(tmp_path, tmp_path) == expected


@pytest.mark.parametrize("name", [HEAD_FILE, PROTOTYPES_FILE])
@pytest.mark.parametrize("left", [0, 5, 60])
def test_an_exported_file_that_was_cut_is_named_in_one_line(tmp_path, name, left):
    head = ProjectionHead(5, HeadConfig(num_layers=2, hidden_dim=6, projection_dim=4))
    save_file(head.state_dict(), tmp_path / HEAD_FILE)
    save_file({"means": torch.randn(3, 4)}, tmp_path / PROTOTYPES_FILE)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
    message = (
        rf"^\S*/{name} cannot be read as safetensors \(.*\); expected what .*; export the encoder again$"
    )
    with pytest.raises(ValueError, match=message):
        project(tmp_path, torch.randn(2, 5), INSTANCE)
    read = load_projection_head if name == HEAD_FILE else load_exported_prototypes
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("is_shared", [False, True])
def test_patches_are_projected_as_in_training(tmp_path, pool, is_shared):
    """Behind the norm, which models that pool patches have behind the pooling."""
    head = HeadConfig(num_layers=2, hidden_dim=6, projection_dim=4)
    model = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        embed_dim=24,
        depth=1,
        num_heads=2,
        global_pool=pool,
        head=head,
        patch_head=None if is_shared else head,
    )
    network = SelfSupervisedNetwork(model, "teacher", OutputsConfig(patches="hidden")).eval()
    for parameter in network.backbone.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))  # norms that do nothing would be missed by nobody
    images = torch.randn(3, 3, 16, 16)
    expected = network([images], {"rows": torch.arange(48)})[2]
    space = Space("patch", HEAD_FILE if is_shared else PATCH_HEAD_FILE, PROTOTYPES_FILE)
    of_patches = network.projection_head if is_shared else network.patch_head
    save_file(of_patches.state_dict(), tmp_path / space.head)
    tokens = TimmFeatures(network.backbone, is_ours=True).patch_tokens(images)
    assert tokens.shape == (3, 16, 24)
    torch.testing.assert_close(project(tmp_path, tokens.flatten(0, 1), space), expected)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_probes_of_patches_read_the_tokens_that_the_objective_trained(tmp_path, pool):
    """Of our networks and their untrained controls; a folder of timm's gives its tokens as it hands them on."""
    sizes = {"image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = ModelConfig(name="vit_tiny_patch16_224", global_pool=pool, **sizes)
    network = SelfSupervisedNetwork(model, "teacher", OutputsConfig(patches="left_out")).eval()
    for parameter in network.backbone.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    export_encoder(
        network.backbone,
        tmp_path / "ours",
        model=model,
        mean=(0.5,),
        std=(0.5,),
        prototypes={"means": torch.randn(4, 4)},
        provenance={},
    )
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        embedding, trained = network.backbone(images, tokens=True)
        probed = PatchTokens(load_encoder(str(tmp_path / "ours")))(images)
        torch.testing.assert_close(probed["patch_tokens"], trained)
        ours, timms = (load_encoder(f"{kind}{tmp_path / 'ours'}").module for kind in ("", "local-dir:"))
        features, patches = ours.with_patches(images)
        torch.testing.assert_close(patches, trained)
        for found in (features, timms(images)):
            torch.testing.assert_close(found["embedding"], embedding)
            torch.testing.assert_close(found["mean"], features["mean"])
        untrained = load_encoder(f"random-init:{tmp_path / 'ours'}:7").module
        untrained.model.load_state_dict(ours.model.state_dict())
        torch.testing.assert_close(untrained.patch_tokens(images), trained)
        assert torch.allclose(timms.patch_tokens(images), trained, atol=1e-4) == (pool == "token")
