"""The linear segmentation head: crops and windows stay in register with their labels, and it learns."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as program
from evaluation.encoders.preprocessing import Preprocessing
from evaluation.probes.segmentation_linear import RandomScene, WholeScene, merge_windows, window_places
from tests.helpers.label_maps import write_label_map_shards
from tests.unit.evaluation.conftest import write_run

SQUARE = Preprocessing(
    channels=3,
    image_size=32,
    crop_fraction=1.0,
    interpolation="bicubic",
    mean=(0.5,),
    std=(0.25,),
    crop_mode="squash",
)


def marked(height=60, width=90):
    """An image that is white where its label is 1 and black where it is 0, in large boxes."""
    labels = np.kron(
        np.random.default_rng(0).integers(0, 2, (3, 3)), np.ones((height // 3, width // 3), dtype=np.uint8)
    )
    return Image.fromarray(np.repeat(labels[..., None] * 255, 3, axis=2).astype(np.uint8)), Image.fromarray(
        labels.astype(np.uint8)
    )


@pytest.mark.parametrize("scale", [(0.5, 0.5), (1.0, 2.0)])
def test_random_squares_stay_in_register_and_the_rest_is_void(scale):
    torch.manual_seed(0)
    scene, seen = RandomScene(SQUARE, scale, flip=True), set()
    for _ in range(20):
        image, labels = scene(*marked())
        assert image.shape == (3, 32, 32) and labels.shape == (32, 32)
        grey = (image * 0.25 + 0.5).mean(dim=0)
        inside = labels != 255
        # Bicubic edges differ from nearest ones by a pixel; away from them they agree.
        agree = ((grey > 0.5) == (labels == 1))[inside].double().mean()
        assert agree > 0.93
        assert (grey[~inside] - 0.5).abs().max() < 0.01 if bool((~inside).any()) else scale[0] >= 1
        seen.add(tuple(labels.flatten().tolist()))
    if scale == (0.5, 0.5):  # 16 x 24 pixels of image at the corner
        assert int(inside.sum()) == 16 * 24 and len(seen) == 2, "mirrored or not"
    else:
        assert len(seen) > 10


def test_windows_cover_an_image_and_their_mean_is_taken():
    for height, width in ((32, 32), (32, 33), (32, 90), (70, 32)):
        places = window_places(height, width, 32, 0.666)
        covered = np.zeros((height, width), dtype=int)
        for top, left in places:
            covered[top : top + 32, left : left + 32] += 1
            assert 0 <= top <= height - 32 and 0 <= left <= width - 32
        assert covered.min() >= 1 and len(set(places)) == len(places)
    assert window_places(32, 90, 32, 0.666) == [(0, 0), (0, 21), (0, 42), (0, 58)]
    image, label_map = marked()
    windows, labels = WholeScene(SQUARE, 0.666)(image, label_map)
    assert labels.shape == (32, 48) and windows.shape == (2, 3, 32, 32)
    # What the windows show, put together again, is the image.
    merged = merge_windows(windows, window_places(32, 48, 32, 0.666), (32, 48))
    whole = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(merged.permute(1, 2, 0).numpy() * 0.25 + 0.5, whole, atol=1e-5)


@pytest.mark.learned
def test_it_learns_and_says_how_well(tmp_path, record_property):
    shards = write_label_map_shards(tmp_path)
    run = write_run(tmp_path / "run", seed=3)
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"encoder: {run}\nprobes: [segmentation_linear, segmentation]\ncontrols: []\n"
        f"data: {{shards: {shards}, num_workers: 0}}\n"
        f"features: {{cache_dir: {tmp_path / 'features'}}}\nconfidence: {{resamples: 20}}\n"
        "segmentation: {classifiers: [knn]}\n"
        "segmentation_linear: {steps: 150, batch_size: 8, lr: 0.01, scale: [1, 1.2]}\n"
    )
    assert program.main([str(config)]) == 0
    found = {
        probe: json.loads((run / "results" / f"{probe}.json").read_text())["figures"]
        for probe in ("segmentation", "segmentation_linear")
    }
    linear = found["segmentation_linear"]
    majority = found["segmentation"]["headline"]["majority_miou"]
    record_property("linear", linear["headline"]["linear_miou"])
    record_property("majority", majority)
    assert linear["headline"]["linear_miou"] > 1.3 * majority and linear["last_loss"] < 1.0
    assert [row["linear_iou"] is None for row in linear["per_class"]] == [False, False, False, True]
    assert linear["test_images"] == 6 and linear["image_size"] == 28
