"""Everything in `metrics.jsonl` over steps: one chart a group of keys, one panel a key, one colour a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from report.charts import COLOURS, DASHES, Chart, Records, series, short_names, to_png

_COLUMNS = 2
_PANEL = (2.45, 1.75)
# A run's curve with more points than this is drawn without a marker at each of them.
_MOST_MARKERS = 30


@dataclass(frozen=True)
class Group:
    """Keys of the record that are read together.

    Attributes:
        prefix: of the keys, before the slash.
        title: of the chart.
        caption: what the reader should know.
        first: names of the keys that come first, with their titles; the others of the prefix follow as they are.
        shares: whether the values are shares of 0 to 1, drawn in percent on that scale.
    """

    prefix: str
    title: str
    caption: str
    first: tuple[tuple[str, str], ...] = ()
    shares: bool = False


GROUPS = (
    Group(
        "loss",
        "Loss",
        "Consistency draws two views of an image together; entropy keeps all prototypes of a block in use.",
        (("total", "total"),),
    ),
    Group(
        "eval",
        "k-NN during training",
        "Teacher's features on a fixed subset of the test images.",
        (("knn20_top1", "k-NN top-1 (k = 20)"),),
    ),
    Group(
        "prototypes",
        "Prototypes",
        "unique ε: share farther than ε (cosine distance) from every earlier one; random directions are unique too, "
        "so read it beside use. used: won a teacher view of the epoch in the E-step (learned prototypes: by the "
        "logits), before a revival; by logits: the argmax of the dot products. Perplexity: 100 % if used equally.",
        (
            ("unique_0.025", "unique ε = 0.025"),
            ("used", "used"),
            ("used_by_logits", "used by logits"),
            ("usage_perplexity", "usage perplexity"),
            ("cosine_to_start", "mean cosine to the start"),
            ("cosine_to_start_min", "smallest cosine to the start"),
        ),
        shares=True,
    ),
    Group(
        "gmm",
        "Mixture",
        "Of the E-step and M-step of the step that is recorded.",
        (
            ("log_likelihood", "log-likelihood a row"),
            ("responsibility_perplexity", "responsibility perplexity"),
        ),
    ),
    Group(
        "features",
        "Features",
        "Of the teacher's projections of one global batch. An effective rank of 1 means that all point one way.",
        (("effective_rank", "effective rank"),),
    ),
    Group("optim", "Optimisation", "The schedules as they were applied, and the gradient before clipping."),
    Group(
        "throughput",
        "Speed",
        "data wait fraction: share of the time in which the training process waited for its loader. MFU: the networks' "
        "floating point operations as a share of what a matrix product reached at the run's start.",
        (
            ("images_per_s", "images/s"),
            ("data_wait_fraction", "data wait fraction"),
            ("mfu_dense", "MFU, dense"),
            ("mfu_executed", "MFU, with recomputation"),
        ),
    ),
    Group("memory", "Memory", "Largest of any rank, in GiB: of the device, else resident."),
    Group("data", "Data", "Samples that could not be decoded, of all ranks."),
)


def draw_curves(runs: Mapping[str, Records]) -> list[Chart]:
    """Returns one chart for each group of which there are figures; a key without any number is left out."""
    groups = [each for group in GROUPS for each in (group, _of_patches(group))]
    return [chart for group in groups for chart in _draw_group(group, runs)]


def _of_patches(group: Group) -> Group:
    """Returns the same of the patches' own prototypes; most groups have no such keys."""
    return replace(group, prefix=f"patch_{group.prefix}", title=f"{group.title}: patches")


def _draw_group(group: Group, runs: Mapping[str, Records]) -> Iterable[Chart]:
    keys = _keys(group, runs)
    if not keys:
        return
    columns = min(_COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    width, height = _PANEL[0] * _COLUMNS, _PANEL[1] * rows + 0.45
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    figure.suptitle(group.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    last = max(1, *(record["step"] for records in runs.values() for record in records))
    for panel, key in zip(axes.flat, keys, strict=False):
        panel.set_xlim(-0.02 * last, 1.02 * last)
        is_share = group.shares and not key.startswith("cosine")
        _draw_panel(panel, f"{group.prefix}/{key}", keys[key], runs, shares=is_share)
    for panel in list(axes.flat)[len(keys) :]:
        panel.set_axis_off()
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=6.5, framealpha=0.8, loc="best", handlelength=1.6)
    yield Chart(f"{group.prefix}_over_time", group.title, group.caption, to_png(figure))


def _draw_panel(axes: Axes, key: str, title: str, runs: Mapping[str, Records], *, shares: bool) -> None:
    for index, (name, records) in enumerate(zip(short_names(list(runs)), runs.values(), strict=True)):
        steps, values = series(records, key)
        axes.plot(
            steps,
            values,
            DASHES[index // len(COLOURS) % len(DASHES)],
            color=COLOURS[index % len(COLOURS)],
            marker="o" if len(steps) <= _MOST_MARKERS else "",
            markersize=2.5,
            linewidth=1.2,
            label=name,
        )
    axes.set_title(title, fontsize=8.5, loc="left")
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if shares:
        axes.set_ylim(-0.03, 1.03)
    if shares or key.startswith("eval/"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _keys(group: Group, runs: Mapping[str, Records]) -> dict[str, str]:
    """Returns the group's keys that some run has a number of, each with its title, in the order of the panels."""
    found = {
        key.split("/", 1)[1]
        for records in runs.values()
        for record in records
        for key, value in record.items()
        if key.startswith(f"{group.prefix}/") and isinstance(value, int | float)
    }
    named = {key: title for key, title in group.first if key in found}
    return named | {key: key.replace("_", " ") for key in sorted(found - set(named))}
