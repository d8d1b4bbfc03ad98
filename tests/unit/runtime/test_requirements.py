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
        "torch is 2.9.0+cu128 (at least 2.9.1), timm is 1.0.4 (at least 1.0.31), accelerate is not "
        "installed, as pip counts (at least 1.0.0); expected the versions of requirements-min.txt; run pip install"
    )


def test_metadata_without_a_version_are_no_package(bounds, monkeypatch):
    installed(monkeypatch, torch=None)
    with pytest.raises(
        UserError, match=r"^torch is not installed, as pip counts \(at least 2\.9\.1\); expected"
    ):
        requirements.require_packages("torch")


def pretend(folder, package, version):
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


@pytest.mark.parametrize(
    "program",
    [
        ["pretrain.py", "no.yaml"],
        ["evaluate.py", "no.yaml"],
        ["-m", "training.export", "no-run", "out"],
        ["-m", "evaluation.embed", "no-run", "images", "--out", "features.npz"],
    ],
    ids=lambda program: " ".join(program[:2]),
)
def test_a_program_says_so_before_anything_else(program, tmp_path):
    pretend(tmp_path, "timm", "0.9.0")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.startswith("error: timm is 0.9.0 (at least 1.0.31); expected")
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp2"])
def test_deepspeed_is_asked_for_where_it_is_used(engine, tmp_path):
    pretend(tmp_path, "deepspeed", "0.14.0")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    options = [f"engine.name={engine}", "run.dry_run=true", "data.shards=/nowhere", "run.device=cpu"]
    done = subprocess.run(
        [sys.executable, "pretrain.py", "configs/pretrain_vits16_imagenet_full.yaml", *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ("deepspeed is 0.14.0" in done.stderr) == (engine == "deepspeed"), done.stderr
