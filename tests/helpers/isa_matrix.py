"""Runs the tests of learned figures as other machines would: other instruction sets, other numbers of threads.

    python -m tests.helpers.isa_matrix [--slow] [pytest arguments]

A verdict must not hang on rounding. Tests that assert what training, EM or k-means ends with are marked `learned`; they
say their figures with `record_property`, and this prints, for each setting, how many passed and what was in force, and
for each figure its range over all settings. Exit code 1 where any test failed in any setting.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[2]
# What each kernel library reads; MKL's and OpenBLAS's products are what another maker's CPU changes most.
SETTINGS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "4 threads": {"OMP_NUM_THREADS": "4"},
    "torch default": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default"},
    "torch avx2": {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2"},
    "oneDNN avx2": {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "BLAS avx2": {
        "OMP_NUM_THREADS": "1",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}
READ = sorted({name for values in SETTINGS.values() for name in values})
IN_FORCE = "in force"


def run_setting(values: dict[str, str], marks: str, arguments: list[str], report: Path) -> int:
    """Runs the marked tests under one setting, writes pytest's XML report and returns its exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in READ} | values
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-o", "junit_family=xunit1"]
    command += [f"--junitxml={report}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode


def read_report(path: Path) -> tuple[int, list[str], dict[str, dict[str, str]]]:
    """Returns how many passed, who failed, and the properties of every test."""
    passed, failed, properties = 0, [], {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        elif case.find("skipped") is None:
            passed += 1
        properties[name] = {p.get("name", ""): p.get("value", "") for p in case.iter("property")}
    return passed, failed, properties


def main(arguments: list[str]) -> int:
    """Runs every setting, prints both tables and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slow", action="store_true", help="the marked tests that take minutes, too")
    options, rest = parser.parse_known_args(arguments)
    marks = "learned" if options.slow else "learned and not slow"
    rows, failures = [], []
    figures: dict[str, list[float]] = defaultdict(list)
    for setting, values in SETTINGS.items():
        with tempfile.TemporaryDirectory() as work:
            report = Path(work) / "report.xml"
            code = run_setting(values, marks, rest, report)
            if not report.exists():
                return code or 1
            passed, failed, properties = read_report(report)
        found = ""
        for test, said in properties.items():
            found = said.pop(IN_FORCE, found)
            for name, value in said.items():
                figures[f"{test} {name}"].append(float(value))
        rows.append(f"{setting:14s} {passed:6d} {len(failed):6d}  {found}")
        failures += [f"{setting}: {name}" for name in failed]
        if code and not failed:
            failures.append(f"{setting}: pytest exited with {code}")
    print(f"\n{'setting':14s} passed failed  in force", *rows, sep="\n")
    print("\nlearned figures, smallest and largest over the settings")
    for name, values in sorted(figures.items()):
        print(f"{min(values):12.4g} {max(values):12.4g}  {name}")
    print(*failures, sep="\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
