"""What a user can get wrong is one line and exit code 2, before or instead of a wrong figure."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import timm
import torch

import evaluate as program
from data.verify_shards import write_manifests
from evaluation.config import EvaluationConfig
from evaluation.encoders.exported import name_folder
from runtime.config import load_config
from runtime.program import run_program
from tests.test_configs import ROOT, unread_options


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Runs the program and returns exit code and error lines."""
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"encoder: unset\nprobes: [knn]\noutput_dir: {tmp_path / 'out'}\ndata: {{num_workers: 0}}\n"
        f"features: {{cache_dir: {tmp_path / 'features'}}}\nknn: {{k: [5]}}\n"
    )

    def run(*arguments):
        code = run_program(program.main, [str(config), *map(str, arguments)])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return code, errors

    return run


def without_label(source, target):
    """A copy of shards in which one test image has no `.cls`, with manifests to match."""
    shutil.copytree(source, target)
    shard = sorted(target.glob("test-*.tar"))[0]
    with tarfile.open(shard) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    dropped = next(index for index, (member, _) in enumerate(members) if member.name.endswith(".cls"))
    with tarfile.open(shard, "w") as tar:
        for index, (member, content) in enumerate(members):
            if index != dropped:
                tar.addfile(member, io.BytesIO(content))
    (target / "manifest.json").unlink()
    write_manifests(str(target), num_decoded=0)
    return target


def test_a_missing_label(evaluate, run_dir, digits, tmp_path):
    shards = without_label(Path(digits), tmp_path / "unlabelled")
    code, errors = evaluate(f"encoder={run_dir}", f"data.shards={shards}")
    assert code == 2 and len(errors) == 1 and "label" in errors[0], errors
    assert not (tmp_path / "out" / "knn.json").exists()


def test_results_of_others_are_not_replaced(evaluate, run_dir, digits, tmp_path):
    place, path = tmp_path / "out", tmp_path / "out" / "knn.json"
    place.mkdir()
    path.write_text("mine")
    asked = (f"encoder={run_dir}", f"data.shards={digits}", "controls=[]")
    code, errors = evaluate(*asked)
    assert code == 2 and "exists and is no result of knn; expected a place for results" in errors[0]
    assert path.read_text() == "mine"
    path.unlink()
    assert evaluate(*asked)[0] == evaluate(*asked)[0] == 0  # its own it replaces
    before = path.read_text()
    pixels = ("encoder=raw-pixels", "transform.image_size=8", "transform.channels=1")
    code, errors = evaluate(*pixels, *asked[1:])
    assert code == 2 and f"knn.json is a result of {run_dir}; expected none of another encoder" in errors[0]
    assert path.read_text() == before


def test_exports_inside_checkpoints_have_names_of_their_own(tmp_path):
    inside = tmp_path / "mine" / "checkpoints" / "step-00000045" / "teacher"
    assert name_folder(inside) == "mine-step-00000045-teacher"
    assert name_folder(tmp_path / "step-00000045" / "student") == "step-00000045-student"
    assert name_folder(tmp_path / "exported") == "exported"


def test_another_class_map(evaluate, run_dir, digits, tmp_path):
    shifted = tmp_path / "shifted"
    shutil.copytree(digits, shifted)
    manifest = json.loads((shifted / "manifest.json").read_text())
    manifest["splits"]["test"]["classes"].reverse()
    (shifted / "manifest.json").write_text(json.dumps(manifest))
    code, errors = evaluate(f"encoder={run_dir}", f"data.shards={digits}", f"data.test_shards={shifted}")
    assert code == 2 and len(errors) == 1 and "class maps" in errors[0]


def test_a_test_split_of_training_images(evaluate, run_dir, digits):
    code, errors = evaluate(f"encoder={run_dir}", f"data.shards={digits}", "data.test_split=train")
    assert code == 2 and len(errors) == 1
    assert "384 of 384 images of" in errors[0] and "are training images too" in errors[0]


def test_an_encoder_of_another_size(evaluate, digits, tmp_path):
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    folder = tmp_path / "net"
    timm.models.save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    content = json.loads((folder / "config.json").read_text())
    content["model_args"].pop("num_classes", None)
    (folder / "config.json").write_text(json.dumps(content))
    code, errors = evaluate(f"encoder=local-dir:{folder}", f"data.shards={digits}", "transform.image_size=56")
    assert code == 2 and len(errors) == 1 and "image_size is 56; expected 28" in errors[0]


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("prefix", ["", "local-dir:", "hf:", "file"])
def test_a_hostile_pickle(evaluate, prefix, run_dir, digits, tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "net"
    folder.mkdir()
    source = run_dir / "checkpoints" / "step-00000010" / "teacher" / "config.json"
    if prefix == "hf:":  # a folder of timm's would be loaded by timm
        (folder / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_size": 24}))
    else:
        shutil.copy(source, folder)
    torch.save({"weights": Hostile(canary)}, folder / "pytorch_model.bin")
    spec = folder / "pytorch_model.bin" if prefix == "file" else f"{prefix}{folder}"
    probes = "[prototypes]" if prefix == "file" else "[knn]"
    code, errors = evaluate(f"encoder={spec}", f"probes={probes}", f"data.shards={digits}")
    assert code == 2 and len(errors) == 1 and not canary.exists(), errors


def test_every_option_is_read_and_every_configuration_loads():
    assert unread_options(EvaluationConfig) == []
    for path in (ROOT / "configs").glob("eval*.yaml"):
        load_config(EvaluationConfig, str(path))
