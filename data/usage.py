"""How the programs of this room show and read their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written; behind every option its default, also where it has no other text."""

    def add_argument(self, action: argparse.Action) -> None:
        """Gives an option without a text its default for one."""
        if action.help is None and action.default not in (None, argparse.SUPPRESS):
            action.help = "default: %(default)s"
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser with this help; so are those of its commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, **options})


def ranges_of(config_class: type, name: str) -> list[str]:
    """Returns the ranges that an option's annotation declares, such as `[0, 1)`: one for each of its numbers.

    `runtime.config` holds a configuration's values against them; this room imports nothing, and its programs build
    theirs of a few options.
    """

    def find(hint: Any) -> Iterator[str]:
        for part in get_args(hint):
            if isinstance(part, str):
                yield part
            else:
                yield from find(part)

    return list(find(get_type_hints(config_class, include_extras=True)[name]))


def read_number(text: str, allowed: str, kind: type[int] | type[float] = float) -> int | float:
    """Returns the number in a text if it lies in a range; argparse says what is wrong with another, NaN too."""
    low, high = map(float, allowed[1:-1].split(","))
    try:
        number = kind(text)
        above = number >= low if allowed.startswith("[") else number > low
        below = number <= high if allowed.endswith("]") else number < high
        if above and below:
            return number
    except ValueError:
        pass
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r}; expected {what} in {allowed}")


def whole(config_class: type, name: str) -> Callable[[str], int | float]:
    """Returns what reads the whole number of an option that stands for one of a configuration."""
    return lambda text: read_number(text, ranges_of(config_class, name)[0], int)
