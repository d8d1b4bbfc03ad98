"""The files of requirements agree: one list of packages, pins that lie within the bounds, one bound for torch."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def requirements(name: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {requirement.name: requirement for requirement in found}


def test_every_pin_lies_within_its_lower_bound() -> None:
    pins, bounds = requirements("requirements.txt"), requirements("requirements-min.txt")
    assert pins.keys() == bounds.keys()
    for name, pin in pins.items():
        (exact,), (bound,) = pin.specifier, bounds[name].specifier
        assert (exact.operator, bound.operator) == ("==", ">=")
        assert Version(exact.version) >= Version(bound.version), name


def test_the_package_of_the_prototypes_has_the_same_bound_for_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == [str(requirements("requirements-min.txt")["torch"])]


def test_the_oldest_environment_installs_test_tools_that_are_pinned() -> None:
    wanted = re.search(r"grep -E '(.*?)' requirements-dev", (ROOT / "Makefile").read_text())
    assert wanted is not None
    installed = {name for name in requirements("requirements-dev.txt") if re.match(wanted[1], name)}
    needed = {
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "jaxtyping",
        "beartype",
        "scikit-learn",
    }
    assert installed == needed
