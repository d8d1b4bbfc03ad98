"""Features out: one file whatever happened on the way, and whoever worked on it."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from data import make_shards
from evaluation import embed as program
from evaluation.encoders.backbones import TimmFeatures
from evaluation.encoders.hf_models import TransformersFeatures
from evaluation.encoders.load import load_encoder
from evaluation.features.npz_parts import PartFiles
from evaluation.features.processes import Processes
from runtime.program import UserError
from tests.helpers.bands import encode_npy

NUM_IMAGES = 40


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(program, "_PART_IMAGES", 16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 pictures of noise in two folders, and one file that is none."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(3)
    for number in range(NUM_IMAGES):
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(256, size=(30, 34, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    (root / "b" / "99.jpg").write_bytes(b"no image")
    return root


def embed(*arguments, processes=None):
    options = program.parse(["--workers", "0", "--batch", "7", *map(str, arguments)])
    program.embed(options, processes or Processes())
    return read(options.out)


def read(path):
    with np.load(path) as file:  # without pickle
        return {name: file[name] for name in file.files}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_rows_are_the_encoders_features_of_the_named_files(photos, run_dir, tmp_path):
    found = embed(run_dir, photos, "--out", tmp_path / "f.npz", "--patches")
    encoder = load_encoder(str(run_dir))
    images = torch.stack([encoder.transform(Image.open(path)) for path in found["paths"]])
    with torch.no_grad():
        expected, patches = encoder.module(images)["embedding"], encoder.module.patch_tokens(images)
    assert list(found["paths"]) == [str(path) for path in sorted(photos.rglob("*.png"))]
    np.testing.assert_allclose(found["features"], expected, rtol=1e-4, atol=1e-5)
    assert found["patches"].shape == (NUM_IMAGES, 4, 4, 24)
    # The grid is the image's: row by row from the top.
    np.testing.assert_allclose(found["patches"][:, 1, 2], patches[:, 6], rtol=1e-4, atol=1e-5)
    assert list(found["bad_paths"]) == [str(photos / "b" / "99.jpg")] and "format" in found["bad_reasons"][0]
    assert json.loads(str(found["about"]))["encoder"]["weights_sha256"] == encoder.weights_sha256
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_patches_and_features_of_every_kind_come_from_one_pass(kind):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if kind == "timm":
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 0,
        }
        network = timm.create_model("vit_tiny_patch16_224", **sizes)
        module = TimmFeatures(network)
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        network = ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes))
        module = TransformersFeatures(network)
    module.eval()
    passes = []
    (network.blocks if kind == "timm" else network).register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        features, patches = module.with_patches(images)
        assert len(passes) == 1
        expected, expected_patches = module(images), module.patch_tokens(images)
    assert features.keys() == expected.keys() and patches.shape == (2, 16, 24)
    for name, rows in expected.items():
        torch.testing.assert_close(features[name], rows)
    torch.testing.assert_close(patches, expected_patches)


def test_an_interrupted_job_goes_on_with_what_is_missing(photos, run_dir, tmp_path, monkeypatch):
    whole = embed(run_dir, photos, "--out", tmp_path / "whole.npz")
    out, save, written = tmp_path / "f.npz", PartFiles.save, []

    def save_and_stop(self, number, part):
        written.append(number)
        if number == 1 and written.count(1) == 1:
            raise KeyboardInterrupt
        save(self, number, part)

    monkeypatch.setattr(PartFiles, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        embed(run_dir, photos, "--out", out)
    part = out.with_name("f.npz.parts") / "part-000000.safetensors"
    assert same(embed(run_dir, photos, "--out", out), whole) and written == [0, 1, 1, 2]
    # A part that a failing disk has changed is made again; a finished file is left alone.
    monkeypatch.setattr(PartFiles, "assemble", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(run_dir, photos, "--out", tmp_path / "second.npz")
    monkeypatch.undo()
    monkeypatch.setattr(program, "_PART_IMAGES", 16)
    part = tmp_path / "second.npz.parts" / "part-000000.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    assert same(embed(run_dir, photos, "--out", tmp_path / "second.npz"), whole)
    before = out.stat().st_mtime_ns
    assert same(embed(run_dir, photos, "--out", out), whole) and out.stat().st_mtime_ns == before


def test_two_processes_write_what_one_writes(photos, run_dir, tmp_path):
    barrier, box, failures = threading.Barrier(2, timeout=60), [None, None], []

    def gather(rank, item):
        box[rank] = item
        barrier.wait()
        everything = list(box)
        barrier.wait()
        return everything

    def work(rank):
        processes = Processes(
            rank=rank, world_size=2, gather=lambda item: gather(rank, item), wait=barrier.wait
        )
        try:
            embed(run_dir, photos, "--out", tmp_path / "two.npz", processes=processes)
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert same(read(tmp_path / "two.npz"), embed(run_dir, photos, "--out", tmp_path / "one.npz"))


def test_shards_give_the_same_features_under_the_names_of_their_samples(photos, run_dir, tmp_path):
    arguments = ["imagefolder", str(photos), "--out", str(tmp_path / "shards"), "--processes", "1"]
    assert make_shards.main([*arguments, "--samples-per-shard", "24"]) == 0
    of_files = embed(run_dir, photos, "--out", tmp_path / "files.npz", "--feature", "mean")
    of_shards = embed(run_dir, tmp_path / "shards", "--out", tmp_path / "shards.npz", "--feature", "mean")
    # A sample's key is its number among the files and its stem.
    by_stem = {
        Path(path).stem: row for path, row in zip(*(of_files[k] for k in ("paths", "features")), strict=True)
    }
    assert len(of_shards["paths"]) == NUM_IMAGES and of_shards["paths"][0].startswith("train-000000.tar/")
    for path, row in zip(of_shards["paths"], of_shards["features"], strict=True):
        np.testing.assert_allclose(row, by_stem[path.rsplit("-", 1)[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["raw-pixels", "{photos}", "--image-size", "8", "--patches"], "has no patch tokens"),
        (["{run}", "{photos}", "--feature", "nosuch"], "^--feature is 'nosuch'; expected .*; set --feature$"),
        (["raw-pixels", "{photos}"], "^--image-size is null; expected the size .*; set --image-size$"),
        (["{run}", "{photos}", "--image-size", "0"], r"^--image-size is 0; expected .*; set --image-size$"),
        (["{run}", "{photos}", "--image-size", "57"], r"set --image-size, or --channels$"),
        (["{run}", "{photos}", "--channels", "0"], "^--channels is 0; expected .*; set --channels$"),
        (["{run}", "{photos}", "--channels", "13"], "set --image-size, or --channels$"),
        (["s3x://nowhere", "{photos}"], "^(?!.*(data|transform)\\.)"),
        (["{run}", "nosuch://bucket/set"], "^IMAGES is 'nosuch://bucket/set'; expected .*; set IMAGES$"),
        (["{run}", "{photos}", "--std", "0"], "^--std.* is 0.0; expected .*; set --std$"),
        (
            ["{run}", "{photos}", "--mean", ".5", ".5"],
            "^--mean is .*; expected 1 or 1 numbers.*; set --mean$",
        ),
        (["{run}", "{photos}", "--batch", "0"], "--batch is 0; expected 1 to"),
        (["{run}", "{nothing}"], "expected an existing folder"),
        (["{run}", "{run}"], "holds no image"),
        (["{run}/metrics.jsonl", "{photos}"], "a weights file"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, photos, run_dir, tmp_path):
    places = {"photos": photos, "run": run_dir, "nothing": tmp_path / "nothing"}
    with pytest.raises(ValueError, match=message):
        embed(*(text.format(**places) for text in arguments), "--out", tmp_path / "f.npz")


def test_a_size_is_a_side_or_height_and_width(photos, run_dir, tmp_path):
    found = embed("raw-pixels", photos, "--image-size", "6", "8", "--out", tmp_path / "f.npz")
    assert found["features"].shape == (NUM_IMAGES, 3 * 6 * 8)
    found = embed("raw-pixels", photos, "--image-size", "6", "--out", tmp_path / "g.npz")
    assert found["features"].shape == (NUM_IMAGES, 3 * 6 * 6)


def test_bands_are_embedded_where_their_number_and_type_are_said(tmp_path):
    """Raw pixels declare none: images of 5 x 16 bits were refused in the words of a training's options."""
    (tmp_path / "bands").mkdir()
    images = np.random.default_rng(0).integers(60000, size=(4, 5, 8, 8)).astype(np.uint16)
    for number, image in enumerate(images):
        (tmp_path / "bands" / f"{number}.npy").write_bytes(encode_npy(image))
    start = ("raw-pixels", tmp_path / "bands", "--image-size", "8", "--out")
    with pytest.raises(
        UserError, match=r"none of 4 .*: 5 bands of 8 x 8; expected 3; pass .* --channels and --pix"
    ):
        embed(*start, tmp_path / "f.npz")
    found = embed(*start, tmp_path / "g.npz", "--channels", "5", "--pixels", "uint16")
    np.testing.assert_allclose(found["features"], images.reshape(4, -1) / 65535, atol=1e-6)
    assert make_shards.main(["imagefolder", str(tmp_path / "bands"), "--out", str(tmp_path / "set")]) == 0
    with pytest.raises(UserError, match=r"^--split is 'val'; expected one of .*: train; set --split$"):
        embed(
            "raw-pixels", tmp_path / "set", "--image-size", "8", "--split", "val", "--out", tmp_path / "h.npz"
        )


def test_nothing_that_others_made_is_replaced(photos, run_dir, tmp_path):
    out = tmp_path / "f.npz"
    np.savez(out, theirs=np.arange(3))
    with pytest.raises(UserError, match="which exists"):
        embed(run_dir, photos, "--out", out)
    assert list(read(out)) == ["theirs"]
    parts = tmp_path / "g.npz.parts"
    parts.mkdir()
    (parts / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="parts of another embedding"):
        embed(run_dir, photos, "--out", tmp_path / "g.npz")
    assert [path.name for path in parts.iterdir()] == ["diary.txt"]


def test_images_of_which_none_can_be_decoded_are_named(run_dir, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 1 images can be decoded .*; the first, .*x\.png"):
        embed(run_dir, tmp_path / "bad", "--out", tmp_path / "f.npz")


def test_the_neighbour_search_of_the_documentation_runs(photos, run_dir, tmp_path, monkeypatch, capsys):
    embed(run_dir, photos, "--out", tmp_path / "FILE.npz")
    text = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text()
    (code,) = [
        block.split("```")[0] for block in text.split("```python\n")[1:] if 'np.load("FILE.npz")' in block
    ]
    monkeypatch.chdir(tmp_path)
    exec(code, {"np": np})
    cosines, paths = zip(*(line.split("  ") for line in capsys.readouterr().out.splitlines()), strict=True)
    assert cosines[0] == "1.000" and paths[0] == str(photos / "a" / "00.png") and len(set(paths)) == 6
    assert list(cosines) == sorted(cosines, reverse=True)
