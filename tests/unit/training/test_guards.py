"""Loss spikes and drifting replicas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.guards import LossSpikeGuard, ReplicaMismatchError, check_replicas, compute_checksum


def fill(guard: LossSpikeGuard, value: float = 2.0, count: int = 32) -> LossSpikeGuard:
    for index in range(count):
        guard.record(value + 0.01 * (index % 3))
    return guard


def test_spikes_and_non_finite_losses_are_refused_and_normal_ones_admitted() -> None:
    guard = fill(LossSpikeGuard(3.0))
    assert guard.admits(2.5) and guard.admits(-10.0)
    for loss in (200.0, math.nan, math.inf, -math.inf):
        assert not guard.admits(loss)
    assert not fill(LossSpikeGuard(3.0), value=-4.0).admits(10.0)
    assert fill(LossSpikeGuard(3.0), value=-4.0).admits(-3.5)


def test_without_a_factor_only_non_finite_losses_are_refused() -> None:
    guard = fill(LossSpikeGuard(None))
    assert guard.admits(1e9) and not guard.admits(math.nan)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 2.0, 2.1, 1.9]), max_size=300))
def test_no_stream_of_losses_poisons_the_window(losses: list[float]) -> None:
    guard = fill(LossSpikeGuard(3.0))
    for loss in losses:
        if guard.admits(loss):
            guard.record(loss)
        else:
            guard.record(math.nan)  # a caller's mistake must not matter either
    assert guard.admits(2.05) and not guard.admits(200.0)


def test_a_resumed_guard_decides_alike() -> None:
    guard = fill(LossSpikeGuard(1.5, window=20))
    resumed = LossSpikeGuard(1.5, window=20)
    resumed.load_state_dict(guard.state_dict())
    for loss in torch.linspace(1.0, 5.0, 101).tolist():
        assert guard.admits(loss) == resumed.admits(loss)
        if guard.admits(loss):
            guard.record(loss)
            resumed.record(loss)
    assert guard.state_dict() == resumed.state_dict()


def test_a_factor_that_would_refuse_everything_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"optim\.spike_factor"):
        LossSpikeGuard(1.0)


class Ranks:
    """Rank r of several whose gathered values are given."""

    def __init__(self, values: list[Any]) -> None:
        self.values, self.world_size = values, len(values)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.values


def checksums(states: list[dict[str, torch.Tensor]]) -> Ranks:
    return Ranks([[int(compute_checksum(tensor)) for tensor in state.values()] for state in states])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8])
def test_any_single_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.rand(3, 5000, generator=generator) * 100).to(dtype)
    reference = int(compute_checksum(tensor))
    raw = tensor.view(torch.uint8).view(-1)
    for index in torch.randint(raw.numel(), (200,), generator=generator).tolist():
        bit = index % 8
        raw[index] ^= 1 << bit
        assert int(compute_checksum(tensor)) != reference
        raw[index] ^= 1 << bit
    assert int(compute_checksum(tensor)) == reference
    assert int(compute_checksum(tensor.flip(0))) != reference


def test_one_ulp_on_one_rank_is_named() -> None:
    states = [{"gmm/means": torch.ones(10, 4), "teacher/weight": torch.ones(7)} for _ in range(3)]
    check_replicas(states[0].items(), checksums(states), step=12)
    states[1]["gmm/means"][3, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for rank in range(3):
        with pytest.raises(ReplicaMismatchError, match=r"step 12.*rank 1 differs in gmm/means"):
            check_replicas(states[rank].items(), checksums(states), step=12)


def test_with_two_ranks_the_second_is_named_against_rank_0() -> None:
    states = [{"teacher/weight": torch.ones(7)}, {"teacher/weight": torch.zeros(7)}]
    with pytest.raises(ReplicaMismatchError, match="rank 1 differs in teacher/weight"):
        check_replicas(states[0].items(), checksums(states), step=1)


def test_nothing_replicated_or_nobody_else_is_no_error() -> None:
    check_replicas([], Ranks([[], []]), step=0)
    check_replicas([("a", torch.ones(1))], Ranks([[]]), step=0)
