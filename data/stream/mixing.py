"""How mixed the batches of a run will be: the plan is simulated, nothing is decoded.

Lanes read shards in order and shuffle a window only, so shards that were written class by class give batches of few
classes. What a batch holds is known before the run: the plan is a pure function, the labels are in the index.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.shards import Manifest, load_index
from data.stream.plan import SamplePlan
from data.stream.samplers import build_copies, selected_labels

logger = logging.getLogger(__name__)

# A batch of less than this share of what a uniform draw holds is worth a warning.
LEAST_SHARE = 0.8
_NUM_NEIGHBOURHOODS = 1000
_NUM_DRAWN = 8192  # samples of the simulated batches together
_MIN_BATCHES, _MAX_BATCHES = 4, 64


@dataclass(frozen=True)
class Mixing:
    """What batches hold.

    Attributes:
        kind: `classes`; or, where the images have no labels, `neighbourhoods`, a thousandth of the split's samples each
            in the order in which they were written.
        distinct: mean number of distinct ones in a batch.
        uniform: the number expected in a batch drawn uniformly without replacement.
        batch_size: samples of a batch.
    """

    kind: str
    distinct: float
    uniform: float
    batch_size: int

    @property
    def share(self) -> float:
        """Distinct ones over those of a uniform draw; about 1 for a well shuffled set."""
        return self.distinct / self.uniform

    def describe(self, directory: str) -> str:
        """Returns one line, with the remedy where the batches are badly mixed."""
        text = (
            f"a batch of {self.batch_size:,} holds {self.distinct:.0f} {self.kind}, a uniform draw {self.uniform:.0f}: "
            f"mixing {self.share:.2f}"
        )
        if self.share >= LEAST_SHARE:
            return text
        sorted_by = (
            "sorted by class" if self.kind == "classes" else "sorted, unless they were shuffled elsewhere"
        )
        return (
            f"{text}; expected at least {LEAST_SHARE}: the shards are {sorted_by}; rewrite them in random order with "
            f"python -m data.make_shards reshuffle {directory} --out NEW, or raise data.num_lanes and "
            "data.shuffle_window"
        )


def measure_mixing(
    manifest: Manifest,
    *,
    num_lanes: int,
    window: int,
    batch_size: int,
    sampler: str = "uniform",
    seed: int = 0,
) -> Mixing | None:
    """Returns how mixed the global batches of a run's first epoch are; None where there is nothing to measure.

    Labels are taken where the index has them. Without them, neighbourhoods in the shards stand in for classes, unless
    the manifest says that the images were shuffled before they were written.

    Args:
        manifest: the split.
        num_lanes: L of the plan.
        window: that a lane shuffles.
        batch_size: of one optimizer step on all ranks.
        sampler: see `data.config.DataConfig`.
        seed: of the plan.
    """
    groups, kind = _group(manifest)
    if groups is None:
        return None
    plan = SamplePlan(
        manifest, seed=seed, num_lanes=num_lanes, window=window, copies=build_copies(manifest, sampler)
    )
    batch_size = min(batch_size, plan.num_samples)
    num_batches = int(np.clip(_NUM_DRAWN // batch_size, _MIN_BATCHES, _MAX_BATCHES))
    num_batches = min(num_batches, plan.num_samples // batch_size)
    # From everywhere in the epoch, at whole batches.
    starts = np.linspace(0, plan.num_samples // batch_size - 1, num_batches).astype(np.int64) * batch_size
    distinct = [len(np.unique(groups[plan.samples_of_slots(int(start), batch_size)])) for start in starts]
    counts = np.bincount(groups[groups >= 0], weights=plan.copies_of_samples(0)[groups >= 0])
    uniform = expected_distinct(counts, batch_size)
    return Mixing(kind, float(np.mean(distinct)), uniform, batch_size)


def expected_distinct(counts: NDArray[Any], batch_size: int) -> float:
    """Returns the expected number of distinct groups in a draw of `batch_size` without replacement.

    sum_c 1 - C(N - n_c, B) / C(N, B), where n_c of N samples are of group c.
    """
    counts = counts[counts > 0]
    total = counts.sum()
    # C(N - n, B) / C(N, B) as a product over the B draws, in logarithms.
    left = total - np.arange(batch_size, dtype=np.float64)
    ratios = 1 - np.unique(counts)[:, None] / left
    with np.errstate(divide="ignore"):
        absent = np.exp(np.log(np.clip(ratios, 0, None)).sum(axis=1))
    return float(np.sum(1 - absent[np.searchsorted(np.unique(counts), counts)]))


def report_mixing(directory: str, split: str, mixing: Mixing | None) -> None:
    """Logs how mixed a split's batches are, as a warning where it is bad."""
    if mixing is None:
        return
    level = logging.INFO if mixing.share >= LEAST_SHARE else logging.WARNING
    logger.log(level, "%s: %s", split, mixing.describe(directory))


def _group(manifest: Manifest) -> tuple[NDArray[np.int64] | None, str]:
    """Returns the group of every sample of the tars by its id (-1 for those that are not selected), and what it is."""
    index = load_index(manifest)
    labels = selected_labels(manifest) if index is not None else None
    if index is not None and labels is not None and len(labels) and (labels >= 0).all():
        return index["label"].astype(np.int64), "classes"
    if manifest.notes.get("shuffled"):
        return None, ""
    total = manifest.first_ids[-1]
    # A neighbourhood of fewer than a few samples would be one whatever the order.
    num_groups = max(1, min(_NUM_NEIGHBOURHOODS, total // 16))
    return np.arange(total, dtype=np.int64) * num_groups // total, "neighbourhoods"
