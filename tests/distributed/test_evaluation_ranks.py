"""One and two processes: the same features, the same figures, nothing counted twice."""

import json

import pytest
import torch
from safetensors.torch import load_file

from evaluation.features.extract import merge_parts
from tests.helpers.digits import write_digit_shards
from tests.helpers.label_maps import write_label_map_shards
from tests.helpers.ranks import start_ranks, wait_for_ranks
from tests.unit.evaluation.conftest import write_run


def evaluate_with(ranks, root, run, shards, cache):
    config = root / "eval.yaml"
    config.write_text(
        f"encoder: {run}\ndata: {{shards: {shards}, num_workers: 0, batch_size: 40}}\ndevice: cpu\n"
    )
    out = root / f"results-{ranks}-{cache.name}"
    arguments = [
        str(config),
        f"output_dir={out}",
        f"features.cache_dir={cache}",
        "probes=[knn,linear,long_tail]",
        "knn.k=[5,20]",
        "linear.epochs=2",
        "linear.min_steps=0",
    ]
    processes = start_ranks("evaluate", arguments, ranks, log_dir=root / f"logs-{ranks}-{cache.name}")
    codes = wait_for_ranks(processes, 150)
    assert codes == [0] * ranks, [
        p.read_text()[-2000:] for p in (root / f"logs-{ranks}-{cache.name}").iterdir()
    ]
    return {
        probe: json.loads((out / f"{probe}.json").read_text())["figures"]
        for probe in ("knn", "linear", "long_tail")
    }


@pytest.mark.learned
def test_one_and_two_processes_agree(tmp_path):
    # 95 test images in batches of 40 on two processes: neither parts nor batches are equal.
    shards = write_digit_shards(tmp_path / "shards", num_test=95)
    run = write_run(tmp_path / "run", seed=5)
    alone = evaluate_with(1, tmp_path, run, shards, tmp_path / "cache-1")
    together = evaluate_with(2, tmp_path, run, shards, tmp_path / "cache-2")
    assert together["knn"]["test_images"] == 95 and together["knn"]["train_images"] == 384
    for path in (tmp_path / "cache-1").iterdir():
        ours, theirs = load_file(path), load_file(tmp_path / "cache-2" / path.name)
        assert torch.equal(ours["sample_ids"], theirs["sample_ids"])
        assert torch.equal(ours["labels"], theirs["labels"])
        assert (ours["embedding"] - theirs["embedding"]).abs().max() < 1e-5
    same_cache = evaluate_with(2, tmp_path, run, shards, tmp_path / "cache-1")
    # Classifiers are fitted by every process on all features: on the same ones they are the same to the last bit.
    assert same_cache == alone


def test_one_and_two_processes_segment_alike(tmp_path):
    """Patch tokens and label maps are extracted in parts, queries and values of C are dealt out."""
    shards = write_label_map_shards(tmp_path, num_test=5)
    run = write_run(tmp_path / "run", seed=5)
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"encoder: {run}\nprobes: [segmentation]\ndevice: cpu\nconfidence: {{resamples: 20}}\n"
        f"data: {{shards: {shards}, num_workers: 0, batch_size: 4}}\nfeatures: {{cache_dir: {tmp_path / 'cache'}}}\n"
        "segmentation: {inverse_regularisation: [1.39e-3, 0.0518, 1.93]}\n"
    )
    found = []
    for ranks in (2, 1):  # two processes extract, one reads what they wrote
        arguments = [str(config), f"output_dir={tmp_path / str(ranks)}"]
        processes = start_ranks("evaluate", arguments, ranks, log_dir=tmp_path / f"logs-{ranks}")
        assert wait_for_ranks(processes, 150) == [0] * ranks, [
            path.read_text()[-2000:] for path in (tmp_path / f"logs-{ranks}").iterdir()
        ]
        found.append(json.loads((tmp_path / str(ranks) / "segmentation.json").read_text())["figures"])
    assert found[0] == found[1] and found[0]["test_images"] == 5


def test_a_padded_last_batch_is_not_counted_twice():
    first = {
        "sample_ids": torch.tensor([0, 2, 4]),
        "labels": torch.tensor([0, 1, 0]),
        "x": torch.tensor([0.0, 2.0, 4.0]),
    }
    second = {
        "sample_ids": torch.tensor([1, 3, 0]),
        "labels": torch.tensor([1, 1, 0]),
        "x": torch.tensor([1.0, 3.0, 9.0]),
    }
    merged = merge_parts([first, second])
    assert merged["sample_ids"].tolist() == [0, 1, 2, 3, 4]
    assert merged["x"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
