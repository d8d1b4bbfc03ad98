"""Images of 1, 4 and 13 bands, and crops that are no squares, from files on the disk to features and exports."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evaluation.encoders.load import load_encoder
from evaluation.encoders.projections import Space, find_spaces, load_projection_head
from models.heads import UNIT_LENGTH
from tests.helpers import starts
from tests.helpers.bands import encode_npy, encode_tiff
from tests.helpers.digits import DEMO, TINY
from training.checkpoints.exported_encoder import EXPORTED_NAMES
from training.checkpoints.state_files import ConsolidatedState
from training.export import main as export

NUM_CLASSES = 3


def write_images(root, channels, dtype, *, encode, suffix, size=(30, 36)):
    """Folders `train` and `test` of three classes: which band is bright, and in which third of the image."""
    generator = np.random.default_rng(channels)
    unit = 200 if dtype == "u2" else 40
    for split, number in (("train", 64), ("test", 24)):
        for index in range(number):
            label = index % NUM_CLASSES
            bands = generator.normal(unit, unit / 8, (channels, *size))
            third = size[0] // NUM_CLASSES
            bands[label % channels, label * third : (label + 1) * third] *= 2
            path = root / split / f"class{label}" / f"{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(bands.clip(0).astype(dtype)))
    return root


def run(program, *arguments, expect=0):
    result = starts.run(program, [str(argument) for argument in arguments])
    assert result.returncode == expect, result.stderr[-3000:]
    return result


def train(tmp_path, images, *overrides, expect=0):
    source = ("data.shards=null", f"data.images={images}", f"data.cache_dir={tmp_path / 'cache'}")
    where = (*source, f"run.output_dir={tmp_path}")
    probe = (
        "evaluation.knn_every_steps=2",
        "evaluation.knn_train_images=48",
        "evaluation.knn_test_images=24",
    )
    steps = ("run.name=run", "optim.steps=2", "checkpoint.every_steps=2")
    return run("pretrain", DEMO, *TINY, *where, *steps, *probe, *overrides, expect=expect)


def read(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def embed_patches(tmp_path, images):
    file = tmp_path / "f.npz"
    run("evaluation.embed", tmp_path / "run", images, "--out", file, "--workers", "0", "--patches")
    return file


def evaluate(tmp_path, images, *overrides):
    data = (f"data.images={images}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=0")
    asked = ("probes=[knn]", "controls=[random-init, raw-pixels]", "control_seeds=1", "knn.k=[5]")
    small = ("fine_tune.epochs=1", "fine_tune.batch_size=16", f"features.cache_dir={tmp_path / 'features'}")
    run("evaluate", "configs/eval.yaml", f"encoder={tmp_path / 'run'}", *data, *asked, *small, *overrides)
    found = {}
    for path in (tmp_path / "run" / "results").rglob("*.json"):
        result = json.loads(path.read_text())
        found[result["probe"], result["encoder"]["label"]] = result
    return found


@pytest.mark.parametrize(
    ("channels", "dtype", "suffix"), [(1, "u2", "tif"), (4, "u1", "tif"), (13, "u2", "npy")]
)
def test_bands_train_and_are_evaluated(tmp_path, channels, dtype, suffix):
    encode = encode_npy if suffix == "npy" else encode_tiff
    images = write_images(tmp_path / "images", channels, dtype, encode=encode, suffix=suffix)
    pixels = {"u1": "uint8", "u2": "uint16"}[dtype]
    # What `verify_shards --statistics` says of these images, rounded.
    unit = {"u1": 255, "u2": 65535}[dtype]
    mean, std = [round(value / unit, 6) for value in ((240, 80) if dtype == "u2" else (45, 15))]
    options = (
        f"data.channels={channels}",
        f"model.channels={channels}",
        f"data.pixels={pixels}",
        f"data.mean={[mean] * channels}",
        f"data.std={[std] * channels}",
    )
    said = train(tmp_path, images, "data.recipe=dino", *options)
    lines = read(tmp_path / "run")
    assert lines[-1]["step"] == 2 and np.isfinite(lines[-1]["loss/total"])
    assert 0 <= lines[-1]["eval/knn20_top1"] <= 1
    left_out = "have no colours, so that" in said.stdout + said.stderr
    assert left_out == (channels > 1 or pixels != "uint8")
    teacher = tmp_path / "run/checkpoints/step-00000002/teacher"
    config = json.loads((teacher / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [channels, 28, 28]
    assert config.get("pixels", "uint8") == pixels
    encoder = load_encoder(str(tmp_path / "run"))
    assert encoder.transform.format.channels == channels and encoder.transform.format.pixels == pixels

    found = evaluate(tmp_path, images, *(["probes=[knn, fine_tune]"] if channels == 13 else []))
    labels = {label for probe, label in found if probe == "knn"}
    assert labels == {"run", "random-init-seed0", "raw-pixels"}
    assert ("fine_tune", "run") in found or channels != 13
    pixels_alone = found["knn", "raw-pixels"]["encoder"]["transform"]
    assert pixels_alone["channels"] == channels and pixels_alone.get("pixels", "uint8") == pixels
    # Brightness tells the classes apart: a control that saw cut or clipped numbers would guess.
    assert found["knn", "raw-pixels"]["figures"]["headline"]["top1"] > 0.9

    if channels != 13:  # all of it once
        return
    with np.load(embed_patches(tmp_path, images)) as file:
        assert file["features"].shape == (88, 24) and file["patches"].shape == (88, 2, 2, 24)
        assert len(file["bad_paths"]) == 0 and np.isfinite(file["features"]).all()
    if importlib.util.find_spec("onnxruntime"):
        import onnx

        assert export([str(tmp_path / "run"), str(tmp_path / "e.onnx"), "--format", "onnx"]) == 0
        stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "e.onnx").metadata_props}
        prepared = json.loads(stored["preprocessing"])
        assert prepared["pixels"] == "uint16" and prepared["input_size"] == [13, 28, 28]
        assert len(prepared["mean"]) == 13 and "divide uint16 numbers by 65535" in prepared["text"]


def test_crops_that_are_no_squares_train_with_masks_and_are_evaluated(tmp_path):
    """21 x 28 pixels: three rows and four columns of patches, with iBOT's blocks; turns keep the crops' shape."""
    images = write_images(tmp_path / "images", 1, "u1", encode=encode_tiff, suffix="tif")
    ibot = (
        "objective.instance.name=dino",
        "objective.patch.name=ibot",
        "data.masks.kind=block",
        "data.masks.patch_size=7",
        "data.masks.min_patches=1",
        "data.masks.crops=1",
        "model.patch_size=7",
        "model.patch_head.hidden_dim=20",
        "model.patch_head.projection_dim=8",
        "model.patch_head.normalize_bottleneck=true",
        "patch_prototypes.num_prototypes=48",
        "patch_prototypes.dim=8",
        "patch_prototypes.partition.size=16",
    )
    sizes = ("data.global_crop_size=[21, 28]", "model.image_size=[21, 28]", "data.local_crop_size=[14, 21]")
    turns = ("data.augmentation.quarter_turns=0.75",)
    dry = train(tmp_path, images, *ibot, *sizes, *turns, "run.dry_run=true")
    assert "FLOP" in dry.stdout
    train(tmp_path, images, *ibot, *sizes, *turns)
    lines = read(tmp_path / "run")
    assert lines[-1]["step"] == 2 and np.isfinite(lines[-1]["loss/patch_cross_entropy"])
    assert 0 <= lines[-1]["eval/knn20_top1"] <= 1
    encoder = load_encoder(str(tmp_path / "run"))
    assert encoder.transform.height_and_width == (21, 28)
    assert encoder.module.model.patch_embed.grid_size == (3, 4)
    assert encoder.module.model.pos_embed.shape[1] - encoder.module.model.num_prefix_tokens == 12
    found = evaluate(tmp_path, images)
    assert found["knn", "run"]["encoder"]["transform"]["image_size"] == [21, 28]
    assert found["knn", "raw-pixels"]["encoder"]["transform"]["image_size"] == [21, 28]
    with np.load(embed_patches(tmp_path, images)) as file:
        assert file["patches"].shape == (88, 3, 4, 24)
    check_exports(tmp_path / "run", tmp_path)


def check_exports(run_dir, tmp_path):
    """Heads and prototypes of views and patches, bit for bit: the teacher's as its checkpoint's, the student's own."""
    checkpoint = run_dir / "checkpoints/step-00000002"
    folders = {which: tmp_path / f"exported-{which}" for which in ("teacher", "student")}
    for which, folder in folders.items():
        assert export([str(run_dir), str(folder), "--which", which]) == 0
        assert {path.name for path in folder.iterdir()} == EXPORTED_NAMES
        assert find_spaces(folder, None) == find_spaces(checkpoint / "teacher", run_dir)
    weights = [name for name in EXPORTED_NAMES if name.endswith(".safetensors")]
    for name in weights:
        tensors, expected = load_file(folders["teacher"] / name), load_file(checkpoint / "teacher" / name)
        assert tensors.keys() == expected.keys() and tensors
        assert all(torch.equal(tensors[key], value) for key, value in expected.items()), name
    state = ConsolidatedState(checkpoint)
    for head in ("projection_head", "patch_head"):
        loaded = load_projection_head(folders["student"], f"{head}.safetensors").state_dict()
        own = {key: state[f"student/network.{head}.{key}"] for key in loaded if key != UNIT_LENGTH}
        assert own and all(torch.equal(loaded[key], value) for key, value in own.items())
        assert not torch.equal(next(iter(own.values())), state[f"teacher/network.{head}.{next(iter(own))}"])


def test_capi_trains_on_crops_that_are_no_squares(tmp_path):
    """32 x 48 pixels: four rows and six columns, of which inverse blocks leave out as many of every crop."""
    images = write_images(tmp_path / "images", 1, "u1", encode=encode_tiff, suffix="tif", size=(36, 52))
    capi = (
        "objective.instance.name=none",
        "objective.patch.name=capi",
        "data.masks.kind=inverse_block",
        "data.masks.patch_size=8",
        "data.masks.predicted=0.5",
        "data.num_local_crops=0",
        "prototypes.mode=partial",
        "model.patch_size=8",
        "model.global_pool=avg",
        "model.embed_dim=32",
        "model.predictor.depth=1",
        "model.predictor.num_heads=2",
    )
    sizes = ("data.global_crop_size=[32, 48]", "model.image_size=[32, 48]")
    train(tmp_path, images, *capi, *sizes)
    lines = [line for line in read(tmp_path / "run") if "loss/patch_cross_entropy" in line]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["loss/total"]) and line["optim/grad_norm"] > 0 for line in lines)
    assert load_encoder(str(tmp_path / "run")).module.model.patch_embed.grid_size == (4, 6)
    with np.load(embed_patches(tmp_path, images)) as file:
        assert file["patches"].shape == (88, 4, 6, 32)
    assert export([str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    expected = {"patch": Space("patch", "projection_head.safetensors", "prototypes.safetensors")}
    assert find_spaces(tmp_path / "exported", None) == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.global_crop_size=[21, 28]", "model.image_size is 28; expected data.global_crop_size (21, 28)"),
        ("data.global_crop_size=[21, 28, 3]", "data.global_crop_size is [21, 28, 3] (list)"),
        ("data.global_crop_size=[0, 28]", "data.global_crop_size[0] is 0; expected 1 <= global_crop_size"),
        ("data.global_crop_size=big", "data.global_crop_size is 'big' (str)"),
        ("data.channels=0", "data.channels is 0; expected 1 <= channels <= 1e4"),
        ("data.channels=2.5", "data.channels is 2.5 (float)"),
        ("data.channels=13", "model.channels is 1; expected data.channels 13"),
        ("data.pixels=int8", "data.pixels is 'int8'; expected one of uint8, uint16, float32"),
    ],
)
def test_nonsense_is_one_line(override, message, tmp_path):
    result = run("pretrain", DEMO, *TINY, "data.mean=[0.3]", f"run.output_dir={tmp_path}", override, expect=2)
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert message in line


def test_a_size_that_patches_do_not_divide_is_one_line(tmp_path):
    images = write_images(tmp_path / "images", 1, "u1", encode=encode_tiff, suffix="tif")
    sizes = ("data.global_crop_size=[21, 29]", "model.image_size=[21, 29]")
    result = train(tmp_path, images, *sizes, expect=2)
    assert "data.global_crop_size is [21, 29]" in result.stderr and "Traceback" not in result.stderr


def test_rgb_weights_start_an_encoder_of_more_bands():
    """timm's own adaptation: the three kernels are repeated and scaled, so that equal bands give the same sum."""
    from models import vit
    from models.config import ModelConfig
    from models.released_weights import _fit_channels

    small = {"name": "vit_tiny_patch16_224", "image_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 1}
    donor = vit.build_backbone(ModelConfig(**small, num_heads=2))
    for channels in (1, 2, 4, 13):
        receiver = vit.build_backbone(ModelConfig(**small, num_heads=2, channels=channels))
        state, adapted = dict(donor.state_dict()), []
        _fit_channels(state, donor, receiver, receiver.state_dict(), adapted)
        kernel, original = state["patch_embed.proj.weight"], donor.state_dict()["patch_embed.proj.weight"]
        assert kernel.shape[1] == channels and adapted
        scale = 1.0 if channels == 1 else 3 / channels
        expected = (
            original.sum(dim=1, keepdim=True)
            if channels == 1
            else original[:, [n % 3 for n in range(channels)]]
        )
        assert torch.allclose(kernel, scale * expected, atol=1e-6)
