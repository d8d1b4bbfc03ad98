import math

import pytest

from training.config import BatchConfig, OptimConfig
from training.schedules import compute_schedule, cosine

OPTIM = OptimConfig(lr=1e-3, min_lr=1e-5, weight_decay=0.04, weight_decay_end=0.4, ema_momentum=0.99)


def schedule(step, num_steps=100, warmup_steps=10, batch=512):
    return compute_schedule(OPTIM, step=step, num_steps=num_steps, warmup_steps=warmup_steps, batch=batch)


def test_warm_up_is_linear_and_scaled_to_the_batch():
    rates = [schedule(step).lr for step in range(10)]
    assert rates == pytest.approx([2e-3 * (step + 1) / 10 for step in range(10)])


def test_ends_where_it_should():
    last = schedule(100)
    assert last.lr == pytest.approx(2e-5)
    assert last.weight_decay == pytest.approx(0.4)
    assert last.ema_momentum == pytest.approx(1.0)


def test_prototypes_move_once_their_epochs_of_rest_are_over():
    moving = [
        compute_schedule(
            OPTIM, step=step, num_steps=9, warmup_steps=0, batch=8, frozen_steps=2
        ).prototypes_move
        for step in range(4)
    ]
    assert moving == [False, False, True, True]


def test_is_a_pure_function_of_the_step():
    assert schedule(57) == schedule(57)


def test_cosine_half_way_is_the_mean():
    assert cosine(3.0, 1.0, 5, 10) == pytest.approx(2.0)
    assert cosine(3.0, 1.0, 2, 10) == pytest.approx(1 + 2 * 0.5 * (1 + math.cos(math.pi * 0.2)))


def test_momentum_and_decay_ignore_the_warm_up():
    assert schedule(0).ema_momentum == pytest.approx(0.99)
    assert schedule(0).weight_decay == pytest.approx(0.04)


@pytest.mark.parametrize(("global_batch", "accumulation", "world", "micro"), [(64, 1, 1, 64), (64, 2, 4, 8)])
def test_batch_identity(global_batch, accumulation, world, micro):
    batch = BatchConfig(global_batch_size=global_batch, gradient_accumulation_steps=accumulation)
    assert batch.micro_batch_size_per_gpu(world) == micro


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"batch.global_batch_size is 10.*world size 4"):
        BatchConfig(global_batch_size=10).micro_batch_size_per_gpu(4)
