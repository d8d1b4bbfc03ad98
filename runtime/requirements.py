"""Packages that are missing or too old are one line at the start, and no traceback when a checkpoint is due."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.program import UserError

BOUNDS = Path(__file__).resolve().parent.parent / "requirements-min.txt"


def require_packages(*names: str) -> None:
    """Refuses an environment without packages that the caller is about to need, or with one below its bound.

    Not collective; imports none of them.

    Raises:
        UserError: one line with every such package, its version and its bound in requirements-min.txt.
    """
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", BOUNDS.read_text(), re.MULTILINE))
    problems = []
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:
            problems.append(f"{name} is not installed (at least {bounds[name]})")
            continue
        if _release(found) < _release(bounds[name]):
            problems.append(f"{name} is {found} (at least {bounds[name]})")
    if problems:
        raise UserError(
            f"{', '.join(problems)}; expected the versions of requirements-min.txt; run pip install -r "
            "requirements-min.txt in this environment"
        )


def _release(text: str) -> tuple[int, ...]:
    """Returns the numbers of a release without trailing zeros: builds such as 2.9.1a0+cu130 are of their release."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
