"""The report's charts, drawn from metrics and results: one message each, readable on white and in grey."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display on a compute node

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from runtime.files import write_atomically

# Okabe & Ito's palette, without yellow: distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
# A confusion matrix of more classes cannot be read; the table of the most frequent confusions can.
MOST_NAMED_CLASSES = 30
# Bytes of a run's name in a file's; file systems take 255 with what stands before and behind it.
_LONGEST_NAME = 120
# Of a curve's values; a loss that diverges comes to the largest numbers there are, and the length of its axis beyond.
_LARGEST = 1e300
# Wide enough for a laptop's column, and still legible at a phone's 360 pixels.
_SIZE = (4.6, 3.4)
_DPI = 190

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chart:
    """A drawn figure: file name without ending, title, what the reader should know, PNG bytes."""

    name: str
    title: str
    caption: str
    png: bytes


def draw_unique_by_eps(audits: Mapping[str, Mapping[str, float]]) -> Chart | None:
    """Returns the share of unique prototypes against eps, one line for each audited matrix; None without one."""
    figure, axes = new_axes("ε (cosine distance below which two prototypes are one)", "Unique prototypes")
    for index, (name, fractions) in enumerate(audits.items()):
        eps = sorted(float(text) for text in fractions)
        axes.plot(
            eps,
            [fractions[f"{e:g}"] for e in eps],
            DASHES[index // len(COLOURS) % len(DASHES)],
            color=COLOURS[index % len(COLOURS)],
            marker="o",
            label=name,
        )
    axes.set_xscale("log")
    ticks = sorted({float(text) for fractions in audits.values() for text in fractions})
    axes.set_xticks(ticks, [f"{e:g}" for e in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    caption = "Read beside usage: random directions are unique too."
    return finish(figure, axes, "unique_by_eps", "Unique prototypes against ε", caption, bool(audits))


def draw_angle_density(densities: Mapping[str, Sequence[float]]) -> Chart | None:
    """Returns the density of prototype directions on a random plane; None without audits."""
    figure, axes = new_axes("Angle on a random plane (radians)", "Density")
    for index, (name, density) in enumerate(densities.items()):
        width = 2 * math.pi / len(density)
        centres = [-math.pi + (bin_index + 0.5) * width for bin_index in range(len(density))]
        dash = DASHES[index % len(DASHES)]
        axes.plot(centres, density, dash, color=COLOURS[index % len(COLOURS)], label=name)
    axes.axhline(1 / (2 * math.pi), color="#777777", linewidth=1)
    axes.set_xticks([-math.pi, 0, math.pi], ["-π", "0", "π"])
    axes.set_ylim(bottom=0)
    caption = "The grey line, 1/(2π), is what evenly spread directions give; peaks are crowds of prototypes."
    return finish(figure, axes, "angle_density", "Where prototypes point", caption, bool(densities))


def draw_probes(rows: Sequence[Mapping[str, Any]], runs: Sequence[str]) -> Chart | None:
    """Returns accuracies with intervals, one line for each encoder below its probe's name; None without rows.

    Args:
        rows: `probe`, `encoder`, `value`, `low`, `high`, each share in 0..1; in the order in which to draw them.
        runs: names of the runs, in the order of their colours; every other encoder is a control, drawn in grey.
    """
    shown = dict(zip(runs, short_names(runs), strict=True))
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    lines = [line for probe in probes for line in (probe, *(row for row in rows if row["probe"] == probe))]
    figure, axes = plt.subplots(figsize=(_SIZE[0], 0.9 + 0.21 * len(lines)), layout="constrained")
    for position, row in enumerate(lines):
        if isinstance(row, str):
            continue
        is_run = row["encoder"] in shown
        axes.errorbar(
            [row["value"]],
            [position],
            xerr=[[max(0.0, row["value"] - row["low"])], [max(0.0, row["high"] - row["value"])]],
            fmt="o" if is_run else "s",
            markersize=4,
            capsize=2.5,
            color=COLOURS[list(runs).index(row["encoder"]) % len(COLOURS)] if is_run else "#777777",
        )
        axes.annotate(
            f"{100 * row['value']:.1f}",
            (row["high"], position),
            xytext=(4, -2.5),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set_yticks(
        range(len(lines)),
        [row if isinstance(row, str) else _encoder_name(row["encoder"], shown) for row in lines],
        fontsize=7.5,
    )
    for label, row in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel("Top-1 accuracy on the test split")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.14)
    axes.grid(axis="x", alpha=0.3)
    caption = "Bars: bootstrap intervals over test images. For two encoders on the same images, see the differences."
    return finish(figure, axes, "probes", "Probes side by side", caption, bool(rows))


def draw_confusion(counts: NDArray[np.int64], classes: Sequence[str], run: str) -> Chart | None:
    """Returns the k-NN probe's confusions; None for more classes than a picture can name.

    Args:
        counts: int [C, C], test images of true class (row) classified as (column).
        classes: names, C of them.
        run: the run's name.
    """
    if len(classes) > MOST_NAMED_CLASSES:
        return None
    names = short_names(classes, longest=12)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(_SIZE[0], _SIZE[0] * 0.92), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 7 if len(classes) <= 12 else 5
    for row, column in np.argwhere(shares >= 0.005):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = f"{100 * shares[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size + 0.5)
    axes.set_yticks(range(len(names)), names, fontsize=size + 0.5)
    axes.set_xlabel("Classified as")
    axes.set_ylabel("Class")
    caption = "k-NN on the test split, percent of the class's images (rows sum to 100)."
    return finish(figure, axes, f"confusion_{file_name(run)}", f"Confusions: {run}", caption, True)


def draw_audits(results: Sequence[Path]) -> None:
    """Writes the picture of every prototype audit among results files, beside its file."""
    for path in results:
        if path.stem == "prototypes":
            result = json.loads(path.read_text())
            write_atomically(
                path.with_suffix(".png"), draw_audit(result["encoder"]["label"], result["figures"])
            )


def draw_audit(label: str, figures: Mapping[str, Any]) -> bytes:
    """Returns one checkpoint's audit as a PNG: unique prototypes against eps, directions, and usage where known.

    Args:
        label: of the encoder.
        figures: of the probe `prototypes`.
    """
    usage = figures.get("patch_usage", {}) | figures.get("image_usage", {})
    figure, axes = plt.subplots(
        1, 3 if usage else 2, figsize=(4.3 * (3 if usage else 2), 3.7), layout="constrained"
    )
    for index, (role, audited) in enumerate(figures["roles"].items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
        fractions = {float(eps): share for eps, share in audited["unique_fraction"].items()}
        axes[0].plot(list(fractions), list(fractions.values()), marker="o", label=role, **style)
        density = audited["angle_density"]
        width = 2 * math.pi / len(density)
        axes[1].plot([-math.pi + (i + 0.5) * width for i in range(len(density))], density, **style)
        if role in usage:
            counts = [count for count in usage[role]["largest_counts"] if count]
            axes[2].plot(range(1, len(counts) + 1), counts, **style)
    axes[0].set(xscale="log", xlabel="ε (cosine distance)", ylabel="Unique prototypes", ylim=(-0.03, 1.03))
    axes[0].set_xticks(list(fractions), [f"{eps:g}" for eps in fractions])
    axes[0].minorticks_off()
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[1].axhline(1 / (2 * math.pi), color="#777777", linewidth=1)
    axes[1].set(xlabel="Angle on a random plane (radians)", ylabel="Density")
    axes[1].set_ylim(bottom=0)
    if usage:
        axes[2].set(
            xscale="log",
            yscale="log",
            xlabel="Prototype, most used first (by logits)",
            ylabel="Test images (patches)",
        )
    for cell in axes:
        cell.grid(alpha=0.3)
        cell.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Prototypes: {label}", x=0.01, ha="left", fontweight="bold", fontsize=11)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return to_png(figure)


def new_axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Returns a figure of the report's size with labelled axes and a light grid."""
    figure, axes = plt.subplots(figsize=_SIZE, layout="constrained")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def finish(figure: Figure, axes: Axes, name: str, title: str, caption: str, drawn: bool) -> Chart | None:
    """Returns the figure with title and legend as a chart, closed; None where nothing was drawn."""
    if not drawn:
        plt.close(figure)
        return None
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=7.5, framealpha=0.8, loc="best")
    return Chart(name=name, title=title, caption=caption, png=to_png(figure))


def to_png(figure: Figure) -> bytes:
    """Returns the figure as PNG bytes and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one key in order; of a step that was logged twice, the later value."""
    points = {r["step"]: _bound(r[key]) for r in records if isinstance(r.get(key), int | float)}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _bound(value: float) -> float:
    """Returns a value whose distance from any other one is finite: without it no axis has ticks."""
    if value > _LARGEST:
        return _LARGEST
    return -_LARGEST if value < -_LARGEST else float(value)


def file_name(text: str) -> str:
    """Returns `text` as part of a file name: bad letters as underscores, too long a text cut; others stay others."""
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in text)
    if name == text and len(name.encode()) <= _LONGEST_NAME:
        return name
    kept = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"{kept}-{hashlib.blake2b(text.encode(errors='surrogateescape'), digest_size=4).hexdigest()}"


def short_names(names: Sequence[str], longest: int = 22) -> list[str]:
    """Returns names as a legend can hold them: those that are too long lose their middle; they stay unique."""
    keep = longest // 2
    shown = [name if len(name) <= longest else f"{name[: keep - 1]}…{name[-keep:]}" for name in names]
    return [f"{i + 1}: {name}" if shown.count(name) > 1 else name for i, name in enumerate(shown)]


def _encoder_name(encoder: str, shown: Mapping[str, str]) -> str:
    """Returns a run's short name, or a control's own name behind that of the run it belongs to, if there are many."""
    run, _, control = encoder.rpartition(": ")
    if encoder in shown or run not in shown:
        return shown.get(encoder, encoder)
    return control if len(shown) == 1 else f"{shown[run]}: {control}"
