"""What a program answers to `--help`: its own description, then every option with default, range and meaning."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.ranges import parse_range

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


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command line holds `-h` or `--help`."""
    return any(argument in ("-h", "--help") for argument in arguments)


def describe_usage(description: str | None, config_class: type) -> str:
    """Returns the help of a program that takes `CONFIG.yaml [key.sub=value ...]`."""
    lines = [inspect.cleandoc(description or ""), "", "Options, with their defaults:"]
    for key, default, text in iterate_options(config_class):
        lines.append(f"  {key}={default}")
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def iterate_options(config_class: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields key, default (`...` where there is none) and meaning with range or choices of every option."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    meanings = _meanings(config_class)
    for field in dataclasses.fields(config_class):
        annotation = hints[field.name]
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            yield from iterate_options(annotation, f"{prefix}{field.name}.")
        else:
            rule = _rule(annotation, field.name)
            text = " ".join(part for part in (meanings.get(field.name, ""), rule and f"[{rule}]") if part)
            yield prefix + field.name, _default(field), text


def _meanings(config_class: type) -> dict[str, str]:
    """Returns the texts of the `Attributes:` section of a class's docstring."""
    _, _, section = inspect.cleandoc(config_class.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _rule(annotation: Any, name: str) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return parse_range(arguments[1]).describe(name)
    if origin is typing.Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin in (types.UnionType, typing.Union):
        rule = _rule(next(a for a in arguments if a is not types.NoneType), name)
        return f"{rule}, or null" if rule else "may be null"
    if origin is tuple:
        rule = _rule(arguments[0], "each")
        return f"{rule}, a list" if rule else "a list"
    if origin is dict:
        return "a mapping"
    return "true or false" if annotation is bool else ""


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _as_yaml(field.default_factory())
    return "..." if field.default is dataclasses.MISSING else _as_yaml(field.default)


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value) or '""'
