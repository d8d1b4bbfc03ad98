"""One reading of what a user writes for weights: `encoder`, `prototypes.weights` and `model.init` ask it."""

import subprocess
import sys

import pytest

from evaluation.config import ENCODER_KINDS, EvaluationConfig
from models.config import INIT_KINDS, ModelConfig, parse_weights_spec

EVERY = {*ENCODER_KINDS, *INIT_KINDS}


@pytest.mark.parametrize(
    ("text", "kind", "name", "tensor", "seed"),
    [
        ("random", "random", "random", None, 0),
        ("./random", "folder", "./random", None, 0),
        ("raw-pixels", "raw-pixels", "raw-pixels", None, 0),
        ("timm:hf-hub:a/b", "timm", "hf-hub:a/b", None, 0),
        ("hf:facebook/dinov2-base", "hf", "facebook/dinov2-base", None, 0),
        ("local-dir:x.bin", "local-dir", "x.bin", None, 0),
        ("random-init:outputs/run", "random-init", "outputs/run", None, 0),
        ("random-init:outputs/run:4294967295", "random-init", "outputs/run", None, 4294967295),
        ("random-init:outputs/a:b:7", "random-init", "outputs/a:b", None, 7),
        ("outputs/run", "folder", "outputs/run", None, 0),
        ("outputs/a:b", "folder", "outputs/a:b", None, 0),
        ("lost/model.pth", "file", "lost/model.pth", None, 0),
        ("lost/model.safetensors.index.json", "file", "lost/model.safetensors.index.json", None, 0),
        ("lost/model.pth#head.weight", "file", "lost/model.pth", "head.weight", 0),
        ("a#1/model#head.weight", "file", "a#1/model", "head.weight", 0),
        ("model.pth#", "file", "model.pth", None, 0),
    ],
)
def test_every_form(text, kind, name, tensor, seed):
    found = parse_weights_spec(text, "encoder", EVERY)
    assert (found.kind, found.name, found.tensor, found.seed) == (kind, name, tensor, seed)
    assert found.text == text


def test_what_is_there_is_told_apart_by_what_it_is(tmp_path):
    for name in ("run.bin", "a#b"):
        (tmp_path / name).mkdir()
    for name in ("plain", "c#d"):
        (tmp_path / name).touch()
    kinds = {
        name: parse_weights_spec(str(tmp_path / name), "encoder", EVERY).kind for name in ("run.bin", "a#b")
    }
    assert kinds == {"run.bin": "folder", "a#b": "folder"}
    for name in ("plain", "c#d"):
        found = parse_weights_spec(str(tmp_path / name), "encoder", EVERY)
        assert (found.kind, found.path, found.tensor) == ("file", tmp_path / name, None)


@pytest.mark.parametrize(
    "text",
    ["", "x" * 300, "timm:", "hf:",
     "random-init:", "random-init::3", "random-init:r:x", "random-init:r:-1", "random-init:r:",
     "random-init:r:4294967296", "random-init:r:²", "random"],
)  # fmt: skip
def test_half_a_name_is_refused_where_the_configuration_is_read(text):
    with pytest.raises(
        ValueError, match=r"^encoder is .*; expected .*random-init:RUN\[:SEED\].*; set encoder$"
    ):
        EvaluationConfig(encoder=text)


@pytest.mark.parametrize(
    "text",
    ["", "rand", "timm:", "raw-pixels", "random-init:outputs/run", "some/model.pth", "some/model.pth#head"],
)
def test_no_start_of_a_run(text):
    with pytest.raises(ValueError, match=r"^model\.init is .*; expected random, .*set model\.init$"):
        ModelConfig(init=text)


def test_starts_of_a_run():
    for text in ("random", "timm:vit", "hf:a/b", "local-dir:net", "outputs/run", "./rand"):
        assert ModelConfig(init=text).init == text


def test_every_kind_of_encoder_has_its_loader_and_reading_needs_no_torch():
    from evaluation.encoders.load import LOADERS

    assert set(LOADERS) == set(ENCODER_KINDS)
    code = "import sys, evaluation.config, training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
