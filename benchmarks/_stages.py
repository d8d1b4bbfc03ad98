"""Which part of a training step takes how long, measured from outside: the step itself knows no clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import training.step
from training.feed import Feed
from training.step import TrainingStep

# In the order of a step.
STAGES = (
    "data wait",
    "copy + augment",
    "teacher",
    "E-step",
    "student forward",
    "exchange",
    "M-step",
    "loss",
    "backward",
    "check",
    "optimizer",
    "EMA",
    "usage",
    "rest",
)


class StageClock:
    """Adds up seconds by stage while it is `active`; a stage inside another one counts for itself alone.

    The device is waited for at every border: stages that overlap elsewhere stand one after the other here, so the
    table's sum is longer than a step that nobody watches.

    Attributes:
        active: whether it counts; else what it wraps is called as it is.
        seconds: by stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.active = False
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts what runs inside."""
        if not self.active:
            yield
            return
        self._close_interval()
        self._open.append(name)
        try:
            yield
        finally:
            self._close_interval()
            self._open.pop()

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Returns a function that counts as a stage."""

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **named)

        return run

    def iterate(self, items: Iterable[Any], name: str) -> Iterator[Any]:
        """Yields the items; waiting for each counts as a stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                item = next(iterator)
            yield item

    def collective(self, start: Callable[[Tensor], Any], name: str) -> Callable[[Tensor], Any]:
        """Returns an asynchronous collective the wait for whose result counts as a stage."""

        def run(tensor: Tensor) -> Any:
            handle = start(tensor)
            handle.wait = self.timed(handle.wait, name)
            return handle

        return run

    def watch(self, step: TrainingStep, feed: Feed) -> None:
        """Counts the stages of a step and its feed, whose data wait is `iterate`'s."""
        engine = step.engine
        parts: list[tuple[Any, str, str]] = [
            (feed, "take", "copy + augment"),
            (engine, "forward_teacher", "teacher"),
            (engine, "forward_student", "student forward"),
            (engine, "backward", "backward"),
            (engine, "gradients_are_finite", "check"),
            (step, "_apply", "check"),
            (engine, "step", "optimizer"),
            (engine, "update_teacher", "EMA"),
        ]
        for one in step.sets:
            parts += [
                (one.estimator, "observe", "E-step"),
                (one.estimator, "commit", "M-step"),
                (one, "count_usage", "usage"),
            ]
        for owner, name, stage in parts:
            setattr(owner, name, self.timed(getattr(owner, name), stage))

    @contextmanager
    def watching_the_loss(self) -> Iterator[None]:
        """Counts the loss and its gradient at the rows, a function that the step calls by name."""
        original = training.step.differentiate
        training.step.differentiate = self.timed(original, "loss")
        try:
            yield
        finally:
            training.step.differentiate = original

    def _close_interval(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def describe_stages(seconds: dict[str, dict[str, float]]) -> list[str]:
    """Returns the lines of a table: milliseconds of a step and shares, a row a stage and a column a contestant.

    Args:
        seconds: of one step, by contestant and stage.
    """
    lines = [f"{'stage (full)':16}" + "".join(f"{name:>16}" for name in seconds)]
    totals = {name: sum(stages.values()) for name, stages in seconds.items()}
    for stage in STAGES:
        cells = (
            f"{1e3 * stages[stage]:9.2f} {stages[stage] / totals[name]:6.1%}"
            for name, stages in seconds.items()
        )
        lines.append(f"{stage:16}" + "".join(cells))
    return [*lines, f"{'sum (ms)':16}" + "".join(f"{1e3 * total:9.2f}{'':7}" for total in totals.values())]
