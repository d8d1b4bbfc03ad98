"""Prototypes that the loss trains begin where the mixture's means were placed, once these are."""

import dataclasses

import pytest
import torch

from prototypes.config import CouplingConfig
from prototypes.mixture.config import InitialisationConfig
from tests.unit.prototypes.building import build, make_config
from tests.unit.training.test_step_figures import DIM, NUM, FixedEngine, batch_of, build_step
from training.engines.interface import NetworkOutput
from training.schedules import StepSchedule

SCHEDULE = StepSchedule(lr=0.1, weight_decay=0.0, ema_momentum=0.9)


class RecordingEngine(FixedEngine):
    """One whose student and teacher hold prototypes, and that remembers what was done to them."""

    def __init__(self, learned):
        super().__init__()
        self.learned, self.done = learned, []

    def forward_teacher(self, crops, patches=None):
        return NetworkOutput(crops[0].flatten(1), self.learned)

    forward_student = forward_teacher

    def step(self, schedule):
        self.done.append("step")
        return super().step(schedule)

    def update_teacher(self, ema_momentum):
        self.done.append("update_teacher")

    def write_parameter(self, name, whole):
        self.done.append(name)
        self.learned = whole.clone()


def run(start, skipped=None, steps=5):
    """Returns the engine, its estimator, and of every step the cosines to the start."""
    config = dataclasses.replace(
        make_config(NUM, DIM, init=InitialisationConfig(method="data")),
        coupling=CouplingConfig(strength=1.0, start=start),
    )
    estimator = build(config)
    engine = RecordingEngine(estimator.build_learned()().detach())
    training_step = build_step(estimator, config, engine)
    cosines = []
    for index in range(steps):
        engine.finite = index != skipped
        engine.done.append(index)
        outcome = training_step([batch_of(index)[0]], index, SCHEDULE)
        cosines.append(estimator.cosines_to_start(outcome.sets["prototypes"].prototypes))
    return engine, estimator, cosines


@pytest.mark.parametrize("skipped", [None, 2])
def test_they_are_written_once_after_the_step_that_places_the_last(skipped):
    engine, _, cosines = run("means", skipped)
    name = "learned_prototypes.weight"
    # 24 rows a step for 64 means: the third step that counts. Student and teacher have moved before.
    placing = 2 if skipped is None else 3
    first = engine.done.index(placing)
    assert engine.done[first : first + 4] == [placing, "step", "update_teacher", name]
    assert engine.done.count(name) == 1
    rows = torch.cat([batch_of(index)[1] for index in range(4) if index != skipped])[:NUM]
    torch.testing.assert_close(engine.learned, torch.nn.functional.normalize(rows, dim=1))
    # Nothing trains here, so nothing has moved from its start, before or after.
    for value in cosines:
        torch.testing.assert_close(value, torch.ones(NUM))


def test_directions_are_left_alone():
    engine, _, cosines = run("directions")
    assert "learned_prototypes.weight" not in engine.done
    torch.testing.assert_close(cosines[-1], torch.ones(NUM))


def test_the_start_is_known_between_accept_and_the_next_observation_alone():
    for forget in ("observe", "discard", "load"):
        _, estimator, _ = run("means", steps=3)
        assert estimator.learned_start() is not None
        rows = batch_of(3)[1]
        if forget == "load":
            estimator.load_state_dict(estimator.state_dict())
        else:
            observation = estimator.observe(rows)
        if forget == "discard":
            estimator.commit(observation)
            estimator.discard()
        assert estimator.learned_start() is None, forget
