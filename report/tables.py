"""Results side by side, as rows of text: what `evaluate.py` prints and the report's tables are made of."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, str]


@dataclass(frozen=True)
class KnnComparison:
    """k-NN top-1 (0..1) of an encoder beside its controls, by feature.

    Attributes:
        k: neighbours.
        trained: feature to accuracy of the encoder.
        random_init: feature to the mean over fresh initialisations; empty where there is no such control.
        num_seeds: initialisations behind that mean.
        raw_pixels: accuracy of the pixels, or None.
    """

    k: int
    trained: dict[str, float]
    random_init: dict[str, float]
    num_seeds: int
    raw_pixels: float | None

    def fair_feature(self) -> str | None:
        """Returns the pooling at which the fresh encoder is better, CLS or patch mean: both are compared there."""
        candidates: list[str] = [
            name for name in ("cls", "mean") if name in self.random_init and name in self.trained
        ]
        candidates = candidates or [name for name in self.random_init if name in self.trained]
        return max(candidates, key=lambda name: self.random_init[name], default=None)


def compare_knn(result: dict[str, Any], controls: Sequence[dict[str, Any]]) -> KnnComparison:
    """Returns an encoder's k-NN result beside those of its controls, at the encoder's headline k."""
    k = result["figures"]["headline"]["k"]
    seeds = [c for c in controls if c["encoder"]["label"].startswith("random-init")]
    pixels = [c for c in controls if c["encoder"]["label"] == "raw-pixels"]
    shared = set.intersection(*(set(_top1(c, k)) for c in seeds)) if seeds else set()
    return KnnComparison(
        k=k,
        trained=_top1(result, k),
        random_init={
            name: statistics.mean(_top1(c, k)[name] for c in seeds)
            for name in _top1(result, k)
            if name in shared
        },
        num_seeds=len(seeds),
        raw_pixels=next(iter(_top1(pixels[0], k).values())) if pixels else None,
    )


def knn_rows(comparison: KnnComparison) -> list[Row]:
    """Returns one row for each feature, trained beside fresh and pixels, in percent."""
    rows = []
    for name, accuracy in comparison.trained.items():
        row = {"feature": name, f"k-NN top-1 (k={comparison.k}) trained": percent(accuracy)}
        if comparison.num_seeds:
            fresh = comparison.random_init.get(name)
            row[f"random-init (mean of {comparison.num_seeds})"] = percent(fresh)
            row["difference"] = "" if fresh is None else f"{100 * (accuracy - fresh):+.2f}"
        if comparison.raw_pixels is not None:
            row["raw pixels"] = percent(comparison.raw_pixels)
        rows.append(row)
    return rows


def prototype_rows(result: dict[str, Any]) -> list[Row]:
    """Returns a row for each role: K, unique prototypes at every eps, and usage, with one more row where two are known.

    Usage in training is that of the E-step, with the mass and the logits beside it; that of images is by the logits.
    """
    figures = result["figures"]
    families = figures.get("families", {})
    rows = []
    for role, audited in figures["roles"].items():
        title = f"{role} ({families[role]})" if role in families else role
        row = {"prototypes": title, "K x dim": f"{audited['num_prototypes']} x {audited['dim']}"}
        for eps, fraction in audited["unique_fraction"].items():
            row[f"unique ε={eps}"] = f"{audited['unique'][eps]} ({100 * fraction:.1f} %)"
        first, *more = usages_of(figures, role) or [({}, "")]
        rows.append({**row, **_usage_cells(*first)})
        rows += [{"prototypes": title, **_usage_cells(*usage)} for usage in more]
    return rows


def usages_of(figures: dict[str, Any], role: str) -> list[tuple[dict[str, Any], str]]:
    """Returns a matrix's usage figures, each with over what it was counted: the training epoch, images, patches."""
    found = []
    sections = {"teacher": "training_usage", "patch teacher": "patch_training_usage"}
    training = figures.get(sections.get(role, ""), {})
    if training:
        rows = f"{training['usage_rows']:,.0f} rows, " if "usage_rows" in training else ""
        found.append((training, f"{rows}epoch up to step {training['step']}"))
    images = figures.get("image_usage", {}).get(role)
    if images:
        found.append((images, f"{images['images']:,} test images"))
    patches = figures.get("patch_usage", {}).get(role)
    if patches:
        found.append((patches, f"{patches['patches']:,} patches of {patches['images']:,} test images"))
    return found


def _usage_cells(usage: dict[str, Any], over: str) -> Row:
    titles = {
        "used": "used %",
        "used_by_mass": "by mass >= 1 %",
        "used_by_logits": "by logits %",
        "used_ceiling": "ceiling %",
        "usage_perplexity": "perplexity %",
    }
    return {**{title: percent(usage.get(key)) for key, title in titles.items()}, "usage over": over}


def percent(value: float | None) -> str:
    """Returns a share as a percentage with two digits; empty for None."""
    return "" if value is None else f"{100 * value:.2f}"


def text_table(rows: Sequence[Row]) -> str:
    """Returns rows as aligned plain text."""
    if not rows:
        return ""
    titles = list(rows[0])
    widths = [max(len(title), *(len(row.get(title, "")) for row in rows)) for title in titles]
    lines = [
        {title: title for title in titles},
        {t: "-" * w for t, w in zip(titles, widths, strict=True)},
        *rows,
    ]
    return "\n".join(
        "  ".join(row.get(t, "").ljust(w) for t, w in zip(titles, widths, strict=True)).rstrip()
        for row in lines
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns rows as a Markdown table."""
    if not rows:
        return ""
    titles = list(rows[0])
    body = [titles, *([row.get(title, "") for title in titles] for row in rows)]
    head, *lines = ["| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |" for cells in body]
    return "\n".join([head, "|" + "---|" * len(titles), *lines])


def summarise(paths: Sequence[Path]) -> str:
    """Returns what `evaluate.py` prints: a table for each probe, and the comparison with the controls."""
    results = [{**json.loads(path.read_text()), "path": path} for path in paths]
    controls = [r for r in results if r["encoder"]["role"] == "control" and "controls" in r["path"].parts]
    own = [r for r in results if r not in controls]
    blocks = []
    for result in own:
        title = f"{result['encoder']['label']} ({result['encoder']['role']}): {result['probe']}"
        blocks.append(f"{title}\n{text_table(_rows_of(result, controls))}")
        if result["probe"] == "knn":
            blocks.append(control_sentence(compare_knn(result, controls)))
    return "\n\n".join(block for block in blocks if block)


def control_sentence(comparison: KnnComparison) -> str:
    """Returns the comparison with the controls as a sentence; empty where there are none."""
    feature = comparison.fair_feature()
    if feature is None:
        return ""
    trained, fresh = comparison.trained[feature], comparison.random_init[feature]
    sentence = (
        f"k-NN top-1 at {feature} (where random-init is better): trained {percent(trained)}, random-init "
        f"{percent(fresh)} (mean of {comparison.num_seeds}), difference {100 * (trained - fresh):+.2f} points"
    )
    if comparison.raw_pixels is None:
        return sentence
    best = max(comparison.trained.values())
    ahead = f"{100 * (best - comparison.raw_pixels):+.2f}"
    return f"{sentence}; raw pixels {percent(comparison.raw_pixels)}, best trained feature {ahead} points"


def _rows_of(result: dict[str, Any], controls: Sequence[dict[str, Any]]) -> list[Row]:
    if result["probe"] == "knn":
        return knn_rows(compare_knn(result, controls))
    if result["probe"] == "prototypes":
        return prototype_rows(result)
    headline = result["figures"].get("headline", {})
    plain = ("learning_rate", "weight_decay", "C", "predictions")
    rows = {
        key: percent(v) if isinstance(v, float) and key not in plain else str(v)
        for key, v in headline.items()
    }
    return [{key: text for key, text in rows.items() if key != "predictions"}]


def _top1(result: dict[str, Any], k: int) -> dict[str, float]:
    return {
        name: figures["top1"][str(k)]
        for name, figures in result["figures"]["features"].items()
        if str(k) in figures["top1"]
    }
