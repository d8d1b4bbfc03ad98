"""The figures of one prototype matrix, on matrices whose figures are known."""

import pytest
import torch

from evaluation.probes.prototype_audit import AuditError, audit, count_usage

THRESHOLDS = (0.025,)


@pytest.mark.learned
def test_directions_spread_evenly_have_an_even_density(record_property):
    figures = audit(torch.randn(40_000, 8), thresholds=(), angle_pairs=100, seed=0)
    record_property("ratio", figures["angle_density_max_over_min"])
    assert 1 <= figures["angle_density_max_over_min"] < 1.35
    assert sum(figures["angle_density"]) / len(figures["angle_density"]) == pytest.approx(0.159, abs=1e-3)


@pytest.mark.learned
def test_a_crowd_has_a_finite_ratio_of_at_most_k(record_property):
    crowd = torch.ones(300, 8) + 1e-3 * torch.randn(300, 8)
    figures = audit(crowd, thresholds=THRESHOLDS, angle_pairs=100, seed=0)
    record_property("ratio", figures["angle_density_max_over_min"])
    assert min(figures["angle_density"]) == 0
    assert figures["angle_density_max_over_min"] == pytest.approx(300, rel=0.5)
    assert figures["unique"] == {"0.025": 1}
    assert figures["mean_cosine"] == pytest.approx(1, abs=1e-3)


def test_zero_rows_are_no_prototypes_and_broken_ones_are_refused():
    rows = torch.cat([torch.eye(6), torch.zeros(2, 6)])
    figures = audit(rows, thresholds=THRESHOLDS, angle_pairs=100, seed=0)
    assert figures["zero_rows"] == 2 and figures["unique"] == {"0.025": 6}
    assert figures["unique_fraction"]["0.025"] == 0.75 and figures["mean_cosine"] == pytest.approx(
        0, abs=1e-6
    )
    # Logits below zero: the zero rows win the argmax, and are still not used.
    usage = count_usage(-torch.ones(5, 6), rows)
    assert usage["used_by_logits"] == 0 and usage["used_ceiling"] == 5 / 8
    rows[3, 2] = torch.nan
    with pytest.raises(AuditError, match="prototype 3 is not finite; expected directions"):
        audit(rows, thresholds=THRESHOLDS, angle_pairs=100, seed=0)
    with pytest.raises(AuditError, match="all prototypes are zero"):
        audit(torch.zeros(4, 6), thresholds=THRESHOLDS, angle_pairs=100, seed=0)
