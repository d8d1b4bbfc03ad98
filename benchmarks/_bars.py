"""Bars: limits of figures, each agreed on one kind of device and applied there alone."""

from __future__ import annotations

from typing import NamedTuple


class Verdict(NamedTuple):
    """Whether a figure passes, and the words of it: PASS, FAIL or NO BAR, then the limit."""

    passed: bool
    text: str


def judge(
    value: float,
    measured_on: str,
    *,
    least: float | None = None,
    most: float | None = None,
    unit: str = "x",
    bar_of: str = "cpu",
) -> Verdict:
    """Returns the verdict on a figure; on another kind of device than the bar's own it passes unjudged.

    Two cores say nothing about what a GPU should reach, neither in ratios to peers nor in memory.

    Args:
        value: the figure.
        measured_on: kind of device that it was measured on, "cpu" or "cuda".
        least: smallest value that passes; give this one or `most`.
        most: largest value that passes.
        unit: printed behind the limit.
        bar_of: kind of device on which the bar was agreed.
    """
    if (least is None) == (most is None):
        raise ValueError(f"least is {least} and most is {most}; expected one of them; pass one")
    limit = f">= {least:g}{unit}" if least is not None else f"<= {most:g}{unit}"
    if measured_on != bar_of:
        return Verdict(True, f"NO BAR on {measured_on} (on {bar_of} {limit})")
    passed = value >= least if least is not None else value <= most  # type: ignore[operator]
    return Verdict(passed, f"{'PASS' if passed else 'FAIL'} {limit}")
