"""Charts of an audit: one colour for each arm, thin lines for seeds, thick ones for their mean."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import PercentFormatter

from evaluation.probes.long_tail import GROUPS
from report.charts import (
    COLOURS,
    DASHES,
    Chart,
    draw_angle_density,
    draw_unique_by_eps,
    finish,
    new_axes,
    series,
)
from report.runs import Run

Figures = Mapping[str, Mapping[str, Mapping[str, float]]]


def draw_audit_charts(runs: Mapping[str, Sequence[Run]], figures: Figures) -> list[Chart]:
    """Returns every chart for which there are figures.

    Args:
        runs: arm to its finished runs, one for each seed.
        figures: arm to seed to named figures.
    """
    audited = _audited_by_arm(runs)
    drawn = [
        _draw_over_time(
            runs,
            "prototypes/unique_0.025",
            ("unique_over_time", "Unique prototypes over time (ε = 0.025)", "Unique prototypes"),
            "Counted densely at the start: collapse, where it comes, comes early.",
        ),
        _draw_over_time(
            runs,
            "prototypes/used",
            ("used_over_time", "Used prototypes", "Used prototypes"),
            "Share of the K prototypes that won a teacher view of the epoch in the E-step; without one, by the logits.",
        ),
        _draw_over_time(
            runs,
            "eval/knn20_top1",
            ("knn_over_time", "k-NN during training", "k-NN top-1 (k = 20)"),
            "Teacher's features on a fixed subset of the test images.",
        ),
        draw_unique_by_eps({arm: values["unique_fraction"] for arm, values in audited.items()}),
        draw_angle_density({arm: values["angle_density"] for arm, values in audited.items()}),
        _draw_use_against_uniqueness(figures),
        _draw_groups(figures, "k-NN"),
        _draw_groups(figures, "linear"),
    ]
    return [chart for chart in drawn if chart is not None]


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def _draw_over_time(
    runs: Mapping[str, Sequence[Run]], key: str, names: tuple[str, str, str], caption: str
) -> Chart | None:
    name, title, label = names
    figure, axes = new_axes("Step", label)
    drawn = False
    for index, (arm, members) in enumerate(runs.items()):
        lines = [series(run.metrics, key) for run in members]
        lines = [line for line in lines if line[0]]
        for steps, values in lines:
            axes.plot(steps, values, linewidth=0.7, alpha=0.45, **_style(index))
        if lines:
            by_step: dict[int, list[float]] = {}
            for steps, values in lines:
                for step, value in zip(steps, values, strict=True):
                    by_step.setdefault(step, []).append(value)
            means = [statistics.fmean(by_step[step]) for step in sorted(by_step)]
            axes.plot(sorted(by_step), means, linewidth=2, label=arm, **_style(index))
            drawn = True
    if key.startswith("prototypes/"):  # shares of K: a zoom on the last per mille would mislead
        axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return finish(figure, axes, name, title, caption, drawn)


def _audited_by_arm(runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    """Returns the audited teacher's matrix of every arm: that of its first seed."""
    return {
        f"{arm} (first seed)": result["figures"]["roles"]["teacher"]
        for arm, members in runs.items()
        if members and (result := members[0].result("prototypes"))
    }


def _draw_use_against_uniqueness(figures: Figures) -> Chart | None:
    """Draws every run as a point: what a healthy codebook needs is the upper right corner."""
    figure, axes = new_axes("Used prototypes, last epoch", "Unique prototypes (ε = 0.025)")
    drawn = False
    for index, (arm, seeds) in enumerate(figures.items()):
        points = [(v["used"], v["u(0.025)"]) for v in seeds.values() if "used" in v and "u(0.025)" in v]
        if points:
            marker = "os^Dv<>"[index % 7]
            axes.scatter(
                *zip(*points, strict=True), color=COLOURS[index % len(COLOURS)], marker=marker, label=arm
            )
            drawn = True
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    caption = "One point a seed. Distinct and used is the upper right corner; distinct alone is easy."
    return finish(figure, axes, "used_and_unique", "Distinct, and used?", caption, drawn)


def _draw_groups(figures: Figures, probe: str) -> Chart | None:
    """Draws head, medium and tail accuracy of every arm as bars with one standard deviation."""
    arms = [arm for arm, seeds in figures.items() if any(f"{probe} tail" in v for v in seeds.values())]
    if not arms:
        return None
    figure, axes = new_axes("Classes by number of training images", f"{probe} top-1")
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        groups = {
            g: [v[f"{probe} {g}"] for v in figures[arm].values() if f"{probe} {g}" in v] for g in GROUPS
        }
        groups = {group: values for group, values in groups.items() if values}
        places = [GROUPS.index(group) + (index - (len(arms) - 1) / 2) * width for group in groups]
        axes.bar(
            places,
            [statistics.fmean(values) for values in groups.values()],
            width,
            yerr=[statistics.stdev(values) if len(values) > 1 else 0.0 for values in groups.values()],
            color=COLOURS[index % len(COLOURS)],
            capsize=2,
            label=arm,
        )
    plt.setp(axes, xticks=range(len(GROUPS)), xticklabels=GROUPS)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    name = "groups_" + "".join(c for c in probe if c.isalnum()).lower()
    caption = "Mean and standard deviation over seeds; balanced test set."
    return finish(figure, axes, name, f"Long tail: {probe}", caption, True)
