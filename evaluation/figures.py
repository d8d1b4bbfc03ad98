"""The report's charts, drawn from metrics and results: one message each, readable on white and in grey."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a compute node

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe & Ito's palette, without yellow: distinguishable with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
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


def draw_losses(runs: Mapping[str, Records]) -> Chart | None:
    """Returns loss terms over steps for every run; None where no run has any."""
    terms = (("total", "-"), ("consistency", "--"), ("entropy", ":"))
    figure, axes = new_axes("Step", "Loss")
    drawn = False
    for colour, (run, records) in zip(_cycle(), runs.items(), strict=False):
        for term, dash in terms:
            steps, values = series(records, f"loss/{term}")
            if steps:
                axes.plot(steps, values, dash, color=colour, label=_label(run, term, runs))
                drawn = True
    caption = (
        "Consistency draws two views of an image together; entropy keeps all prototypes of a block in use."
    )
    return finish(figure, axes, "loss", "Loss terms", caption, drawn)


def draw_unique_over_time(run: str, records: Records) -> Chart | None:
    """Returns the share of unique prototypes over steps at every eps of one run; None without data."""
    figure, axes = new_axes("Step", "Unique prototypes")
    keys = sorted({key for r in records for key in r if key.startswith("prototypes/unique_")}, key=_eps_of)
    for colour, dash, key in zip(_cycle(), DASHES * 2, keys, strict=False):
        steps, values = series(records, key)
        axes.plot(
            steps,
            values,
            dash,
            color=colour,
            marker="o",
            markersize=3,
            label=f"ε = {_eps_of(key):g}",
        )
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    caption = (
        "Share of prototypes farther than ε (cosine distance) from every earlier one. Collapse shows early."
    )
    return finish(
        figure,
        axes,
        f"unique_over_time_{file_name(run)}",
        f"Unique prototypes over time: {run}",
        caption,
        bool(keys),
    )


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


def draw_usage(runs: Mapping[str, Records]) -> Chart | None:
    """Returns used prototypes and usage perplexity over steps; None without data."""
    figure, axes = new_axes("Step", "Share of prototypes")
    drawn = False
    for colour, (run, records) in zip(_cycle(), runs.items(), strict=False):
        for key, title, dash, marker in (
            ("used", "used", "-", "o"),
            ("used_by_logits", "used by logits", ":", "^"),
            ("usage_perplexity", "usage perplexity / K", "--", "s"),
        ):
            steps, values = series(records, f"prototypes/{key}")
            if steps:
                axes.plot(
                    steps,
                    values,
                    dash,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=_label(run, title, runs),
                )
                drawn = True
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    caption = (
        "Used: won a teacher view of the epoch in the E-step (learned prototypes: by the logits), before a revival; "
        "by logits: the argmax of the dot products. Perplexity: 100 % if all are used equally."
    )
    return finish(figure, axes, "usage", "Prototype usage", caption, drawn)


def draw_knn_over_time(runs: Mapping[str, Records]) -> Chart | None:
    """Returns the in-training k-NN accuracy over steps; None without data."""
    figure, axes = new_axes("Step", "k-NN top-1 (k = 20)")
    drawn = False
    for colour, dash, (run, records) in zip(_cycle(), DASHES * 2, runs.items(), strict=False):
        steps, values = series(records, "eval/knn20_top1")
        if steps:
            axes.plot(steps, values, dash, color=colour, marker="o", markersize=4, label=run)
            drawn = True
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    caption = "Teacher's features on a fixed subset of the test images."
    return finish(figure, axes, "knn_over_time", "k-NN during training", caption, drawn)


def draw_feature_rank(runs: Mapping[str, Records]) -> Chart | None:
    """Returns the effective rank of projections over steps; None without data."""
    figure, axes = new_axes("Step", "Effective rank")
    drawn = False
    for colour, dash, (run, records) in zip(_cycle(), DASHES * 2, runs.items(), strict=False):
        steps, values = series(records, "features/effective_rank")
        if steps:
            axes.plot(steps, values, dash, color=colour, label=run)
            drawn = True
    caption = "Of the teacher's projections of one batch; 1 means that all features point one way."
    return finish(figure, axes, "effective_rank", "Spread of the features", caption, drawn)


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


def draw_probes(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Returns accuracies with intervals side by side.

    Args:
        rows: `probe`, `encoder`, `value`, `low`, `high`, each share in 0..1; in the order in which to draw them.
    """
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    height = max(2.2, 0.8 + 0.32 * len(rows) + 0.3 * len(probes))
    figure, axes = plt.subplots(figsize=(_SIZE[0], height), layout="constrained")
    ticks, position = [], 0.0
    for probe in probes:
        members = [row for row in rows if row["probe"] == probe]
        ticks.append(position + (len(members) - 1) / 2)
        for row in members:
            index = encoders.index(row["encoder"])
            bounds = [[max(0.0, row["value"] - row["low"])], [max(0.0, row["high"] - row["value"])]]
            first = row is next(r for r in rows if r["encoder"] == row["encoder"])
            axes.errorbar(
                [row["value"]],
                [position],
                xerr=bounds,
                fmt="os^Dv<>"[index % 7],
                capsize=3,
                color=COLOURS[index % len(COLOURS)],
                label=row["encoder"] if first else None,
            )
            axes.annotate(
                f"{100 * row['value']:.1f}",
                (row["high"], position),
                xytext=(6, -3),
                textcoords="offset points",
                fontsize=8,
            )
            position += 1
        position += 0.8
    axes.set_yticks(ticks, probes)
    axes.invert_yaxis()
    axes.set_xlabel("Top-1 accuracy on the test split")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(x=0.12, y=0.12)
    axes.grid(axis="x", alpha=0.3)
    caption = "Bars: bootstrap intervals over test images. For two encoders on the same images, see the differences."
    return finish(figure, axes, "probes", "Probes side by side", caption, bool(rows))


def draw_audit(label: str, figures: Mapping[str, Any]) -> bytes:
    """Returns one checkpoint's audit as a PNG: unique prototypes against eps, directions, and usage where known.

    Args:
        label: of the encoder.
        figures: of the probe `prototypes`.
    """
    usage = figures.get("image_usage") or {}
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
        axes[2].set(xscale="log", yscale="log", xlabel="Prototype, most used first", ylabel="Test images")
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
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        # Below the axes: a legend inside hides data on small charts.
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return Chart(name=name, title=title, caption=caption, png=to_png(figure))


def to_png(figure: Figure) -> bytes:
    """Returns the figure as PNG bytes and closes it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    plt.close(figure)
    return buffer.getvalue()


def _cycle() -> tuple[str, ...]:
    return COLOURS * 4


def series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one key in order; of a step that was logged twice, the later value."""
    points = {
        r["step"]: float(r[key]) for r in records if isinstance(r.get(key), int | float) and "step" in r
    }
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _label(run: str, term: str, runs: Mapping[str, Records]) -> str:
    return term if len(runs) == 1 else f"{run}: {term}"


def _eps_of(key: str) -> float:
    return float(key.rsplit("_", 1)[-1])


def file_name(text: str) -> str:
    """Returns `text` with whatever a file name should not hold replaced by an underscore."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in text)
