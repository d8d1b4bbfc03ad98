"""The package of the prototypes, built and installed where nothing of the checkout can be found."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "prototypes.md"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # builds a wheel, makes an environment, asks an index


def run(*command, cwd, check=True):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=1500, env=environment
    )
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def pip(*arguments, cwd, check=True):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd, check=check)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves files beside its sources."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "prototypes", source / "prototypes", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "docs").mkdir()
    for name in ("pyproject.toml", "LICENSE", "docs/prototypes.md"):
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", source / "dist", source, cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The python of a fresh environment with the wheel in it; torch is borrowed, not installed once more."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    own = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).stdout.strip()
    (Path(own) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    # Without an index: the requirements of the wheel are met by torch alone, or this fails.
    pip("--python", python, "install", "--no-index", wheel, cwd=folder)
    return python


USE = """
import sys, time, torch, torch.utils.checkpoint
before = {name.partition(".")[0] for name in sys.modules}
started = time.process_time()
from decoupled_prototypes import *
seconds = time.process_time() - started
loaded = {name.partition(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
config = PrototypesConfig(num_prototypes=64, dim=8, partition=PartitionConfig(size=16), gmm=GmmConfig())
estimator = build_estimator(config, seed=0, num_observations_per_epoch=64, total_steps=2)
rows = torch.randn(32, 8, requires_grad=True)
estimator.commit(estimator.observe(rows))
views, prototypes = rows.unflatten(0, (2, 16)), estimator.prototypes("student")
carp_loss(views, views, prototypes, prototypes, draw_partition(64, 16, seed=0, step=0)).total.backward()
estimator.accept()
assert rows.grad.abs().sum() > 0 and count_unique(prototypes)[0.025] > 0
print(seconds, *sorted(loaded))
"""


def test_the_wheel_works_where_nothing_else_of_ours_is(environment, tmp_path):
    seconds, *loaded = run(environment, "-c", USE, cwd=tmp_path).stdout.split()
    assert loaded == ["decoupled_prototypes"]
    assert float(seconds) < 1


def test_the_wheel_holds_the_sources_and_asks_for_torch_alone(environment, tmp_path):
    code = (
        "import importlib.metadata as m; d = m.distribution('decoupled-prototypes');"
        "print(d.requires, d.metadata['License-Expression'], *sorted(map(str, d.files)), sep='\\n')"
    )
    requires, licence, *files = run(environment, "-c", code, cwd=tmp_path).stdout.split("\n")
    assert re.fullmatch(r"\['torch>=[\d.]+'\]", requires)
    assert licence == "Apache-2.0"
    sources = {
        path.relative_to(ROOT / "prototypes").as_posix() for path in (ROOT / "prototypes").rglob("*.py")
    }
    package = "decoupled_prototypes/"
    found = {
        name.removeprefix(package) for name in files if name.startswith(package) and name.endswith(".py")
    }
    assert found == sources


def code_of(page, heading):
    section = page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return block


def test_the_page_adds_the_prototypes_to_lightlys_dino(environment, tmp_path):
    found = pip(
        "download", "--no-deps", "-d", tmp_path / "index", "lightly==1.6.*", cwd=tmp_path, check=False
    )
    if found.returncode:
        pytest.skip(f"needs lightly from a package index: {found.stderr.strip().splitlines()[-1]}")
    pip("--python", environment, "install", "lightly==1.6.*", cwd=tmp_path)
    (tmp_path / "dino.py").write_text(code_of(PAGE, "In lightly's DINO"))
    lines = run(environment, "dino.py", cwd=tmp_path).stdout.splitlines()
    losses = [float(line.split()[3]) for line in lines if line.startswith("step")]
    assert len(losses) == 10
    assert all(0 < loss < 20 for loss in losses)
    assert len(set(losses)) > 1


TWO_RANKS = """
dist.init_process_group("gloo")
{block}
import torch
from decoupled_prototypes import PartitionConfig, PrototypesConfig, build_estimator
config = PrototypesConfig(num_prototypes=64, dim=8, partition=PartitionConfig(size=16))
both = torch.randn(3, 2, 32, 8, generator=torch.Generator().manual_seed(0))
one, two = (
    build_estimator(config, seed=0, num_observations_per_epoch=640, total_steps=3, **given) for given in ({{}}, ranks)
)
for rows in both:
    for estimator, seen in ((one, rows.flatten(0, 1)), (two, rows[dist.get_rank()])):
        estimator.commit(estimator.observe(seen))
        estimator.accept()
print("ERROR", float((one.means - two.means).abs().max()), float((one.means - both.new_zeros(1)).abs().max()))
"""


def test_the_pages_exchange_makes_two_ranks_one(environment, tmp_path):
    block = code_of(PAGE, "On several ranks")
    (tmp_path / "ranks.py").write_text("import torch.distributed as dist\n" + TWO_RANKS.format(block=block))
    result = run(
        *(environment, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "ranks.py"),
        cwd=tmp_path,
    )
    errors = re.findall(r"ERROR (\S+) (\S+)", result.stdout)
    assert len(errors) == 2
    assert all(float(error) < 1e-5 < float(scale) for error, scale in errors)
