"""Runs benchmarks, keeps one JSON each, prints one table: python -m benchmarks.report [NAME ...] [--out DIR].

A benchmark passes if it exits with 0, which it does if no figure misses its bar. The report exits with 1 if any
fails. Everything that a figure needs to be believed is in its JSON: command, commit, hardware, load, lines printed.
These are the benchmarks of the CPU; `python -m benchmarks.gpu_check` runs those of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
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
VERDICTS = ("PASS", "FAIL", "NO BAR")


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
    results = [run(name, COMMANDS[name], out) for name in arguments.names or COMMANDS]
    table = write_table(results)
    (out / "report.md").write_text(table)
    print(table)
    return 0 if all(result["exit_code"] == 0 for result in results) else 1


def run(
    name: str, arguments: str, out: Path, *, device: str = "cpu", timeout_s: float | None = None
) -> dict[str, Any]:
    """Runs one benchmark, shows its lines as they come, and writes and returns its record.

    Args:
        name: of the record, OUT/NAME.json; what the program says on stderr is kept beside it, in OUT/NAME.log.
        arguments: the module and its arguments, as on the command line.
        out: existing folder.
        device: kind of device that is measured, "cpu" or "cuda".
        timeout_s: after it the program and all that it has started are ended; None waits for ever.
    """
    started, load, lines, timed_out = time.time(), os.getloadavg()[0], [], threading.Event()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *shlex.split(arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )

        def end() -> None:
            timed_out.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout_s or threading.TIMEOUT_MAX, end)
        timer.daemon = True
        timer.start()
        # `timeout` and schedulers stop a program by SIGTERM, which would leave this one's children behind.
        previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip())
            process.wait()
        except BaseException:
            end()
            raise
        finally:
            timer.cancel()
            signal.signal(signal.SIGTERM, previous)
    result = {
        "name": name,
        "command": f"python -m {arguments}",
        "exit_code": process.returncode,
        "timed_out": timed_out.is_set(),
        "seconds": round(time.time() - started, 1),
        "load_before": load,
        "lines": lines,
        **read_error(out / f"{name}.log", process.returncode),
        **describe_machine(device),
    }
    replace_file(out / f"{name}.json", json.dumps(result, indent=2) + "\n")
    return result


def read_error(log: Path, exit_code: int) -> dict[str, Any]:
    """Returns the last line of a failed program's stderr, and whether the GPU's memory was too small for it."""
    if exit_code == 0:
        return {"error": None, "out_of_memory": False}
    text = log.read_text(errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return {"error": last[:300], "out_of_memory": "OutOfMemoryError" in text}


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def describe_machine(device: str) -> dict[str, Any]:
    """Returns commit, versions and the hardware that is measured on a kind of device, "cpu" or "cuda"."""
    import torch

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() or None,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def write_table(results: list[dict[str, Any]]) -> str:
    """Returns a Markdown table with a row per line that was judged, or that has figures."""
    rows = ["| benchmark | verdict | what was measured |", "|---|---|---|"]
    for result in results:
        judged = [line for line in result["lines"] if any(word in line for word in VERDICTS)]
        for line in judged or result["lines"] or ["no output"]:
            text = line.strip().replace("|", "/")
            rows.append(f"| {result['name']} | {describe_verdict(result, line)} | {text} |")
    return "\n".join(rows) + "\n"


def describe_verdict(result: Mapping[str, Any], line: str) -> str:
    """Returns the verdict on a line of a benchmark: its own words, or how the program ended."""
    if result["timed_out"]:
        return "timed out"
    if result["out_of_memory"]:
        return "out of memory"
    if "FAIL" in line:
        return "FAIL"
    if result["exit_code"] and not any("FAIL" in line for line in result["lines"]):
        return f"FAIL, exit code {result['exit_code']}"
    if "NO BAR" in line:
        return "no bar"
    return "pass" if "PASS" in line else "-"


if __name__ == "__main__":
    sys.exit(main())
