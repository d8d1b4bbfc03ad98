"""Segmentation in the report: mean IoU beside the controls, classes, paired differences, and predicted maps."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import patches as shapes
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data.members import VOID_INDEX
from data.shards import load_manifest
from data.views.config import PixelFormat
from data.views.pictures import Picture, to_rgb
from evaluation.confidence import draw_weights
from evaluation.config import EvaluationConfig
from evaluation.features.extract import open_stream
from evaluation.features.processes import Processes
from evaluation.probes.mean_iou import PixelCounts
from evaluation.results import read_predictions
from report.charts import Chart, to_png
from report.comparison import why_not_comparable
from report.runs import Run
from report.tables import Row, percent
from runtime.config import build_config

if TYPE_CHECKING:
    from jaxtyping import UInt8

PROBE = "segmentation"
_PROBES = (PROBE, "segmentation_linear")
_RESAMPLES, _LEVEL, _SEED = 1000, 0.95, 0
_TITLES = {
    "knn": "k-NN",
    "logistic": "logistic regression",
    "majority": "majority class",
    "ceiling": "ceiling",
}
_SHOWN, _SIDE, _MOST_NAMES = 6, 128, 24
_VOID_COLOUR = (1.0, 1.0, 1.0)
_NUM_TABLE_COLOURS = 20
_GOLDEN = 0.618034


def miou_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for every run and control: mean IoU of each classifier with its interval, and what was chosen."""
    encoders = [
        encoder
        for run in runs
        for encoder in (
            (run.name, run.results),
            *((f"{run.name}: {c['encoder']['label']}", [c]) for c in run.controls),
        )
    ]
    rows = []
    for name, results in encoders:
        found = {
            key: values
            for result in results
            if result["probe"] in _PROBES
            for key, values in result["figures"]["classifiers"].items()
        }
        cells = {
            f"{title} mIoU %": _with_interval(found[key]["miou"], found[key]["interval"])
            for key, title in _TITLES.items()
            if key in found
        }
        chosen = ", ".join(filter(None, (_chosen(values) for values in found.values())))
        rows += [{"encoder": name, **cells, "chosen": chosen}] if found else []
    return rows


def miou_class_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for every class of every run and probe: its pixels in the test split, and each IoU."""
    return [
        {
            "run": run.name,
            "class": row["class"],
            "test pixels": f"{row['test_pixels']:,}",
            **{
                f"{_TITLES[key]} IoU %": _with_interval(row[f"{key}_iou"], row[f"{key}_interval"])
                for key in result["figures"]["classifiers"]
                if key != "majority"
            },
        }
        for run in runs
        for result in run.results
        if result["probe"] in _PROBES
        for row in result["figures"]["per_class"]
    ]


def miou_difference_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns each run minus its controls, and the other runs minus the first, in points on the same test images."""
    pairs: list[tuple[str, dict[str, Any] | None, str, dict[str, Any] | None]] = [
        (run.name, run.result(c["probe"]), c["encoder"]["label"], c)
        for run in runs
        for c in run.controls
        if c["probe"] in _PROBES
    ]
    pairs += [
        (run.name, run.result(probe), runs[0].name, runs[0].result(probe))
        for run in runs[1:]
        for probe in _PROBES
    ]
    rows = []
    for name, ours, base, theirs in pairs:
        if ours is None or theirs is None:
            continue
        reason = why_not_comparable(theirs, ours)
        for key in _TITLES:
            found = None if reason else _difference(ours, theirs, key)
            if found is not None:
                low, high = found[1:]
                cells = {
                    "points": f"{100 * found[0]:+.2f}",
                    "interval": f"{100 * low:+.2f} to {100 * high:+.2f}",
                }
                rows.append({"difference": f"{name} minus {base}", "classifier": _TITLES[key], **cells})
        if reason:
            rows.append({"difference": f"{name} minus {base}", "interval": f"not compared: {reason}"})
    return rows


def draw_overlays(result: dict[str, Any], run: str) -> Chart | None:
    """Returns test images beside their labels and the predicted classes of their patches.

    None without predictions.
    """
    kept = read_predictions(result)
    names = [key for key in _TITLES if f"{key}_maps" in kept]
    if not names:
        return None
    config = build_config(EvaluationConfig, result["provenance"]["config"])
    data = config.data
    shards = data.test_shards or data.shards
    assert shards is not None, "an evaluation writes the shards of data.images first"
    manifest = load_manifest(shards, data.test_split, "data.test_split")
    wanted = kept["sample_ids"].tolist()[:_SHOWN]
    seen_as = result["encoder"]["transform"]
    stream = open_stream(
        manifest,
        _Scene(),
        data=data,
        processes=Processes(),
        limit=len(kept["sample_ids"]),
        dense=True,
        format=PixelFormat(seen_as.get("channels", 3), seen_as.get("pixels", "uint8")),
    )
    scenes: dict[int, tuple[Tensor, Tensor]] = {}
    for images, labels, ids in stream:
        rows = zip(ids.tolist(), images, labels, strict=True)
        scenes |= {number: (image, label) for number, image, label in rows if number in wanted}
    colours = _palette(len(manifest.classes))
    pictures = []
    for place, number in enumerate(wanted):
        image, label = scenes[number]
        maps = [_to_side(kept[f"{name}_maps"][place], result["figures"]["grid"]) for name in names]
        pictures.append(
            [image.permute(1, 2, 0).numpy(), *(colours[m.long().numpy()] for m in (label, *maps))]
        )
    seen = torch.cat([scenes[number][1].flatten() for number in wanted]).unique().tolist()
    legend = [(manifest.classes[label], colours[label]) for label in seen if label != VOID_INDEX]
    png = _draw(pictures, ["image", "label", *(_TITLES[name] for name in names)], legend, run)
    caption = (
        f"The first {len(wanted)} test images as the encoder sees them, their label (white is void), and the class of "
        f"each of {result['figures']['grid'][0]} x {result['figures']['grid'][1]} patches."
    )
    return Chart(f"segmentation_{run}", f"Segmentation: {run}", caption, png)


class _Scene:
    """Image and label map to uint8 [3, side, side] and uint8 [side, side]; picklable."""

    def __call__(
        self, image: Picture, label_map: Image.Image
    ) -> tuple[UInt8[Tensor, "3 S S"], UInt8[Tensor, "S S"]]:
        """Returns both, squashed to one square."""
        small = to_rgb(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        labels = label_map.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1), torch.from_numpy(np.array(labels))


def _to_side(patches: Tensor, grid: list[int]) -> Tensor:
    return interpolate(patches.view(1, 1, *grid).float(), size=(_SIDE, _SIDE), mode="nearest")[0, 0]


def _palette(num_classes: int) -> np.ndarray:
    """Returns a colour for every class index and for void, [256, 3] in 0..1."""
    colours = np.tile(np.array(_VOID_COLOUR), (VOID_INDEX + 1, 1))
    for index in range(num_classes):
        if num_classes <= _NUM_TABLE_COLOURS:
            colours[index] = plt.get_cmap("tab20")(index)[:3]
        else:
            colours[index] = colorsys.hsv_to_rgb(
                index * _GOLDEN % 1, 0.55 + 0.4 * (index % 2), 0.9 - 0.35 * (index % 3 == 0)
            )
    return colours


def _draw(
    rows: list[list[np.ndarray]], titles: list[str], legend: list[tuple[str, np.ndarray]], run: str
) -> bytes:
    height = 1.15 * len(rows) + 0.2 * (len(legend[:_MOST_NAMES]) // 4 + 1) + 0.5
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(4.7, height), layout="constrained", squeeze=False
    )
    figure.suptitle(f"Segmentation: {run}", fontsize=10, fontweight="bold", x=0.01, ha="left")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set_axis_off()
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=8)
    handles = [
        shapes.Patch(color=tuple(colour.tolist()), label=name[:18]) for name, colour in legend[:_MOST_NAMES]
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=7, frameon=False)
    return to_png(figure)


def _difference(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> tuple[float, float, float] | None:
    """Returns our mean IoU minus theirs and the ends of its paired interval; None where one has no counts."""
    counts = [_counts(result, key) for result in (ours, theirs)]
    if None in counts or counts[0].unions.shape != counts[1].unions.shape:  # type: ignore[union-attr]
        return None
    first, second = (found for found in counts if found is not None)
    weights = draw_weights(len(first.unions), resamples=_RESAMPLES, seed=_SEED)
    drawn = first.resampled_means(weights) - second.resampled_means(weights)
    low, high = np.nanquantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return first.mean_iou() - second.mean_iou(), float(low), float(high)


def _counts(result: dict[str, Any], key: str) -> PixelCounts | None:
    kept = read_predictions(result)
    if f"{key}_unions" not in kept:
        return None
    return PixelCounts(kept[f"{key}_intersections"].long().numpy(), kept[f"{key}_unions"].long().numpy())


def _chosen(found: dict[str, Any]) -> str:
    if "k" in found:
        return f"k = {found['k']}, {found['distance']}"
    return f"C = {found['C']:g}" if "C" in found else ""


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return ""
    return f"{percent(value)} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"
