"""How far something is and how long it still takes, in words for a log that nobody watches."""

from __future__ import annotations

import math
import time

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


class Pace:
    """The speed of this start, evaluations and saves included, from its first step on.

    Args:
        total: steps of the whole.
        done: steps done before this start.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._first, self._started = total, done, 0.0

    def describe(self, done: int) -> str:
        """Returns share and time left; the first call starts the clock, as what comes before is not of every step."""
        now = time.monotonic()
        if not self._started or done <= self._first:
            self._first, self._started = done, now
            return describe_progress(done, self._total, 0.0)
        return describe_progress(done, self._total, (now - self._started) / (done - self._first))


def describe_progress(done: int, total: int, seconds_each: float) -> str:
    """Returns the share that is done and the time that the rest takes, such as `37.5 %, 2 h 05 min left`.

    Args:
        done: of `total`.
        total: at least 1.
        seconds_each: time of one; 0 where it is not known, and no time is said.
    """
    share = f"{100 * done / total:.1f} %"
    return (
        share
        if done >= total or not seconds_each
        else f"{share}, {describe_seconds((total - done) * seconds_each)} left"
    )


def describe_seconds(seconds: float) -> str:
    """Returns a duration in its two largest units: `42 s`, `3 min 05 s`, `2 h 05 min`, `1 d 04 h`."""
    whole = math.ceil(seconds)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR:02d} h"
