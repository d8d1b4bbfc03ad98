import pytest
import torch

from models.config import HeadConfig, ModelConfig
from models.student_teacher import SelfSupervisedNetwork, update_ema_
from models.vit import backbone_arguments, build_backbone, initialise_from


def tiny(**changes):
    options = {
        "name": "vit_tiny_patch16_224",
        "image_size": 28,
        "patch_size": 7,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "channels": 1,
        "head": HeadConfig(hidden_dim=16, projection_dim=8),
    }
    return ModelConfig(**(options | changes))


def test_crops_of_two_sizes_give_one_row_each_in_order():
    network = SelfSupervisedNetwork(tiny(), "student").eval()
    large, small = torch.randn(4, 1, 28, 28), torch.randn(6, 1, 14, 14)
    projections = network([large, small])
    assert projections.shape == (10, 8)
    torch.testing.assert_close(projections[:4], network([large]))
    torch.testing.assert_close(projections[4:], network([small]))


def test_student_and_teacher_are_built_alike_and_only_one_drops_paths():
    student = SelfSupervisedNetwork(tiny(drop_path_rate=0.5), "student")
    teacher = SelfSupervisedNetwork(tiny(drop_path_rate=0.5), "teacher")
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert not any(p.requires_grad for p in teacher.parameters())
    images = [torch.randn(8, 1, 28, 28)]
    assert torch.equal(teacher(images), teacher(images))
    assert not torch.equal(student(images), student(images))


@pytest.mark.parametrize(
    ("name", "size", "millions"),
    [
        pytest.param("vit_base_patch16_224", 224, 86, marks=pytest.mark.slow),
        ("vit_large_patch16_224", 224, 303),
        ("vit_so400m_patch14_siglip_224", 224, 428),
        pytest.param("vit_giant_patch14_dinov2", 224, 1135, marks=pytest.mark.slow),
        ("vit_7b_patch16_dinov3", 256, 6716),
    ],
)
def test_large_names_build_without_memory(name, size, millions):
    with torch.device("meta"):
        network = SelfSupervisedNetwork(ModelConfig(name=name, image_size=size), "student")
        projections = network([torch.empty(2, 3, size, size), torch.empty(4, 3, size // 2, size // 2)])
    assert projections.shape == (6, 256)
    assert round(sum(p.numel() for p in network.backbone.parameters()) / 1e6) == millions


def test_resnet_takes_no_vit_options():
    backbone = build_backbone(ModelConfig(name="resnet50"))
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, 2048)
    assert backbone_arguments(ModelConfig(name="resnet50")) == {}


def test_unknown_architecture_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean vit_small_patch16_224"):
        build_backbone(ModelConfig(name="vit_smal_patch16_224"))


def test_batch_norm_heads_have_no_idle_bias():
    head = SelfSupervisedNetwork(
        tiny(head=HeadConfig(use_bn=True, hidden_dim=16, projection_dim=8)), "student"
    )
    images = [torch.randn(8, 1, 28, 28)]
    head(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.projection_head.parameters())


def test_average_follows_a_float64_reference_through_tiny_updates():
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.randn(64, generator=generator), torch.randn(5, 3, generator=generator)]
    student = [t.clone() for t in teacher]
    reference = [t.double() for t in teacher]
    start = [t.clone() for t in teacher]
    for _ in range(100):
        for tensor in student:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
        update_ema_(teacher, student, 0.999)
        reference = [r + (s.double() - r) * (1 - 0.999) for r, s in zip(reference, student, strict=True)]
    for ours, exact, before in zip(teacher, reference, start, strict=True):
        assert ((ours.double() - exact).abs() / exact.abs().clamp(min=1)).max() < 1e-6
        assert not torch.equal(ours, before)


def test_average_in_low_precision_is_refused():
    with pytest.raises(ValueError, match="fp32"):
        update_ema_([torch.zeros(2, dtype=torch.bfloat16)], [torch.zeros(2)], 0.9)


def test_initialise_from_an_exported_folder_counts_every_key(tmp_path):
    import timm

    donor = build_backbone(tiny())
    model_args = backbone_arguments(tiny())
    timm.models.save_for_hf(donor, str(tmp_path / "donor"), model_args=model_args, safe_serialization=True)
    receiver = build_backbone(tiny())
    counts = initialise_from(receiver, str(tmp_path / "donor"))
    assert counts["missing"] == counts["unexpected"] == []
    for name, value in donor.state_dict().items():
        assert torch.equal(receiver.state_dict()[name], value), name


def test_initialise_from_a_smaller_donor_names_what_is_missing(tmp_path):
    import timm

    donor = build_backbone(tiny(depth=1))
    arguments = backbone_arguments(tiny(depth=1))
    timm.models.save_for_hf(donor, str(tmp_path / "donor"), model_args=arguments, safe_serialization=True)
    receiver = build_backbone(tiny(image_size=14))
    counts = initialise_from(receiver, str(tmp_path / "donor"))
    assert len(counts["missing"]) == 12 and all(key.startswith("blocks.1.") for key in counts["missing"])
    assert counts["unexpected"] == [] and "pos_embed" in counts["loaded"]  # resampled to the smaller grid


def test_initialise_from_nothing_is_one_line():
    with pytest.raises(ValueError, match=r"model.init is '/nowhere/at-all'"):
        initialise_from(build_backbone(tiny()), "/nowhere/at-all")
