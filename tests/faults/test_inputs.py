"""Malformed configurations and hostile files: one-line errors, and no code of theirs runs."""

from __future__ import annotations

import contextlib
import io
import pickle
from pathlib import Path

import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.config import DataConfig
from data.datasets import EvaluationStream
from data.shards import DataError
from data.stream.pipeline import TrainingStream
from data.verify_shards import verify, write_manifests
from runtime.config import ConfigError, iterate_keys, load_config
from training.checkpoints.files import CheckpointError
from training.checkpoints.state_files import ConsolidatedState, load_tensors, load_tree
from training.config import PretrainConfig

KEYS = sorted(iterate_keys(PretrainConfig))
VALUES = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "true", "[1, 2", "{a: b}", "!!python/object:os.system x", "${env:HOME}", "", "*", "&a"]
    ),
    st.text(max_size=12),
)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("yaml") / "smallest.yaml"
    path.write_text("data: {shards: x}\n")
    load_config(PretrainConfig, str(path), [])
    return str(path)


@settings(max_examples=1000, deadline=None)
@given(key=st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), value=VALUES)
def test_no_override_ends_in_a_traceback(smallest: str, key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):  # the program prints it as one line; anything else is a traceback
        load_config(PretrainConfig, smallest, [f"{key}={value}"])


@settings(max_examples=100, deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_no_yaml_ends_in_a_traceback(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_config(PretrainConfig, str(path), [])


class Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self._path,))


def test_a_pickle_in_place_of_a_state_file_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile = pickle.dumps(Canary(canary))
    for name in ("state-00000-of-00001.safetensors", "progress.safetensors", "progress.json"):
        (tmp_path / name).write_bytes(hostile)
    with pytest.raises(CheckpointError):
        ConsolidatedState(tmp_path)
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "progress.safetensors")
    with pytest.raises(CheckpointError):
        load_tree(tmp_path, "progress")
    (tmp_path / "progress.safetensors").unlink()
    with pytest.raises(CheckpointError):
        load_tree(tmp_path, "progress")
    assert not canary.exists()
    pickle.loads(hostile)
    assert canary.exists(), "the canary sings when it is let out: the test can fail"


@pytest.mark.parametrize("image", ["png", "pickle"])
def test_members_of_a_shard_are_never_unpickled_nor_run(tmp_path: Path, image: str) -> None:
    canary = tmp_path / "canary"
    hostile = pickle.dumps(Canary(canary))
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(picture, format="PNG")
    members = {"pyd": hostile, "pickle": hostile, "pkl": hostile, "pth": hostile, "npy": hostile, "cls": b"0"}
    with webdataset.TarWriter(str(tmp_path / "train-000000.tar")) as writer:
        for number in range(4):
            # An image that is a pickle in truth, and members that webdataset's own decoders would load.
            writer.write(
                {
                    "__key__": str(number),
                    **members,
                    "png": picture.getvalue() if image == "png" else hostile,
                }
            )
    findings = write_manifests(str(tmp_path), num_decoded=0)
    assert not findings
    assert bool(verify(str(tmp_path), num_decoded=None)) == (image == "pickle")
    config = DataConfig(
        shards=str(tmp_path), global_crop_size=8, num_local_crops=0, num_workers=0, num_lanes=1
    )
    options = {"seed": 0, "global_batch_size": 4, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    if image == "png":
        assert len(next(iter(TrainingStream(config, **options))).keys) == 4
    else:
        with pytest.raises(DataError, match="no image"):
            TrainingStream(config, **options)
    stream = EvaluationStream(str(tmp_path), "train", lambda image: torch.zeros(1), batch_size=4)
    assert sum(len(labels) for _, labels, _ in stream) == (4 if image == "png" else 0)
    assert not canary.exists()
    pickle.loads(hostile)
    assert canary.exists(), "the canary sings when it is let out: the test can fail"


@pytest.mark.parametrize("room", ["training", "data"])
def test_nothing_is_unpickled(room: str) -> None:
    for path in Path(room).rglob("*.py"):
        text = path.read_text()
        if (
            path.name == "cifar.py"
        ):  # its unpickler knows stand-ins only, which test_official_archives.py holds
            assert "pickle.load" not in text
            continue
        assert "torch.load(" not in text and "import pickle" not in text, path
