"""The figures of a step are those of the mixture that it made, not of the repair that follows it."""

import copy

import pytest
import torch

from data.views.augmentations import Crops
from prototypes.build import build_objective
from prototypes.config import ObjectiveConfig
from prototypes.diagnostics import UsageCounter
from prototypes.mixture.config import RevivalConfig
from prototypes.mixture.revival import find_starved
from tests.unit.prototypes.building import build, clustered_rows, make_config, take_step
from training.config import BatchConfig
from training.engines.interface import NetworkOutput
from training.engines.synchronization import Synchronization
from training.guards import LossSpikeGuard
from training.prototype_sets import PrototypeSet
from training.schedules import StepSchedule
from training.step import TrainingStep

ROWS, DIM, NUM = 24, 8, 64


class FixedEngine:
    """An engine whose networks give back what stands in the crops; nothing is trained."""

    def __init__(self, finite=True):
        self.finite = finite

    def forward_teacher(self, crops, patches=None):
        return NetworkOutput(crops[0].flatten(1), None)

    forward_student = forward_teacher

    def backward(self, loss, *, is_last_micro_step):
        pass

    def gradients_are_finite(self):
        return torch.tensor(self.finite)

    def step(self, schedule):
        return torch.ones(())

    def skip(self):
        pass

    def update_teacher(self, ema_momentum):
        pass


def build_step(estimator, config, engine):
    return TrainingStep(
        engine=engine,
        sets=[PrototypeSet("prototypes", ["instance"], estimator, UsageCounter(NUM))],
        objective=build_objective(ObjectiveConfig(), config, seed=0),
        batch=BatchConfig(),
        synchronization=Synchronization(1),
        spike_guard=LossSpikeGuard(None),
    )


def batch_of(step):
    rows = clustered_rows(ROWS, DIM, num_clusters=30, spread=0.1, seed=step)
    crops = Crops(rows.view(2, ROWS // 2, 1, 2, 4), torch.empty(0))
    return crops, rows


@pytest.mark.parametrize("method", ["reseed", "split"])
def test_uniqueness_usage_and_starvation_are_counted_before_the_revival(method):
    revival = RevivalConfig(
        method=method,
        interval_steps=1,
        max_share=1.0,
        duplicate_distance=0.2 if method == "reseed" else 0.0,
    )
    config = make_config(NUM, DIM, size=4, revival=revival)
    estimator = build(config, num_observations_per_epoch=200 * ROWS)
    training_step = build_step(estimator, config, FixedEngine())
    revived = 0
    for index in range(12):
        batch, rows = batch_of(index)
        estimator.usage[: NUM // 4] = 0.0
        before = copy.deepcopy(estimator)
        outcome = training_step([batch], index, StepSchedule(lr=0.1, weight_decay=0.0, ema_momentum=0.9))
        assert outcome.applied
        expected = copy.deepcopy(before)
        winners = torch.bincount(expected.responsibilities(rows).argmax(1), minlength=NUM) if index else None
        take_step(expected, rows)
        unrevived = expected.prototypes("teacher")
        assert torch.equal(outcome.sets["prototypes"].prototypes, unrevived)
        by_logits = torch.bincount((rows @ unrevived.T).argmax(1), minlength=NUM)
        assert torch.equal(training_step.sets[0].usage.by_logits, by_logits.double())
        assert training_step.sets[0].usage.by_assignment.sum() == ROWS
        if winners is not None:
            assert torch.equal(training_step.sets[0].usage.by_assignment, winners.double())
            mass = training_step.sets[0].usage.mass
            torch.testing.assert_close(mass, expected.assignment().mass.double())
        training_step.sets[0].usage.reset()
        assert estimator.metrics() == expected.metrics()
        starved = float(find_starved(expected.usage).float().mean())
        assert estimator.metrics()["gmm/starved"] == pytest.approx(starved)
        revived += int(not torch.equal(estimator.means, expected.means))
    assert revived >= 5


def test_a_dropped_step_counts_for_no_figure():
    config = make_config(NUM, DIM, size=4)
    training_step = build_step(build(config), config, FixedEngine(finite=False))
    batch, _ = batch_of(0)
    assert not training_step([batch], 0, StepSchedule(lr=0.1, weight_decay=0.0, ema_momentum=0.9)).applied
    assert training_step.sets[0].usage.counts.sum() == 0
