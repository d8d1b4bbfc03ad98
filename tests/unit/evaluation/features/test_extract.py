"""Features that a probe must never see, and features that two processes keep on one disk."""

import dataclasses
import multiprocessing
import os
import time

import pytest
import torch

from evaluation import cache
from evaluation.config import EvaluationDataConfig, FeaturesConfig
from evaluation.encoders.backbones import FeatureModule
from evaluation.encoders.load import load_encoder
from evaluation.features import extract as features
from evaluation.features.bank import FeatureError
from evaluation.features.extract import load_features
from evaluation.features.processes import Processes
from evaluation.features.splits import load_splits
from evaluation.tensor_files import DamagedFileError, load_tensors, save_tensors
from runtime.program import run_program


class OneBadImage(FeatureModule):
    """An encoder whose feature of one image is not finite."""

    def __init__(self, encoder, value, at):
        super().__init__()
        self.encoder, self.value, self.at, self.seen = encoder, value, at, 0

    def forward(self, images):
        features = self.encoder(images)
        if self.seen <= self.at < self.seen + len(images):
            features["mean"][self.at - self.seen, 1] = self.value
        self.seen += len(images)
        return features

    def patch_tokens(self, images):
        return None


def load(encoder, shards, cache, **options):
    data = EvaluationDataConfig(shards=str(shards), num_workers=0)
    manifest = load_splits(data)[1]
    features = FeaturesConfig(cache_dir=str(cache), **options)
    (bank,) = load_features([encoder], manifest, data=data, features=features, processes=Processes())
    return bank


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_names_encoder_and_image(value, run_dir, digits, tmp_path):
    encoder = load_encoder(str(run_dir))
    broken = dataclasses.replace(encoder, module=OneBadImage(encoder.module, value, at=50))
    with pytest.raises(FeatureError, match=r"feature 'mean' of tiny holds NaN.*test-000001.tar, sample 2"):
        load(broken, digits, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")), "a probe could read them from the cache"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def without_checksum(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty, without_checksum])
def test_a_damaged_cache_is_said_and_made_again(damage, run_dir, digits, tmp_path, caplog):
    encoder = load_encoder(str(run_dir))
    first = load(encoder, digits, tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    again = load(encoder, digits, tmp_path)
    assert torch.equal(first.select("embedding"), again.select("embedding"))
    assert "features are extracted again" in caplog.text and again.seconds > 0
    caplog.clear()
    assert load(encoder, digits, tmp_path).seconds == 0 and "again" not in caplog.text


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from evaluation import tensor_files

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"x": torch.ones(2)}, tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(DamagedFileError, match="cannot be read"):
        load_tensors(tmp_path / "x.safetensors")


def _extract(run_dir, digits, cache_dir, written, merged, is_late):
    encoder = load_encoder(run_dir)
    save = features.save_tensors

    def save_and_meet(tensors, path, about):
        digest = save(tensors, path, about)
        if ".part-" in path.name:
            written.wait(60)
            if is_late:
                merged.wait(60)
        return digest

    features.save_tensors = save_and_meet
    load(encoder, digits, cache_dir)
    merged.set()


def test_two_evaluations_at_once_do_not_meet(run_dir, digits, tmp_path):
    """Part files had one name for all: the first to merge removed those of the second."""
    # spawned: a fork of a process whose threads have computed hangs in the first product that wants several
    context = multiprocessing.get_context("spawn")
    written, merged = context.Barrier(2), context.Event()
    both = [
        context.Process(target=_extract, args=(str(run_dir), digits, tmp_path, written, merged, is_late))
        for is_late in (False, True)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    (path,) = tmp_path.iterdir()
    load_tensors(path)


def test_what_the_first_process_finds_wrong_reaches_the_others(run_dir, digits, tmp_path):
    """They waited for the next collective, for hours, while the first one had left."""
    encoder = load_encoder(str(run_dir))
    gathered = []

    def gather(item):
        gathered.append(item)
        return [item]

    broken = dataclasses.replace(encoder, module=OneBadImage(encoder.module, float("nan"), at=50))
    data = EvaluationDataConfig(shards=str(digits), num_workers=0)
    with pytest.raises(FeatureError):
        load_features(
            [broken],
            load_splits(data)[1],
            data=data,
            features=FeaturesConfig(cache_dir=str(tmp_path)),
            processes=Processes(gather=gather),
        )
    assert isinstance(gathered[-1], FeatureError)


def test_pruning_removes_what_is_unused_and_nothing_of_others(run_dir, digits, tmp_path, capsys):
    load(load_encoder(str(run_dir)), digits, tmp_path)
    (used,) = tmp_path.iterdir()
    old = tmp_path / used.name.replace("test-", "other-")
    old.write_bytes(used.read_bytes())
    unfinished = tmp_path / f".{used.name}.host-7.part-00000"
    foreign = [tmp_path / "notes.txt", tmp_path / "model-0123456789abcdef.safetensors"]
    for path in (unfinished, *foreign):
        path.write_bytes(b"x" * 100)
    long_ago = time.time() - 40 * 24 * 3600
    for path in (old, unfinished, *foreign):
        os.utime(path, (long_ago, long_ago))
    assert run_program(cache.main, [str(tmp_path)]) == 0
    assert old.exists() and "3 files" in capsys.readouterr().out
    assert run_program(cache.main, [str(tmp_path), "--prune"]) == 0
    assert not old.exists() and not unfinished.exists() and used.exists()
    os.utime(used, (long_ago, long_ago))
    load(load_encoder(str(run_dir)), digits, tmp_path)  # read again: used today
    assert run_program(cache.main, [str(tmp_path), "--prune"]) == 0 and used.exists()
    assert run_program(cache.main, [str(tmp_path), "--prune", "--unused-days", "0"]) == 0
    assert sorted(tmp_path.iterdir()) == sorted(foreign)
    assert run_program(cache.main, [str(tmp_path / "nowhere")]) == 2
