"""Packages that are missing or too old are one line at the start, and no traceback when a checkpoint is due."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.program import EXIT_DONE, UserError, run_program

ENCODER_PACKAGES = ("torch", "torchvision", "timm", "omegaconf", "numpy", "pillow", "safetensors")
"""What every program needs that builds an encoder and gives it images."""
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
            found = ""
        if not found:  # also where its metadata name no version
            problems.append(f"{name} is not installed, as pip counts (at least {bounds[name]})")
        elif _release(found) < _release(bounds[name]):
            problems.append(f"{name} is {found} (at least {bounds[name]})")
    if problems:
        raise UserError(
            f"{', '.join(problems)}; expected the versions of requirements-min.txt; run pip install -r "
            "requirements-min.txt in this environment"
        )


def exit_without_packages(*names: str) -> None:
    """Ends the program with exit code 2 and that line; for one whose slow imports stand at its top."""

    def check(packages: list[str]) -> int:
        require_packages(*packages)
        return EXIT_DONE

    code = run_program(check, list(names))
    if code != EXIT_DONE:
        sys.exit(code)


def _release(text: str) -> tuple[int, ...]:
    """Returns the numbers of a release without trailing zeros; a build such as 2.9.1a0+cu130 counts as its release."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
