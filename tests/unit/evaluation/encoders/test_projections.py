"""A head that was saved beside an encoder projects as it did in training."""

import pytest
import torch
from safetensors.torch import save_file

from evaluation.encoders.projections import HEAD_FILE, load_projection_head
from models.config import HeadConfig
from models.heads import UNIT_LENGTH, ProjectionHead


@pytest.mark.parametrize("is_unit", [False, True])
def test_a_saved_head_keeps_its_unit_length(tmp_path, is_unit):
    config = HeadConfig(num_layers=2, hidden_dim=6, projection_dim=4, normalize_bottleneck=is_unit)
    head, rows = ProjectionHead(5, config).eval(), torch.randn(3, 5)
    mark = {UNIT_LENGTH: torch.ones(())} if is_unit else {}
    save_file(head.state_dict() | mark, tmp_path / HEAD_FILE)
    found = load_projection_head(tmp_path)
    assert torch.equal(found(rows), head(rows))
    lengths = found(rows).norm(dim=1)
    assert torch.allclose(lengths, torch.ones(3)) == is_unit
