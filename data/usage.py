"""How the programs of this room show their options."""

from __future__ import annotations

import argparse
from typing import Any


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
