"""Miniature iNaturalist and ImageNet trees go all the way: make_shards, verify, pretrain 20 steps, evaluate."""

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


def write_imagenet(root: Path, image_bytes) -> None:
    """Class folders for training, a flat folder and LOC_val_solution.csv for validation."""
    names = ("n01440764", "n01443537", "n02102040", "n03000684")
    lines = ["ImageId,PredictionString"]
    (root / "val").mkdir()
    for i in range(80):
        path = root / "train" / names[i % 4] / f"{names[i % 4]}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(i, size=40, suffix="jpeg"))
    for i in range(24):
        stem = f"ILSVRC2012_val_{i:08d}"
        (root / "val" / f"{stem}.JPEG").write_bytes(image_bytes(100 + i, size=40, suffix="jpeg"))
        lines.append(f"{stem},{names[i % 4]} 1 2 30 40 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["inat2018", "imagenet"])
def test_a_miniature_tree_trains_and_is_evaluated(tmp_path, image_bytes, tree):
    shards = tmp_path / "shards"
    common = ("--out", shards, "--samples-per-shard", 20)
    if tree == "inat2018":
        write_inat(tmp_path, image_bytes)
        files = ("--train", tmp_path / "train2018.json", "--val", tmp_path / "val2018.json")
        run("-m", "data.make_shards", "inat2018", "--root", tmp_path, *files, *common)
    else:
        write_imagenet(tmp_path, image_bytes)
        run("-m", "data.make_shards", "imagefolder", tmp_path / "train", *common)
        labels = ("--split", "val", "--labels", tmp_path / "LOC_val_solution.csv")
        run("-m", "data.make_shards", "imagefolder", tmp_path / "val", *labels, *common)
    assert "all is well" in run("-m", "data.verify_shards", shards, "--decode", "all")
    where = (f"data.shards={shards}", f"run.output_dir={tmp_path}", "run.name=run")
    run("pretrain.py", CONFIG, *OVERRIDES, *where)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 20
    data = (f"data.shards={shards}", "data.train_split=train", "data.test_split=val", "data.num_workers=0")
    options = ("data.batch_size=16", "probes=[knn]", "knn.k=[5, 10]", "controls=[]")
    run("evaluate.py", "configs/eval_fashion_mnist.yaml", f"encoder={tmp_path / 'run'}", *data, *options)
    (results,) = (tmp_path / "run" / "results").glob("*.json")
    assert json.loads(results.read_text())
