import pytest
import torch

from models.config import HeadConfig, ModelConfig, OutputsConfig
from models.student_teacher import SelfSupervisedNetwork, update_ema_
from models.vit import ImageSizeError, backbone_arguments, build_backbone, measure_embed_dim


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
    projections, embeddings, patches = network([large, small])
    assert embeddings is None and patches is None
    assert projections.shape == (10, 8)
    torch.testing.assert_close(projections[:4], network([large])[0])
    torch.testing.assert_close(projections[4:], network([small])[0])


def test_student_and_teacher_are_built_alike_and_only_one_drops_paths():
    student = SelfSupervisedNetwork(tiny(drop_path_rate=0.5), "student")
    teacher = SelfSupervisedNetwork(tiny(drop_path_rate=0.5), "teacher")
    assert student.state_dict().keys() == teacher.state_dict().keys()
    assert not any(p.requires_grad for p in teacher.parameters())
    images = [torch.randn(8, 1, 28, 28)]
    assert torch.equal(teacher(images)[0], teacher(images)[0])
    assert not torch.equal(student(images)[0], student(images)[0])


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
        projections, *_ = network([torch.empty(2, 3, size, size), torch.empty(4, 3, size // 2, size // 2)])
    assert projections.shape == (6, 256)
    assert round(sum(p.numel() for p in network.backbone.parameters()) / 1e6) == millions


def test_resnet_takes_no_vit_options():
    backbone = build_backbone(ModelConfig(name="resnet50"))
    assert backbone(torch.randn(1, 3, 64, 64)).shape == (1, 2048)
    assert backbone_arguments(ModelConfig(name="resnet50")) == {}


@pytest.mark.parametrize(
    ("name", "option"),
    [("test_resnet", "patch_size"), ("test_convnext", "depth"), ("vit_tiny_patch16_224", "output_stride")],
)
def test_an_option_that_the_architecture_does_not_have_is_refused(name, option):
    with pytest.raises(ValueError, match=rf"model.{option} is 8 with {name}; .*set model.{option}=null"):
        build_backbone(ModelConfig(name=name, image_size=32, **{option: 8}))


@pytest.mark.parametrize(
    ("option", "cells"),
    [({}, 1), ({"output_stride": 8}, 4), ({"name": "test_convnext3", "output_stride": 16}, 2)],
)
def test_small_images_keep_their_cells_and_channels_last_change_nothing(option, cells):
    backbone = build_backbone(ModelConfig(**{"name": "test_resnet", "image_size": 32} | option)).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = backbone.forward_features(images)
    assert maps.shape[2:] == (cells, cells)
    torch.testing.assert_close(backbone(images), backbone.forward_head(maps))


def test_unknown_architecture_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean vit_small_patch16_224"):
        build_backbone(ModelConfig(name="vit_smal_patch16_224"))


def test_a_normalised_bottleneck_has_unit_rows_and_embeddings_come_on_demand():
    head = HeadConfig(hidden_dim=16, projection_dim=8, normalize_bottleneck=True)
    torch.manual_seed(0)
    unit = SelfSupervisedNetwork(tiny(head=head), "student", OutputsConfig(embeddings=True)).eval()
    torch.manual_seed(0)
    plain = SelfSupervisedNetwork(tiny(), "student").eval()
    crops = [torch.randn(4, 1, 28, 28), torch.randn(6, 1, 14, 14)]
    projections, embeddings, _ = unit(crops)
    torch.testing.assert_close(projections, torch.nn.functional.normalize(plain(crops)[0], dim=1))
    torch.testing.assert_close(embeddings, unit.backbone(crops[0]))


def test_batch_norm_heads_have_no_idle_bias():
    head = SelfSupervisedNetwork(
        tiny(head=HeadConfig(use_bn=True, hidden_dim=16, projection_dim=8)), "student"
    )
    images = [torch.randn(8, 1, 28, 28)]
    head(images)[0].square().sum().backward()
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


def test_width_is_measured_where_num_features_is_another():
    config = ModelConfig(name="mobilenetv3_small_100", image_size=64)
    network = SelfSupervisedNetwork(config, "student").eval()
    assert network.backbone.num_features == 576 and measure_embed_dim(config, (64, 64)) == 1024
    assert network([torch.randn(2, 3, 64, 64)])[0].shape == (2, 256)


def test_measuring_draws_no_random_numbers():
    measure_embed_dim.cache_clear()
    before = torch.get_rng_state()
    measure_embed_dim(tiny(), (28, 28))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "cait_xxs24_224", "hiera_tiny_224"])
def test_networks_of_one_size_are_found_without_numbers(name):
    config = ModelConfig(name=name)
    assert measure_embed_dim(config, (224, 224)) in (768, 192)
    with pytest.raises(ImageSizeError):
        measure_embed_dim(config, (96, 96))


def test_what_the_meta_device_cannot_do_is_tried_on_numbers(monkeypatch):
    class Counting(torch.nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3)) * (1.0 + float(images.sum()))

    monkeypatch.setattr("models.vit.build_backbone", lambda config, drop_path_rate: Counting())
    measure_embed_dim.cache_clear()
    assert measure_embed_dim(tiny(channels=3), (28, 28)) == 3
    measure_embed_dim.cache_clear()


def test_tokens_without_a_pooling_are_no_embedding():
    with pytest.raises(ValueError, match=r"model\.global_pool is '', .* 2 axes .*set model\.global_pool"):
        measure_embed_dim(tiny(global_pool=""), (28, 28))


def test_a_width_that_heads_do_not_divide_is_one_line():
    with pytest.raises(ValueError, match="set the options under model"):
        build_backbone(tiny(embed_dim=25))
