"""An environment that would fail when a checkpoint is due is refused at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from runtime import requirements
from runtime.program import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def bounds(tmp_path, monkeypatch):
    path = tmp_path / "requirements-min.txt"
    path.write_text("# a comment\ntorch>=2.9.1\ntimm>=1.0.31  # why\naccelerate>=1.0.0\n")
    monkeypatch.setattr(requirements, "BOUNDS", path)


def installed(monkeypatch, **versions):
    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(requirements, "version", version)


@pytest.mark.parametrize("torch", ["2.9.1", "2.9.1+cu130", "2.10.0", "2.9.1a0+145a3a7.nv25.10", "3"])
def test_new_enough_is_taken(bounds, monkeypatch, torch):
    installed(monkeypatch, torch=torch, timm="1.0.31", accelerate="1.0")
    requirements.require_packages("torch", "timm", "accelerate")


def test_old_and_missing_packages_are_one_line(bounds, monkeypatch):
    installed(monkeypatch, torch="2.9.0+cu128", timm="1.0.4")
    with pytest.raises(UserError) as caught:
        requirements.require_packages("torch", "timm", "accelerate")
    assert str(caught.value).startswith(
        "torch is 2.9.0+cu128 (at least 2.9.1), timm is 1.0.4 (at least 1.0.31), accelerate is not installed "
        "(at least 1.0.0); expected the versions of requirements-min.txt; run pip install"
    )


@pytest.mark.parametrize("program", ["pretrain.py", "evaluate.py"])
def test_a_program_says_so_before_it_reads_its_configuration(program, tmp_path):
    old = tmp_path / "timm-0.9.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.9.0\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / program), "no.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.startswith("error: timm is 0.9.0 (at least 1.0.31); expected")
        and done.stderr.count("\n") == 1
    )
