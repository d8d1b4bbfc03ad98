"""A miniature iNaturalist tree goes all the way: make_shards, verify, pretrain 20 steps, evaluate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CONFIG = "configs/pretrain_vit-mini_fashion-mnist_full.yaml"
OVERRIDES = (
    "data.recipe=dino",
    "data.channels=3",
    "data.mean=[0.5]",
    "data.std=[0.25]",
    "data.num_workers=0",
    "model.channels=3",
    "model.depth=1",
    "batch.global_batch_size=16",
    "optim.epochs=4",
    "optim.warmup_epochs=1",
    "prototypes.num_prototypes=256",
    "prototypes.partition.size=64",
    "evaluation.knn_every_steps=0",
)


def run(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def write_inat(root: Path, image_bytes) -> None:
    categories = [{"id": i, "name": f"species {i}", "supercategory": "Aves"} for i in range(4)]
    number = 0
    for split, count in (("train", 80), ("val", 24)):
        images, annotations = [], []
        for i in range(count):
            name = f"train_val2018/Aves/{i % 4}/{split}{i}.jpg"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(image_bytes(number, size=40, suffix="jpg"))
            images.append({"id": number, "file_name": name, "width": 40, "height": 40})
            annotations.append({"id": number, "image_id": number, "category_id": i % 4})
            number += 1
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}2018.json").write_text(json.dumps(document))


@pytest.mark.slow
def test_a_miniature_inat18_trains_and_is_evaluated(tmp_path, image_bytes):
    write_inat(tmp_path, image_bytes)
    shards = tmp_path / "shards"
    files = ("--train", tmp_path / "train2018.json", "--val", tmp_path / "val2018.json")
    run(
        "-m",
        "data.make_shards",
        "inat2018",
        "--root",
        tmp_path,
        *files,
        "--out",
        shards,
        "--samples-per-shard",
        20,
    )
    assert "all is well" in run("-m", "data.verify_shards", shards)
    where = (f"data.shards={shards}", f"run.output_dir={tmp_path}", "run.name=inat")
    run("pretrain.py", CONFIG, *OVERRIDES, *where)
    lines = (tmp_path / "inat" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 20
    data = (f"data.shards={shards}", "data.train_split=train", "data.test_split=val", "data.num_workers=0")
    options = ("data.batch_size=16", "probes=[knn]", "knn.k=[5, 10]", "controls=[]")
    run("evaluate.py", "configs/eval_fashion_mnist.yaml", f"encoder={tmp_path / 'inat'}", *data, *options)
    assert list((tmp_path / "inat" / "results").glob("*.json"))
