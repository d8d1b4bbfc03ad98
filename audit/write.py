"""What an audit found: one table of arms, paired differences over seeds, charts, one page."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from audit import charts as audit_figures
from audit.cells import Cell, audit_directory
from audit.config import AuditConfig
from evaluation.probes.long_tail import GROUPS
from evaluation.results import read_predictions
from report.comparison import correctness, mean_difference
from report.page import Section, render_page, require_own_folder
from report.runs import Run, load_runs
from report.tables import Row, markdown_table
from report.write import provenance_rows
from runtime.files import write_atomically
from runtime.program import UserError

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal's.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
_NORMAL95 = 1.960
_SHOWN_EPS = ("0.025", "0.1", "0.5")
_EARLY_SHARE = 0.2
_ACCURACIES = (("knn", "k-NN"), ("linear", "linear"), ("logistic", "logistic"))
# What is no share of 0 to 1, and its decimals; all else is shown in percent with one.
_PLAIN = {"angle max/min": 1, "effective rank": 1, "cosine to start": 5, "smallest cosine to start": 5}


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, its standard deviation and the half width of its 95 % interval."""

    mean: float
    deviation: float
    half_width: float
    number: int


def spread(values: Sequence[float]) -> Spread:
    """Returns mean, sample standard deviation and Student's 95 % half width of the mean; infinite for one value."""
    number = len(values)
    if number < 2:
        return Spread(values[0], 0.0, math.inf, number)
    deviation = statistics.stdev(values)
    quantile = _T95[number - 2] if number - 2 < len(_T95) else _NORMAL95
    return Spread(statistics.fmean(values), deviation, quantile * deviation / math.sqrt(number), number)


def write_audit(config: AuditConfig) -> str:
    """Writes page, charts and tables of the finished runs into the audit's folder; returns the tables as text.

    Raises:
        UserError: no run is finished, or the folder of the page holds something else.
    """
    directory, by_seed = audit_directory(config), load_finished(config)
    if not by_seed:
        raise UserError(
            f"{directory} has no finished run; expected results of at least one arm; run the audit first"
        )
    figures = {arm: {seed: run_figures(run) for seed, run in seeds.items()} for arm, seeds in by_seed.items()}
    runs = {arm: list(seeds.values()) for arm, seeds in by_seed.items()}
    sections = [
        Section(
            "Arms",
            "Mean over seeds, ± standard deviation. Read uniqueness beside usage, and both beside the cosine of the "
            "prototypes to their start: 1 has not moved. Used: in the E-step before a revival; of prototypes without "
            "one, by the logits. u is of the prototypes as the run saved them: where an arm revives, after a revival.",
            arm_rows(figures),
        ),
        *(
            Section(
                f"Minus {reference}",
                "Paired by seed, in points: mean and 95 % interval (Student's t over seeds); over images: that of the "
                "mean over these seeds, by resampling the test images, which arms share.",
                [
                    row | image_intervals(by_seed, row["arm"], reference)
                    for row in difference_rows(figures, reference)
                ],
            )
            for reference in config.references
        ),
    ]
    sections = [section for section in sections if section.rows]
    report = directory / "report"
    require_own_folder(report, "name")
    report.mkdir(parents=True, exist_ok=True)
    charts = audit_figures.draw_audit_charts(runs, figures)
    flat = [run for members in runs.values() for run in members]
    # The page first: it is what says that the folder is a report's.
    page = render_page(list(figures), sections, charts, [], provenance_rows(flat))
    write_atomically(report / "index.html", page)
    for chart in charts:
        write_atomically(report / f"{chart.name}.png", chart.png)
    markdown = "\n\n".join(f"## {s.title}\n\n{s.text}\n\n{markdown_table(s.rows)}" for s in sections)
    write_atomically(report / "results.md", markdown + "\n")
    write_atomically(report / "results.csv", _to_csv(figures))
    write_atomically(report / "results.json", json.dumps(figures, indent=1) + "\n")
    return markdown


def load_finished(config: AuditConfig) -> dict[str, dict[str, Run]]:
    """Returns arm to seed (as text) to run, of every run that has results."""
    finished: dict[str, dict[str, Run]] = {}
    for arm in config.arms:
        for seed in config.seeds:
            cell = Cell(config, arm, seed)
            if cell.is_done:
                finished.setdefault(arm, {})[str(seed)] = _load_cell(cell)
    return finished


def run_figures(run: Run) -> dict[str, float]:
    """Returns the figures of one run: shares and accuracies in 0..1, by the name that its column gets."""
    figures: dict[str, float] = {}
    audited = run.result("prototypes")
    if audited:
        fractions = audited["figures"]["roles"]["teacher"]["unique_fraction"]
        figures |= {f"u({eps})": fractions[eps] for eps in _SHOWN_EPS if eps in fractions}
        figures["angle max/min"] = audited["figures"]["roles"]["teacher"]["angle_density_max_over_min"]
    for column, key in (
        ("used", "prototypes/used"),
        ("used by logits", "prototypes/used_by_logits"),
        ("usage perplexity", "prototypes/usage_perplexity"),
        ("cosine to start", "prototypes/cosine_to_start"),
        ("smallest cosine to start", "prototypes/cosine_to_start_min"),
        ("effective rank", "features/effective_rank"),
        (f"patch u({_SHOWN_EPS[0]})", f"patch_prototypes/unique_{_SHOWN_EPS[0]}"),
        ("patch used", "patch_prototypes/used"),
        ("patch used by logits", "patch_prototypes/used_by_logits"),
    ):
        values = [record[key] for record in run.metrics if key in record]
        if values:
            figures[column] = values[-1]
    figures |= _early_uniqueness(run)
    groups = _class_groups(run)
    for probe, column in _ACCURACIES:
        result = run.result(probe)
        if result:
            figures[column] = result["figures"]["headline"]["top1"]
            figures |= {f"{column} {group}": value for group, value in _by_group(result, groups).items()}
    result = run.result("segmentation")
    if result:
        found = result["figures"]["headline"]
        figures |= {"mIoU k-NN": found["knn_miou"], "mIoU logistic": found["logistic_miou"]}
    return figures


def _early_uniqueness(run: Run) -> dict[str, float]:
    """Uniqueness after the first fifth of the steps: collapse, where it comes, comes early."""
    last = max((int(record.get("step", 0)) for record in run.metrics), default=0)
    key = f"prototypes/unique_{_SHOWN_EPS[0]}"
    early = [r[key] for r in run.metrics if key in r and 0 < int(r["step"]) <= _EARLY_SHARE * last]
    return {f"u({_SHOWN_EPS[0]}) early": early[-1]} if early else {}


def _class_groups(run: Run) -> list[str] | None:
    """Returns every class's group (head, medium, tail), as the run's long-tail probe found it."""
    result = run.result("long_tail")
    return None if result is None else [entry["group"] for entry in result["figures"]["per_class"]]


def _by_group(result: dict[str, Any], groups: list[str] | None) -> dict[str, float]:
    right = correctness(result)
    if groups is None or right is None:
        return {}
    labels = read_predictions(result)["labels"].numpy()
    found: dict[str, list[bool]] = defaultdict(list)
    for label, is_right in zip(labels.tolist(), right.tolist(), strict=True):
        found[groups[label]].append(is_right)
    return {group: statistics.fmean(found[group]) for group in GROUPS if found[group]}


def arm_rows(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Row]:
    """Returns one row for each arm."""
    rows = []
    for arm, seeds in figures.items():
        row: Row = {"arm": arm, "seeds": str(len(seeds))}
        for column in _columns(seeds):
            found = spread([values[column] for values in seeds.values() if column in values])
            row[column] = _text(column, found)
        rows.append(row)
    return rows


def difference_rows(figures: Mapping[str, Mapping[str, Mapping[str, float]]], reference: str) -> list[Row]:
    """Returns, for every other arm, its accuracies minus the reference's, over the seeds that both have."""
    rows = []
    for arm, seeds in figures.items():
        shared = sorted(set(seeds) & set(figures.get(reference, {})))
        if arm == reference or not shared:
            continue
        row: Row = {"arm": arm, "seeds": str(len(shared))}
        for column in _columns(seeds):
            if not column.startswith(("k-NN", "linear", "logistic", "mIoU")):
                continue
            differences = [
                100 * (seeds[seed][column] - figures[reference][seed][column])
                for seed in shared
                if column in seeds[seed] and column in figures[reference][seed]
            ]
            if differences:
                found = spread(differences)
                positive = sum(difference > 0 for difference in differences)
                row[column] = f"{found.mean:+.2f}"
                if found.number > 1:
                    row[column] += f" ± {found.half_width:.2f} ({positive} of {found.number} > 0)"
        rows.append(row)
    return rows


def image_intervals(runs: Mapping[str, Mapping[str, Run]], arm: str, reference: str) -> Row:
    """Returns, by probe, the 95 % interval over the test images of what an arm has more than the reference.

    Of the mean over the seeds that both have; arms and seeds share the images.
    """
    seeds = sorted(set(runs[arm]) & set(runs.get(reference, {})))
    row: Row = {}
    for probe, column in _ACCURACIES:
        pairs = [(runs[reference][seed].result(probe), runs[arm][seed].result(probe)) for seed in seeds]
        found = mean_difference([(a, b) for a, b in pairs if a is not None and b is not None])
        if found is not None:
            row[f"{column} over images"] = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
    return row


def _columns(seeds: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(column for values in seeds.values() for column in values))


def _text(column: str, found: Spread) -> str:
    scale, decimals = (1, _PLAIN[column]) if column in _PLAIN else (100, 1)
    text = f"{scale * found.mean:.{decimals}f}"
    return f"{text} ± {scale * found.deviation:.{decimals}f}" if found.number > 1 else text


def _load_cell(cell: Cell) -> Run:
    """Returns a run with the results that `check_cells` has looked at, whatever else lies beside them."""
    (run,) = load_runs([cell.directory])
    checked = {cell.result(probe) for probe in cell.config.measured}
    return replace(run, results=[result for result in run.results if result["path"] in checked])


def _to_csv(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Returns every figure in long form: arm, seed, figure, value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["arm", "seed", "figure", "value"])
    for arm, seeds in figures.items():
        for seed, values in seeds.items():
            writer.writerows([arm, seed, name, value] for name, value in values.items())
    return buffer.getvalue()
