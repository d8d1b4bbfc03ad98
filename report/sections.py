"""The report's tables: every probe of every run, with intervals, and the differences between runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from report.comparison import accuracy_rows, difference_rows, why_not_comparable
from report.confusion import confusion_rows
from report.page import Section
from report.runs import Run, configuration_rows, difference_of_configurations, run_rows
from report.segmentation import miou_class_rows, miou_difference_rows, miou_rows
from report.tables import Row, compare_knn, control_sentence, knn_rows, percent, prototype_rows


def table_sections(runs: Sequence[Run]) -> list[Section]:
    """Returns every table for which there are figures, in the order in which they are read."""
    sections = [
        *_run_sections(runs),
        *_probe_sections(runs),
        *_long_tail_sections(runs),
        *_dense_sections(runs),
    ]
    every_option = Section(
        "Configuration",
        "Every option as it was resolved.",
        configuration_rows(runs),
        folded=True,
        most_rows=None,
    )
    return [section for section in [*sections, every_option] if section.rows]


def _run_sections(runs: Sequence[Run]) -> list[Section]:
    differences = difference_of_configurations(runs)
    sections = [
        Section("Runs", "How each run ended, what it trained and how fast.", run_rows(runs)),
        Section("Configuration: differences", "Options that are not the same in all runs.", differences),
    ]
    for run in runs:
        knn = run.result("knn")
        if knn:
            alike, left_out = _controls_measured_alike(knn, run.controls)
            comparison = compare_knn(knn, alike)
            text = " ".join(part for part in (control_sentence(comparison), *left_out) if part)
            sections.append(Section(f"k-NN: {run.name}", text, knn_rows(comparison)))
    return sections


def _probe_sections(runs: Sequence[Run]) -> list[Section]:
    return [
        Section(
            "Prototypes",
            "Unique prototypes by Definition 2.1, and which of them are used.",
            _of_each(runs, "prototypes", prototype_rows),
        ),
        Section(
            "Probes",
            "Top-1 on the test split with 95 % bootstrap intervals. Choices were made on a held-out "
            "part of train; test-selected is the best on the test split, which papers report.",
            probe_rows(runs),
        ),
        Section(
            "Differences", "Paired on the same test images, in points, with intervals.", difference_rows(runs)
        ),
        Section(
            "k-NN by k",
            "Top-1 and, in brackets, top-5 in percent.",
            _of_each(runs, "knn", knn_by_k_rows),
            folded=True,
        ),
        Section(
            "Confusions of k-NN",
            "The most frequent ones on the test split.",
            _of_each(runs, "knn", confusion_rows),
            folded=True,
        ),
        Section(
            "Few-shot",
            "Top-1 of logistic regression on so many images per class: mean and standard deviation over draws.",
            _of_each(runs, "few_shot", few_shot_rows),
        ),
        Section(
            "Clustering",
            "How groups found without labels agree with the classes, in percent. Accuracy names clusters one to one, "
            "purity by each cluster's majority.",
            _of_each(runs, "clustering", clustering_rows),
        ),
    ]


def _long_tail_sections(runs: Sequence[Run]) -> list[Section]:
    return [
        Section(
            "Long tail",
            "Top-1 by how often a class was seen in training, with intervals.",
            _of_each(runs, "long_tail", long_tail_rows),
        ),
        Section(
            "Long tail by class",
            "Every class with its training images and its accuracy.",
            _of_each(runs, "long_tail", class_rows),
            folded=True,
        ),
    ]


def _dense_sections(runs: Sequence[Run]) -> list[Section]:
    return [
        Section(
            "Segmentation",
            "Mean IoU over the test split's classes, void left out, with intervals over images. The ceiling gives each "
            "patch the class of most of its pixels; the majority class is that of the training split.",
            miou_rows(runs),
        ),
        Section(
            "Segmentation: differences",
            "Paired on the same test images, in points of mean IoU, with intervals.",
            miou_difference_rows(runs),
        ),
        Section("Segmentation by class", "IoU of every class.", miou_class_rows(runs), folded=True),
    ]


def _controls_measured_alike(
    knn: dict[str, Any], controls: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the controls that may stand beside a k-NN result, and a sentence for each that may not."""
    alike, left_out = [], []
    for control in controls:
        reason = why_not_comparable(knn, control) if control["probe"] == "knn" else ""
        if reason:
            left_out.append(f"{control['encoder']['label']} is not compared: {reason}; evaluate again.")
        elif control["probe"] == "knn":
            alike.append(control)
    return alike, left_out


def probe_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for each probe and encoder: accuracy, interval, and the test-selected figure if there is one."""
    headlines = {
        (r["probe"], run.name): r["figures"].get("headline", {}) for run in runs for r in run.results
    }
    rows = []
    for row in accuracy_rows(runs):
        headline = headlines.get((row["probe"], row["encoder"]), {})
        rows.append(
            {
                "probe": row["probe"],
                "encoder": row["encoder"],
                "top-1 %": percent(row["value"]),
                "interval": f"{percent(row['low'])} to {percent(row['high'])}",
                "test-selected %": percent(headline.get("test_selected")),
                "feature": str(headline.get("feature", "")),
            }
        )
    return rows


def knn_by_k_rows(result: dict[str, Any]) -> list[Row]:
    """Returns one row for each feature with every k."""
    return [
        {
            "feature": name,
            **{
                f"k={k}": f"{percent(top1)} ({percent(found['top5'][k])})"
                for k, top1 in found["top1"].items()
            },
        }
        for name, found in result["figures"]["features"].items()
    ]


def few_shot_rows(result: dict[str, Any]) -> list[Row]:
    """Returns one row with every number of shots."""
    shots = result["figures"]["shots"]
    texts = {
        f"{count} per class": f"{percent(found['top1'])} ± {percent(found['standard_deviation'])}"
        for count, found in shots.items()
    }
    return [{"feature": result["figures"]["feature"], **texts}]


def clustering_rows(result: dict[str, Any]) -> list[Row]:
    """Returns one row for k-means and one for the assignment to prototypes, where there is one."""
    figures = result["figures"]
    found = {"k-means": figures["headline"], "nearest prototype": figures.get("prototypes")}
    return [
        {"clusters": title, **{key: percent(values[key]) for key in ("nmi", "ari", "accuracy", "purity")}}
        for title, values in found.items()
        if values
    ]


def long_tail_rows(result: dict[str, Any]) -> list[Row]:
    """Returns one row: overall, by group, balanced, and the gap."""
    figures = result["figures"]
    row: Row = {"classifier": figures["classifier"]}
    for name, found in figures["groups"].items():
        classes = "" if name == "overall" else f" ({found['classes']} classes)"
        row[f"{name}{classes}"] = _with_interval(found["top1"], found["interval"])
    balanced, gap = figures["balanced_accuracy"], figures["tail_minus_head"]
    row["balanced"] = _with_interval(balanced["value"], balanced["interval"])
    row["tail minus head"] = _with_interval(gap["value"], gap["interval"])
    return [row]


def class_rows(result: dict[str, Any]) -> list[Row]:
    """Returns one row for each class, as the results file has them."""
    return [
        {
            "class": found["class"],
            "group": found["group"],
            "training images": str(found["train_images"]),
            "test images": str(found["test_images"]),
            "top-1 %": percent(found["top1"]),
        }
        for found in result["figures"]["per_class"]
    ]


def _of_each(runs: Sequence[Run], probe: str, rows_of: Any) -> list[Row]:
    found = [(run.name, run.result(probe)) for run in runs]
    return [{"run": name, **row} for name, result in found if result for row in rows_of(result)]


def _with_interval(value: float | None, interval: Sequence[float]) -> str:
    if value is None:
        return ""
    low, high = interval
    return f"{100 * value:.2f} ({100 * low:.1f} to {100 * high:.1f})"
