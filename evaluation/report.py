"""One page about one or several runs: what they learned, beside each other.

    python -m evaluation.report RUN [RUN ...] --out DIR [--no-images]

Writes `DIR/index.html` (self-contained: opens without a network), every figure as a PNG, `results.csv` and
`results.md`. RUN is a run directory; its `metrics.jsonl`, `results/` and newest checkpoint are read, nothing in it
is changed.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.program import run_program
from runtime.usage import HelpFormatter


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.report", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", required=True, help="directory of the page")
    parser.add_argument(
        "--no-images", action="store_true", help="leave out the panels that need encoder and data"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":  # usage and mistakes are answered before the slow imports
    parse(sys.argv[1:])

from data.config import DataConfig
from evaluation import curves, figures, panels
from evaluation.comparison import accuracy_rows
from evaluation.config import EvaluationConfig
from evaluation.confusion import class_names, count_confusions
from evaluation.encoder import load_encoder
from evaluation.figures import Chart
from evaluation.page import Section, render_page
from evaluation.processes import Processes
from evaluation.report_runs import Run, load_runs
from evaluation.report_tables import table_sections
from evaluation.session import Session
from evaluation.tables import Row, markdown_table
from runtime.config import ConfigError, build_config
from runtime.files import write_atomically
from runtime.logging_setup import set_up_logging

logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Returns the exit code of the report's command line."""
    options = parse(arguments)
    set_up_logging(rank=0)
    page = write_report(
        [Path(run) for run in options.runs], Path(options.out), with_images=not options.no_images
    )
    print(page)
    return 0


def write_report(run_dirs: list[Path], out: Path, *, with_images: bool = True) -> Path:
    """Writes the page and its files into `out` and returns the page's path.

    Args:
        run_dirs: run directories.
        out: made where missing; files of an older report are replaced.
        with_images: also draw panels, for which checkpoint, shards and cached features are read.

    Raises:
        ValueError: a directory is no run.
    """
    runs = load_runs(run_dirs)
    charts = draw_charts(runs)
    pictures = [chart for run in runs for chart in _draw_panels(run)] if with_images else []
    out.mkdir(parents=True, exist_ok=True)
    for chart in [*charts, *pictures]:
        write_atomically(out / f"{chart.name}.png", chart.png)
    sections = table_sections(runs)
    write_atomically(out / "results.csv", _to_csv(sections))
    markdown = "\n\n".join(f"## {s.title}\n\n{s.text}\n\n{markdown_table(s.rows)}".rstrip() for s in sections)
    write_atomically(out / "results.md", markdown + "\n")
    html = render_page([run.name for run in runs], sections, charts, pictures, provenance_rows(runs))
    page = out / "index.html"
    write_atomically(page, html)
    return page


def draw_charts(runs: list[Run]) -> list[Chart]:
    """Returns every chart for which there are figures."""
    unique, density = {}, {}
    for name, run in zip(figures.short_names([run.name for run in runs]), runs, strict=True):
        audited = run.result("prototypes")
        roles = audited["figures"]["roles"] if audited else {}
        # One line a run: the teacher's prototypes where there are several; the table has the others.
        for values in [roles.get("teacher") or next(iter(roles.values()))] if roles else []:
            unique[name], density[name] = values["unique_fraction"], values["angle_density"]
    drawn = [
        figures.draw_probes(accuracy_rows(runs), [run.name for run in runs]),
        *curves.draw_curves({run.name: run.metrics for run in runs if run.metrics}),
        figures.draw_unique_by_eps(unique),
        figures.draw_angle_density(density),
        *(draw_confusions(run) for run in runs),
    ]
    return [chart for chart in drawn if chart is not None]


def draw_confusions(run: Run) -> Chart | None:
    """Returns the confusions of the run's k-NN probe; None without predictions, or with too many classes."""
    knn = run.result("knn")
    counts = count_confusions(knn) if knn else None
    if knn is None or counts is None:
        return None
    return figures.draw_confusion(counts, class_names(knn, len(counts)), run.name)


def _draw_panels(run: Run) -> list[Chart]:
    drawn: list[Chart | None] = []
    safe = figures.file_name(run.name)
    if run.training:
        drawn += _attempt(f"crops of {run.name}", lambda: [_draw_crops(run, safe)])
    knn = run.result("knn")
    if knn:
        drawn += _attempt(f"image panels of {run.name}", lambda: _draw_gallery(knn, safe))
    return [chart for chart in drawn if chart is not None]


def _draw_crops(run: Run, safe: str) -> Chart:
    values = {**run.training["data"], "num_workers": 0}
    return panels.draw_crops(
        build_config(DataConfig, values), run.training.get("run", {}).get("seed", 0), safe
    )


def _draw_gallery(knn: dict[str, Any], safe: str) -> list[Chart | None]:
    config = build_config(EvaluationConfig, knn["provenance"]["config"])
    encoder = load_encoder(
        config.encoder, role=config.role, transform=config.transform, num_blocks=config.features.num_blocks
    )
    gallery = panels.Gallery(Session(config, encoder, Processes()))
    return [
        panels.draw_neighbours(gallery, safe),
        panels.draw_prototype_images(gallery, safe),
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
            provenance = result["provenance"]
            hardware = provenance["hardware"]
            rows.append(
                {
                    "run": run.name,
                    "probe": result["probe"],
                    "role": result["encoder"]["role"],
                    "step": str(result["encoder"]["step"] or ""),
                    "weights": result["encoder"]["weights_sha256"][:12],
                    "commit": provenance["commit"],
                    "config": provenance["config_hash"],
                    "data": ", ".join(provenance["manifest_hashes"].values()),
                    "torch": provenance["versions"]["torch"],
                    "hardware": str(
                        hardware.get("gpu", f"{hardware['machine']}, {hardware['cpu_threads']} threads")
                    ),
                    "seconds": f"{result['seconds']:.1f}",
                    "finished": provenance["finished_utc"],
                }
            )
    return rows


def _to_csv(sections: list[Section]) -> str:
    """Returns every table in long form: table, row, column, value."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value"])
    for section in sections:
        for index, row in enumerate(section.rows):
            writer.writerows([section.title, index, column, value] for column, value in row.items())
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
