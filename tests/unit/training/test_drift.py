"""Whether the mixture can follow: drift per revisit is measured on the same images, a revisit apart."""

import pytest
import torch
from torch import nn

from prototypes.alarms import find_alarms
from tests.unit.prototypes.building import build, clustered_rows, exact_gmm, make_config, take_step
from training.drift import DriftGauge
from training.engines.interface import NetworkOutput


class DriftingTeacher:
    """Projections are the crops plus an offset that the test moves; BatchNorm counts its forward passes."""

    def __init__(self):
        self.teacher = nn.BatchNorm2d(1)
        self.offset = 0.0
        self.calls = 0

    def forward_teacher(self, crops, patches=None):
        self.calls += 1
        self.teacher(crops[0])
        if patches is None:
            return NetworkOutput(crops[0].flatten(1) + self.offset, None)
        # The lines of a picture are its patches.
        return NetworkOutput(None, None, crops[0].flatten(0, 2)[patches["rows"]] + self.offset)


def build_mixture(estimator="gmm_diag", **gmm):
    mixture = build(make_config(num_prototypes=16, dim=8, estimator=estimator, **gmm))
    for _ in range(3):
        take_step(mixture, clustered_rows(64, 8, 16))
    return mixture


def gauge_of(engine, estimator, rows_per_step=4, every_steps=3):
    return DriftGauge(engine, estimator, rows_per_step, every_steps, lambda figures: figures)


def test_the_same_images_are_seen_a_revisit_apart():
    engine, mixture = DriftingTeacher(), build_mixture(**exact_gmm())
    gauge = gauge_of(engine, mixture)
    assert gauge.revisit_steps == 16 / 4
    crops = torch.randn(10, 1, 2, 4)
    read = {}
    for step in range(1, 12):
        engine.offset = 0.5 * step
        # The crops change with every step; those of step 3 are held until step 7.
        gauge.observe(crops + 100 * step, step)
        if figures := gauge.metrics():
            read[step] = figures["gmm/drift_per_revisit"]
    assert list(read) == [7] and read[7] == pytest.approx(4 * 0.5 * 8**0.5, rel=1e-4)
    assert engine.calls == 3  # two of the reading, one of the next, which began at step 9
    assert engine.teacher.num_batches_tracked == 0


def test_a_mixture_of_patches_is_looked_at_on_patches():
    """One of each image, in different places; the figures bear the set's name."""
    engine, mixture, seen = DriftingTeacher(), build_mixture(**exact_gmm()), []
    mixture.describe_drift = lambda before, after: (
        seen.append((before, after)) or {"gmm/spacing": after.sum()}
    )
    gauge = DriftGauge(engine, mixture, 16, 1, lambda figures: figures, num_patches=3, prefix="patch_")
    crops = torch.randn(5, 1, 3, 8)
    for step in (1, 2):
        engine.offset = 0.5 * step
        gauge.observe(crops, step)
    ((before, after),) = seen
    assert torch.equal(before, torch.stack([crops[i, 0, i % 3] for i in range(5)]) + 0.5)
    torch.testing.assert_close(after, before + 0.5)
    assert list(gauge.metrics()) == ["patch_gmm/spacing"]


def test_spacing_is_the_way_to_the_next_component():
    mixture = build_mixture(**exact_gmm())
    mixture.means.copy_(torch.arange(16.0)[:, None].square() * torch.eye(8)[0])
    rows = (
        torch.tensor([[4.0], [24.8], [225.0]]) * torch.eye(8)[0]
    )  # means at 0, 1, 4, 9, 16, 25, ... 196, 225
    figures = mixture.describe_drift(rows + torch.eye(8)[1], rows)
    assert float(figures["gmm/spacing"]) == pytest.approx(
        9.0
    )  # of 3 (4 to 1), 9 (25 to 16) and 29 (225 to 196)
    assert float(figures["gmm/drift_per_revisit"]) == pytest.approx(1.0)


@pytest.mark.parametrize("estimator", ["gmm_diag", "vmf", "sph_kmeans", "vb_gmm"])
def test_rows_are_compared_in_the_space_of_the_mixture(estimator):
    """Lengths mean nothing to a mixture of unit rows."""
    mixture, rows = build_mixture(estimator), clustered_rows(64, 8, 16)
    assert float(mixture.describe_drift(rows, 7 * rows)["gmm/drift_per_revisit"]) == pytest.approx(
        0.0, abs=1e-5
    )


def test_learned_prototypes_have_nothing_to_follow_with():
    engine = DriftingTeacher()
    gauge = gauge_of(engine, build(make_config(mode="joint")))
    for step in range(1, 12):
        gauge.observe(torch.randn(10, 1, 2, 4), step)
        assert not gauge.metrics()
    assert engine.calls == 0


def test_an_outrun_mixture_is_said():
    figures = {"gmm/drift_per_revisit": 0.31, "gmm/spacing": 0.3}
    assert [alarm.name for alarm in find_alarms(figures, step=200)] == ["outrun"]
    assert not find_alarms(figures, step=199) and not find_alarms(figures | {"gmm/spacing": 0.4}, step=200)
