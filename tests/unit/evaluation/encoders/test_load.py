import json
import shutil

import pytest
import timm
import torch
from PIL import Image

from evaluation.config import TransformConfig
from evaluation.encoders.load import EncoderError, load_controls, load_encoder
from evaluation.encoders.weights_files import read_weights_file

GREY = Image.new("L", (28, 28), 128)
COLOUR = Image.new("RGB", (64, 48), (255, 0, 0))


def test_a_run_its_checkpoint_and_its_folder_are_one_encoder(run_dir):
    folder = run_dir / "checkpoints" / "step-00000010" / "teacher"
    found = [load_encoder(str(path)) for path in (run_dir, folder.parent, folder)]
    found.append(load_encoder(f"local-dir:{folder}"))
    assert len({encoder.weights_sha256 for encoder in found}) == 1
    assert found[0].run_dir == run_dir.resolve() and found[0].step == 10 and found[0].role == "teacher"
    assert found[0].transform.describe()["mean"] == [0.3] and found[0].transform(GREY).shape == (1, 28, 28)


def test_features_are_the_networks_own(run_dir):
    encoder = load_encoder(str(run_dir), num_blocks=2)
    images = torch.randn(3, 1, 28, 28)
    features = encoder.module(images)
    folder = run_dir / "checkpoints" / "step-00000010" / "teacher"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    tokens = model.forward_features(images)
    assert torch.equal(features["embedding"], model(images))
    assert torch.allclose(features["mean"], tokens[:, 1:].mean(dim=1))
    assert features["cls"].shape == (3, 2, 24) and torch.allclose(
        features["cls"][:, -1], tokens[:, 0], atol=1e-6
    )
    assert encoder.module.patch_tokens(images).shape == (3, 16, 24)
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())


def test_an_incomplete_checkpoint_is_passed_over(run_dir):
    (run_dir / "checkpoints" / "step-00000020" / "teacher").mkdir(parents=True)
    assert load_encoder(str(run_dir)).step == 10


PARTS = ("model.safetensors", "config.json", "prototypes.safetensors", "projection_head.safetensors")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_checkpoint_is_passed_over_and_refused_where_it_is_named(name, run_dir, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    newest = run / "checkpoints" / "step-00000030"
    shutil.copytree(run / "checkpoints" / "step-00000010", newest)
    assert load_encoder(str(run)).step == 30 and "passing over" not in caplog.text
    flip(newest / "teacher" / name)
    assert load_encoder(str(run)).step == 10
    assert f"passing over checkpoint {newest}: teacher/{name} does not match its SHA-256" in caplog.text
    for spec in (newest, newest / "teacher", f"local-dir:{newest / 'teacher'}"):
        with pytest.raises(EncoderError, match=rf"step-00000030 is damaged: teacher/{name} does not match"):
            load_encoder(str(spec))
    with pytest.raises(EncoderError, match="is damaged"):
        read_weights_file(newest / "teacher" / "prototypes.safetensors")
    manifest = run / "checkpoints" / "step-00000010" / "MANIFEST.json"
    flip(manifest)
    with pytest.raises(
        EncoderError, match=r"where 2 with COMMIT are damaged.* expected a complete checkpoint"
    ):
        load_encoder(str(run))
    manifest.unlink()  # a copy of COMMIT and teacher/ alone, which nothing can be compared with
    assert load_encoder(str(run)).step == 10
    assert "has no MANIFEST.json: its files cannot be compared" in caplog.text


def test_a_random_timm_model_saved_to_disk_keeps_its_own_preprocessing(tmp_path):
    model = timm.create_model("resnet10t", num_classes=0)
    data = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 0.75}
    timm.models.save_for_hf(model, str(tmp_path / "net"), safe_serialization=True, data_config=data)
    encoder = load_encoder(f"local-dir:{tmp_path / 'net'}")
    seen = encoder.transform.describe()
    assert (seen["image_size"], seen["mean"], seen["crop_fraction"]) == (48, [0.1, 0.2, 0.3], 0.75)
    features = encoder.module(encoder.transform(COLOUR)[None])
    assert set(features) == {"embedding", "mean"} and features["embedding"].shape == (1, 512)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    Dinov2Model(config).save_pretrained(folder / "bare")
    Dinov2Model(config).save_pretrained(folder / "whole")
    processor = BitImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.4, 0.4, 0.4],
        image_std=[0.2, 0.2, 0.2],
    )
    processor.save_pretrained(folder / "whole")
    return folder


def test_a_transformers_model_with_its_own_processor(dinov2):
    encoder = load_encoder(f"hf:{dinov2 / 'whole'}", num_blocks=2)
    image = encoder.transform(COLOUR)
    assert image.shape == (3, 28, 28) and image[0].max() == pytest.approx((1 - 0.4) / 0.2, abs=1e-4)
    features = encoder.module(image[None])
    whole = encoder.module.model(pixel_values=image[None]).last_hidden_state
    assert torch.equal(features["embedding"], whole[:, 0]) and features["cls"].shape == (1, 2, 24)
    assert torch.allclose(features["mean"], whole[:, 1:].mean(dim=1), atol=1e-6)


def test_a_model_without_processor_is_refused_until_told(dinov2):
    with pytest.raises(EncoderError, match=r"no image processor.*set transform.mean"):
        load_encoder(f"hf:{dinov2 / 'bare'}")
    told = TransformConfig(mean=(0.5,), std=(0.5,), image_size=28)
    assert load_encoder(f"hf:{dinov2 / 'bare'}", transform=told).transform(COLOUR).shape == (3, 28, 28)


def test_controls_share_shape_and_preprocessing_and_not_weights(run_dir):
    encoder = load_encoder(str(run_dir))
    controls = load_controls(encoder, ("random-init", "raw-pixels"), seeds=2)
    assert [control.label for control in controls] == ["random-init-seed0", "random-init-seed1", "raw-pixels"]
    assert len({control.weights_sha256 for control in [encoder, *controls]}) == 4
    assert all(control.transform == encoder.transform for control in controls)
    pixels = controls[-1].module(encoder.transform(GREY)[None])["embedding"]
    assert torch.allclose(pixels, torch.full((1, 784), 128 / 255), atol=1e-6)
    assert controls[-1].module.patch_tokens(encoder.transform(GREY)[None]).shape == (1, 16, 49), (
        "its patches of 7 x 7"
    )
    again = load_encoder(f"random-init:{run_dir}:1")
    assert again.weights_sha256 == controls[1].weights_sha256


def test_a_released_encoder_stands_beside_its_untrained_architecture(monkeypatch):
    build = timm.create_model

    def release(name, pretrained=False, **options):
        """Without a network: weights that a seed of their own draws stand for the released ones."""
        if pretrained:
            torch.manual_seed(99)
        return build(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", release)
    encoder = load_encoder("timm:test_vit")
    controls = load_controls(encoder, ("random-init", "raw-pixels"), seeds=2)
    assert [c.spec for c in controls] == [
        "random-init:timm:test_vit:0",
        "random-init:timm:test_vit:1",
        "raw-pixels",
    ]
    assert len({control.weights_sha256 for control in [encoder, *controls]}) == 4
    assert all(control.transform == encoder.transform for control in controls)
    tokens = [c.module.patch_tokens(encoder.transform(COLOUR)[None]) for c in (encoder, *controls)]
    assert len({found.shape[1] for found in tokens}) == 1 and tokens[0].shape == tokens[1].shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "expected an existing directory"),
        ("timm:no_such_network", "timm cannot load"),
        ("raw-pixels", "transform.image_size is null"),
        ("random-init:RUN:x", r"expected .*random-init:RUN\[:SEED\]"),
        ("random-init:nowhere:1", "expected an existing directory"),
        ("random", "expected .*the path of a run"),
    ],
)
def test_names_that_lead_nowhere_get_one_line(spec, message, run_dir):
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(spec.replace("RUN", str(run_dir)))
    assert "\n" not in str(caught.value)


def test_a_student_that_was_not_exported_is_named(run_dir):
    with pytest.raises(EncoderError, match=r"role is 'student'.*expected one of teacher"):
        load_encoder(str(run_dir), role="student")


def test_another_size_than_a_fixed_encoder_takes_is_refused(tmp_path):
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    timm.models.save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"].pop("num_classes", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="image_size is 56; expected 28"):
        load_encoder(f"local-dir:{tmp_path}", transform=TransformConfig(image_size=56))


class _Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("prefix", ["", "local-dir:", "hf:"])
def test_a_hostile_pickle_is_refused_and_never_runs(prefix, tmp_path, run_dir, dinov2):
    canary, folder = tmp_path / "canary", tmp_path / "net"
    folder.mkdir()
    source = dinov2 / "whole" if prefix == "hf:" else run_dir / "checkpoints" / "step-00000010" / "teacher"
    (folder / "config.json").write_text((source / "config.json").read_text())
    torch.save({"weights": _Hostile(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(EncoderError) as caught:
        load_encoder(f"{prefix}{folder}")
    assert "\n" not in str(caught.value) and not canary.exists()
