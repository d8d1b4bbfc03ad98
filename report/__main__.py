"""One page about one or several runs: what they learned, beside each other.

    python -m report RUN [RUN ...] --out DIR [--no-images]

Writes `DIR/index.html` (self-contained: opens without a network), every figure as a PNG, `results.csv` and
`results.md`. RUN is a run directory; its `metrics.jsonl`, `results/` and newest checkpoint are read, nothing in it
is changed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from runtime.program import run_program
from runtime.usage import HelpFormatter


def main(arguments: list[str]) -> int:
    """Returns the exit code of the report's command line."""
    options = _parse(arguments)
    # Imported once the command line is known to be right: torch takes seconds.
    from report.write import write_report
    from runtime.logging_setup import set_up_logging

    set_up_logging(rank=0)
    print(write_report(options.runs, options.out, with_images=not options.no_images))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m report", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="directory of the page")
    parser.add_argument(
        "--no-images", action="store_true", help="leave out the panels that need encoder and data"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
