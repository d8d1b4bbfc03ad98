"""Patch tokens of a ViT: what it always gave, what is hidden behind the mask token, what is left out."""

import dataclasses

import pytest
import torch

from models.config import HeadConfig, ModelConfig, OutputsConfig
from models.patches import give_patches
from models.student_teacher import SelfSupervisedNetwork
from models.vit import build_backbone

MODEL = ModelConfig(
    name="vit_tiny_patch16_224",
    image_size=16,
    patch_size=4,
    embed_dim=24,
    depth=2,
    num_heads=2,
    channels=1,
    num_registers=2,
    head=HeadConfig(num_layers=2, hidden_dim=16, projection_dim=8),
)
IMAGES = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def build(**changes):
    torch.manual_seed(0)
    backbone = build_backbone(dataclasses.replace(MODEL, **changes)).eval()
    give_patches(backbone)
    return backbone


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_asked_for_tokens_the_embedding_is_the_same_and_the_tokens_are_its_own(pool):
    backbone = build(global_pool=pool)
    embedding, tokens = backbone(IMAGES, tokens=True)
    assert torch.equal(embedding, backbone(IMAGES))
    features = backbone.fc_norm(backbone.forward_features(IMAGES))
    assert torch.equal(tokens, features[:, 3:]) and tokens.shape == (3, 16, 24)


def test_hidden_patches_are_the_mask_token_and_nothing_of_the_image():
    backbone = build()
    hidden = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)) < 0.4
    token = torch.randn(24)
    found = backbone(IMAGES, tokens=True, hidden=hidden, mask_token=token)
    pixels = hidden.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(pixels, torch.randn(IMAGES.shape), IMAGES)
    for part, same in zip(found, backbone(other, tokens=True, hidden=hidden, mask_token=token), strict=True):
        assert torch.equal(part, same)
    assert not torch.allclose(found[1], backbone(IMAGES, tokens=True)[1])
    nothing = backbone(IMAGES, tokens=True, hidden=torch.zeros_like(hidden), mask_token=token)
    assert torch.equal(nothing[1], backbone(IMAGES, tokens=True)[1])


def test_left_out_patches_are_not_seen_and_the_others_keep_their_places():
    backbone = build()
    visible = torch.stack(
        [torch.randperm(16, generator=torch.Generator().manual_seed(i))[:6] for i in range(3)]
    )
    _, tokens = backbone(IMAGES, tokens=True, visible=visible)
    is_visible = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, visible, True)
    pixels = is_visible.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    other = torch.where(pixels, IMAGES, torch.randn(IMAGES.shape))
    assert torch.equal(tokens, backbone(other, tokens=True, visible=visible)[1])
    turned = visible.flip(1)
    torch.testing.assert_close(backbone(IMAGES, tokens=True, visible=turned)[1], tokens.flip(1))
    everything = torch.arange(16).expand(3, 16)
    torch.testing.assert_close(
        backbone(IMAGES, tokens=True, visible=everything)[1], backbone(IMAGES, tokens=True)[1]
    )


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        backbone = build(activation_checkpointing=recompute).train()
        _, tokens = backbone(IMAGES, tokens=True)
        tokens.square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("own_head", [False, True])
def test_rows_of_patches_are_projected_by_their_head_and_views_stay_what_they_were(own_head):
    head = HeadConfig(num_layers=2, hidden_dim=16, projection_dim=8 + 4 * own_head) if own_head else None
    model = dataclasses.replace(MODEL, patch_head=head)
    torch.manual_seed(0)
    network = SelfSupervisedNetwork(model, "student", OutputsConfig(patches="hidden")).eval()
    local = torch.randn(2, 1, 8, 8)
    rows = torch.tensor([0, 5, 17, 40])
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden.view(-1)[rows] = True
    projections, _, patches = network([IMAGES, local], {"rows": rows, "hidden": hidden})
    embedding, tokens = network.backbone(IMAGES, tokens=True, hidden=hidden, mask_token=network.mask_token)
    used = network.patch_head if own_head else network.projection_head
    torch.testing.assert_close(patches, used(tokens.flatten(0, 1)[rows]))
    expected = network.projection_head(torch.cat([embedding, network.backbone(local)]))
    torch.testing.assert_close(projections, expected)
    patches.sum().backward()
    assert network.mask_token.grad.abs().sum() > 0


def test_the_teacher_has_no_mask_token_and_begins_as_the_student():
    outputs = OutputsConfig(patches="hidden")
    student, teacher = (SelfSupervisedNetwork(MODEL, role, outputs) for role in ("student", "teacher"))
    assert student.state_dict().keys() - teacher.state_dict().keys() == {"mask_token"}
    assert not teacher.state_dict().keys() - student.state_dict().keys()


def test_a_network_without_patch_tokens_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"objective.patch needs patch tokens.*set model.name") as error:
        SelfSupervisedNetwork(ModelConfig(name="resnet18"), "student", OutputsConfig(patches="hidden"))
    assert "\n" not in str(error.value)
