"""How far something is and how long it still takes, in words for a log that nobody watches."""

from __future__ import annotations

import math

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


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
