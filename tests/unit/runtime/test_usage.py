"""Programs greet: `--help` costs no torch, names every option, and an early Ctrl-C is one line."""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from audit.config import AuditConfig
from evaluation.config import EvaluationConfig
from runtime.config import iterate_keys
from runtime.options import iterate_options
from runtime.usage import describe_usage, positive
from tests.helpers.digits import DEMO
from training.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = {
    "pretrain.py": ["pretrain.py"],
    "evaluate.py": ["evaluate.py"],
    **{
        name: ["-m", name]
        for name in (
            "data.make_shards",
            "data.verify_shards",
            "data.show_crops",
            "training.export",
            "training.metrics",
            "report",
            "audit",
            "evaluation.cache",
            "evaluation.embed",
            "slurm.submit",
            "runtime.options_page",
            "benchmarks.report",
            "benchmarks.gmm",
            "benchmarks._ceiling",
            "benchmarks.gpu_check",
            "benchmarks.loss",
            "benchmarks.unique",
            "benchmarks.comm",
            "benchmarks.step",
            "benchmarks.step_profile",
            "benchmarks.loader",
            "benchmarks.peers",
            "benchmarks._lightly_method",
        )
    },
}
# Placed on PYTHONPATH, Python runs it first: says which modules a program has loaded, or sends SIGINT at an import.
SITE = """
import atexit, os, signal, sys
if os.environ.get("SAY_MODULES"):
    atexit.register(lambda: print("TORCH" if "torch" in sys.modules else "no torch", file=sys.stderr))
if os.environ.get("INTERRUPT_AT"):  # shells start background jobs with SIGINT ignored, test suites among them
    signal.signal(signal.SIGINT, signal.default_int_handler)
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("INTERRUPT_AT"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.fixture
def site(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_list_of_programs_is_whole() -> None:
    rooms = (
        "data",
        "training",
        "evaluation",
        "report",
        "audit",
        "slurm",
        "benchmarks",
        "runtime",
        "models",
        "prototypes",
    )
    found = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert found == set(PROGRAMS) - {"pretrain.py", "evaluate.py"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_costs_no_torch(name: str, site: dict[str, str]) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run([*PROGRAMS[name], "--help"], site | {"SAY_MODULES": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == "no torch\n", done.stderr[-1500:]
    assert len(done.stdout.splitlines()) > 3 and "python" in done.stdout
    # A tenth to a half of a second on an idle machine; the bar of one second, with room for a busy one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_help_is_found_wherever_it_stands(site: dict[str, str]) -> None:
    for arguments in (
        ["pretrain.py", "-h"],
        ["pretrain.py", DEMO, "--help"],
        ["-m", "audit", "-h"],
    ):
        done = run(arguments, site)
        assert done.returncode == 0 and "Options, with their defaults:" in done.stdout and not done.stderr
    nothing = run(["pretrain.py"], site)
    assert nothing.returncode == 2 and nothing.stderr.startswith("error: no configuration given")


@pytest.mark.parametrize("config_class", [PretrainConfig, EvaluationConfig, AuditConfig])
def test_every_option_is_listed_with_its_default_and_meaning(config_class: type) -> None:
    usage = describe_usage("What it does.", config_class)
    listed = [line.strip().split("=")[0] for line in usage.splitlines() if re.match(r"  [a-z]", line)]
    assert sorted(listed) == sorted(iterate_keys(config_class))
    for option in iterate_options(config_class):
        assert f"  {option.key}={option.default}\n      {option.text[:40]}" in usage
    assert max(map(len, usage.splitlines())) <= 140


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("pretrain.py", "omegaconf"),
        ("pretrain.py", "training.config"),
        ("pretrain.py", "torch"),
        ("pretrain.py", "torch.nn"),
        ("evaluate.py", "omegaconf"),
        ("evaluate.py", "torch"),
    ],
)
def test_an_early_interrupt_is_one_line(name: str, module: str, site: dict[str, str], tmp_path: Path) -> None:
    """At an import, where most of the first second goes, and where Python's own answer is thirty lines."""
    config = DEMO if name == "pretrain.py" else "configs/eval_fashion_mnist.yaml"
    place = [f"run.output_dir={tmp_path}"] if name == "pretrain.py" else ["encoder=raw-pixels"]
    done = run([name, config, *place], site | {"INTERRUPT_AT": module})
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_planted_interrupt_has_its_usual_effect_elsewhere(site: dict[str, str]) -> None:
    done = run(["-c", "import omegaconf"], site | {"INTERRUPT_AT": "omegaconf"})
    assert "Traceback" in done.stderr and done.stderr.count("\n") > 3


def test_an_ignored_interrupt_stays_ignored(site: dict[str, str]) -> None:
    """A shell starts background jobs so; their run must not end with somebody's Ctrl-C."""
    code = "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "from runtime.program import run_program\n"
    code += "sys.exit(run_program(lambda _: os.kill(os.getpid(), signal.SIGINT) or 7, []))"
    assert run(["-c", code], site).returncode == 7


@pytest.mark.parametrize("path", ["a" * 300 + ".yaml", "a/" * 3000, "missing.yaml", "configs", "a\x01b"])
def test_a_path_that_is_none_is_one_line(path: str, site: dict[str, str]) -> None:
    done = run(["pretrain.py", path], site)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert re.match(r"error: configuration file is .{1,200}; expected an existing YAML file", done.stderr)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", ""])
def test_what_is_counted_is_at_least_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least 1"):
        positive(text)
    assert positive("12") == 12
