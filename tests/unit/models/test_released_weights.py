"""Donors with drawn weights, saved as timm saves released ones: what they compute must survive where it can."""

import json

import pytest
import timm
import torch
from timm.layers import resample_patch_embed

from models.config import ModelConfig
from models.released_weights import initialise_from
from models.vit import backbone_arguments, build_backbone

PLAIN = "vit_tiny_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"  # no_embed_class, LayerScale, four registers


def options(name=PLAIN, **changes):
    sizes = {"image_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return ModelConfig(name=name, **(sizes | changes))


def save_donor(folder, config):
    """Returns a donor none of whose tensors is where its initialisation left it."""
    torch.manual_seed(1)
    donor = build_backbone(config).eval()
    with torch.no_grad():
        for tensor in donor.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    timm.models.save_for_hf(
        donor,
        str(folder),
        model_args=backbone_arguments(config),
        safe_serialization=True,
        data_config={"input_size": (config.channels, config.image_size, config.image_size)},
    )
    return donor


def start(tmp_path, donor_config, config):
    """Returns (donor, receiver, what was loaded)."""
    donor = save_donor(tmp_path / "donor", donor_config)
    receiver = build_backbone(config).eval()
    return donor, receiver, initialise_from(receiver, str(tmp_path / "donor"))


def assert_same_embedding(donor, receiver, images):
    with torch.no_grad():
        expected, found = donor(images), receiver(images)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_an_exported_folder_is_taken_whole(tmp_path):
    donor, receiver, weights = start(tmp_path, options(channels=1), options(channels=1))
    assert weights.missing == weights.unexpected == weights.adapted == []
    for name, value in donor.state_dict().items():
        assert torch.equal(receiver.state_dict()[name], value), name
    again = build_backbone(options(channels=1))
    initialise_from(again, f"local-dir:{tmp_path / 'donor'}")
    assert torch.equal(again.cls_token, donor.cls_token)


def test_a_folder_with_a_pickle_of_tensors_is_taken(tmp_path):
    donor = save_donor(tmp_path / "donor", options())
    (tmp_path / "donor" / "model.safetensors").unlink()
    torch.save(donor.state_dict(), tmp_path / "donor" / "pytorch_model.bin")
    receiver = build_backbone(options()).eval()
    initialise_from(receiver, str(tmp_path / "donor"))
    assert_same_embedding(donor, receiver, torch.randn(2, 3, 28, 28))


@pytest.mark.parametrize("name", [PLAIN, "resnet18"])
def test_a_colour_donor_sees_grey_images_as_colours_that_are_equal(tmp_path, name):
    size = {"image_size": 28} if name == PLAIN else {}
    config = options if name == PLAIN else ModelConfig
    donor, receiver, weights = start(
        tmp_path, config(name=name, **size), config(name=name, channels=1, **size)
    )
    grey = torch.randn(2, 1, 28, 28)
    assert_same_embedding(donor, lambda images: receiver(images[:, :1]), grey.expand(2, 3, 28, 28))
    assert weights.missing == [] and any("from 3 to 1 channels" in line for line in weights.adapted)


def test_a_grey_donor_is_spread_over_colours(tmp_path):
    donor, receiver, _ = start(tmp_path, options(channels=1), options())
    grey = torch.randn(2, 1, 28, 28)
    assert_same_embedding(donor, lambda images: receiver(images.expand(2, 3, 28, 28)), grey)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (options(), options(REGISTERS, num_registers=0)),
        (options(REGISTERS), options(num_registers=4, init_values=0.1)),
    ],
    ids=["into-no-embed-class", "out-of-no-embed-class"],
)
def test_tokens_with_and_without_positions_compute_the_same(tmp_path, given, wanted):
    donor, receiver, weights = start(tmp_path, given, wanted)
    assert_same_embedding(donor, receiver, torch.randn(2, 3, 28, 28))
    assert weights.missing == weights.unexpected == []


@pytest.mark.parametrize("name", [PLAIN, REGISTERS])
def test_new_registers_start_from_nothing_and_are_said(tmp_path, name):
    held = {PLAIN: None, REGISTERS: 2}[name]
    donor, receiver, weights = start(
        tmp_path, options(name, num_registers=held), options(name, num_registers=4)
    )
    num_held = held or 0
    assert any(f"reg_token: {4 - num_held} of 4" in line for line in weights.adapted)
    assert receiver.reg_token.shape[1] == 4 and receiver.reg_token[:, num_held:].abs().max() < 1e-4
    if held:
        assert torch.equal(receiver.reg_token[:, :held], donor.reg_token)
    grid = slice(-16, None)
    assert torch.equal(receiver.pos_embed[:, grid], donor.pos_embed[:, grid])
    assert torch.equal(receiver.cls_token, donor.cls_token)
    if name == PLAIN:
        assert torch.equal(receiver.pos_embed[:, :1], donor.pos_embed[:, :1])


def test_more_registers_than_the_network_has_are_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"4 register tokens and the network 0; .*set model\.num_registers=4"
    ):
        start(tmp_path, options(REGISTERS), options(REGISTERS, num_registers=0))


@pytest.mark.parametrize("registers", [None, 4])
def test_positions_are_resampled_and_prefix_tokens_kept(tmp_path, registers):
    donor, receiver, weights = start(
        tmp_path,
        options(num_registers=registers),
        options(num_registers=registers, image_size=42),
    )
    num_prefix = 1 + (registers or 0)
    assert receiver.pos_embed.shape[1] == num_prefix + 36 and weights.missing == []
    assert torch.equal(receiver.pos_embed[:, :num_prefix], donor.pos_embed[:, :num_prefix])
    grid = donor.pos_embed[:, num_prefix:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        receiver.pos_embed[:, num_prefix:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2), expected
    )


def test_patch_kernels_are_resampled(tmp_path):
    donor, receiver, _ = start(tmp_path, options(patch_size=14), options(patch_size=7, image_size=14))
    expected = resample_patch_embed(donor.patch_embed.proj.weight, [7, 7])
    torch.testing.assert_close(receiver.patch_embed.proj.weight, expected)


@pytest.mark.parametrize(("given", "wanted"), [("token", "avg"), ("avg", "token")])
def test_the_final_norm_follows_the_pooling(tmp_path, given, wanted):
    donor, receiver, weights = start(tmp_path, options(global_pool=given), options(global_pool=wanted))
    norms = [
        getattr(m, "norm" if pool == "token" else "fc_norm")
        for m, pool in ((donor, given), (receiver, wanted))
    ]
    assert torch.equal(norms[0].weight, norms[1].weight) and torch.equal(norms[0].bias, norms[1].bias)
    assert weights.missing == weights.unexpected == []


def test_layer_scale_starts_at_one_where_the_donor_has_none(tmp_path):
    donor, receiver, weights = start(tmp_path, options(), options(init_values=1e-5))
    assert_same_embedding(donor, receiver, torch.randn(2, 3, 28, 28))
    assert any("LayerScale" in line for line in weights.adapted)


def test_layer_scale_that_would_be_lost_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"blocks\.0\.ls1\.gamma .*set model\.init_values"):
        start(tmp_path, options(init_values=0.1), options())


def test_a_smaller_donor_names_what_is_missing(tmp_path):
    _, _, weights = start(tmp_path, options(depth=1), options())
    assert len(weights.missing) == 12 and all(key.startswith("blocks.1.") for key in weights.missing)


def test_another_width_is_refused_by_the_tensors_name(tmp_path):
    with pytest.raises(
        ValueError, match=r"model\.init is .*blocks\.0\.attn\.proj\.bias has shape \(24,\); expected \(32,\)"
    ):
        start(tmp_path, options(), options(embed_dim=32))


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"shares no tensor with the network; .*set model\.init or model\.name"
    ):
        start(tmp_path, options(), ModelConfig(name="resnet18"))


def test_a_network_without_numbers_is_told_the_same(tmp_path):
    save_donor(tmp_path / "donor", options())
    config = options(num_registers=4, channels=1, image_size=42)
    with torch.device("meta"):
        receiver = build_backbone(config)
    tried = initialise_from(receiver, str(tmp_path / "donor"))
    assert tried == initialise_from(build_backbone(config), str(tmp_path / "donor"))
    assert all(parameter.is_meta for parameter in receiver.parameters())


@pytest.mark.parametrize("damage", ["nothing", "no-config", "transformers", "cut"])
def test_what_cannot_be_read_is_one_line(tmp_path, damage):
    folder = tmp_path / "donor"
    if damage != "nothing":
        save_donor(folder, options())
    if damage == "no-config":
        (folder / "config.json").unlink()
    if damage == "transformers":
        (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    if damage == "cut":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.init is .* cannot be loaded .*set model\.init") as caught:
        initialise_from(build_backbone(options()), str(folder))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
