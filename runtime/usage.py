"""What a program answers to `--help`: its own description, then every option with default, range and meaning."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Sequence

from runtime.options import iterate_options

_WIDTH = 116


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written; behind every option its default, also where it has no other text."""

    def add_argument(self, action: argparse.Action) -> None:
        """Gives an option without a text its default for one."""
        if action.help is None and action.default not in (None, argparse.SUPPRESS):
            action.help = "default: %(default)s"
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "") else super()._get_help_string(action)


def positive(text: str) -> int:
    """Returns the whole number of an option that counts something; argparse says what is wrong with another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number of at least 1")
    return int(text)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line holds `-h` or `--help`."""
    return any(argument in ("-h", "--help") for argument in arguments)


def describe_usage(description: str | None, config_class: type) -> str:
    """Returns the help of a program that takes `CONFIG.yaml [key.sub=value ...]`."""
    lines = [inspect.cleandoc(description or ""), "", "Options, with their defaults:"]
    for option in iterate_options(config_class):
        lines.append(f"  {option.key}={option.default}")
        text = f"{option.text} ({option.type})"
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"
