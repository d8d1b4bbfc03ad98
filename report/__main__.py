"""One page about one or several runs: what they learned, beside each other.

    python -m report RUN [RUN ...] --out DIR [--no-images]
    python -m report RUN --out DIR --live 60        (writes the page every 60 s until Ctrl-C, and browsers follow)

Writes `DIR/index.html` (self-contained: opens without a network), every figure as a PNG, `results.csv` and
`results.md`. RUN is a run directory; its `metrics.jsonl`, `results/` and newest checkpoint are read, nothing in it
is changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from runtime.program import UserError, run_program
from runtime.usage import HelpFormatter

_LONGEST_WAIT_S = 86400


def main(arguments: list[str]) -> int:
    """Returns the exit code of the report's command line."""
    options = _parse(arguments)
    # Imported once the command line is known to be right: torch takes seconds.
    from report.write import write_report
    from runtime.logging_setup import set_up_logging

    set_up_logging(rank=0)
    if options.live is None:
        print(write_report(options.runs, options.out, with_images=not options.no_images))
        return 0
    print(f"{options.out / 'index.html'}: every {options.live:g} s until Ctrl-C")
    while True:
        # The tables and curves alone: panels would take the processor from the run that is watched.
        write_report(options.runs, options.out, with_images=False, reload_s=options.live)
        time.sleep(options.live)


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
    parser.add_argument(
        "--live", type=float, default=None, metavar="SECONDS", help="write it again and again, without images"
    )
    options = parser.parse_args(arguments)
    if options.live is not None and not 1 <= options.live <= _LONGEST_WAIT_S:
        raise UserError(f"--live is {options.live}; expected 1 to {_LONGEST_WAIT_S} seconds; set --live")
    return options


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
