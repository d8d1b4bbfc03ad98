"""Weights, folders and splits that nobody means to evaluate: one line each, and nothing computed in vain."""

from pathlib import Path

import pytest
import torch

from data.shards import Manifest, Shard
from evaluation.config import EvaluationConfig, EvaluationDataConfig, FeaturesConfig, TransformConfig
from evaluation.encoders.exported import EncoderError
from evaluation.encoders.load import load_encoder
from evaluation.encoders.public_heads import read_prototypes
from evaluation.encoders.weights_files import WeightsFileError
from evaluation.features import cache, splits
from evaluation.harness import evaluate
from evaluation.probes.config import KnnConfig
from evaluation.probes.linear import split_held_out
from evaluation.probes.prototype_audit import AuditError, audit


def _config(encoder, shards, tmp_path, **changes):
    values = {
        "encoder": str(encoder),
        "probes": ("knn",),
        "data": EvaluationDataConfig(shards=shards, max_train_images=24, max_test_images=12, num_workers=0),
        "features": FeaturesConfig(cache_dir=str(tmp_path / "cache")),
        "knn": KnnConfig(k=(5,)),
        "output_dir": str(tmp_path / "results"),
    }
    return EvaluationConfig(**{**values, **changes})


@pytest.mark.parametrize("below", [False, True], ids=["a file", "below a file"])
def test_places_that_cannot_be_written_are_named_before_anything_is_extracted(
    tmp_path, digits, run_dir, below
):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    place = str(taken / "x" if below else taken)
    with pytest.raises(ValueError, match=r"output_dir is .*taken.*expected a folder that can be written"):
        evaluate(_config(run_dir, digits, tmp_path, output_dir=place))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        ValueError, match=r"features\.cache_dir is .*taken.*expected a folder that can be written"
    ):
        evaluate(_config(run_dir, digits, tmp_path, features=FeaturesConfig(cache_dir=place)))
    assert taken.read_text() == "mine"


def test_a_cache_that_may_only_be_read_is_used(tmp_path, digits, run_dir, monkeypatch):
    evaluate(_config(run_dir, digits, tmp_path))

    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(cache.os, "utime", refuse)
    assert evaluate(_config(run_dir, digits, tmp_path))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.empty(8, 4, device="meta"),
        torch.eye(8, 4).to_sparse(),
        torch.eye(8, 4).to(torch.complex64),
    ],
    ids=["meta", "sparse", "complex"],
)
def test_prototypes_without_plain_values_are_refused_by_name(tmp_path, matrix):
    torch.save({"prototypes.weight": matrix}, tmp_path / "head.pth")
    for spec in (f"{tmp_path}/head.pth", f"{tmp_path}/head.pth#prototypes.weight"):
        with pytest.raises(WeightsFileError, match=r"tensor 'prototypes\.weight' is"):
            read_prototypes(spec)


def test_a_checkpoint_that_holds_itself_is_read(tmp_path):
    content: dict[str, object] = {"prototypes.weight": torch.eye(8, 4)}
    content["again"] = content
    torch.save(content, tmp_path / "head.pth")
    assert len(read_prototypes(f"{tmp_path}/head.pth")) == 1


def test_directions_need_two_dimensions():
    with pytest.raises(AuditError, match="at least 2 columns"):
        audit(torch.ones(8, 1), thresholds=(0.1,), angle_pairs=8, seed=0)


def test_classes_of_one_image_each_leave_nothing_to_choose_by():
    with pytest.raises(ValueError, match="no class has two of the 3 training images"):
        split_held_out(torch.arange(3), 0.1, seed=0)


def test_more_blocks_than_the_encoder_has_name_their_option(run_dir):
    with pytest.raises(EncoderError, match=r"features\.num_blocks is 99; expected at most 2"):
        load_encoder(str(run_dir), transform=TransformConfig(), num_blocks=99)


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match="probes is"):
        EvaluationConfig(encoder="x", probes=())
    assert EvaluationConfig(encoder="x", probes=(), controls=("raw-pixels",)).probes == ()


def test_shards_that_a_split_leaves_aside_are_not_shared():
    def manifest(*chosen):
        shards = [
            Shard(name=f"{n}.tar", samples=4, bytes=1, sha256=str(n), ordinals=c)
            for n, c in enumerate(chosen)
        ]
        return Manifest(split="train", shards=tuple(shards), classes=("a",))

    assert splits._count_shared(manifest(None, ()), manifest((), None)) == 0
    assert splits._count_shared(manifest(None, ()), manifest((1, 2), None)) == 2
