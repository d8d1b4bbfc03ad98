"""The page that shows the method is the method: its mixture is the trainer's, bit for bit."""

import copy

import pytest
import torch
from torch import nn

from data.views.augmentations import Crops
from examples import decoupled
from prototypes import UsageCounter
from prototypes.build import build_objective
from prototypes.config import ObjectiveConfig
from tests.helpers.plain_engine import PlainEngine
from training.config import BatchConfig
from training.engines.interface import TrainedNetwork
from training.engines.synchronization import Synchronization
from training.guards import LossSpikeGuard
from training.prototype_sets import PrototypeSet
from training.schedules import StepSchedule
from training.step import TrainingStep

NUM_STEPS, IMAGES = 20, 16


class OfCrops(nn.Module):
    """The example's network behind the interface of ours: crops by resolution in, rows out."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, crops, patches):
        return self.network(torch.cat(list(crops))), None, None


class ExampleEngine(PlainEngine):
    """The plain engine with the example's optimizer instead of plain gradient descent."""

    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.optimizer = decoupled.build_optimizer(student)

    def step(self, schedule):
        self.optimizer.step()
        self.skip()
        return torch.zeros(())


def start():
    torch.manual_seed(0)
    student = nn.Sequential(*decoupled.build_network())
    return student, copy.deepcopy(student).requires_grad_(False), decoupled.build_mixture()


def draw_views():
    images, _ = decoupled.draw_images(IMAGES * NUM_STEPS)
    return [torch.stack([decoupled.augment(part), decoupled.augment(part)]) for part in images.split(IMAGES)]


def run_example(batches):
    student, teacher, estimator = start()
    optimizer = decoupled.build_optimizer(student)
    return [
        (decoupled.train_step(student, teacher, estimator, optimizer, views, step), copy_of(estimator))
        for step, views in enumerate(batches)
    ]


def run_trainer(batches, ema_momentum):
    student, teacher, estimator = start()
    networks = [TrainedNetwork(OfCrops(network), estimator.build_learned()) for network in (student, teacher)]
    step = TrainingStep(
        engine=ExampleEngine(*networks),
        sets=[PrototypeSet("prototypes", ["instance"], estimator, UsageCounter(decoupled.K))],
        objective=build_objective(ObjectiveConfig(), decoupled.CONFIG, seed=decoupled.SEED),
        batch=BatchConfig(global_batch_size=IMAGES),
        synchronization=Synchronization(1),
        spike_guard=LossSpikeGuard(None),
    )
    schedule, outcomes = StepSchedule(lr=0.0, weight_decay=0.0, ema_momentum=ema_momentum), []
    for index, views in enumerate(batches):
        outcome = step([Crops(views, views[:0])], index, schedule)
        assert outcome.applied
        outcomes.append((outcome.loss["total"], copy_of(estimator)))
    return outcomes


def copy_of(estimator):
    return {
        name: value.clone()
        for name, value in estimator.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def find_differences(found, expected):
    """Steps and names of the tensors that differ in any bit; the loss is one of them."""
    pairs = enumerate(zip(found, expected, strict=True))
    return [
        (step, name)
        for step, ((loss, state), (expected_loss, expected_state)) in pairs
        for name, value in ({"loss": loss} | state).items()
        if not torch.equal(value, ({"loss": expected_loss} | expected_state)[name])
    ]


def test_the_examples_mixture_equals_the_trainers_bit_for_bit():
    batches = draw_views()
    found = run_example(batches)
    assert find_differences(found, run_trainer(batches, decoupled.EMA_MOMENTUM)) == []
    assert len(found) == NUM_STEPS
    assert not torch.equal(found[0][1]["means"], found[-1][1]["means"])
    # The comparison sees a teacher that is a thousandth slower, from the step after the first on.
    planted = find_differences(found, run_trainer(batches[:3], decoupled.EMA_MOMENTUM + 1e-3) + found[3:])
    assert (1, "means") in planted
    assert (0, "means") not in planted


def test_a_batch_that_is_not_finite_moves_nothing():
    student, teacher, estimator = start()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict())), copy_of(estimator)
    views = draw_views()[0]
    views[0, 0] = torch.inf
    loss = decoupled.train_step(student, teacher, estimator, decoupled.build_optimizer(student), views, 0)
    assert not loss.isfinite()
    for network, state in zip((student, teacher), before[0], strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(torch.equal(value, before[1][name]) for name, value in copy_of(estimator).items())


@pytest.mark.slow  # a minute of CPU: everything the page promises to print
@pytest.mark.learned
def test_it_prints_what_the_prototypes_are_doing(capsys, record_property):
    decoupled.main()
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step")]
    assert len(steps) == decoupled.STEPS // decoupled.PRINT_EVERY
    assert all(word in line for line in steps for word in ("loss", "unique", "used", "of at most"))
    assert float(steps[-1].split()[3]) < float(steps[0].split()[3])
    trained, untrained = (float(part.split()[-1].rstrip("%")) for part in lines[-1].split(";")[0].split(","))
    record_property("trained", trained)
    record_property("untrained", untrained)
    assert trained > untrained + 5  # 54 and 32 when this was written
