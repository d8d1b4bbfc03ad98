"""How mixed batches are, measured from the plan; and sets rewritten in random order."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.make_shards import main
from data.shards import INDEX_DTYPE, Manifest, Shard, load_manifest, save_index
from data.stream.mixing import expected_distinct, measure_mixing
from data.stream.pipeline import TrainingStream, build_plan
from data.verify_shards import main as verify_main
from data.verify_shards import verify, write_manifests
from data.writing import reshuffling
from tests.unit.data.conftest import encode_image


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def imagenet_like(directory: Path, order: str, *, num_shards: int = 855, per_shard: int = 1498) -> Manifest:
    """Returns a manifest of ImageNet's size with 1,000 classes: by class, in random order, or without labels."""
    total = num_shards * per_shard
    labels = np.arange(total, dtype=np.int64) * 1000 // total
    if order == "random":
        labels = np.random.default_rng(0).permutation(labels)
    index = np.zeros(total, INDEX_DTYPE)
    index["label"] = -1 if order == "no labels" else labels
    shards = tuple(Shard(name=f"{i}.tar", samples=per_shard, bytes=1, sha256="") for i in range(num_shards))
    classes = () if order == "no labels" else tuple(map(str, range(1000)))
    manifest = Manifest(
        split="train", shards=shards, classes=classes, directory=str(directory), index_path="index"
    )
    return save_index(manifest, index)


def test_sorted_shards_of_imagenets_size_give_a_ninth_of_the_classes(tmp_path):
    """The figures of docs/data.md."""
    options = {"num_lanes": 64, "window": 64, "batch_size": 1024}
    sorted_set = imagenet_like(tmp_path, "sorted")
    mixing = measure_mixing(sorted_set, **options)
    assert mixing.kind == "classes" and 635 < mixing.uniform < 648
    assert 0.08 < mixing.share < 0.14
    assert "reshuffle old --out NEW" in mixing.describe("old")
    more = measure_mixing(sorted_set, num_lanes=1024, window=1024, batch_size=1024)
    assert more.share > 0.8 and "reshuffle" not in more.describe("old")
    unlabelled = measure_mixing(imagenet_like(tmp_path, "no labels"), **options)
    assert unlabelled.kind == "neighbourhoods" and unlabelled.share == pytest.approx(mixing.share, abs=0.01)
    shuffled = measure_mixing(imagenet_like(tmp_path, "random"), **options)
    assert 0.97 < shuffled.share < 1.03


def test_the_expected_number_is_that_of_draws():
    counts, batch_size = np.array([1, 2, 30, 300, 0, 7]), 40
    labels = np.repeat(np.arange(6), counts)
    generator = np.random.default_rng(0)
    drawn = [len(np.unique(generator.permutation(labels)[:batch_size])) for _ in range(4000)]
    assert expected_distinct(counts, batch_size) == pytest.approx(np.mean(drawn), abs=0.06)
    assert expected_distinct(counts, int(counts.sum())) == 5


@pytest.mark.parametrize("sampler", ["uniform", "class_balanced"])
def test_the_simulated_batches_are_those_of_the_run(make_set, make_config, sampler):
    config = make_config(make_set([7, 3, 9, 5], labels=[i % 4 for i in range(24)]), sampler=sampler)
    stream = TrainingStream(config, seed=3, global_batch_size=6, micro_batch_size=6, rank=0, world_size=1)
    plan = build_plan(config, stream.manifest, 3)
    for step, batch in zip(range(9), stream, strict=False):
        assert plan.samples_of_slots(6 * step, 6).tolist() == batch.sample_ids.tolist()
    shown = np.concatenate([plan.samples_of_slots(start, 1) for start in range(24)])
    assert np.bincount(shown, minlength=24).tolist() == plan.copies_of_samples(0).tolist()


def test_a_sorted_set_is_said_at_the_start_and_by_verify(make_set, make_config, caplog):
    labels = [i // 40 for i in range(1600)]
    shards = make_set([100] * 16, labels=labels)
    config = make_config(shards, num_lanes=4, shuffle_window=8)
    options = {"seed": 0, "global_batch_size": 64, "micro_batch_size": 64, "rank": 0, "world_size": 1}
    with caplog.at_level("INFO"):
        TrainingStream(config, **options)
    (said,) = [record for record in caplog.records if "mixing" in record.message]
    assert said.levelname == "WARNING" and f"reshuffle {shards} --out NEW" in said.message
    caplog.clear()
    with caplog.at_level("INFO"):
        assert verify_main([shards]) == 0
    assert sum("mixing" in record.message for record in caplog.records) == 1


def read_members(directory: Path, split: str = "train") -> Counter:
    """Returns the samples of a folder's tars as (suffix, bytes) groups, keys left aside."""
    found = Counter()
    for path in sorted(directory.glob(f"{split}-*.tar")):
        groups: dict[str, list[tuple[str, bytes]]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                groups.setdefault(key, []).append((suffix, tar.extractfile(member).read()))
        found.update(frozenset(group) for group in groups.values())
    return found


def test_reshuffling_keeps_every_sample_and_mixes_them(make_set, tmp_path, caplog):
    labels = [i // 30 for i in range(300)]
    old, new = Path(make_set([60] * 5, labels=labels)), tmp_path / "new"
    arguments = ("reshuffle", old, "--samples-per-shard", 40, "--processes", 1)
    assert run(*arguments, "--out", new) == 0
    assert read_members(new) == read_members(old)
    manifest = load_manifest(str(new), "train")
    assert manifest.num_samples == 300 and len(manifest.shards) == 8
    assert manifest.images_per_class == (30,) * 10 and manifest.notes["shuffled"] is True
    assert verify(str(new), num_decoded=None) == []
    share = {
        directory: measure_mixing(
            load_manifest(str(directory), "train"), num_lanes=2, window=8, batch_size=10
        ).share
        for directory in (old, new)
    }
    assert share[old] < 0.5 and share[new] > 0.9
    assert not list(new.glob(".reshuffle*"))
    # The same seed gives the same bytes, another one another order.
    again, other = tmp_path / "again", tmp_path / "other"
    assert run(*arguments, "--out", again) == 0
    assert run(*arguments, "--seed", 1, "--out", other) == 0
    hashes = [[s.sha256 for s in load_manifest(str(d), "train").shards] for d in (new, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_memory_is_bounded_by_the_buffer(make_set, tmp_path, monkeypatch):
    old = make_set([50] * 4)
    options = reshuffling.ReshuffleOptions(samples_per_shard=20, buffer_bytes=2000)
    largest, flushes = 0, 0
    add, flush = reshuffling._Spools.add, reshuffling._Spools.flush

    def watch_add(self, *arguments):
        nonlocal largest
        add(self, *arguments)
        largest = max(largest, self._buffered)

    def watch_flush(self):
        nonlocal flushes
        flushes += 1
        flush(self)

    monkeypatch.setattr(reshuffling._Spools, "add", watch_add)
    monkeypatch.setattr(reshuffling._Spools, "flush", watch_flush)
    reshuffling.reshuffle(old, str(tmp_path / "new"), options)
    assert 0 < largest <= 2000 and flushes > 10
    assert read_members(tmp_path / "new") == read_members(Path(old))


def test_the_order_is_uniform():
    """Where 20,000 samples of a source go: places and sources are uncorrelated, parts are equally full."""
    values = np.array(
        [reshuffling.hash_key(0, reshuffling._ORDER, i) for i in range(20_000)], dtype=np.uint64
    )
    place = np.argsort(values)
    assert abs(np.corrcoef(place, np.arange(20_000))[0, 1]) < 0.03
    parts = np.bincount([int(value) * 50 >> 64 for value in values.tolist()], minlength=50)
    assert parts.min() > 0.8 * 400 and parts.max() < 1.2 * 400


def test_sets_without_manifest_compressed_tars_and_dotted_keys(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for number in range(2):
        with tarfile.open(old / f"train-{number:05d}-of-00002.tar", "w:gz") as tar:
            for i in range(16):
                name = ["owl", "fox"][i % 2]
                for suffix, content in (
                    ("jpg", encode_image(i + 16 * number, suffix="jpg")),
                    ("cls", name.encode()),
                ):
                    info = tarfile.TarInfo(f"im.v{i}.final.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    assert write_manifests(str(old))
    assert run("reshuffle", old, "--out", tmp_path / "no") == 2  # 16 images in one sample
    assert run("reshuffle", old, "--last-dot", "--out", tmp_path / "new", "--processes", 1) == 0
    manifest = load_manifest(str(tmp_path / "new"), "train")
    assert manifest.num_samples == 32 and manifest.classes == ("fox", "owl")
    assert manifest.images_per_class == (16, 16)


def test_a_long_tail_becomes_a_set_of_its_own_and_keeps_its_class_names(tmp_path, image_bytes):
    for number, name in enumerate(("owl", "fox", "ant")):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "in" / name / f"{i}.png").write_bytes(image_bytes(100 * number + i))
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "whole") == 0
    assert run("lt", tmp_path / "whole", "--imbalance", 10, "--out", tmp_path / "tail") == 0
    assert run("reshuffle", tmp_path / "tail", "--out", tmp_path / "new", "--processes", 1) == 0
    tail, new = (load_manifest(str(tmp_path / name), "train") for name in ("tail", "new"))
    assert new.classes == tail.classes == ("ant", "fox", "owl")
    assert new.images_per_class == tail.images_per_class and new.num_samples == tail.num_samples < 60


def test_mistakes_are_one_line(make_set, tmp_path, capsys, monkeypatch):
    old = make_set([6])
    assert run("reshuffle", old, "--out", old) == 2
    assert run("reshuffle", tmp_path / "nowhere", "--out", tmp_path / "new") == 2
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("data.writing.reshuffling.shutil.disk_usage", lambda _: usage)
    assert run("reshuffle", old, "--out", tmp_path / "full") == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * 3
    assert "is not empty; expected a new or empty folder" in lines[0] and "GiB free" in lines[2]


def test_a_damaged_sample_ends_the_rewriting(make_set, tmp_path, capsys):
    old = Path(make_set([6, 6]))
    path = old / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[1600] ^= 4
    path.write_bytes(content)
    assert run("reshuffle", old, "--out", tmp_path / "new") == 2
    assert "train-000001.tar#0 (k00006) cannot be read" in capsys.readouterr().err
    assert json.loads((old / "manifest.json").read_bytes())
