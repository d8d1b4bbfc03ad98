"""Unsupported combinations are refused in one line, and the page tells the same as the table."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from models.vit import compile_blocks
from training.engines.table import ENGINES, REMEDIES, UNSUPPORTED, check_combination

PAGE = Path(__file__).resolve().parents[4] / "docs" / "engines.md"


def network(feature: str) -> nn.Module:
    student = nn.Sequential(nn.Linear(2, 2))
    if feature == "BatchNorm":
        student.append(nn.BatchNorm1d(2))
    if feature == "compile_blocks":
        student.blocks = nn.ModuleList([nn.Linear(2, 2)])
        compile_blocks(student)
    return student


@pytest.mark.parametrize("feature", list(UNSUPPORTED))
@pytest.mark.parametrize("engine", ENGINES)
def test_a_combination_is_accepted_or_refused_with_reason_and_remedy(feature: str, engine: str) -> None:
    optimizer = "lars" if feature == "optimizer lars" else "adamw"
    if engine not in UNSUPPORTED[feature]:
        check_combination(engine, optimizer, network(feature))
        return
    with pytest.raises(ValueError) as refusal:
        check_combination(engine, optimizer, network(feature))
    message = str(refusal.value)
    assert feature in message and UNSUPPORTED[feature][engine] in message and REMEDIES[feature] in message
    assert "\n" not in message


@pytest.mark.parametrize("feature", list(UNSUPPORTED))
def test_the_page_has_the_same_table(feature: str) -> None:
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {feature} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
    assert cells == ["no" if engine in UNSUPPORTED[feature] else "yes" for engine in ENGINES]
