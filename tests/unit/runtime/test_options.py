"""Every option has a text below its field, and docs/options.md says what the fields say."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from audit.config import AuditConfig
from evaluation.config import EvaluationConfig
from runtime.config import iterate_keys
from runtime.options import iterate_options
from slurm.config import ClusterConfig
from training.config import PretrainConfig

ROOT = Path(__file__).resolve().parents[3]
CLASSES = [PretrainConfig, EvaluationConfig, AuditConfig, ClusterConfig]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A class with one text too few."""

    rate: Annotated[float, "[0, 1)"] = 0.5
    """What it means,
    on two lines.
    """
    silent: int | None = None
    spoken: tuple[str, ...] = ("a", "b")
    """The last one."""


@pytest.mark.parametrize("config_class", CLASSES)
def test_every_option_has_a_text(config_class):
    options = list(iterate_options(config_class))
    assert sorted(option.key for option in options) == sorted(iterate_keys(config_class))
    # A text says more than its name, and is a sentence.
    short = [o.key for o in options if len(o.text) < 10 or not o.text.endswith(".")]
    assert short == []


def test_a_missing_text_is_found_and_the_neighbours_are_not_taken_for_it():
    rate, silent, spoken = iterate_options(Planted)
    assert (rate.text, rate.type, rate.default) == ("What it means, on two lines.", "float in [0, 1)", "0.5")
    assert (silent.text, silent.type, silent.default) == ("", "int, or null", "null")
    assert (spoken.text, spoken.type, spoken.default) == ("The last one.", "list of str", "[a, b]")


def test_an_option_is_described_in_full():
    listed = {option.key: option for option in iterate_options(PretrainConfig)}
    assert (listed["optim.lr"].default, listed["optim.lr"].type) == ("0.0005", "float in [0, 100]")
    assert (listed["optim.betas"].default, listed["optim.betas"].type) == (
        "[0.9, 0.999]",
        "list of 2 float in [0, 1)",
    )
    assert listed["model.patch_size"].type == "int in [1, 1e4], or null"
    assert listed["data.shards"].default == "null"
    assert listed["run.device"].type == "auto, cpu, cuda"


def test_docs_options_is_current():
    recipe = re.search(
        r"python (-m runtime.options_page (?:.*\\\n)?.*) > (.*)", (ROOT / "Makefile").read_text()
    )
    arguments = shlex.split(recipe[1].replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == (ROOT / recipe[2]).read_text(), "run make options"
    for config_class in CLASSES:
        assert all(f"| `{key}` |" in done.stdout for key in iterate_keys(config_class))
