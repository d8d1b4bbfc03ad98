"""Shards that somebody else wrote: roles instead of spellings, labels of any kind, and what is accepted can be used."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.datasets import EvaluationStream
from data.shards import DataError, load_index, load_manifest
from data.stream.pipeline import TrainingStream
from data.verify_shards import main, verify, write_manifests
from data.writing.findings import MAX_LINES, Finding, count, summarise
from data.writing.labels import LabelError, parse_label
from tests.unit.data.conftest import encode_image

STREAM = {"seed": 0, "global_batch_size": 2, "micro_batch_size": 2, "rank": 0, "world_size": 1}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labels_of(directory: Path, split: str = "train") -> list[int]:
    return load_index(load_manifest(str(directory), split))["label"].tolist()


def image_of(number: int, suffix: str) -> bytes:
    kinds = {"jpg": "jpg", "jpeg": "jpeg", "webp": "webp", "gif": "gif"}
    return encode_image(number, suffix=kinds.get(suffix, "png"))


def test_suffixes_may_be_mixed_and_companions_are_optional(tmp_path, make_config):
    members = []
    for number, suffix in enumerate(["jpg", "JPEG", "png", "webp", "jpg", "gif"]):
        members.append((f"k{number}.{suffix}", image_of(number, suffix.lower())))
        members.append((f"k{number}.cls", str(number % 2).encode()))
        if number % 2:
            members.append((f"k{number}.json", b"{}"))
    write_tar(tmp_path / "train-000000.tar", members)
    assert write_manifests(str(tmp_path), num_decoded=None) == []
    assert verify(str(tmp_path), num_decoded=None) == []
    config = make_config(str(tmp_path), num_lanes=1)
    batch = next(iter(TrainingStream(config, **{**STREAM, "global_batch_size": 6, "micro_batch_size": 6})))
    assert sorted(batch.keys) == [f"k{number}" for number in range(6)]


def test_several_images_are_asked_about_and_the_answer_is_kept(tmp_path, make_config, capsys):
    depth, image = encode_image(1, size=4), encode_image(2, size=9)
    members = [(f"k{i}.{s}", data) for i in range(4) for s, data in (("depth.png", depth), ("jpg", image))]
    write_tar(tmp_path / "train-000000.tar", members)
    assert main([str(tmp_path), "--write"]) == 2
    said = capsys.readouterr().out
    assert "2 images (depth.png, jpg); expected one; set data.image_key" in said and "3 more like it" in said
    assert main([str(tmp_path), "--write", "--image-key", "jpg"]) == 0
    assert main([str(tmp_path)]) == 0
    sizes = []

    def look(picture):
        sizes.append(picture.size)
        return torch.zeros(1)

    assert len(list(EvaluationStream(str(tmp_path), "train", look, batch_size=4))) == 1
    assert set(sizes) == {(9, 9)}
    # The configuration's choice goes before the manifest's, and a member that is not there is no image.
    next(iter(TrainingStream(make_config(str(tmp_path), image_key="depth.png", num_lanes=1), **STREAM)))
    with pytest.raises(DataError, match=r"no member 'seg.png' among its members \(depth.png, jpg\)"):
        TrainingStream(make_config(str(tmp_path), image_key="seg.png"), **STREAM)


def test_a_manifest_without_image_key_ends_the_run_with_one_line(tmp_path, make_config):
    write_tar(
        tmp_path / "train-000000.tar",
        [(f"k{i}.{s}", encode_image(i)) for i in range(4) for s in ("a.png", "b.png")],
    )
    assert write_manifests(str(tmp_path), image_key="a.png") == []
    path = tmp_path / "manifest.json"
    document = json.loads(path.read_bytes())
    document["splits"]["train"]["image_key"] = ""
    path.write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=r"sample k0 holds 2 images \(a.png, b.png\); expected one; set data.image_key"
    ):
        TrainingStream(make_config(str(tmp_path)), **STREAM)


def test_keys_with_dots_are_named_with_the_remedy(tmp_path, capsys):
    members = [(f"im.v{i}.final.jpg", encode_image(i, suffix="jpg")) for i in range(32)]
    write_tar(tmp_path / "old" / "train-000000.tar", members)
    assert main([str(tmp_path / "old"), "--write"]) == 2
    said = capsys.readouterr().out
    assert "sample 0 (im): holds several images (32 images" in said
    assert "if im.v0.final.jpg is a sample of its own, its key holds a dot" in said and "--last-dot" in said


@pytest.mark.parametrize("kind", ["cls", "json"])
def test_text_labels_are_numbered_in_sorted_order(tmp_path, kind):
    names = ["owl", "fox", "owl", "ant"]
    content = {"cls": lambda name: name.encode(), "json": lambda name: json.dumps({"label": name}).encode()}[
        kind
    ]
    for split, chosen in (("train", names), ("test", ["fox"])):
        members = [
            (f"k{i}.{s}", data)
            for i, name in enumerate(chosen)
            for s, data in (("png", encode_image(i)), (kind, content(name)))
        ]
        write_tar(tmp_path / f"{split}-00000-of-00001.tar", members)
    assert write_manifests(str(tmp_path)) == []
    train, test = load_manifest(str(tmp_path), "train"), load_manifest(str(tmp_path), "test")
    assert train.classes == test.classes == ("ant", "fox", "owl")
    assert train.images_per_class == (1, 1, 2) and labels_of(tmp_path) == [2, 1, 2, 0]
    assert verify(str(tmp_path)) == []
    stream = EvaluationStream(str(tmp_path), "train", lambda image: torch.zeros(1), batch_size=8)
    assert [labels.tolist() for _, labels, _ in stream] == [[2, 1, 2, 0]]


def test_a_file_of_classes_gives_the_order(tmp_path, capsys):
    members = [
        (f"k{i}.{s}", data)
        for i, name in enumerate(["owl", "fox"])
        for s, data in (("png", encode_image(i)), ("cls", name.encode()))
    ]
    write_tar(tmp_path / "train-000000.tar", members)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfowl\nfox\ncat\n")
    assert write_manifests(str(tmp_path)) == []
    assert load_manifest(str(tmp_path), "train").classes == ("owl", "fox", "cat")
    assert labels_of(tmp_path) == [0, 1]
    (tmp_path / "classes.txt").write_text("owl\n")
    assert main([str(tmp_path), "--write"]) == 2
    assert "does not list; expected one of 1; mend that file ('fox')" in capsys.readouterr().out
    (tmp_path / "classes.txt").write_text("owl\nfox\nowl\n")
    assert main([str(tmp_path), "--write"]) == 2
    assert "names the class 'owl' twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, 3), (1.0, 1), ("7", 7), (" 7\n", 7), ("2.0", 2), ("n01440764", "n01440764"), ("red fox", "red fox")],
)
def test_labels_are_indices_or_names(value, label):
    assert parse_label("k", value) == label


@pytest.mark.parametrize(
    "value",
    [3_000_000_000, "3000000000", -1, "-1", "9" * 5000, 1.5, float("nan"), True, "", "  ", [1], {}, 1e300],
)
def test_what_is_neither_is_refused_before_it_sizes_anything(value):
    with pytest.raises(LabelError, match="the label of k is "):
        parse_label("k", value)


@pytest.mark.parametrize("label", [b"1000000", b"-7", b"", b"1.5", b"\xff"])
def test_unusable_labels_are_one_finding(tmp_path, label):
    members = [
        (f"k{i}.{s}", data) for i in range(40) for s, data in (("png", encode_image(i)), ("cls", label))
    ]
    write_tar(tmp_path / "train-000000.tar", members)
    findings = write_manifests(str(tmp_path), num_decoded=0)
    if label == b"1.5":  # a name
        assert findings == []
        return
    assert len(findings) == 1 and findings[0].count == 40 and "has no usable label" in str(findings[0])
    assert not (tmp_path / "manifest.json").exists()


def test_labels_of_two_kinds_are_refused(tmp_path):
    members = [
        (f"k{i}.{s}", data)
        for i, label in enumerate([b"3", b"fox"])
        for s, data in (("png", encode_image(i)), ("cls", label))
    ]
    write_tar(tmp_path / "train-000000.tar", members)
    (finding,) = write_manifests(str(tmp_path))
    assert "labels are of two kinds" in finding.message and "'fox'" in finding.detail


def test_any_number_of_findings_is_at_most_ten_lines(tmp_path):
    per_shard = [
        Finding(f"train-{i:06d}.tar", "sample 3 (k)", "has no image", f"detail {i}", 500) for i in range(900)
    ]
    kinds = [Finding("train-000000.tar", "", f"kind {i}") for i in range(30)]
    for findings in (per_shard, kinds, per_shard + kinds):
        lines = summarise(findings)
        assert len(lines) <= MAX_LINES and ("detail 0" in lines[0] or "kind 0" in lines[0])
    assert count(per_shard) == 450_000
    assert summarise(per_shard) == [
        "train-000000.tar: sample 3 (k): has no image (detail 0); and 449,999 more like it, in 900 shards"
    ]
    assert "and 21 findings of 21 other kinds" in summarise(kinds)[-1]


def test_the_hubs_naming_makes_one_split_and_missing_shards_are_said(tmp_path, caplog):
    for split, numbers in (("train", (0, 1, 3)), ("imagenet1k-validation", (0,))):
        for number in numbers:
            members = [(f"{number}-{i}.png", encode_image(i)) for i in range(3)]
            write_tar(tmp_path / f"{split}-{number:05d}-of-00004.tar", members)
    assert main([str(tmp_path), "--write"]) == 0
    assert "train: 3 of its 4 shards are here" in caplog.text
    manifest = load_manifest(str(tmp_path), "train")
    assert [shard.name for shard in manifest.shards] == [f"train-{n:05d}-of-00004.tar" for n in (0, 1, 3)]
    assert load_manifest(str(tmp_path), "imagenet1k-validation").num_samples == 3


def test_splits_may_be_folders(tmp_path, make_config):
    for split in ("train", "test"):
        for number in range(2):
            members = [(f"{number}{i}.png", encode_image(i)) for i in range(2)]
            write_tar(tmp_path / split / f"{number}.tar", members)
    assert write_manifests(str(tmp_path)) == []
    assert verify(str(tmp_path)) == []
    assert load_manifest(str(tmp_path), "test").num_samples == 4
    assert len(next(iter(TrainingStream(make_config(str(tmp_path)), **STREAM))).keys) == 2


def write_sparse(path: Path) -> None:
    with (path.parent / "k.png").open("wb") as file:
        file.write(encode_image(1))
        file.truncate(1 << 20)
    subprocess.run(["tar", "--sparse", "-cf", path, "-C", path.parent, "k.png"], check=True)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gzip", "is compressed; expected a plain tar, in which samples can be found; expand it (gzip)"),
        ("sparse", "holds a sparse file; expected whole ones"),
        ("no members", "holds no sample"),
        (
            "no suffix",
            "holds no sample; expected members such as KEY.jpg; remove the file (no suffix: image0, image1)",
        ),
        ("AppleDouble only", "holds no sample"),
        ("zero bytes", "cannot be read"),
    ],
)
def test_what_no_reader_takes_is_refused_in_one_line_that_names_the_file(tmp_path, capsys, kind, expected):
    good = [(f"g{i}.png", encode_image(i)) for i in range(3)]
    write_tar(tmp_path / "train-000000.tar", good)
    path = tmp_path / "train-000001.tar"
    if kind == "gzip":
        path.write_bytes(gzip.compress((tmp_path / "train-000000.tar").read_bytes()))
    elif kind == "sparse":
        write_sparse(path)
    elif kind == "no members":
        write_tar(path, [])
    elif kind == "no suffix":
        write_tar(path, [(f"image{i}", encode_image(i)) for i in range(2)])
    elif kind == "AppleDouble only":
        write_tar(path, [(f"a/._k{i}.png", b"resource fork") for i in range(2)])
    else:
        path.write_bytes(b"")
    assert main([str(tmp_path), "--write"]) == 2
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "train-000001.tar: " in line and expected in line
    ]
    assert lines, kind
    assert not (tmp_path / "manifest.json").exists()


def test_a_shard_that_is_compressed_only_is_named(tmp_path):
    (tmp_path / "train-000000.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 compressed ones, train-000000.tar.gz: expand them"):
        write_manifests(str(tmp_path))


def test_members_that_are_no_data_are_passed_over_and_counted(tmp_path, caplog, make_config):
    members = [("__MACOSX/a/k.png", b"x"), ("README", b"x")]
    for i in range(4):
        members += [
            (f"a/._k{i}.jpg", b"fork"),
            (f"a/k{i}.jpg", encode_image(i, suffix="jpg")),
            (f"a/k{i}.cls", b"0"),
        ]
    write_tar(tmp_path / "train-000000.tar", members)
    with caplog.at_level("INFO"):
        assert main([str(tmp_path), "--write"]) == 0
    assert "passed over, hidden or system file: 5 members" in caplog.text
    assert "passed over, no suffix: 1 members" in caplog.text
    batch = next(iter(TrainingStream(make_config(str(tmp_path), num_lanes=1), **STREAM)))
    assert set(batch.keys) <= {f"a/k{i}" for i in range(4)}
    assert verify(str(tmp_path)) == []


def test_latin_1_names_are_read(tmp_path, make_config):
    with tarfile.open(
        tmp_path / "train-000000.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT
    ) as tar:
        for name in ("caf\xe9.png", "caf\xe8.png"):
            content = encode_image(len(name))
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert write_manifests(str(tmp_path)) == []
    batch = next(iter(TrainingStream(make_config(str(tmp_path), num_lanes=1), **STREAM)))
    assert sorted(batch.keys) == ["caf\xe8", "caf\xe9"]


NAMES = st.sampled_from(
    [
        *(f"k{i}.{suffix}" for i in range(3) for suffix in ("png", "jpg", "cls", "json", "txt", "seg.png")),
        *(
            "k1",
            "._k0.png",
            "a/._k0.png",
            "a.b/k.png",
            "__meta__.png",
            "x.v0.png",
            "x.v1.png",
            "./k9.png",
            ".png",
        ),
    ]
)
CONTENTS = st.sampled_from(
    [
        encode_image(0),
        encode_image(1, suffix="jpg"),
        b"",
        b"3",
        b"fox",
        b"-1",
        b'{"label": 1.0}',
        b"[1]",
        b"\x80\x04N.",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tars=st.lists(st.lists(st.tuples(NAMES, CONTENTS), max_size=7), min_size=1, max_size=2))
def test_what_write_accepts_every_reader_takes(tars, make_config):
    with tempfile.TemporaryDirectory() as directory:
        for number, members in enumerate(tars):
            write_tar(Path(directory) / f"train-{number:06d}.tar", members)
        if write_manifests(directory, num_decoded=None):
            assert not (Path(directory) / "manifest.json").exists()
            return
        assert verify(directory, num_decoded=None) == []
        manifest = load_manifest(directory, "train")
        config = make_config(directory, num_lanes=1)
        batch = next(
            iter(TrainingStream(config, **{**STREAM, "global_batch_size": 1, "micro_batch_size": 1}))
        )
        assert not batch.skipped
        stream = EvaluationStream(directory, "train", lambda image: torch.zeros(1), batch_size=100)
        ((_, labels, ids),) = stream
        assert not stream.skipped and len(ids) == manifest.num_samples
        assert labels.tolist() == labels_of(Path(directory))
        assert int(labels.max()) < max(1, len(manifest.classes))


def test_usage_lines_do_not_wait_for_torch():
    code = "import sys; sys.argv = ['make_shards', '--help']\nimport data.make_shards as m\ntry: m.main()\n"
    code += (
        "except SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
