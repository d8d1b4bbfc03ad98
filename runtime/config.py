"""YAML files and dotted overrides to frozen dataclasses.

The only module that knows OmegaConf. It imports no torch, so that a typo in a configuration is reported
before torch is loaded. Numbers are checked here and nowhere else: finite, and inside the range that the option's
annotation declares (`runtime/ranges.py`); a class's `__post_init__` checks only what concerns several options.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import logging
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf

from runtime.ranges import parse_range
from runtime.wording import name_in_place, one_line, shown

ConfigT = TypeVar("ConfigT")

logger = logging.getLogger(__name__)

# Text that would not survive being written into paths, batch scripts, logs and YAML files: line ends and other control
# characters, bytes that are no UTF-8 (surrogates), and OmegaConf's mark of a reference.
_NOT_PLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|\\$\\{")
# A shell expands it at the start of a word only, and in a YAML file nobody does: a folder named ~ would be made.
_HOME = re.compile(r"~[^/]*/")


class ConfigError(ValueError):
    """A mistake in a configuration that its author can mend; the message is one line."""


def load_config(config_class: type[ConfigT], yaml_path: str, overrides: Sequence[str] = ()) -> ConfigT:
    """Returns `config_class` filled from a YAML file and `key.sub=value` overrides.

    Precedence: the dataclass's default < YAML < override.

    Args:
        config_class: a frozen, keyword-only dataclass; nested dataclasses are sections.
        yaml_path: the YAML file.
        overrides: dotted assignments; values are parsed as YAML.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest known one), wrong type, a number outside its
            range or a value that the dataclass refuses. The message names key, value and remedy in one line.
    """
    return build_config(config_class, read_yaml(yaml_path, overrides))


def read_yaml(yaml_path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the mapping in a YAML file with its bases below it and dotted overrides above; see `load_config`.

    `base: other.yaml`, or a list of them, names files relative to the one that names them. Of several values of a key
    the file's own counts, then the last base's; sections are merged key by key, lists are replaced.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(name.strip() for name in key.split(".")):
            rule = "key.sub=value; write it with one '=', and a name on both sides of a dot"
            raise ConfigError(f"override is {shown(override)}; expected {rule}")
        if _find_missing(parse_override(override)):
            raise ConfigError(
                f"override is {shown(override)}; expected a value; write one in the place of ???"
            )
    layers = list(_read_layers(yaml_path))
    try:
        return _merge(layers, overrides)
    except Exception:  # references and overrides, of which OmegaConf raises whatever its parser meets
        pass
    for number in range(len(overrides) + 1):  # who is to blame?
        try:
            _merge(layers, overrides[:number])
        except Exception as error:
            if number == 0:
                raise ConfigError(
                    f"{yaml_path} cannot be read as YAML: {one_line(error)}; mend the file"
                ) from error
            rule = f"key.sub=value with a value in YAML ({one_line(error)}); quote or mend it"
            raise ConfigError(f"override is {overrides[number - 1]!r}; expected {rule}") from error
    raise AssertionError("what fails with all overrides fails with one of them")


def parse_override(override: str) -> Any:
    """Returns `key.sub=value` as nested plain values; None where it cannot be parsed."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]))
    except Exception:  # of which `read_yaml` says more
        return None


def _find_missing(values: Any, key: str = "") -> str:
    """Returns the dotted key of a ???, which OmegaConf takes for "to be said later" and merges away; empty if none."""
    if isinstance(values, Mapping):
        found = [_find_missing(item, f"{key}.{name}" if key else str(name)) for name, item in values.items()]
    elif isinstance(values, list):
        found = [_find_missing(item, key) for item in values]
    else:
        return key if values == "???" else ""
    return next(filter(None, found), "")


def _merge(layers: Sequence[dict[Any, Any]], overrides: Sequence[str]) -> dict[str, Any]:
    merged = OmegaConf.merge(*layers, OmegaConf.from_dotlist(list(overrides)))
    return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))


def _read_layers(path: str, named_by: tuple[Path, ...] = ()) -> Iterator[dict[Any, Any]]:
    """Yields the contents of a file's bases and of the file, without the key `base`; what counts most comes last."""
    if not _is_file(path):
        what = f"base of {named_by[-1]}" if named_by else "configuration file"
        raise ConfigError(f"{what} is {shown(path)}; expected an existing YAML file; pass its path")
    here = Path(path)
    if here.resolve() in {other.resolve() for other in named_by}:
        circle = " -> ".join(map(str, (*named_by, here)))
        raise ConfigError(f"base is {circle}; expected no file below itself; take one base out")
    try:
        # Untrusted tags cannot construct objects: OmegaConf's loader derives from yaml.SafeLoader.
        values = OmegaConf.to_container(OmegaConf.load(here))
    except Exception as error:  # on malformed text OmegaConf and PyYAML raise whatever their parsers meet
        raise ConfigError(f"{path} cannot be read as YAML: {one_line(error)}; mend the file") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ConfigError(f"{path} holds a {kind}; expected key: value lines; mend the file")
    if missing := _find_missing(values):
        raise ConfigError(f"{missing} of {path} is ???; expected a value; write one, or take the key out")
    bases = values.pop("base", None)
    names = [] if bases is None else [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        rule = "a file's name, or a list of them"
        raise ConfigError(f"base of {path} is {shown(bases)}; expected {rule}; set base in it")
    for name in names:
        yield from _read_layers(str(here.parent / name), (*named_by, here))
    yield values


def build_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Returns `config_class` built from nested plain values, checking every key, type and range."""
    known = set(iterate_keys(config_class))
    if isinstance(values, Mapping):
        values = without_former(config_class, values)
    return typing.cast(ConfigT, _build_section(config_class, values, prefix="", known_keys=known))


def without_former(config_class: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested values without options of former versions that changed nothing; `FORMER` of a class lists them.

    A run's `config.yaml` names every option there was when it was made.

    Raises:
        ConfigError: such an option has another value, and the result would not be what it was.
    """
    former, kept = getattr(config_class, "FORMER", {}), dict(values)
    for name in [name for name in values if name in former]:
        neutral, remedy = former[name]
        if kept.pop(name) != neutral:
            rule = f"no such option, which former versions had, or {shown(neutral)}"
            raise ConfigError(f"{prefix}{name} is {shown(values[name])}; expected {rule}; {remedy}")
        logger.warning("%s%s is an option of former versions; its value changes nothing", prefix, name)
    for name, hint in type_hints(config_class).items():
        section = section_class(hint) or section_class(_without_none(hint))
        if section is not None and isinstance(kept.get(name), Mapping):
            kept[name] = without_former(section, kept[name], f"{prefix}{name}.")
    return kept


def config_to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as nested plain values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_to_yaml(config: Any) -> str:
    """Returns the resolved configuration as YAML text: what `config.yaml` of a run directory holds."""
    return OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config)))


def config_hash(config: Any) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the configuration's canonical JSON."""
    canonical = json.dumps(config_to_dict(config), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def iterate_keys(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yields every dotted leaf key of a configuration class."""
    hints = type_hints(config_class)
    for field in dataclasses.fields(config_class):
        section = section_class(hints[field.name])
        if section is None:
            yield prefix + field.name
        else:
            yield from iterate_keys(section, f"{prefix}{field.name}.")


@functools.cache
def type_hints(config_class: type) -> dict[str, Any]:
    """Returns the fields' types, their ranges included."""
    return typing.get_type_hints(config_class, include_extras=True)


def section_class(annotation: Any) -> type | None:
    """Returns the dataclass of a field that is a section; None for an option, which a section or null is."""
    return annotation if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else None


def _without_none(annotation: Any, *, wants_list: bool = False) -> Any:
    """Returns what an option is where it is not null: of one that is a number or a list, the kind that is wanted."""
    if typing.get_origin(annotation) not in (types.UnionType, typing.Union):
        return annotation
    kinds = _kinds(annotation)
    return next((kind for kind in kinds if wants_list and _is_list(kind)), kinds[0])


def _is_list(kind: Any) -> bool:
    """Returns whether an option is a list, with its form beside it or not."""
    base = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
    return typing.get_origin(base) is tuple


def _kinds(annotation: Any) -> list[Any]:
    return [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]


def describe_type(annotation: Any) -> str:
    """Returns an option's type and range in words: `float in [0, 1)`, `list of int, or null`, `adamw or lars`.

    A list of so many numbers may have its form beside its type: `Annotated[tuple[Side, Side], "[height, width]"]`.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated and _is_list(annotation):
        return f"{arguments[1]} of {describe_type(typing.get_args(arguments[0])[0])}"
    if origin is typing.Annotated:
        return f"{describe_type(arguments[0])} in {arguments[1]}"
    if origin in (types.UnionType, typing.Union):
        null = ["null"] if types.NoneType in arguments else []
        return ", or ".join([*map(describe_type, _kinds(annotation)), *null])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments)) if len(arguments) < 3 else ", ".join(map(str, arguments))
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" {len(arguments)}"
        return f"list of{count} {describe_type(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {describe_type(arguments[1])}"
    if section_class(annotation) is not None:
        return "section"
    return annotation.__name__


def _build_section(config_class: type, values: Any, prefix: str, known_keys: set[str]) -> Any:
    if not isinstance(values, Mapping):
        where = prefix.rstrip(".") or "the configuration"
        raise ConfigError(
            f"{where} is {shown(values)}; expected a section of key: value lines; set {prefix}<key>"
        )
    hints = type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown_key_message(f"{prefix}{name}", list(fields), prefix, known_keys))
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        key = prefix + name
        section = section_class(hints[name])
        if section is not None and (name in values or _has_no_default(field)):
            arguments[name] = _build_section(section, values.get(name, {}), key + ".", known_keys)
        elif name in values:
            arguments[name] = _convert(hints[name], values[name], key)
        elif _has_no_default(field):
            raise ConfigError(f"{key} is missing; expected {describe_type(hints[name])}; set {key}")
    try:
        return config_class(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(name_in_place(one_line(error), prefix)) from error


def _unknown_key_message(key: str, siblings: list[str], prefix: str, known_keys: set[str]) -> str:
    name = key[len(prefix) :]
    if ":" in name:
        rule = "key: value in YAML, with a space behind the colon"
        return f"unknown key {key}; expected {rule}; write {name.replace(':', ': ', 1)}"
    # The key may be right and its section wrong: the same leaf elsewhere is the better guess.
    same_leaf = [known for known in sorted(known_keys) if known.rsplit(".", 1)[-1] == name]
    near = [prefix + sibling for sibling in difflib.get_close_matches(name, siblings, n=1)]
    candidates = same_leaf or near or difflib.get_close_matches(key, sorted(known_keys), n=1)
    suggestion = candidates[0] if candidates else ""
    hint = f"did you mean {suggestion}?" if suggestion else f"known keys here: {', '.join(sorted(siblings))}"
    return f"unknown key {key}; {hint}"


def _convert(annotation: Any, value: Any, key: str, whole: Any = None) -> Any:
    """Returns an option's value; of `whole`, the type that a message names, the annotation may be a part."""
    whole = annotation if whole is None else whole
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if (section := section_class(annotation)) is not None:
        return _build_section(section, value, f"{key}.", set())
    if origin is typing.Annotated and _is_list(annotation):
        return _convert(arguments[0], value, key, whole)
    if origin is typing.Annotated:
        number, allowed = _convert(arguments[0], value, key, whole), parse_range(arguments[1])
        if number in allowed:
            return number
        rule = allowed.describe(key.rsplit(".", 1)[-1])
        raise ConfigError(f"{key} is {shown(number)}; expected {rule}; set {_settable(key)}")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return _convert(_without_none(annotation, wants_list=is_list), value, key, whole)
    if origin is typing.Literal:
        if value is False and "off" in arguments:  # YAML 1.1 reads the word off as a boolean
            return "off"
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{key} is {shown(value)}; expected one of {', '.join(map(str, arguments))}; set {_settable(key)}{hint}"
        )
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            pairs = enumerate(zip(arguments, value, strict=True))
            return tuple(_convert(a, item, f"{key}[{i}]") for i, (a, item) in pairs)
    elif origin is dict and isinstance(value, Mapping):
        return {str(k): _convert(arguments[1], item, f"{key}.{k}") for k, item in value.items()}
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, key)
    elif annotation is str and isinstance(value, str):
        return _plain(value, key)
    elif annotation in (bool, int) and type(value) is annotation:  # a bool is no int here
        return value
    raise ConfigError(
        f"{key} is {shown(value)} ({type(value).__name__}); expected {describe_type(whole)}; set {_settable(key)}"
    )


def _finite(value: float, key: str) -> float:
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{key} is {shown(value)}; expected a finite number; set {_settable(key)}")
    return number


def _plain(value: str, key: str) -> str:
    if _HOME.match(value):
        rule = "a path that is written out, because no shell expands ~ here"
        raise ConfigError(
            f"{key} is {shown(value)}; expected {rule}; set {_settable(key)} with $HOME or in full"
        )
    if _NOT_PLAIN.search(value):
        rule = "one line of text without control characters and ${"
        raise ConfigError(f"{key} is {shown(value)}; expected {rule}; set {_settable(key)}")
    return value


def _settable(key: str) -> str:
    """Returns the key that a user sets: an element of a list is set with its list."""
    return key.partition("[")[0]


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that is too long, or one with a NUL
        return False


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
