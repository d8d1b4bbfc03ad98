"""Files of tensors."""

import os

import pytest
import torch

from evaluation.tensor_files import save_tensors as save_features
from training.checkpoints.state_files import save_tensors


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_tensors_are_as_readable_as_any_new_file(umask, tmp_path):
    """Whoever may read the folder of an exported encoder may read its weights."""
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "weights.safetensors", {"a": torch.ones(2)})
        save_features({"a": torch.ones(2)}, tmp_path / "features.safetensors", {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
