"""Dense evaluation against scikit-learn and against counts of pixels made here."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import evaluate as program
from data.datasets import EvaluationStream
from evaluation.confidence import bootstrap_statistic
from evaluation.config import TransformConfig
from evaluation.encoders.load import load_encoder
from evaluation.features.patches import DensePreprocessing, Reading, square_preprocessing
from evaluation.features.processes import Processes
from evaluation.probes.linear import fit_logistic
from evaluation.probes.mean_iou import PixelCounts, count_patches, count_pixels, patch_histograms
from evaluation.probes.patch_classifiers import Scaler, classify_patches
from report.runs import load_runs
from report.segmentation import miou_class_rows, miou_difference_rows, miou_rows
from report.write import write_report
from runtime.program import run_program
from tests.helpers.label_maps import CLASSES, write_label_map_shards
from tests.unit.evaluation.conftest import write_run


def confusion_iou(truth, found, num_classes):
    """IoU of every class by a confusion matrix of all pixels; void is 255."""
    matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
    kept = truth != 255
    np.add.at(matrix, (truth[kept], found[kept]), 1)
    union = matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix)
    return np.array([i / u if u else np.nan for i, u in zip(np.diag(matrix), union, strict=True)])


def draw_maps(seed, batch=5, size=24, num_classes=6):
    """Random label maps in which class 4 never occurs and void does."""
    generator = np.random.default_rng(seed)
    coarse = generator.choice(
        [0, 1, 2, 3, 5, 255], (batch, size // 4, size // 4), p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.05]
    )
    maps = np.kron(coarse, np.ones((4, 4), dtype=np.int64))
    noise = generator.random(maps.shape) < 0.2
    maps[noise] = generator.choice([0, 1, 2, 3, 5, 255], noise.sum())
    return torch.from_numpy(maps.astype(np.uint8)), num_classes


@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_is_that_of_a_confusion_matrix_of_pixels(seed):
    maps, num_classes = draw_maps(seed)
    predictions = torch.from_numpy(np.random.default_rng(seed + 9).choice([0, 1, 2, 3], (5, 9)))
    counts = count_patches(patch_histograms(maps, (3, 3), num_classes), predictions)
    pixels = np.kron(predictions.numpy().reshape(5, 3, 3), np.ones((8, 8), dtype=np.int64))
    expected = confusion_iou(maps.numpy(), pixels, num_classes)
    assert np.isnan(expected[4]) and expected[5] == 0
    np.testing.assert_allclose(counts.iou(), expected, rtol=0, atol=1e-12, equal_nan=True)
    kept = maps.numpy() != 255
    macro = jaccard_score(maps.numpy()[kept], pixels[kept], average="macro")
    assert counts.mean_iou() == pytest.approx(macro, abs=1e-12)
    for image in range(5):
        own = count_pixels(maps[image], torch.from_numpy(pixels[image]), num_classes)
        assert np.array_equal(own[:2], (counts.intersections[image], counts.unions[image]))
        assert own[2].tolist() == [int((maps[image] == c).sum()) for c in range(num_classes)]


def test_a_patch_counts_its_pixels_and_takes_the_class_of_most():
    maps, num_classes = draw_maps(0, batch=40)
    histograms = patch_histograms(maps, (6, 6), num_classes)
    assert histograms.shape == (40, 36, num_classes + 1) and histograms.sum(dim=2).eq(16).all()
    for image, row, column in ((0, 0, 0), (3, 2, 5), (39, 5, 1)):
        cell = maps[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
        expected = [*(int((cell == c).sum()) for c in range(num_classes)), int((cell == 255).sum())]
        assert histograms[image, 6 * row + column].tolist() == expected
    tie = torch.tensor([[2, 2, 1, 1], [255, 255, 3, 3]], dtype=torch.uint8).repeat(1, 1).view(1, 2, 4)
    tie = torch.cat([tie, tie], dim=1)  # 4 x 4 pixels, one patch: 1, 2, 3 and void four times each
    assert patch_histograms(tie, (1, 1), 4).argmax(dim=2).item() == 1


def test_intervals_are_the_quantiles_of_resampled_images():
    maps, num_classes = draw_maps(1, batch=12)
    predictions = torch.randint(0, 4, (12, 9), generator=torch.Generator().manual_seed(0))
    counts = count_patches(patch_histograms(maps, (3, 3), num_classes), predictions)
    mean, classes = counts.intervals(resamples=100, level=0.9, seed=3)

    def resampled(of_counts):
        """The same images drawn by their indices, not by weights."""

        def statistic(indices):
            parts = [PixelCounts(counts.intersections[row], counts.unions[row]) for row in indices]
            return np.array([of_counts(part) for part in parts])

        return bootstrap_statistic(statistic, 12, 0.0, resamples=100, level=0.9, seed=3).as_list()

    assert mean.as_list() == pytest.approx(resampled(lambda part: part.mean_iou()))
    assert classes[1].as_list() == pytest.approx(resampled(lambda part: part.iou()[1]))
    assert mean.low < mean.value < mean.high
    assert np.isnan(classes[4].low) and np.isnan(classes[4].value)


@pytest.fixture(scope="module")
def patches():
    """Standardised tokens of two drawn splits: three overlapping clusters in 12 dimensions of unequal scale."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 12, generator=generator)
    labels = torch.randint(0, 3, (30, 20), generator=generator)
    tokens = (centres[labels] + 1.2 * torch.randn(30, 20, 12, generator=generator)) * torch.logspace(
        -2, 2, 12
    ) + 5
    scaler = Scaler.fit(tokens[:20])
    return tokens, scaler, labels


def test_standardisation_is_scikit_learns(patches):
    tokens, scaler, _ = patches
    reference = StandardScaler().fit(tokens[:20].flatten(0, 1).double().numpy())
    expected = reference.transform(tokens[20:].flatten(0, 1).double().numpy())
    np.testing.assert_allclose(scaler.rows(tokens[20:]).numpy(), expected, rtol=1e-3, atol=1e-4)
    constant = Scaler.fit(torch.ones(2, 3, 4, dtype=torch.float16))
    assert constant.rows(torch.ones(1, 1, 4)).eq(0).all()


@pytest.mark.parametrize(("distance", "metric"), [("cosine", "cosine"), ("L2", "euclidean")])
def test_knn_of_patches_is_scikit_learns(patches, distance, metric):
    tokens, scaler, labels = patches
    bank, queries = scaler.rows(tokens[:20]), scaler.rows(tokens[20:])
    found = classify_patches(
        bank,
        labels[:20].flatten(),
        queries,
        ks=(1, 3, 10),
        distance=distance,
        num_classes=3,
        processes=Processes(),
    )
    for k, predictions in found.items():
        reference = KNeighborsClassifier(k, metric=metric, algorithm="brute")
        reference.fit(bank.double().numpy(), labels[:20].flatten().numpy())
        assert np.array_equal(predictions.numpy(), reference.predict(queries.double().numpy())), k


def test_blocks_dealt_to_processes_give_the_same(patches, monkeypatch):
    tokens, scaler, labels = patches
    monkeypatch.setattr("evaluation.probes.patch_classifiers._QUERY_BLOCK", 30)

    def predict(processes):
        arguments = {"ks": (3,), "distance": "L2", "num_classes": 3, "processes": processes}
        return classify_patches(
            scaler.rows(tokens[:20]), labels[:20].flatten(), scaler.rows(tokens[20:]), **arguments
        )

    alone = predict(Processes())[3]
    parts = []
    for rank in range(2):  # first each process's own part, then all of them gathered
        collected = {}
        with pytest.raises(KeyError):
            predict(
                Processes(
                    rank=rank, world_size=2, gather=lambda own, into=collected: [into.update(own) or {-1: {}}]
                )
            )
        parts.append(collected)
    assert parts[0].keys() & parts[1].keys() == set() and len(parts[0]) + len(parts[1]) == 7
    assert torch.equal(predict(Processes(rank=1, world_size=2, gather=lambda _: parts))[3], alone)


def test_logistic_regression_of_patches_is_scikit_learns(patches):
    tokens, scaler, labels = patches
    rows, queries = scaler.rows(tokens[:20]), scaler.rows(tokens[20:])
    for strength in (1e-6, 1.39e-3, 1.93):
        ours = fit_logistic(
            rows,
            labels[:20].flatten(),
            inverse_regularisation=strength,
            num_classes=3,
            on_unit_features=False,
        )
        theirs = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(
            rows.numpy(), labels[:20].flatten().numpy()
        )
        scale = np.abs(theirs.coef_).max()
        np.testing.assert_allclose(ours.weights.T.numpy(), theirs.coef_, atol=2e-3 * scale)
        assert (ours.predict(queries).numpy() == theirs.predict(queries.numpy())).mean() > 0.99


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_label_map_shards(tmp_path_factory.mktemp("scenes"))


def write_config(root: Path, shards: str) -> str:
    path = root / "eval.yaml"
    path.write_text(
        f"probes: [segmentation]\ndata: {{shards: {shards}, num_workers: 0, batch_size: 7}}\n"
        f"features: {{cache_dir: {root / 'features'}}}\nconfidence: {{resamples: 50}}\n"
        "segmentation: {inverse_regularisation: [1.39e-3, 1.93], max_iterations: 200}\n"
    )
    return str(path)


@pytest.fixture(scope="module")
def segmented(tmp_path_factory, scenes):
    """A tiny ViT's run through the probe, with its controls."""
    root = tmp_path_factory.mktemp("segmented")
    run = write_run(root / "run", seed=3)
    arguments = [
        write_config(root, scenes),
        f"encoder={run}",
        "controls=[random-init,raw-pixels]",
        "control_seeds=1",
    ]
    assert program.main(arguments) == 0
    return root


def read(root, place=""):
    folder = root / "run" / "results" / place
    return json.loads((folder / "segmentation.json").read_text())["figures"], load_file(
        folder / "segmentation.predictions.safetensors"
    )


def test_the_whole_probe_says_what_its_maps_say_pixel_by_pixel(segmented, scenes):
    figures, kept = read(segmented)
    side, size = figures["grid"][0], figures["image_size"]
    assert (side, size) == (4, 28)  # the encoder's own: 28 pixels, patches of 7
    truth = {}
    for pixels, labels, ids in EvaluationStream(
        scenes, "test", batch_size=1, dense_transform=lambda i, m: (torch.zeros(1), torch.tensor(np.array(m)))
    ):
        small = Image.fromarray(labels[0].numpy()).resize((size, size), Image.Resampling.NEAREST)
        truth[int(ids)] = np.asarray(small)
        assert pixels.shape == (1, 1)
    assert kept["sample_ids"].tolist() == sorted(truth) and figures["test_images"] == 6
    maps = np.stack([truth[i] for i in sorted(truth)])
    for name in ("knn", "logistic"):
        found = np.kron(kept[f"{name}_maps"].numpy().reshape(6, side, side), np.ones((7, 7), dtype=np.int64))
        expected = confusion_iou(maps, found, len(CLASSES))
        assert figures["headline"][f"{name}_miou"] == pytest.approx(np.nanmean(expected), abs=1e-12)
        rows = [row[f"{name}_iou"] for row in figures["per_class"]]
        assert rows[3] is None and rows[:3] == pytest.approx(expected[:3].tolist(), abs=1e-12)
    majority = confusion_iou(maps, np.zeros_like(maps, dtype=np.int64), len(CLASSES))
    assert figures["headline"]["majority_miou"] == pytest.approx(np.nanmean(majority), abs=1e-12)
    assert [row["test_pixels"] for row in figures["per_class"]] == [int((maps == c).sum()) for c in range(4)]
    # A prediction stands where its patch does: maps in another order say little more than the majority class.
    for name in ("knn", "logistic"):
        own = figures["headline"][f"{name}_miou"]
        assert 1.25 * figures["headline"]["majority_miou"] < own < figures["headline"]["ceiling_miou"], name


def test_controls_stand_beside_it_on_the_same_grid(segmented):
    own, _ = read(segmented)
    for label in ("random-init-seed0", "raw-pixels"):
        control, _ = read(segmented, f"controls/{label}")
        for name in ("ceiling_miou", "majority_miou"):
            assert control["headline"][name] == own["headline"][name]
        assert control["grid"] == own["grid"]
        # Boxes of one colour each: any of them sees more than the majority class.
        assert control["headline"]["logistic_miou"] > own["headline"]["majority_miou"]


def test_what_limits_it_is_said_and_what_was_chosen(segmented):
    figures, _ = read(segmented)
    assert any("1 of 4 classes are the label of no training patch" in note for note in figures["notes"])
    knn = figures["classifiers"]["knn"]
    assert knn["held_out_miou"][knn["distance"]][str(knn["k"])] == max(
        value for by_k in knn["held_out_miou"].values() for value in by_k.values()
    )
    assert knn["interval"][0] <= knn["miou"] <= knn["interval"][1]


def test_a_second_evaluation_reads_its_patches_from_the_cache(segmented, scenes):
    before = {path.name: path.stat().st_ino for path in (segmented / "features").iterdir()}
    assert len(before) == 6  # two splits of three encoders, and no pooled features
    tokens = load_file(next(path for path in (segmented / "features").iterdir() if "run-test" in path.name))
    assert tokens["patch_tokens"].dtype == torch.float16 and tokens["patch_tokens"].shape == (6, 16, 24)
    config = write_config(segmented, scenes)
    figures, _ = read(segmented)
    assert program.main([config, f"encoder={segmented / 'run'}"]) == 0
    assert {path.name: path.stat().st_ino for path in (segmented / "features").iterdir()} == before
    assert read(segmented)[0] == figures
    arguments = [config, f"encoder={segmented / 'run'}", "features.patch_precision=fp32"]
    assert program.main([*arguments, f"output_dir={segmented / 'fp32'}"]) == 0
    assert len(list((segmented / "features").iterdir())) == 8


def test_pixels_and_label_maps_stay_in_register():
    """The whole of a wide image is seen, and marks at its edges lie in the same patches of pixels and labels."""
    encoder = load_encoder("raw-pixels", transform=TransformConfig(image_size=32, mean=(0.2,), std=(0.3,)))
    transform = Reading(patches=True, label_maps=True).transform(encoder)
    labels = np.zeros((32, 64), dtype=np.uint8)
    labels[:16, :8], labels[24:, 40:] = 2, 2
    marked = np.where((labels == 2)[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)
    image, label_map = transform(Image.fromarray(marked), Image.fromarray(labels))
    assert label_map.shape == (32, 32) and image.shape == (3, 32, 32)
    tokens = encoder.module.patch_tokens(image[None])
    share = patch_histograms(label_map[None], (2, 2), 4)[0, :, 2] / 256
    assert share.tolist() == [0.25, 0, 0, 0.375] and tokens.shape == (1, 4, 768)
    assert (tokens.mean(dim=2)[0] - share).abs().max() < 0.06  # edges are interpolated in the pixels


def save_vit(folder: Path, *, factor: float = 1.0) -> str:
    """A tiny ViT with registers whose tokens are `factor` times those of its last norm."""
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 1,
        "num_heads": 2,
        "reg_tokens": 3,
    }
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **arguments)
    with torch.no_grad():
        model.norm.weight.mul_(factor)
    data = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.9}
    options = {"safe_serialization": True, "data_config": data, "model_args": arguments}
    timm.models.save_for_hf(model, str(folder), **options)
    return f"encoder=local-dir:{folder}"


def test_registers_and_cls_are_no_patches(tmp_path, scenes):
    config, out = write_config(tmp_path, scenes), tmp_path / "results"
    assert program.main([config, save_vit(tmp_path / "vit"), f"output_dir={out}"]) == 0
    assert json.loads((out / "segmentation.json").read_text())["figures"]["grid"] == [4, 4]


def test_tokens_beyond_fp16_are_refused_with_the_remedy(tmp_path, scenes, capsys):
    arguments = [
        write_config(tmp_path, scenes),
        save_vit(tmp_path / "vit", factor=1e6),
        f"output_dir={tmp_path}",
    ]
    assert run_program(program.main, arguments) == 2
    assert "'patch_tokens' of vit holds NaN or infinity" in (said := capsys.readouterr().err)
    assert "set features.patch_precision=fp32" in said
    assert program.main([*arguments, "features.patch_precision=fp32"]) == 0


def test_a_transformers_processor_is_asked_for_size_mean_and_std(tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}}
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    BitImageProcessor(**size, image_mean=mean, image_std=std, resample=2).save_pretrained(tmp_path)
    found = square_preprocessing(load_encoder(f"hf:{tmp_path}"))
    assert (found.image_size, found.crop_mode, found.crop_fraction) == (28, "squash", 1.0)
    assert found.mean == pytest.approx(mean, abs=1e-4) and found.std == pytest.approx(std, abs=1e-4)
    assert found.interpolation == "bilinear"
    wide = Image.fromarray(np.zeros((20, 60, 3), dtype=np.uint8))
    image, labels = DensePreprocessing(found)(wide, Image.fromarray(np.zeros((20, 60), dtype=np.uint8)))
    assert image.shape == (3, 28, 28) and labels.shape == (28, 28)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["segmentation.k=[1,100000]"],
            r"segmentation.k is 100000; expected at most \d+, the patches of the bank",
        ),
        (["data.max_train_images=1"], "the training split has 1 image; expected at least 2"),
        (["probes=[knn]"], "names 4 classes and no image has one; .* ask probes=.segmentation."),
        (["segmentation.k=[]"], r"segmentation.k is \[\]; expected at least one"),
    ],
)
def test_mistakes_are_one_line(arguments, said, segmented, scenes, tmp_path, capsys):
    config = write_config(tmp_path, scenes)
    out = f"output_dir={tmp_path}"
    assert run_program(program.main, [config, f"encoder={segmented / 'run'}", out, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, error), error


def test_classified_images_have_no_label_maps(digits, segmented, tmp_path, capsys):
    config = write_config(tmp_path, digits)
    assert run_program(program.main, [config, f"encoder={segmented / 'run'}", f"output_dir={tmp_path}"]) == 2
    assert "has no label map (seg.png); expected one for every image" in capsys.readouterr().err


def test_networks_without_patches_are_refused(tmp_path, scenes, capsys):
    # PiT keeps a CLS token and does not say how many tokens stand before its patches.
    data = {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = timm.create_model("pit_ti_224", num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path / "pit"), safe_serialization=True, data_config=data)
    spec = f"encoder=local-dir:{tmp_path / 'pit'}"
    assert run_program(program.main, [write_config(tmp_path, scenes), spec, f"output_dir={tmp_path}"]) == 2
    assert "which hands on no patch tokens; expected a ViT" in capsys.readouterr().err


def test_the_report_has_figures_differences_and_maps(segmented, tmp_path):
    page = write_report([segmented / "run"], tmp_path / "report")
    text = page.read_text()
    for title in ("Segmentation", "Segmentation: differences", "Segmentation by class"):
        assert title in text
    assert (tmp_path / "report" / "segmentation_run.png").stat().st_size > 10_000
    runs = load_runs([segmented / "run"])
    own, _ = read(segmented)
    control, _ = read(segmented, "controls/raw-pixels")
    rows = {row["encoder"]: row for row in miou_rows(runs)}
    assert rows.keys() == {"run", "run: random-init-seed0", "run: raw-pixels"}
    assert rows["run"]["k-NN mIoU %"].startswith(f"{100 * own['headline']['knn_miou']:.2f} (")
    assert rows["run"]["ceiling mIoU %"] == rows["run: raw-pixels"]["ceiling mIoU %"]
    differences = {(row["difference"], row["classifier"]): row for row in miou_difference_rows(runs)}
    points = 100 * (own["headline"]["knn_miou"] - control["headline"]["knn_miou"])
    found = differences["run minus raw-pixels", "k-NN"]
    assert found["points"] == f"{points:+.2f}"
    low, high = map(float, found["interval"].split(" to "))
    assert low <= points + 0.01 and points - 0.01 <= high and low < high
    names = [row["class"] for row in miou_class_rows(runs)]
    assert names == list(CLASSES) and miou_class_rows(runs)[3]["k-NN IoU %"] == ""


def test_what_is_read_of_images_is_part_of_the_cache_key():
    encoder = load_encoder("raw-pixels", transform=TransformConfig(image_size=32))
    readings = [
        Reading(),
        Reading(patches=True),
        Reading(patches=True, label_maps=True),
        Reading(patches=True, label_maps=True, stored=torch.float16),
    ]
    assert len({json.dumps(reading.describe(encoder), sort_keys=True) for reading in readings}) == 4
    assert Reading().describe(encoder) == {"transform": encoder.transform.describe()}, (
        "older caches stay good"
    )
