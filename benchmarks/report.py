"""Runs benchmarks, keeps one JSON each, prints one table: python -m benchmarks.report [NAME ...] [--out DIR].

A benchmark passes if it exits with 0, which it does if no ratio misses its floor. The report exits with 1 if any
fails. Everything that a figure needs to be believed is in its JSON: command, commit, hardware, load, lines printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.usage import HelpFormatter

COMMANDS = {
    "gmm": "benchmarks.gmm --large",
    "unique": "benchmarks.unique",
    "loss": "benchmarks.loss",
    "comm": "benchmarks.comm",
    "loader": "benchmarks.loader",
    "step": "benchmarks.step --model tiny",
}


def main() -> int:
    """Runs what was asked for, writes and prints; returns 1 if any benchmark failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMMANDS)}; all by default")
    parser.add_argument("--out", default="outputs/benchmarks", help="folder of the JSON files and report.md")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(COMMANDS))
    if unknown:
        print(f"error: benchmark is {unknown[0]}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    results = [run(name, out) for name in arguments.names or COMMANDS]
    table = write_table(results)
    (out / "report.md").write_text(table)
    print(table)
    return 0 if all(result["exit_code"] == 0 for result in results) else 1


def run(name: str, out: Path) -> dict[str, Any]:
    """Runs one benchmark, shows its lines as they come, and writes and returns its record."""
    command = [sys.executable, "-m", *shlex.split(COMMANDS[name])]
    started = time.time()
    load = os.getloadavg()[0]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    result = {
        "name": name,
        "command": f"python -m {COMMANDS[name]}",
        "exit_code": process.returncode,
        "seconds": round(time.time() - started, 1),
        "load_before": load,
        "lines": lines,
        **describe_machine(),
    }
    (out / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def describe_machine() -> dict[str, Any]:
    """Returns commit, versions and hardware."""
    import torch

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_table(results: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row per line that was judged, or that has figures."""
    rows = ["| benchmark | verdict | what was measured |", "|---|---|---|"]
    for result in results:
        judged = [line for line in result["lines"] if "PASS" in line or "FAIL" in line]
        for line in judged or result["lines"] or ["no output"]:
            verdict = "FAIL" if "FAIL" in line or result["exit_code"] not in (0, 1) else "pass"
            text = line.strip().replace("|", "/")
            rows.append(f"| {result['name']} | {verdict if judged else result['exit_code']} | {text} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
