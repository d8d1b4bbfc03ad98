"""Every number of every configuration has a finite range, is held against it, and works inside it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.config import AuditConfig
from evaluation.config import EvaluationConfig
from runtime.config import ConfigError, build_config, config_to_dict, read_yaml
from runtime.ranges import parse_range
from slurm.config import ClusterConfig
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from training.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
# What each class cannot do without.
REQUIRED: dict[type, dict[str, Any]] = {
    PretrainConfig: {"data": {"shards": "x"}},
    EvaluationConfig: {"encoder": "raw-pixels"},
    AuditConfig: {"pretrain": "x.yaml", "evaluate": "y.yaml", "arms": {"a": []}},
    ClusterConfig: {},
}
VALUES = (math.nan, math.inf, -math.inf, -1, 0, 1e30, 1e-30, 10**18, 10**400)


def numbers_of(annotation: Any, ranges: tuple[str, ...] = ()) -> Iterator[tuple[type, tuple[str, ...]]]:
    """Yields (int or float, the ranges around it) for every number inside an annotation."""
    if typing.get_origin(annotation) is Annotated:
        base, *metadata = typing.get_args(annotation)
        if typing.get_origin(base) is tuple:  # beside a list stands its form
            metadata = []
        yield from numbers_of(base, (*ranges, *metadata))
    elif annotation in (int, float):
        yield annotation, ranges
    else:
        for argument in typing.get_args(annotation):
            if typing.get_origin(annotation) is not typing.Literal:
                yield from numbers_of(argument, ranges)


def leaves(config_class: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, annotation in typing.get_type_hints(config_class, include_extras=True).items():
        if dataclasses.is_dataclass(annotation):
            yield from leaves(typing.cast(type, annotation), (*prefix, name))
        else:
            yield (*prefix, name), annotation


def unranged(config_class: type) -> list[str]:
    return [
        ".".join(path)
        for path, annotation in leaves(config_class)
        for _, ranges in numbers_of(annotation)
        if len(ranges) != 1
        or not math.isfinite(float(parse_range(ranges[0]).low) + float(parse_range(ranges[0]).high))
    ]


def candidates(annotation: Any, value: Any) -> Any:
    """Returns `value` in the option's form: as every element of a list where the option is one."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return candidates(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        return [value] * (1 if arguments[-1] is Ellipsis else len(arguments))
    return value


def attempts(config_class: type) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yields (key, value as given, nested plain values) for every numeric option and every value of `VALUES`."""
    for path, annotation in leaves(config_class):
        if not list(numbers_of(annotation)):
            continue
        for number in VALUES:
            value = candidates(annotation, number)
            nested: dict[str, Any] = {**REQUIRED[config_class]}
            section = nested
            for name in path[:-1]:
                section[name] = dict(section.get(name, {}))
                section = section[name]
            section[path[-1]] = value
            yield ".".join(path), value, nested


@pytest.mark.parametrize("config_class", REQUIRED, ids=lambda c: c.__name__)
def test_every_number_has_one_finite_range_and_a_default_inside_it(config_class: type) -> None:
    assert unranged(config_class) == []
    config = build_config(config_class, REQUIRED[config_class])
    assert build_config(config_class, config_to_dict(config)) == config


def test_a_number_without_a_range_is_found() -> None:
    Planted = dataclasses.make_dataclass(
        "Planted", [("bare", float), ("some", tuple[int, ...] | None), ("good", Annotated[int, "[0, 1]"])]
    )
    assert unranged(Planted) == ["bare", "some"]


@pytest.mark.parametrize("config_class", REQUIRED, ids=lambda c: c.__name__)
def test_extreme_values_are_refused_in_one_line_or_kept_as_they_are(config_class: type) -> None:
    accepted, refused = 0, 0
    for key, value, nested in attempts(config_class):
        extreme = [
            number
            for number in (value if isinstance(value, list) else [value])
            if abs(number) > 1 or number != number
        ]
        try:
            config = build_config(config_class, nested)
        except ConfigError as error:
            message = str(error)
            assert key.rsplit(".", 1)[-1] in message and "\n" not in message and len(message) < 400, message
            assert "expected" in message and "; set " in message, message
            refused += 1
        else:
            assert not extreme, f"{key}={value} is accepted"
            found: Any = config
            for name in key.split("."):
                found = getattr(found, name)
            assert found == (tuple(value) if isinstance(value, list) else value)
            accepted += 1
    assert refused > 5 * accepted > 0


@pytest.mark.parametrize(
    "text", [".nan", "nan", ".inf", "-.inf", "inf", "1e400", "9" * 400, "0x" + "f" * 4000]
)
def test_non_finite_numbers_of_yaml_and_of_overrides_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{shards: x}}\noptim: {{lr: {text}}}\n")
    for values in (read_yaml(str(path)), read_yaml(DEMO, [f"optim.lr={text}"])):
        with pytest.raises(ConfigError, match=r"^optim\.lr is .*; expected .*; set optim\.lr$") as raised:
            build_config(PretrainConfig, values)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@given(
    number=st.floats() | st.integers(),
    low=st.integers(-5, 5),
    width=st.integers(1, 5),
    ends=st.sampled_from("[("),
    last=st.sampled_from("])"),
)
def test_a_range_is_the_interval_it_is_written_as(
    number: float, low: int, width: int, ends: str, last: str
) -> None:
    high = low + width
    found = parse_range(f"{ends}{low}, {high}{last}")
    expected = low < number < high or (number == low and ends == "[") or (number == high and last == "]")
    assert (number in found) == expected
    assert math.nan not in found
    assert (
        found.describe("x") == f"{low} {'<=' if ends == '[' else '<'} x {'<=' if last == ']' else '<'} {high}"
    )


def test_a_zero_may_stand_apart() -> None:
    found = parse_range("0 or [1, 10]")
    assert [number in found for number in (0, 1, 10, 0.5, -1, 11, math.nan)] == [True] * 3 + [False] * 4
    assert found.describe("x") == "0, or 1 <= x <= 10"


@pytest.mark.parametrize("text", ["0, 1", "[1, 0]", "[0, 1", "[a, 1]", "[0, nan]"])
def test_what_is_no_interval_is_a_mistake_of_the_program(text: str) -> None:
    with pytest.raises((TypeError, ValueError)):
        parse_range(text)


@pytest.mark.parametrize("text", ["a\nb", "a\tb", "a\x00", "\udcff", "a\u2028b", "${b}"])
def test_text_that_paths_and_scripts_cannot_carry_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^run\.name is .*; expected .*; set run\.name$"):
        build_config(PretrainConfig, {**REQUIRED[PretrainConfig], "run": {"name": text}})


@pytest.mark.parametrize("text", ["~/runs", "~user/runs"])
def test_a_home_that_nobody_expands_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^run\.output_dir is .*; expected .* ~ here; set run\.output_dir with "
    ):
        build_config(PretrainConfig, {**REQUIRED[PretrainConfig], "run": {"output_dir": text}})


@pytest.mark.parametrize("name", ["/a", "a//b", "a/", "", ".a", "a/../b", "a\\b", "é" * 101])
def test_a_name_that_is_no_directory_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"set run\.name"):
        build_config(PretrainConfig, {**REQUIRED[PretrainConfig], "run": {"name": name}})


# Options that say how long a run is, which the two steps below decide, and those that a dry run alone reads.
_DECIDED = ("optim.steps", "run.dry_run_world_size")

TRAIN = """
import json, sys, time
from pathlib import Path
from evaluation.probes.knn import build_knn_probe
from runtime import distributed
from runtime.config import ConfigError, load_config
from runtime.preemption import PreemptionFlag
from training.build import build_trainer
from training.config import PretrainConfig
from training.run_directory import held_run_directory
demo, base, overrides = json.loads(sys.stdin.read())
with distributed.joined("cpu") as process:
    for index, override in enumerate(overrides):
        try:
            config = load_config(PretrainConfig, demo, [*base, f"run.name=r{index}", override])
            run_dir = Path(config.run.output_dir) / config.run.name
            with held_run_directory(config, run_dir, process) as directory:
                code = build_trainer(config, process, directory, PreemptionFlag(), build_knn_probe).fit()
            assert code == 0, f"exit {code}"
        except ValueError as error:
            print("refused", override, error)
            assert "\\n" not in str(error)
        except BaseException:
            print("FAULT", override)
            raise
        else:
            print("trained", override)
"""


@pytest.mark.slow  # about two minutes: some eighty runs of two steps in one process
@pytest.mark.timeout(1600)
def test_what_is_accepted_trains_two_steps(tmp_path: Path) -> None:
    import json

    overrides = []
    for key, value, nested in attempts(PretrainConfig):
        try:
            build_config(PretrainConfig, nested)
        except ConfigError:
            continue
        if key not in _DECIDED:
            overrides.append(f"{key}={json.dumps(value)}")
    shards = write_digit_shards(tmp_path / "digits")
    base = [
        *TINY,
        f"data.shards={shards}",
        f"run.output_dir={tmp_path}",
        "optim.steps=2",
        "checkpoint.every_steps=2",
    ]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        input=json.dumps([DEMO, base, overrides]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(overrides) > 40
    assert sum(line.startswith("trained") for line in lines) > 0.8 * len(lines), done.stdout
