import pytest
import torch

from models.config import HeadConfig, ModelConfig
from models.student_teacher import SelfSupervisedNetwork
from prototypes.learned import LearnedPrototypes
from training.config import OptimConfig
from training.engines.interface import TrainedNetwork
from training.engines.optimizer import build_optimizer, build_parameter_groups, set_schedule_
from training.schedules import StepSchedule


@pytest.fixture
def student():
    config = ModelConfig(
        name="vit_tiny_patch16_224",
        image_size=28,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        head=HeadConfig(hidden_dim=16, projection_dim=8),
    )
    return TrainedNetwork(SelfSupervisedNetwork(config, "student"), LearnedPrototypes(32, 8, seed=0))


def decaying_names(student, groups):
    decaying = {id(p) for group in groups if group["decays"] for p in group["params"]}
    return {name for name, p in student.named_parameters() if id(p) in decaying}


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(student, layer_decay):
    groups = build_parameter_groups(student, OptimConfig(layer_decay=layer_decay))
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in student.parameters())
    decaying = decaying_names(student, groups)
    assert "network.backbone.blocks.0.attn.qkv.weight" in decaying
    assert "network.projection_head.mlp.0.weight" in decaying
    for name in decaying:
        assert name.endswith("weight") and "norm" not in name, name
    assert not decaying & {
        "network.backbone.pos_embed",
        "network.backbone.cls_token",
        "learned_prototypes.weight",
    }


def test_layer_decay_slows_the_first_layers(student):
    groups = build_parameter_groups(student, OptimConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = student.network.backbone.blocks
    assert scale[id(blocks[0].mlp.fc1.weight)] < scale[id(blocks[1].mlp.fc1.weight)] <= 1.0


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_patch_embedding_has_a_rate_of_its_own(student, layer_decay):
    """Beside the layers' decay; all else stays as it was."""
    embedding = {id(p) for p in student.network.backbone.patch_embed.parameters()}
    assert len(embedding) == 2
    plain, slow = (
        {
            id(p): (group["lr_scale"], group["decays"])
            for group in build_parameter_groups(
                student, OptimConfig(layer_decay=layer_decay, patch_embed_lr_scale=scale)
            )
            for p in group["params"]
        }
        for scale in (1.0, 0.2)
    )
    assert slow.keys() == plain.keys()
    for parameter, (rate, decays) in plain.items():
        expected = 0.2 * rate if parameter in embedding else rate
        assert slow[parameter] == (pytest.approx(expected), decays)


def test_a_rate_for_a_patch_embedding_that_is_not_there_is_refused():
    network = TrainedNetwork(
        SelfSupervisedNetwork(ModelConfig(name="resnet18", image_size=32), "student"), None
    )
    with pytest.raises(
        ValueError, match=r"expected 1 with ResNet, which has no patch embedding; set optim\.patch"
    ):
        build_parameter_groups(network, OptimConfig(patch_embed_lr_scale=0.2))


def test_schedule_reaches_every_group(student):
    optimizer = build_optimizer(student, OptimConfig(prototype_lr_scale=30.0))
    set_schedule_(optimizer.param_groups, StepSchedule(lr=0.1, weight_decay=0.2, ema_momentum=0.9))
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 3.0}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}


def test_learned_prototypes_stay_where_they_are_at_first(student):
    optimizer = build_optimizer(student, OptimConfig(weight_decay=0.0))
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    for moves in (False, True):
        schedule = StepSchedule(lr=0.1, weight_decay=0.2, ema_momentum=0.9, prototypes_move=moves)
        set_schedule_(optimizer.param_groups, schedule)
        projections, prototypes, *_ = student([torch.randn(4, 3, 28, 28)])
        (projections @ prototypes.T).square().sum().backward()
        optimizer.step()
        stayed = {name for name, p in student.named_parameters() if torch.equal(p, before[name])}
        assert stayed == (set() if moves else {"learned_prototypes.weight"})


def test_lars_gives_every_matrix_a_rate_of_its_own_prototypes_too(student):
    """timm's adapts only what decays: the prototypes of a joint ResNet-50 moved 5 to 200 times too slowly."""
    config = OptimConfig(optimizer="lars", trust_coefficient=0.01, weight_decay=0.0)
    optimizer = build_optimizer(student, config)
    set_schedule_(optimizer.param_groups, StepSchedule(lr=0.1, weight_decay=0.0, ema_momentum=0.9))
    matrices = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in student.named_parameters()
        if name in ("learned_prototypes.weight", "network.backbone.blocks.0.attn.qkv.weight")
    }
    projections, prototypes, *_ = student([torch.randn(4, 3, 28, 28)])
    (projections @ prototypes.T).square().sum().backward()
    optimizer.step()
    for name, (parameter, before) in matrices.items():
        moved = torch.linalg.vector_norm(parameter.detach() - before) / torch.linalg.vector_norm(before)
        assert float(moved) == pytest.approx(0.1 * 0.01, rel=1e-2), name


def test_lars_steps(student):
    optimizer = build_optimizer(student, OptimConfig(optimizer="lars"))
    set_schedule_(optimizer.param_groups, StepSchedule(lr=0.1, weight_decay=1e-6, ema_momentum=0.9))
    before = student.network.projection_head.mlp[0].weight.detach().clone()
    projections, *_ = student([torch.randn(4, 3, 28, 28)])
    projections.square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, student.network.projection_head.mlp[0].weight)
