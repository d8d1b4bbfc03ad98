"""Every family of transformers that is listed: its features beside a forward pass written out here."""

import pytest
import timm
import torch
import transformers as hf

from evaluation.config import TransformConfig
from evaluation.encoders.backbones import TimmFeatures
from evaluation.encoders.hf_models import FAMILIES, TransformersFeatures
from evaluation.encoders.load import EncoderError, load_encoder

TRANSFORM = TransformConfig(mean=(0.5,), std=(0.25,), image_size=32)
VIT = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
CONV = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 1, 1]}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
HIERA = {
    "image_size": [32, 32],
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [1, 1, 2],
    "num_query_pool": 2,
}


def pooled_by_tanh(model, last):
    return torch.tanh(model.pooler.dense(last[:, 0]))


def first(model, last):
    return last[:, 0]


def normed_mean(model, last):
    cells = last.mean(dim=(2, 3)) if last.ndim == 4 else last.mean(dim=1)
    return (model.pooler.layernorm if hasattr(model, "pooler") else model.layernorm)(cells)


def mean(model, last):
    return last.mean(dim=(2, 3)) if last.ndim == 4 else last.mean(dim=1)


# Configuration, tokens before the patches, whether the first is CLS, and what the model's own pooling is.
CASES = {
    "vit": (hf.ViTConfig(**VIT), 1, True, pooled_by_tanh),
    "deit": (hf.DeiTConfig(**VIT), 2, True, pooled_by_tanh),
    "beit": (
        hf.BeitConfig(**VIT, use_mean_pooling=True),
        1,
        True,
        lambda model, last: model.pooler.layernorm(last[:, 1:].mean(dim=1)),
    ),
    "vit_msn": (hf.ViTMSNConfig(**VIT), 1, True, first),
    "ijepa": (hf.IJepaConfig(**VIT), 0, False, mean),
    "dinov2": (hf.Dinov2Config(**VIT), 1, True, first),
    "dinov2_with_registers": (hf.Dinov2WithRegistersConfig(**VIT, num_register_tokens=3), 4, True, first),
    "dinov3_vit": (hf.DINOv3ViTConfig(**VIT, num_register_tokens=2), 3, True, first),
    "dinov3_convnext": (
        hf.DINOv3ConvNextConfig(**CONV),
        1,
        False,
        # The pooled token is the norm of the mean of the cells; its cells went through the same norm.
        first,
    ),
    "clip_vision_model": (
        hf.CLIPVisionConfig(**VIT),
        1,
        True,
        lambda model, last: model.post_layernorm(last[:, 0]),
    ),
    "siglip_vision_model": (hf.SiglipVisionConfig(**VIT), 0, False, lambda model, last: model.head(last)),
    "swin": (hf.SwinConfig(**SWIN), 0, False, mean),
    "swinv2": (hf.Swinv2Config(**SWIN), 0, False, mean),
    "hiera": (hf.HieraConfig(**HIERA), 0, False, normed_mean),
    "convnext": (hf.ConvNextConfig(**CONV), 0, False, normed_mean),
    "convnextv2": (hf.ConvNextV2Config(**CONV), 0, False, normed_mean),
    "resnet": (hf.ResNetConfig(embedding_size=8, **CONV), 0, False, mean),
    "regnet": (hf.RegNetConfig(embedding_size=8, groups_width=4, **CONV), 0, False, mean),
}


def save(config, folder):
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and "running" not in name:
            # Norms start at the identity and biases at 0: nothing would show that one of them was left out.
            tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", CASES)
def test_features_equal_a_forward_written_out(family, tmp_path):
    config, prefix, has_cls, pool = CASES[family]
    model = save(config, tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}", transform=TRANSFORM)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last = model(pixel_values=images).last_hidden_state
        features, tokens = encoder.module(images), encoder.module.patch_tokens(images)
        expected = pool(model, last)
    patches = last.flatten(2).transpose(1, 2) if last.ndim == 4 else last[:, prefix:]
    assert torch.allclose(features["embedding"], expected, atol=1e-5)
    assert torch.allclose(tokens, patches, atol=1e-5)
    assert torch.allclose(features["mean"], patches.mean(dim=1), atol=1e-5)
    assert ("cls" in features) == has_cls
    if has_cls:
        norm = model.post_layernorm if family == "clip_vision_model" else torch.nn.Identity()
        assert torch.allclose(features["cls"][:, -1], norm(last[:, 0]), atol=1e-5)


@pytest.mark.parametrize("family", [name for name in CASES if FAMILIES[name].columnar] + ["swin", "hiera"])
def test_patch_tokens_stand_in_row_order(family):
    """The token that changes most when a cell of the image does is that cell's."""
    torch.manual_seed(0)
    module = TransformersFeatures(hf.AutoModel.from_config(CASES[family][0]).eval())
    images = 0.3 * torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        before = module.patch_tokens(images)
        side = round(before.shape[1] ** 0.5)
        size = 32 // side
        for cell in range(side**2):
            rows, columns = (slice(size * place, size * place + size) for place in divmod(cell, side))
            changed = images.clone()
            changed[:, :, rows, columns] += torch.randn(len(images), 3, size, size)
            # On the average of many images: another token may be shaken more in one of them.
            moved = (module.patch_tokens(changed) - before).norm(dim=2).mean(dim=0)
            assert moved.argmax() == cell


def test_every_listed_family_has_a_forward_here():
    assert set(FAMILIES) == {*CASES, "vit_mae"}


def test_a_masked_autoencoder_sees_the_whole_image_in_order(tmp_path):
    model = save(hf.ViTMAEConfig(**VIT), tmp_path)
    plain = hf.ViTModel(
        hf.ViTConfig(**VIT, layer_norm_eps=model.config.layer_norm_eps), add_pooling_layer=False
    )
    plain.load_state_dict(model.state_dict())
    encoder = load_encoder(f"hf:{tmp_path}", transform=TRANSFORM)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last = plain.eval()(pixel_values=images).last_hidden_state
        features = encoder.module(images)
        assert torch.allclose(encoder.module.patch_tokens(images), last[:, 1:], atol=1e-5)
    assert torch.allclose(features["embedding"], last[:, 0], atol=1e-5)
    assert torch.allclose(features["mean"], last[:, 1:].mean(dim=1), atol=1e-5)


def test_two_forwards_that_differ_are_refused(tmp_path, monkeypatch):
    save(hf.Dinov2Config(**VIT), tmp_path)
    ask = TransformersFeatures._ask

    def drawn(self, images, **options):
        """One token in ten is dropped at random, whatever the mode."""
        output = ask(self, images, **options)
        output.last_hidden_state = torch.nn.functional.dropout(output.last_hidden_state, 0.1)
        return output

    monkeypatch.setattr(TransformersFeatures, "_ask", drawn)
    with pytest.raises(EncoderError, match="differs between two forwards") as caught:
        load_encoder(f"hf:{tmp_path}", transform=TRANSFORM)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip_vision_model"])
def test_earlier_blocks_are_normed_like_the_last(family, tmp_path):
    config, *_ = CASES[family]
    model = save(config, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    blocks = load_encoder(f"hf:{tmp_path}", transform=TRANSFORM, num_blocks=2).module(images)["cls"]
    with torch.no_grad():
        hidden = model(pixel_values=images, output_hidden_states=True).hidden_states
    norm = model.post_layernorm if family == "clip_vision_model" else model.layernorm
    expected = torch.stack([norm(hidden[-2][:, 0]), norm(hidden[-1][:, 0])], dim=1)
    assert torch.allclose(blocks, expected, atol=1e-5)
    with pytest.raises(EncoderError, match="num_blocks is 9; expected at most 3"):
        load_encoder(f"hf:{tmp_path}", transform=TRANSFORM, num_blocks=9)


def test_a_two_tower_model_is_its_vision_tower(tmp_path):
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    both = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=8)).eval()
    both.save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}", transform=TRANSFORM)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = both.vision_model(pixel_values=images).pooler_output
    assert torch.allclose(encoder.module(images)["embedding"], expected, atol=1e-6)


def test_a_pooler_that_the_checkpoint_lacks_is_not_used(tmp_path):
    hf.ViTForImageClassification(hf.ViTConfig(**VIT)).save_pretrained(tmp_path)
    loaded = [load_encoder(f"hf:{tmp_path}", transform=TRANSFORM) for _ in range(2)]
    assert loaded[0].weights_sha256 == loaded[1].weights_sha256, "a random pooler was kept"
    features = loaded[0].module(torch.randn(2, 3, 32, 32))
    assert torch.equal(features["embedding"], features["cls"][:, 0])


def test_a_checkpoint_that_lacks_other_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save(hf.Dinov2Config(**VIT), tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    kept.pop("layernorm.weight")
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks 1 tensors, as layernorm.weight"):
        load_encoder(f"hf:{tmp_path}", transform=TRANSFORM)


def test_a_model_of_unknown_structure_is_refused_by_name(tmp_path):
    config = hf.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    hf.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="model type is 'poolformer', whose tokens are not known here"):
        load_encoder(f"hf:{tmp_path}", transform=TRANSFORM)


SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
TIMM = [
    ("vit_tiny_patch16_224", SMALL, 1, True),
    ("vit_small_patch16_dinov3", SMALL, 5, True),
    ("vit_small_patch16_rope_224", SMALL, 1, True),
    ("vit_base_patch16_rope_reg1_gap_256", SMALL, 1, False),
    ("naflexvit_base_patch16_gap", SMALL, 4, False),
    ("deit_tiny_distilled_patch16_224", SMALL, 2, True),
    ("beit_base_patch16_224", SMALL, 1, True),
]


@pytest.mark.parametrize(("name", "options", "prefix", "has_cls"), TIMM, ids=[case[0] for case in TIMM])
def test_timm_tokens_are_what_the_model_declares(name, options, prefix, has_cls):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    images = torch.randn(2, 3, 32, 32)
    for num_blocks in (1, 2):
        features = TimmFeatures(model, num_blocks)(images)
        tokens = model.forward_features(images)
        assert torch.allclose(features["embedding"], model(images), atol=1e-6)
        norm = getattr(model, "fc_norm", None) or torch.nn.Identity()
        assert torch.allclose(features["mean"], norm(tokens[:, prefix:].mean(dim=1)), atol=1e-6)
        assert ("cls" in features) == has_cls, "a register is no CLS token"
        if has_cls:
            assert features["cls"].shape == (2, num_blocks, 24)
            assert torch.allclose(features["cls"][:, -1], norm(tokens[:, 0]), atol=1e-5)


def test_a_timm_model_that_hides_its_prefix_has_no_patches():
    model = timm.create_model("volo_d1_224", num_classes=0, img_size=64).eval()
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[1] == 17  # CLS and 16 patches
    module = TimmFeatures(model)
    images = torch.randn(1, 3, 64, 64)
    assert set(module(images)) == {"embedding"} and module.patch_tokens(images) is None


def test_blocks_of_a_timm_model_that_keeps_them_to_itself_are_refused():
    model = timm.create_model("cait_xxs24_224", num_classes=0, **SMALL)
    with pytest.raises(EncoderError, match="num_blocks is 2; expected 1 for Cait"):
        TimmFeatures(model, 2)
