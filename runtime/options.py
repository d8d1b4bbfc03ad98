"""Every option of a configuration class as a person reads it: what `--help` and `docs/options.md` are made of."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from runtime.config import describe_type, section_class, type_hints


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        key: dotted name.
        type: its type and its range in words.
        default: as YAML writes it; `...` where there is none.
        text: what it means: the string literal below its field; empty where nobody wrote one.
    """

    key: str
    type: str
    default: str
    text: str


def iterate_options(config_class: type) -> Iterator[Option]:
    """Yields every option, a section's own before those of the sections inside it."""
    for _, _, options in iterate_sections(config_class):
        yield from options


def iterate_sections(config_class: type, prefix: str = "") -> Iterator[tuple[str, type, list[Option]]]:
    """Yields prefix, class and own options of a configuration class, then of every section inside it."""
    hints = type_hints(config_class)
    texts = _read_texts(config_class)
    own, sections = [], []
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if (section := section_class(hint)) is not None:
            sections.append((f"{prefix}{field.name}.", section))
        else:
            text = texts.get(field.name, "")
            own.append(Option(prefix + field.name, describe_type(hint), _default(field), text))
    yield prefix, config_class, own
    for inner, section in sections:
        yield from iterate_sections(section, inner)


@functools.cache
def _read_texts(config_class: type) -> dict[str, str]:
    """Returns field to the string literal below it, on one line; a field that it inherits is read where it stands."""
    texts: dict[str, str] = {}
    for base in reversed(config_class.__mro__[1:-1]):
        texts |= _read_texts(base)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(definition, ast.ClassDef)
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(below.value.value).split())
    return texts


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _as_yaml(field.default_factory())
    return "..." if field.default is dataclasses.MISSING else _as_yaml(field.default)


def _as_yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_as_yaml(item) for item in value)}]"
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value) or '""'
