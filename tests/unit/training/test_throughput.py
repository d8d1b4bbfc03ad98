"""Figures of speed: seconds beside images, and FLOPs beside what a matrix product reaches."""

import time

import pytest
import torch

from training.throughput import Flops, Throughput, measure_product_ceiling

CPU = torch.device("cpu")


def test_shares_are_flops_a_second_and_rank_over_the_ceiling():
    speed = Throughput(global_batch_size=64, world_size=4, flops=Flops(3e9, 4e9), ceiling=1e12)
    for _ in range(5):
        speed.add(0.5)
    values = speed.read(waited_s=1.0)
    assert values["throughput/step_s"] == 0.5 and values["throughput/images_per_s"] == 128
    assert values["throughput/data_wait_fraction"] == pytest.approx(0.4)
    # 32 images/s a rank of 3 (4) GFLOP each, of 1 TFLOP/s.
    assert values["throughput/mfu_dense"] == pytest.approx(0.096)
    assert values["throughput/mfu_executed"] == pytest.approx(0.128)
    assert values["throughput/ceiling_tflops"] == 1.0
    assert set(speed.read(0.0).values()) == {0.0, 1.0}  # nothing since then but the ceiling


def test_the_ceiling_counts_the_product_and_nothing_before_it(monkeypatch):
    """With a clock of our own: the slow first product is preparation, the best of the others counts."""
    durations = iter([5.0, 0.4, 0.25, 0.5])
    clock = [0.0]

    def product(left, right, out):
        assert left.shape == right.shape == out.shape == (10, 10) and left.dtype == torch.bfloat16
        clock[0] += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", product)
    found = measure_product_ceiling(CPU, torch.bfloat16, side=10, budget_s=6.0)
    assert found == 2 * 10**3 / 0.25
    assert next(durations, None) is None


def test_measuring_is_quick_and_leaves_the_random_numbers_alone(record_property):
    before = torch.get_rng_state()
    started = time.perf_counter()
    ceiling = measure_product_ceiling(CPU, torch.float32)
    record_property("seconds", time.perf_counter() - started)
    record_property("gflops", ceiling / 1e9)
    assert torch.equal(torch.get_rng_state(), before)
    # A loop of scalar additions is below, and no CPU is above.
    assert 1e8 < ceiling < 1e14
