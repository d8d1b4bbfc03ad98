"""Prints docs/options.md: every option of the given configuration classes, a table for each section.

python -m runtime.options_page module:Class=HEADING ... > docs/options.md

`make options` names the classes. Imports no torch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator

from runtime.options import Option, iterate_sections
from runtime.program import EXIT_DONE, run_program
from runtime.usage import asks_for_help

_HEADER = """# Options

Made by `make options` from the texts in the `config.py` modules. A YAML file replaces defaults, `key.sub=value` on the
command line replaces both; `...` must be given. `[0, 1)` includes 0 and not 1."""


def main(arguments: list[str]) -> int:
    """Prints the page of the classes `module:Class=HEADING` and returns the exit code."""
    if asks_for_help(arguments):
        print((__doc__ or "").strip())
        return EXIT_DONE
    print(_HEADER)
    for argument in arguments:
        place, _, heading = argument.partition("=")
        module, _, name = place.partition(":")
        print("\n".join(_render(heading, getattr(importlib.import_module(module), name))))
    return EXIT_DONE


def _render(heading: str, config_class: type) -> Iterator[str]:
    for prefix, section, options in iterate_sections(config_class):
        yield f"\n{f'### {prefix[:-1]}' if prefix else f'## {heading}'}\n{inspect.getdoc(section)}"
        if options:
            yield "\n| option | default | values | meaning |\n|---|---|---|---|"
        yield from map(_render_row, options)


def _render_row(option: Option) -> str:
    cells = (f"`{option.key}`", f"`{option.default}`", option.type, option.text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
