"""`base: other.yaml` in a configuration: what counts, where files are looked for, and mistakes in one line."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from runtime.config import ConfigError, load_config, read_yaml
from training.config import PretrainConfig

Side = Annotated[int, "[1, 1e4]"]
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.0
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outer:
    number: int = 0
    text: str | None = "default"
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_file_counts_more_than_its_bases_and_an_override_more_than_both(tmp_path):
    write(
        tmp_path,
        below__first="number: 1\ntext: first\ninner:\n  rate: 1.5\n  names: [a, b]\n",
        # Its base stands beside it, not beside the file that names it.
        below__second="base: first.yaml\ntext: null\n",
        third="inner:\n  rate: 3.5\n",
        top="base: [below/second.yaml, third.yaml]\nnumber: 9\ninner:\n  names: [c]\n",
    )
    expected = Outer(number=9, text=None, inner=Inner(rate=3.5, names=("c",)))
    assert load_config(Outer, str(tmp_path / "top.yaml")) == expected
    assert load_config(Outer, str(tmp_path / "top.yaml"), ["inner.rate=7"]).inner.rate == 7
    assert "base" not in read_yaml(str(tmp_path / "top.yaml"))


def test_one_base_may_be_reached_on_two_ways(tmp_path):
    write(tmp_path, root="number: 3", left="base: root.yaml", right="base: root.yaml\ntext: right")
    write(tmp_path, top="base: [left.yaml, right.yaml]")
    assert load_config(Outer, str(tmp_path / "top.yaml")) == Outer(number=3, text="right")


MISTAKES = {
    "itself": ("base: top.yaml", "base is .*top.yaml -> .*top.yaml; expected no file below itself"),
    "circle": ("base: a.yaml", "top.yaml -> .*a.yaml -> .*b.yaml -> .*a.yaml; expected no file"),
    "unknown": (
        "base: nowhere.yaml",
        r"base of \S*top.yaml is '\S*nowhere.yaml'; expected an existing YAML file",
    ),
    "number": ("base: 3", "base of .* is 3; expected a file's name"),
    "zero": ("base: 0", "base of .* is 0; expected a file's name"),
    "false": ("base: false", "base of .* is False; expected a file's name"),
    "empty": ("base: ''", "base of .*; expected an existing YAML file"),
    "left open": ("inner: {names: [a, '???']}", r"^inner.names of \S*top.yaml is \?\?\?; expected a value; "),
    "left open below": ("base: e.yaml\nnumber: 3", r"^number of \S*e.yaml is \?\?\?; expected a value; "),
    "list of a section": ("base: [{a: 1}]", "expected a file's name"),
    "section": ("base: {file: a.yaml}", "expected a file's name"),
    "reference": ("base: '${number}'", "base of .*; expected an existing YAML file"),
    "a base's key": ("base: c.yaml", "unknown key numbr; did you mean number"),
    "a base that is no mapping": ("base: d.yaml", r"d.yaml holds a list; expected key: value lines"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path):
    text, expected = MISTAKES[name]
    write(tmp_path, top=text, a="base: b.yaml", b="base: a.yaml", c="numbr: 1", d="[1, 2]", e="number: ???")
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(Outer, str(tmp_path / "top.yaml"))
    assert "\n" not in str(error.value)


def test_a_circle_ends_the_program_with_exit_code_2(tmp_path):
    write(tmp_path, top="base: ./top.yaml")
    done = subprocess.run(
        [sys.executable, "pretrain.py", str(tmp_path / "top.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "below itself" in done.stderr


def test_base_is_no_option():
    with pytest.raises(ConfigError, match="unknown key base"):
        load_config(
            PretrainConfig, str(ROOT / "configs" / "pretrain_vitl16_imagenet_full.yaml"), ["base=x.yaml"]
        )


@dataclass(frozen=True, kw_only=True)
class Sized:
    size: Side | Annotated[tuple[Side, Side], "[height, width]"] = 8
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["number=3", "text=["], r"^override is 'text=\['; expected key\.sub=value with a value in YAML \("),
        (["text=${nosuch}", "number=3"], r"^override is 'text=\$\{nosuch\}'; .*'nosuch' not found"),
        (
            ["inner={rate:0.5}"],
            r"^unknown key inner\.rate:0\.5; .* a space behind the colon; write rate: 0\.5$",
        ),
    ],
)
def test_a_mistake_in_an_override_is_not_the_files(overrides, message, tmp_path):
    write(tmp_path, top="number: 1")
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, str(tmp_path / "top.yaml"), overrides)
    write(tmp_path, broken="text: ${nosuch}")
    with pytest.raises(ConfigError, match=r"broken\.yaml cannot be read as YAML: .*; mend the file$"):
        load_config(Outer, str(tmp_path / "broken.yaml"), overrides)
    assert load_config(Outer, str(tmp_path / "broken.yaml"), ["text=mended"]).text == "mended"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["number=???"],
            r"^override is 'number=\?\?\?'; expected a value; write one in the place of \?\?\?$",
        ),
        (["inner={names: [a, '???']}"], r"^override is .*; expected a value; write one in the place of"),
        (
            [".inner.rate=1"],
            r"^override is '\.inner\.rate=1'; expected key\.sub=value; .* on both sides of a dot$",
        ),
        (["inner..rate=1"], r"^override is 'inner\.\.rate=1'; expected key\.sub=value"),
    ],
)
def test_an_override_has_a_name_and_a_value(overrides, message, tmp_path):
    write(tmp_path, top="number: 1")
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, str(tmp_path / "top.yaml"), overrides)
    assert load_config(Outer, str(tmp_path / "top.yaml"), ["text=what ???"]).text == "what ???"


@pytest.mark.parametrize("size", ["32x48", "28.0", "[32]", "[[32, 48]]", "true"])
def test_a_size_that_is_none_is_told_both_forms(size, tmp_path):
    write(tmp_path, top="size: 8")
    rule = r"expected int in \[1, 1e4\], or \[height, width\] of int in \[1, 1e4\]; set size$"
    with pytest.raises(ConfigError, match=rule):
        load_config(Sized, str(tmp_path / "top.yaml"), [f"size={size}"])
    assert load_config(Sized, str(tmp_path / "top.yaml"), ["size=[32,48]"]).size == (32, 48)
