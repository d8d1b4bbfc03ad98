"""Malformed configurations and hostile files: one-line errors, and no code of theirs runs."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.config import ConfigError, iterate_keys, load_config
from training.checkpoint_files import CheckpointError
from training.config import PretrainConfig
from training.state_files import ConsolidatedState, load_tensors, load_tree

DEMO = "configs/pretrain_vit-mini_fashion-mnist_full.yaml"
KEYS = sorted(iterate_keys(PretrainConfig))
VALUES = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "true", "[1, 2", "{a: b}", "!!python/object:os.system x", "${env:HOME}", "", "*", "&a"]
    ),
    st.text(max_size=12),
)


@settings(max_examples=1000, deadline=None)
@given(key=st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), value=VALUES)
def test_no_override_ends_in_a_traceback(key: str, value: str) -> None:
    with contextlib.suppress(ConfigError):  # the program prints it as one line; anything else is a traceback
        load_config(PretrainConfig, DEMO, [f"{key}={value}"])


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


def test_training_never_unpickles() -> None:
    for path in Path("training").glob("*.py"):
        text = path.read_text()
        assert "torch.load(" not in text and "import pickle" not in text, path
