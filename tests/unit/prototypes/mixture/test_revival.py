"""Duplicates that no row has room for: they stay, or wait in random directions and go first where room appears."""

import pytest
import torch
from torch.nn.functional import normalize

from prototypes.diagnostics import count_unique
from prototypes.mixture.config import RevivalConfig
from prototypes.mixture.revival import revive_
from tests.unit.prototypes.building import build, make_config

REVIVAL = {"method": "reseed", "max_share": 1.0, "duplicate_distance": 0.025, "row_distance": 0.1}


def planted_copies():
    """Eight components in three directions: 0, 1 and 2 are distinct, the others copies of 0."""
    estimator = build(make_config(8, 16))
    torch.manual_seed(0)
    directions = normalize(torch.randn(3, 16), dim=1)
    estimator.means.copy_(directions[torch.tensor([0, 1, 2, 0, 0, 0, 0, 0])])
    return estimator, directions


@pytest.mark.parametrize("surplus", ["stay", "spare"])
def test_copies_without_a_row_stay_or_leave_for_random_directions(surplus):
    estimator, directions = planted_copies()
    before = estimator.means.clone()
    moved = revive_(estimator, directions, RevivalConfig(**REVIVAL, surplus=surplus), seed=0, step=5)
    assert moved == 0  # every row has its prototype
    if surplus == "stay":
        assert torch.equal(estimator.means, before)
        return
    assert torch.equal(estimator.means[:3], before[:3])
    assert count_unique(estimator.means, (0.025,))[0.025] == 8
    assert estimator.usage[3:].sum() == 0 and float(estimator.usage.sum()) == pytest.approx(1)
    assert float(estimator.mixing_weights.sum()) == pytest.approx(1, abs=1e-5)


def test_spares_are_the_first_to_go_where_a_row_is_alone():
    estimator, directions = planted_copies()
    config = RevivalConfig(**REVIVAL, surplus="spare")
    revive_(estimator, directions, config, seed=0, step=5)
    spares = set(range(3, 8))
    new = normalize(torch.randn(2, 16), dim=1)
    assert revive_(estimator, torch.cat([directions, new]), config, seed=0, step=10) == 2
    nearest = (new @ normalize(estimator.means, dim=1).T).max(1)
    assert nearest.values.min() > 0.999 and set(nearest.indices.tolist()) <= spares
    assert estimator.usage[nearest.indices].min() > 0


def test_a_row_nearer_than_the_row_distance_takes_no_component():
    estimator, directions = planted_copies()
    near = normalize(directions[:1] + 0.05 * normalize(torch.randn(1, 16), dim=1), dim=1)
    far_enough = RevivalConfig(**{**REVIVAL, "row_distance": 1e-6})
    assert revive_(estimator, near, RevivalConfig(**REVIVAL), seed=0, step=5) == 0
    assert revive_(estimator, near, far_enough, seed=0, step=5) == 1


def test_of_two_copies_the_one_in_use_stays():
    estimator, directions = planted_copies()
    estimator.usage[:] = torch.tensor([0.0, 0.2, 0.2, 0.0, 0.6, 0.0, 0.0, 0.0])
    revive_(estimator, directions, RevivalConfig(**REVIVAL, surplus="spare"), seed=0, step=5)
    assert torch.equal(estimator.means[4], directions[0])
    assert estimator.usage[[1, 2, 4]].tolist() == pytest.approx([0.2, 0.2, 0.6])
    assert not torch.equal(estimator.means[0], directions[0])


def test_spares_need_rows_and_duplicates():
    for wrong in ({"method": "split"}, {"duplicate_distance": 0.0}):
        with pytest.raises(
            ValueError, match=r"revival\.surplus is spare; expected stay unless method is reseed"
        ):
            RevivalConfig(**{**REVIVAL, **wrong}, surplus="spare")
