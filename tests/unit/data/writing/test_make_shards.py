"""From image files to shards: folders, CSV, iNaturalist, Fashion-MNIST; resumable, shuffled, counted."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.datasets import EvaluationStream, require_same_classes
from data.make_shards import main
from data.shards import DataError, load_index, load_manifest, split_names
from data.stream.pipeline import TrainingStream
from data.verify_shards import verify, write_manifests
from data.writing import fashion_mnist
from data.writing.inspection import scan_shard
from data.writing.shard_writing import fit_shards


def write_tree(root: Path, image_bytes, counts: dict[str, int], *, offset: int = 0) -> None:
    number = offset
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}_{i:03d}.JPEG").write_bytes(image_bytes(number, size=24, suffix="jpeg"))
            number += 1


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def read_all(directory: Path, split: str) -> dict[int, int]:
    stream = EvaluationStream(str(directory), split, lambda image: torch.zeros(1), batch_size=5)
    return {int(i): int(label) for _, labels, ids in stream for i, label in zip(ids, labels, strict=True)}


def test_a_miniature_imagenet_goes_through(tmp_path, image_bytes, make_config, capsys):
    counts = {"n01440764": 9, "n01443537": 5, "n02102040": 4}
    write_tree(tmp_path / "train", image_bytes, counts)
    val = tmp_path / "val"
    val.mkdir()
    lines = ["ImageId,PredictionString"]
    for i, name in enumerate(["n02102040", "n01440764", "n02102040", "n01443537"]):
        stem = f"ILSVRC2012_val_{i:08d}"
        (val / f"{stem}.JPEG").write_bytes(image_bytes(500 + i, size=24, suffix="jpeg"))
        lines.append(f"{stem},{name} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    out = tmp_path / "out"
    common = ("--out", out, "--samples-per-shard", 5, "--processes", 2)
    assert run("imagefolder", tmp_path / "train", *common) == 0
    labels = ("--labels", tmp_path / "LOC_val_solution.csv")
    assert run("imagefolder", val, "--split", "val", *labels, *common) == 0
    train, test = load_manifest(str(out), "train"), load_manifest(str(out), "val")
    assert train.classes == test.classes == tuple(sorted(counts))
    assert train.images_per_class == (9, 5, 4) and test.images_per_class == (1, 1, 2)
    assert [shard.samples for shard in train.shards] == [5, 5, 5, 3]
    require_same_classes(train, test)
    assert verify(str(out), num_decoded=None) == []
    assert sorted(read_all(out, "val").values()) == [0, 1, 2, 2]
    assert sorted(read_all(out, "train")) == list(range(18))
    stream = TrainingStream(
        make_config(str(out)), seed=0, global_batch_size=6, micro_batch_size=6, rank=0, world_size=1
    )
    batches = iter(stream)
    assert len({key for _ in range(3) for key in next(batches).keys}) == 18
    # Written by class, the first shard of 5 would hold one class only.
    index = load_index(train)
    assert index is not None and len(set(index["label"][:9].tolist())) > 1
    assert "train: 18 images, 3 classes, 4 shards" in capsys.readouterr().out


def test_own_images_make_shards_for_all_loader_processes(tmp_path, image_bytes, make_config):
    """A recipe's eight workers refused what `make_shards` had written of 300 photographs: one shard."""
    assert [fit_shards(count) for count in (40, 10_000, 50_000, 1_281_167)] == [16, 39, 195, 1500]
    write_tree(tmp_path / "in", image_bytes, {"a": 40})
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert [shard.samples for shard in load_manifest(str(tmp_path / "out"), "train").shards] == [16, 16, 8]
    config = make_config(str(tmp_path / "out"), num_workers=3, num_lanes=3)
    TrainingStream(config, seed=0, global_batch_size=6, micro_batch_size=6, rank=0, world_size=1)


def test_the_index_written_is_the_index_read_back(tmp_path, image_bytes):
    write_tree(tmp_path / "in", image_bytes, {"a": 3, "b": 4})
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out", "--samples-per-shard", 4) == 0
    manifest = load_manifest(str(tmp_path / "out"), "train")
    index = load_index(manifest)
    for number, shard in enumerate(manifest.shards):
        scan = scan_shard(tmp_path / "out" / shard.name)
        entries = index[manifest.first_ids[number] : manifest.first_ids[number + 1]]
        assert scan.offsets == entries["offset"].tolist()
        assert scan.checksums == entries["checksum"].tolist()
        assert scan.labels == entries["label"].tolist()
        assert (scan.sha256, scan.bytes) == (shard.sha256, shard.bytes)


def test_inat2018_keeps_the_taxonomy(tmp_path, image_bytes):
    taxa = [("Aves", "Pica pica"), ("Plantae", "Abies alba"), ("Aves", "Corvus corax")]
    categories = [{"id": i, "name": name, "supercategory": group} for i, (group, name) in enumerate(taxa)]
    number = 0
    for split, count in (("train", 8), ("val", 3)):
        images, annotations = [], []
        for i in range(count):
            category = i % 3
            name = f"train_val2018/{taxa[category][0]}/{category}/{split}{i}.jpg"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(image_bytes(number, suffix="jpg"))
            images.append({"id": 100 + number, "file_name": name, "width": 8, "height": 8, "license": 3})
            annotations.append({"id": number, "image_id": 100 + number, "category_id": category})
            number += 1
        document = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}2018.json").write_text(json.dumps(document))
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 0, "genus": "Pica", "family": "Corvidae"}]))
    out = tmp_path / "out"
    files = ("--train", tmp_path / "train2018.json", "--val", tmp_path / "val2018.json")
    extra = ("--categories", tmp_path / "categories.json", "--out", out)
    assert run("inat2018", "--root", tmp_path, *files, *extra) == 0
    train = load_manifest(str(out), "train")
    assert train.classes == ("Pica pica", "Abies alba", "Corvus corax")
    assert train.images_per_class == (3, 3, 2)
    require_same_classes(train, load_manifest(str(out), "val"))
    assert verify(str(out)) == []
    from data.stream.reader import ShardReader

    for _, sample in ShardReader(train).read(0, range(8)):
        facts = json.loads(sample.members["json"])
        assert facts["taxonomy"]["supercategory"] == taxa[int(sample.members["cls"])][0]
        if facts["category_id"] == 0:
            assert facts["taxonomy"]["genus"] == "Pica"


def test_csv_with_labels_and_other_columns(tmp_path, image_bytes):
    rows = ["file,species,place"]
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
        rows.append(f"{i}.png,{'fox' if i % 2 else 'owl'},forest")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    table = (
        "csv",
        tmp_path / "list.csv",
        "--root",
        tmp_path,
        "--image-column",
        "file",
        "--out",
        tmp_path / "out",
    )
    assert run(*table, "--label-column", "species") == 0
    manifest = load_manifest(str(tmp_path / "out"), "train")
    assert manifest.classes == ("fox", "owl") and manifest.images_per_class == (2, 2)
    assert run(*table, "--label-column", "genus") == 2


def test_a_flat_folder_without_labels_trains(tmp_path, image_bytes):
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"holiday.{i}.png").write_bytes(image_bytes(i))
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert load_manifest(str(tmp_path / "out"), "train").classes == ()
    assert set(read_all(tmp_path / "out", "train").values()) == {-1}


def test_broken_images_and_duplicates_are_left_out_and_counted(tmp_path, image_bytes, capsys):
    write_tree(tmp_path / "in", image_bytes, {"a": 6, "b": 6})
    twin = tmp_path / "in" / "a" / "twin.JPEG"
    twin.write_bytes((tmp_path / "in" / "a" / "a_002.JPEG").read_bytes())
    (tmp_path / "in" / "b" / "cut.JPEG").write_bytes(twin.read_bytes()[:200])
    for _ in range(2):
        assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out", "--samples-per-shard", 4) == 0
        said = capsys.readouterr().out
        assert "12 images" in said and "left out, broken: 1" in said and "left out, duplicate: 1" in said
        assert "cut.JPEG" in said and "twin" in said
        manifest = load_manifest(str(tmp_path / "out"), "train")
        assert manifest.images_per_class == (6, 6)
        assert manifest.notes["left_out"] == {"broken": 1, "duplicate": 1}
        assert verify(str(tmp_path / "out")) == []


def test_a_second_run_keeps_what_is_complete_and_mends_the_rest(tmp_path, image_bytes):
    write_tree(tmp_path / "in", image_bytes, {"a": 9})
    out = tmp_path / "out"
    arguments = ("imagefolder", tmp_path / "in", "--out", out, "--samples-per-shard", 3, "--processes", 1)
    assert run(*arguments) == 0
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    (out / "train-000001.tar").write_bytes(b"half a shard")
    (out / "train.index").unlink()
    assert run(*arguments) == 0
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    assert {name: content for name, (content, _) in before.items()} == {n: c for n, (c, _) in after.items()}
    kept = [name for name in before if before[name][1] == after[name][1]]
    assert sorted(kept) == ["train-000000.tar", "train-000002.tar"]
    assert verify(str(out)) == []
    # Other options: other shards, and none of the old ones left behind.
    assert run(*arguments, "--samples-per-shard", 5) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]


def test_over_large_images_are_shrunk_by_choice(tmp_path, image_bytes):
    from data.stream.reader import ShardReader
    from data.views.decoding import decode_image, find_image

    write_tree(tmp_path / "in", image_bytes, {"a": 2})
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out", "--max-side", 10) == 0
    manifest = load_manifest(str(tmp_path / "out"), "train")
    for _, sample in ShardReader(manifest).read(0, range(2)):
        assert decode_image(find_image(sample), max_pixels=1000).shape == (3, 10, 10)


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, image_bytes, capsys):
    write_tree(tmp_path / "in", image_bytes, {"a": 2, "b": 2})
    assert run("imagefolder", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    write_tree(tmp_path / "other", image_bytes, {"a": 1, "c": 1})
    assert run("imagefolder", tmp_path / "other", "--split", "val", "--out", tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) == 2
    assert "class 'c' is not among the 2 classes" in errors[-1]


def test_a_long_tail_shares_the_tars(tmp_path, image_bytes, make_config):
    write_tree(tmp_path / "in", image_bytes, dict.fromkeys("abcd", 40))
    whole, tail = tmp_path / "whole", tmp_path / "tail"
    assert run("imagefolder", tmp_path / "in", "--out", whole, "--samples-per-shard", 20) == 0
    assert run("lt", whole, "--imbalance", 20, "--out", tail) == 0
    assert not list(tail.glob("*.tar"))
    manifest = load_manifest(str(tail), "train")
    assert sorted(manifest.images_per_class) == [2, 5, 14, 40]
    labels = read_all(tail, "train")
    assert sorted(np.bincount(list(labels.values())).tolist()) == [2, 5, 14, 40]
    assert len(labels) == manifest.num_samples == 61
    assert verify(str(tail)) == []
    stream = TrainingStream(
        make_config(str(tail)), seed=0, global_batch_size=61, micro_batch_size=61, rank=0, world_size=1
    )
    assert sorted(next(iter(stream)).sample_ids.tolist()) == sorted(labels)
    assert run("lt", whole, "--out", whole) == 2


def test_held_out_images_are_training_images_of_the_whole_and_of_no_other_split(
    tmp_path, image_bytes, capsys
):
    for split in ("train", "test"):
        write_tree(tmp_path / "in" / split, image_bytes, {"a": 40, "b": 20, "c": 2})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert (
        run("imagefolder", tmp_path / "in", "--out", whole, "--samples-per-shard", 20, "--keep-duplicates")
        == 0
    )
    assert run("holdout", whole, "--share", 0.2, "--out", cut) == 0
    train, test = (load_manifest(str(cut), split) for split in ("train", "test"))
    assert (train.images_per_class, test.images_per_class) == ((32, 16, 1), (8, 4, 1))
    labels = {split: read_all(cut, split) for split in ("train", "test")}
    assert labels["train"] | labels["test"] == read_all(whole, "train")
    assert not labels["train"].keys() & labels["test"].keys() and not list(cut.glob("*.tar"))
    assert verify(str(cut)) == [] and train.hash != test.hash
    for options in (("--out", whole), ("--share", 1, "--out", cut), ("--share", "nan", "--out", cut)):
        assert run("holdout", whole, *options) == 2
    assert [line[:7] for line in capsys.readouterr().err.splitlines()[-3:]] == ["error: "] * 3


def test_another_set_s_manifest_is_not_replaced(tmp_path, image_bytes, make_set, capsys):
    for split, number in (("train", 9), ("val", 4)):
        write_tree(tmp_path / "in" / split, image_bytes, {"a": number, "b": number}, offset=number * 10)
    whole, theirs, tail, cut = (str(tmp_path / name) for name in ("whole", "theirs", "tail", "cut"))
    images = ("imagefolder", tmp_path / "in" / "val")
    assert run("imagefolder", tmp_path / "in", "--out", whole) == 0
    # A set without a tar beside its manifest: in folders of splits.
    (Path(make_set([4], name="theirs")) / "train").mkdir()
    (tmp_path / "theirs" / "train-000000.tar").rename(tmp_path / "theirs" / "train" / "000000.tar")
    assert write_manifests(theirs) == []
    again = [("lt", whole, "--imbalance", 3, "--out", tail), ("holdout", whole, "--out", cut)]
    assert [run(*command) for command in again * 2] == [0] * 4  # its own it replaces
    (tmp_path / "tars").mkdir()
    shutil.copy(next(Path(whole).glob("*.tar")), tmp_path / "tars")
    before = {path: path.read_bytes() for path in tmp_path.rglob("manifest.json")}
    for command in [
        ("lt", whole, "--out", theirs),
        ("lt", theirs, "--out", whole),
        ("lt", whole, "--out", cut),
        ("lt", whole, "--out", tmp_path / "tars"),
        ("holdout", whole, "--out", theirs),
        ("holdout", whole, "--out", tail),
        (*images, "--out", tail),
        (*images, "--out", cut),
        (*images, "--out", theirs),
    ]:
        capsys.readouterr()
        assert run(*command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert "set --out" in line and ("same command wrote" in line or "without others' shards" in line)
    assert {path: path.read_bytes() for path in tmp_path.rglob("manifest.json")} == before


def test_a_sub_sample_of_other_splits_leaves_none_of_the_former(tmp_path, image_bytes):
    for name, split in (("one", "val"), ("other", "test")):
        for part in ("train", split):
            write_tree(tmp_path / name / part, image_bytes, {f"{name} a": 4, f"{name} b": 4})
        assert run("imagefolder", tmp_path / name, "--out", tmp_path / f"{name}-shards") == 0
        assert run("lt", tmp_path / f"{name}-shards", "--imbalance", 2, "--out", tmp_path / "tail") == 0
    assert split_names(str(tmp_path / "tail")) == ["test", "train"]


def test_a_sub_sample_behind_a_link_finds_its_tars(tmp_path, image_bytes):
    """The system goes up from where a link leads, not from where it stands; on both sides."""
    write_tree(tmp_path / "in", image_bytes, {"a": 5, "b": 5})
    assert run("imagefolder", tmp_path / "in", "--out", tmp_path / "far" / "away" / "whole") == 0
    (tmp_path / "disk" / "deep" / "tail").mkdir(parents=True)
    (tmp_path / "tail").symlink_to("disk/deep/tail")
    (tmp_path / "whole").symlink_to("far/away/whole")
    for command in ("lt", "holdout"):
        out = tmp_path / "tail" / command
        assert run(command, tmp_path / "whole", "--out", out) == 0
        assert verify(str(out)) == [] and verify(str(out.resolve())) == []
    assert run("lt", tmp_path / "whole", "--out", tmp_path / "far" / "away" / "whole") == 2
    # Where the names as written lead there too they stay: a set's hash is of them.
    assert run("lt", tmp_path / "whole", "--out", tmp_path / "plain") == 0
    assert load_manifest(str(tmp_path / "plain"), "train").shards[0].name.startswith("../whole/train-")


@pytest.fixture
def small_fashion(tmp_path, monkeypatch) -> Path:
    """Four archives of Fashion-MNIST's format with 7 + 3 images; their hashes are put in place of the real ones."""
    folder = tmp_path / "installed" / fashion_mnist._INSTALLED
    folder.mkdir(parents=True)
    hashes = {}
    for prefix, count in (("train", 7), ("t10k", 3)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        contents = {
            f"{prefix}-images-idx3-ubyte.gz": b"\0" * 16 + pixels.tobytes(),
            f"{prefix}-labels-idx1-ubyte.gz": b"\0" * 8 + bytes(range(count)),
        }
        for name, content in contents.items():
            data = gzip.compress(content, mtime=0)
            (folder / name).write_bytes(data)
            hashes[name] = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(fashion_mnist, "_SHA256", hashes)
    return tmp_path / "installed"


def test_the_installed_package_is_used_where_it_is(small_fashion, tmp_path):
    folder = fashion_mnist.fetch(str(tmp_path / "cache"), installed_root=str(small_fashion))
    source = fashion_mnist.open_fashion_mnist(folder, "test")
    assert len(source) == 3 and source.load(2).label == 2
    assert source.load(1).key == "test-00001"


def test_half_a_file_is_never_used(small_fashion, tmp_path, monkeypatch):
    name = "train-images-idx3-ubyte.gz"
    path = small_fashion / fashion_mnist._INSTALLED / name
    path.write_bytes(path.read_bytes()[:-10])

    def no_network(scratch: Path) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist, "_fetch_package", no_network)
    monkeypatch.setattr(fashion_mnist, "_fetch_upstream", no_network)
    with pytest.raises(
        DataError, match=r"install the Debian package .* apt-get download .* or copy the four"
    ):
        fashion_mnist.fetch(str(tmp_path / "cache"), installed_root=str(small_fashion))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_fetched_package_enters_the_cache_whole(small_fashion, tmp_path, monkeypatch):
    def unpack(scratch: Path) -> Path:
        folder = scratch / "unpacked"
        folder.mkdir()
        for path in (small_fashion / fashion_mnist._INSTALLED).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    monkeypatch.setattr(fashion_mnist, "_fetch_package", unpack)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "t10k-labels-idx1-ubyte.gz").write_bytes(b"left by an interrupted copy")
    assert fashion_mnist.fetch(str(cache), installed_root=str(tmp_path)) == cache
    assert {path.name for path in cache.iterdir()} == set(fashion_mnist._SHA256)
    assert fashion_mnist.fetch(str(cache), installed_root=str(tmp_path)) == cache


def test_the_fetch_is_one_line_with_exit_code_2(tmp_path, monkeypatch, capsys):
    def fail(scratch: Path) -> Path:
        raise OSError("no network")

    monkeypatch.setattr(fashion_mnist, "_fetch_package", fail)
    monkeypatch.setattr(fashion_mnist, "_fetch_upstream", fail)
    monkeypatch.setattr(fashion_mnist, "_INSTALLED", "nowhere")
    assert run("fashion-mnist", "--out", tmp_path / "out", "--cache", tmp_path / "cache") == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and error.startswith("error: Fashion-MNIST cannot be fetched")


def test_digits_become_two_splits_that_share_no_image(tmp_path):
    assert run("digits", "--out", tmp_path, "--processes", 1) == 0
    seen = {}
    for split, number in (("train", 1437), ("test", 360)):
        labels = read_all(tmp_path, split)
        manifest = load_manifest(str(tmp_path), split)
        assert len(labels) == manifest.num_samples == number
        assert set(labels.values()) == set(range(10))
        keys = [key for shard in manifest.shards for key in scan_shard(Path(manifest.path_of(shard))).keys]
        seen[split] = {key.removeprefix(f"{split}-") for key in keys}
    assert len(seen["train"]) == 1437 and not seen["train"] & seen["test"]


def test_digits_without_scikit_learn_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("digits", "--out", tmp_path) == 2
    assert capsys.readouterr().err.strip().endswith("pip install scikit-learn")
