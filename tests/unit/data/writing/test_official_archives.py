"""CIFAR and Tiny ImageNet from miniature archives in their makers' layouts; and no code of a pickle is run."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import struct
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from data.make_shards import main
from data.shards import DataError, load_index, load_manifest
from data.stream.reader import ShardReader
from data.verify_shards import verify
from data.views.decoding import decode_image, find_image
from data.writing import cifar, downloads
from data.writing.downloads import fetch_archive

NAMES = {
    "cifar10": [f"class {i}".encode() for i in range(10)],
    "cifar100": [f"fine_{i}".encode() for i in range(100)],
}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


class OldPickler(pickle._Pickler):
    """Writes text as Python 2 wrote it when the official files were made: strings of bytes, and NumPy's old module."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes | str) -> None:
        data = value if isinstance(value, bytes) else value.encode()
        short = len(data) < 256
        size = struct.pack("<B" if short else "<i", len(data))
        self.write((pickle.SHORT_BINSTRING if short else pickle.BINSTRING) + size + data)
        self.memoize(value)

    dispatch[bytes] = save_string
    dispatch[str] = save_string


def old_pickle(values: object) -> bytes:
    stream = io.BytesIO()
    OldPickler(stream, protocol=2).dump(values)
    return stream.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def draw(name: str, count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, generator.integers(0, len(NAMES[name]), count).tolist()


def write_cifar(
    root: Path, name: str, version: str, **changes: bytes
) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Writes an unpacked miniature of the official archive; returns pixels and labels by split."""
    layout = cifar.CIFAR_SETS[name]
    root.mkdir(parents=True)
    (root / "readme.html").write_text("<html>")
    splits = {}
    for split, batches in layout.files.items():
        parts = [draw(name, 4, seed=hash_of(batch)) for batch in batches]
        splits[split] = (
            np.concatenate([part[0] for part in parts]),
            [label for part in parts for label in part[1]],
        )
        for batch, (pixels, labels) in zip(batches, parts, strict=True):
            if version == "python":
                values = {
                    b"batch_label": b"x",
                    b"data": pixels,
                    layout.labels_key: labels,
                    b"filenames": [b"a.png"],
                }
                (root / batch).write_bytes(old_pickle(values))
            else:
                coarse = [[7]] * len(labels) if name == "cifar100" else [[]] * len(labels)
                rows = (
                    bytes([*c, label]) + row.tobytes()
                    for c, label, row in zip(coarse, labels, pixels, strict=True)
                )
                (root / f"{batch}.bin").write_bytes(b"".join(rows))
    if version == "python":
        (root / layout.meta).write_bytes(old_pickle({layout.names_key: NAMES[name], b"num_vis": 3072}))
    else:
        (root / layout.text_meta).write_bytes(b"\n".join(NAMES[name]).replace(b" ", b"_") + b"\n\n")
    for file, content in changes.items():
        (root / file).write_bytes(content)
    return splits


def hash_of(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_goes_through_pixel_by_pixel(tmp_path, name, version, packed):
    root = tmp_path / f"{name}-folder"
    splits = write_cifar(root, name, version)
    archive = root
    if packed:
        archive = tmp_path / "archive.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(root, "cifar-batches")
    assert run(name, "--archive", archive, "--out", tmp_path / "out", "--processes", 1) == 0
    for split, (pixels, labels) in splits.items():
        manifest = load_manifest(str(tmp_path / "out"), split)
        assert manifest.num_samples == len(labels)
        assert [c.replace("_", " ") for c in manifest.classes] == [
            n.decode().replace("_", " ") for n in NAMES[name]
        ]
        index = load_index(manifest)
        for ordinal, sample in ShardReader(manifest).read(0, range(len(labels))):
            number = int(sample.key.rsplit("-", 1)[1])
            image = decode_image(find_image(sample), max_pixels=10_000).numpy()
            assert (image.reshape(-1) == pixels[number]).all()
            assert index["label"][ordinal] == labels[number]
    assert verify(str(tmp_path / "out"), num_decoded=None) == []


class Canary:
    def __reduce__(self) -> tuple:
        return (exec, ("import sys; sys.modules['canary'].sings = True",))


HOSTILE = {
    "code": lambda pixels: {b"data": Canary(), b"labels": [1]},
    "an array of objects": lambda pixels: {b"data": np.array([Canary()], dtype=object), b"labels": [1]},
    "floats": lambda pixels: {b"data": pixels.astype(np.float32), b"labels": [1] * len(pixels)},
    "fewer labels": lambda pixels: {b"data": pixels, b"labels": [1]},
    "labels beyond": lambda pixels: {b"data": pixels, b"labels": [10] * len(pixels)},
    "no labels": lambda pixels: {b"data": pixels},
    "a list": lambda pixels: [pixels],
    "other labels": lambda pixels: {b"data": pixels, b"labels": ["1"] * len(pixels)},
}


@pytest.mark.parametrize("kind", [*HOSTILE, "cut", "garbage", "missing"])
def test_no_pickle_runs_code_and_wrong_ones_are_one_line(tmp_path, kind, capsys, monkeypatch):
    witness = types.ModuleType("canary")
    monkeypatch.setitem(sys.modules, "canary", witness)
    write_cifar(tmp_path / "in", "cifar10", "python")
    path = tmp_path / "in" / "data_batch_3"
    if kind in HOSTILE:
        path.write_bytes(old_pickle(HOSTILE[kind](draw("cifar10", 4, 0)[0])))
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-500])
    elif kind == "garbage":
        path.write_bytes(b"\x80\x02 nothing")
    else:
        path.unlink()
    assert run("cifar10", "--archive", tmp_path / "in", "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "data_batch_3" in line
    assert not hasattr(witness, "sings") and not (tmp_path / "out").exists()


def test_the_canary_sings_when_it_is_let_out(monkeypatch):
    witness = types.ModuleType("canary")
    monkeypatch.setitem(sys.modules, "canary", witness)
    pickle.loads(pickle.dumps(Canary(), protocol=2))
    assert witness.sings


def write_tiny(root: Path, image_bytes) -> None:
    wnids = ["n02", "n01", "n03"]
    root.mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n01\tfish\n")
    number = 0
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(4):
            (folder / f"{wnid}_{i}.JPEG").write_bytes(image_bytes(number, size=64, suffix="jpeg"))
            number += 1
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(3):
            path = root / split / "images" / f"{split}_{i}.JPEG"
            path.write_bytes(image_bytes(number, size=64, suffix="jpeg"))
            number += 1
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62" for i, wnid in enumerate(["n03", "n01", "n03"])]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("packed", [True, False])
def test_tiny_imagenet_has_two_splits(tmp_path, image_bytes, packed):
    root = tmp_path / "tiny-imagenet-200"
    write_tiny(root, image_bytes)
    archive = root
    if packed:
        archive = tmp_path / "tiny-imagenet-200.zip"
        with zipfile.ZipFile(archive, "w") as target:
            for path in sorted(root.rglob("*")):
                target.write(path, path.relative_to(tmp_path))
    arguments = ("tiny-imagenet", "--archive", archive, "--out", tmp_path / "out", "--samples-per-shard", 5)
    assert run(*arguments, "--processes", 2) == 0
    train, val = (load_manifest(str(tmp_path / "out"), split) for split in ("train", "val"))
    assert train.classes == val.classes == ("n01", "n02", "n03")
    assert train.images_per_class == (4, 4, 4) and val.images_per_class == (1, 0, 2)
    assert verify(str(tmp_path / "out"), num_decoded=None) == []


def test_a_tiny_imagenet_of_another_layout_is_one_line(tmp_path, image_bytes, capsys):
    root = tmp_path / "tiny-imagenet-200"
    write_tiny(root, image_bytes)
    changes = {
        "holds the class 'n03'": lambda: (root / "wnids.txt").write_text("n01\nn02\n"),
        "does not fit the images": lambda: (root / "val" / "val_annotations.txt").write_text(
            "val_9.JPEG\tn01\n"
        ),
        "lacks val/val_annotations.txt": lambda: (root / "val" / "val_annotations.txt").unlink(),
        "holds no wnids.txt": lambda: (root / "wnids.txt").unlink(),
    }
    for expected, change in changes.items():
        change()
        assert run("tiny-imagenet", "--archive", root, "--out", tmp_path / "out") == 2
        assert expected in capsys.readouterr().err
    assert run("cifar10", "--archive", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_an_archive_is_fetched_once_and_only_whole(server, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder, address = server
    (folder / "a.tar.gz").write_bytes(b"the archive")
    md5 = hashlib.md5(b"the archive").hexdigest()
    cache = tmp_path / "cache"
    path = fetch_archive(f"{address}/a.tar.gz", md5, str(cache))
    assert path.read_bytes() == b"the archive"
    (folder / "a.tar.gz").unlink()
    assert fetch_archive(f"{address}/a.tar.gz", md5, str(cache)) == path
    (folder / "a.tar.gz").write_bytes(b"half")
    path.unlink()
    for url in (f"{address}/a.tar.gz", f"{address}/b.tar.gz"):
        with pytest.raises(DataError, match=r"cannot be fetched .* or pass its path or its unpacked folder"):
            fetch_archive(url, md5, str(cache))
    assert list(cache.iterdir()) == []


def test_without_a_network_the_user_reads_one_line(tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", fail)
    for name in ("cifar10", "cifar100", "tiny-imagenet"):
        assert run(name, "--cache", tmp_path / "cache", "--out", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be fetched (no network)" in line and "--archive" in line


def test_the_pixels_are_not_those_of_a_transposed_image():
    """Planes of rows: red first, and the first 32 bytes are the first row."""
    pixels = np.zeros((1, 3072), dtype=np.uint8)
    pixels[0, :32] = 255
    source = cifar.build_source(pixels, np.array([0]), ("a",), "train")
    image = decode_image(source.load(0).members["png"], max_pixels=10_000)
    assert image.shape == (3, 32, 32) and (image[0, 0] == 255).all() and int(image.sum()) == 32 * 255
    assert io.BytesIO(source.load(0).members["png"]).read(4) == b"\x89PNG"
