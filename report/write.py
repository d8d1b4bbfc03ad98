"""Writes the page about one or several runs, its figures and its tables."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.config import DataConfig
from evaluation.config import EvaluationConfig
from evaluation.encoders.load import load_encoder
from evaluation.features.processes import Processes, require_writable
from evaluation.features.session import Session
from report import charts, curves, panels, segmentation
from report.charts import Chart
from report.comparison import accuracy_rows
from report.confusion import class_names, count_confusions
from report.page import Section, render_page, require_own_folder
from report.runs import Run, flatten, load_runs, section
from report.sections import table_sections
from report.tables import Row, markdown_table
from runtime.config import ConfigError, build_config
from runtime.files import write_atomically

logger = logging.getLogger(__name__)


def write_report(
    run_dirs: list[Path], out: Path, *, with_images: bool = True, reload_s: float | None = None
) -> Path:
    """Writes the page and its files into `out` and returns the page's path.

    Args:
        run_dirs: run directories.
        out: made where missing; files of an older report are replaced.
        with_images: also draw panels, for which checkpoint, shards and cached features are read.
        reload_s: seconds after which a browser that shows the page reads it again.

    Raises:
        UserError: a directory is no run, or `out` holds something else than a report.
        ValueError: `out` cannot be a folder, or not be written.
    """
    runs = load_runs(run_dirs)
    require_own_folder(out, "--out")
    require_writable(out, "--out", Processes())
    drawn = draw_charts(runs)
    pictures = [chart for run in runs for chart in _draw_panels(run)] if with_images else []
    sections = table_sections(runs)
    names, provenance = [run.name for run in runs], provenance_rows(runs)
    # The page first: it is what says that the folder is a report's.
    page = out / "index.html"
    write_atomically(page, render_page(names, sections, drawn, pictures, provenance, reload_s))
    for chart in [*drawn, *pictures]:
        write_atomically(out / f"{chart.name}.png", chart.png)
    write_atomically(out / "results.csv", _to_csv(sections))
    markdown = "\n\n".join(f"## {s.title}\n\n{s.text}\n\n{markdown_table(s.rows)}".rstrip() for s in sections)
    write_atomically(out / "results.md", markdown + "\n")
    return page


def draw_charts(runs: list[Run]) -> list[Chart]:
    """Returns every chart for which there are figures."""
    unique, density = {}, {}
    for name, run in zip(charts.short_names([run.name for run in runs]), runs, strict=True):
        audited = run.result("prototypes")
        roles = audited["figures"]["roles"] if audited else {}
        # One line a run: the teacher's prototypes where there are several; one more of its patches' own.
        shown = {name: roles.get("teacher") or next(iter(roles.values()))} if roles else {}
        shown |= {f"{name}: patches": roles["patch teacher"]} if "patch teacher" in roles else {}
        for label, values in shown.items():
            unique[label], density[label] = values["unique_fraction"], values["angle_density"]
    drawn = [
        charts.draw_probes(accuracy_rows(runs), [run.name for run in runs]),
        *curves.draw_curves({run.name: run.metrics for run in runs if run.metrics}),
        charts.draw_unique_by_eps(unique),
        charts.draw_angle_density(density),
        *(draw_confusions(run) for run in runs),
    ]
    return [chart for chart in drawn if chart is not None]


def draw_confusions(run: Run) -> Chart | None:
    """Returns the confusions of the run's k-NN probe; None without predictions, or with too many classes."""
    knn = run.result("knn")
    counts = count_confusions(knn) if knn else None
    if knn is None or counts is None:
        return None
    return charts.draw_confusion(counts, class_names(knn, len(counts)), run.name)


def _draw_panels(run: Run) -> list[Chart]:
    drawn: list[Chart | None] = []
    safe = charts.file_name(run.name)
    if run.training:
        drawn += _attempt(f"crops of {run.name}", lambda: [_draw_crops(run, safe)])
    knn = run.result("knn")
    if knn:
        drawn += _attempt(f"image panels of {run.name}", lambda: _draw_gallery(knn, safe))
    segmented = run.result(segmentation.PROBE)
    if segmented:
        drawn += _attempt(f"maps of {run.name}", lambda: [segmentation.draw_overlays(segmented, safe)])
    return [chart for chart in drawn if chart is not None]


def _draw_crops(run: Run, safe: str) -> Chart:
    values = {**section(run, "data"), "num_workers": 0}
    return panels.draw_crops(build_config(DataConfig, values), section(run, "run").get("seed", 0), safe)


def _draw_gallery(knn: dict[str, Any], safe: str) -> list[Chart | None]:
    config = build_config(EvaluationConfig, knn["provenance"]["config"])
    encoder = load_encoder(
        config.encoder, role=config.role, transform=config.transform, num_blocks=config.features.num_blocks
    )
    gallery = panels.Gallery(Session(config, encoder, Processes()))
    return [
        panels.draw_neighbours(gallery, safe),
        panels.draw_prototype_images(gallery, safe),
        panels.draw_prototype_patches(gallery, safe),
        panels.draw_patch_components(gallery, safe),
        panels.draw_feature_map(gallery, safe),
    ]


def _attempt(what: str, draw: Callable[[], list[Chart | None]]) -> list[Chart | None]:
    """Returns what `draw` gives; where shards or checkpoint have gone since, the page is made without it."""
    try:
        return draw()
    except (ValueError, OSError, ConfigError) as error:
        logger.warning("%s are left out: %s", what, " ".join(str(error).split()))
        return []


def provenance_rows(runs: Sequence[Run]) -> list[Row]:
    """Returns one row for every results file: which weights, commit, configuration, data and machine."""
    rows = []
    for run in runs:
        for result in run.results:
            made, encoder, seconds = flatten(result["provenance"]), result["encoder"], result.get("seconds")
            machine = f"{made.get('hardware.machine')}, {made.get('hardware.cpu_threads')} threads"
            rows.append(
                {
                    "run": run.name,
                    "probe": result["probe"],
                    "role": encoder["role"],
                    "step": str(encoder.get("step") or ""),
                    "weights": str(encoder.get("weights_sha256", ""))[:12],
                    "commit": made.get("commit", ""),
                    "config": made.get("config_hash", ""),
                    "data": ", ".join(map(str, result["provenance"]["manifest_hashes"].values())),
                    "torch": made.get("versions.torch", ""),
                    "hardware": made.get("hardware.gpu", machine),
                    "seconds": f"{seconds:.1f}" if isinstance(seconds, int | float) else "",
                    "finished": made.get("finished_utc", ""),
                }
            )
    return rows


def _to_csv(sections: list[Section]) -> str:
    """Returns every table in long form: table, row, column, value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value"])
    for table in sections:
        for index, row in enumerate(table.rows):
            writer.writerows([table.title, index, column, value] for column, value in row.items())
    return buffer.getvalue()
