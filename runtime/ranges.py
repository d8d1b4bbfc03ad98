"""The range of a numeric option, written beside its type: `lr: Annotated[float, "[0, 100]"] = 5e-4`.

Intervals are mathematics' own: a square bracket includes the end, a round one does not; `0 or [1, 10]` has a zero
apart. They are plain text, so that rooms that import nothing of ours declare them too; `runtime/config.py` holds every
value against its own.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_INTERVAL = re.compile(r"(0 or )?([\[(])\s*(\S+)\s*,\s*(\S+?)\s*([\])])")


@dataclass(frozen=True)
class Range:
    """An interval of numbers.

    Attributes:
        low: lower end, as it is written.
        high: upper end.
        includes_low: whether `low` itself is inside.
        includes_high: whether `high` itself is inside.
        or_zero: whether 0, which switches something off, is allowed beside the interval.
    """

    low: str
    high: str
    includes_low: bool
    includes_high: bool
    or_zero: bool = False

    def __contains__(self, number: float) -> bool:
        """Whether `number` lies inside. Written positively: NaN compares false with everything and lies in no range."""
        above = number >= float(self.low) if self.includes_low else number > float(self.low)
        below = number <= float(self.high) if self.includes_high else number < float(self.high)
        return (above and below) or (self.or_zero and number == 0)

    def describe(self, name: str) -> str:
        """Returns the range as a chain of comparisons, such as `0 <= lr < 1`."""
        low, high = ("<=" if includes else "<" for includes in (self.includes_low, self.includes_high))
        return f"{'0, or ' if self.or_zero else ''}{self.low} {low} {name} {high} {self.high}"


@functools.cache
def parse_range(text: str) -> Range:
    """Returns the range that `[low, high]` names.

    Raises:
        TypeError: the text is no interval, or an empty one: a mistake in the program.
    """
    match = _INTERVAL.fullmatch(text)
    if match is None or not float(match[3]) < float(match[4]):
        raise TypeError(f"range is {text!r}; expected an interval such as [0, 1)")
    return Range(match[3], match[4], match[2] == "[", match[5] == "]", or_zero=match[1] is not None)
