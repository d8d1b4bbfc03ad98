"""The clock of the stage table: nested stages count for themselves, and nothing of a step is lost or counted twice."""

from types import SimpleNamespace

import pytest
import torch

import training.step
from benchmarks import _stages
from benchmarks._stages import STAGES, StageClock, describe_stages


@pytest.fixture
def now(monkeypatch):
    """A clock that goes on only where the test says so."""
    time = [0.0]
    monkeypatch.setattr(_stages.time, "perf_counter", lambda: time[0])
    return time


def test_a_stage_inside_another_counts_for_itself_alone(now):
    clock = StageClock(torch.device("cpu"))

    def pass_time(seconds):
        now[0] += seconds

    def wait():
        pass_time(4)
        return "sum"

    start = clock.collective(lambda tensor: SimpleNamespace(wait=wait), "exchange")
    handle = start(torch.zeros(()))
    commit = clock.timed(lambda: (pass_time(1), handle.wait(), pass_time(2)), "M-step")
    commit()
    assert sum(clock.seconds.values()) == 0  # nobody has asked yet
    clock.active = True
    with clock.stage("rest"):
        pass_time(8)
        assert commit()[1] == "sum"
        items = clock.iterate(iter("ab"), "data wait")
        assert next(items) == "a"
        pass_time(16)
    with pytest.raises(ZeroDivisionError), clock.stage("loss"):
        pass_time(32)
        raise ZeroDivisionError
    spent = {name: seconds for name, seconds in clock.seconds.items() if seconds}
    assert spent == {"rest": 24, "M-step": 3, "exchange": 4, "loss": 32}


def test_the_loss_is_watched_where_the_step_calls_it(now, monkeypatch):
    monkeypatch.setattr(training.step, "differentiate", lambda: now.__setitem__(0, now[0] + 1) or "loss")
    plain, clock = training.step.differentiate, StageClock(torch.device("cpu"))
    clock.active = True
    with clock.watching_the_loss():
        assert training.step.differentiate() == "loss"
    assert clock.seconds["loss"] == 1 and training.step.differentiate is plain


def test_the_table_has_every_stage_and_shares_of_its_own_sum():
    seconds = {
        "ddp": dict.fromkeys(STAGES, 1e-3),
        "zero1": dict.fromkeys(STAGES, 0.0) | {"teacher": 1e-3, "backward": 3e-3},
    }
    head, *rows, total = describe_stages(seconds)
    assert [row[:16].strip() for row in rows] == list(STAGES)
    assert head.split()[-2:] == ["ddp", "zero1"]
    backward = next(row for row in rows if row.startswith("backward")).split()
    assert backward[3:] == ["3.00", "75.0%"] and backward[2] == f"{1 / len(STAGES):.1%}"
    assert total.split()[-2:] == [f"{len(STAGES):.2f}", "4.00"]
