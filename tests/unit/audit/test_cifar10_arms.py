"""Every arm of the audits of CIFAR-10 takes two real steps; the controls stand still and the others move."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from audit.cells import Cell
from audit.config import AuditConfig
from data.make_shards import main as make_shards
from runtime.config import load_config
from tests.helpers import starts

ROOT = Path(__file__).resolve().parents[3]
AUDITS = [
    path for path in sorted((ROOT / "configs").glob("audit_cifar10*.yaml")) if "objectives" not in path.stem
]
STILL = ("frozen", "frozen_tuned", "frozen_standardised", "bank")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    for number in range(64):
        path = folder / "images" / "train" / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    assert make_shards(["imagefolder", str(folder / "images"), "--out", str(folder / "shards")]) == 0
    return folder / "shards"


@pytest.mark.slow
@pytest.mark.parametrize("path", AUDITS, ids=lambda path: path.stem)
def test_every_arm_takes_two_steps(path, shards, tmp_path):
    config = load_config(AuditConfig, str(path), [f"output_dir={tmp_path}"])
    # Of an audit on another's base only its own arms differ from those that the other's test has run.
    for arm in config.chosen_arms:
        cell = Cell(config, arm, 0)
        arguments = [
            *cell.commands()[0][2:],
            f"data.shards={shards}",
            "batch.global_batch_size=64",
            "optim.steps=2",
        ]
        # A start that waits for K rows of an image each would outlast two steps.
        arguments += ["optim.warmup_epochs=0", "prototypes.gmm.init.method=sphere"]
        arguments += ["prototypes.coupling.start=directions"]
        arguments += ["optim.ema_momentum=0"]  # learned prototypes of the teacher show what the student's did
        result = starts.run("pretrain", arguments)
        assert result.returncode == 0, f"{arm}: {result.stderr[-2000:]}"
        lines = [json.loads(line) for line in (cell.directory / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 2 and lines[-1]["optim/skipped_steps"] == 0, arm
        kind = arm.partition("-")[0]
        moved = lines[-1]["prototypes/cosine_to_start_min"] < 1 - 1e-6
        # Two steps at the rate of `partial`'s clustering turn rows of unit variance by 1e-7.
        assert kind == "partial" or moved == (kind not in STILL), arm
