"""Exported prototypes pick, for every projection, the prototype that the teacher itself picks."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from prototypes.config import CouplingConfig
from tests.unit.prototypes.building import build, clustered_rows, make_config, take_step
from training.checkpoints.snapshot import _exported_prototypes

CASES = {
    "unit rows": make_config(16, 8),
    "centred": make_config(16, 8, center=True),
    "standardised": make_config(16, 8, standardise=True),
    "coupled": dataclasses.replace(
        make_config(16, 8, standardise=True), coupling=CouplingConfig(strength=0.5)
    ),
    "partial": make_config(16, 8, mode="partial"),
    "joint": make_config(16, 8, mode="joint"),
}


@pytest.mark.learned
@pytest.mark.parametrize("name", CASES)
def test_exported_prototypes_choose_as_the_teacher_does(name, record_property):
    estimator = build(CASES[name])
    rows = 3.0 + clustered_rows(200, 8) * torch.linspace(0.2, 4.0, 8)
    for batch in rows.split(50):
        take_step(estimator, batch)
    raw = {role: torch.randn(16, 8) for role in ("student", "teacher")}
    learned = raw if estimator.build_learned() is not None else {}
    state = {key: value for key, value in estimator.state_dict().items() if isinstance(value, torch.Tensor)}
    exported = _exported_prototypes(estimator, state, learned)

    unit = normalize(raw["teacher"], dim=1) if learned else None
    operands, columns = estimator.logit_operands(rows, "teacher", unit)
    moved = (rows - exported.get("input_shift", 0.0)) * exported.get("input_scale", 1.0)
    chosen = (moved @ normalize(exported["means"], dim=1).T).argmax(1)
    first, second = (operands @ columns.T).topk(2, dim=1).values.T
    # Two prototypes as near as rounding tells are a tie.
    clear = first - second > 1e-4
    record_property("closest two logits", float((first - second).min()))
    assert torch.equal(chosen[clear], (operands @ columns.T).argmax(1)[clear]) and clear.float().mean() > 0.95
    assert ("student_means" in exported) == bool(learned)
    assert len(chosen.unique()) > 1
