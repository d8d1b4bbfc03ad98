"""Alarms in plain words: what a run's metrics say when something has gone wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_GRACE_STEPS = 200
_FROZEN_STEPS = 1000

Metrics = Mapping[str, float]


class Alarm(NamedTuple):
    """One alarm: a short name and a sentence with the value and what to try."""

    name: str
    message: str


class Collapse(NamedTuple):
    """What constant networks make of an objective: the sum of the scalars `terms`, in nats.

    Attributes:
        terms: names of the scalars.
        num_choices: of which a target chooses one: the sum lies between 0 and ln `num_choices`.
        value: what the sum becomes; None: ln `num_choices`.
        remedy: what this objective has against it.
    """

    terms: tuple[str, ...]
    num_choices: int
    value: float | None = None
    remedy: str = "BatchNorm in the head"


def find_alarms(
    metrics: Metrics, *, step: int, collapses: Sequence[Collapse] = (), prefixes: Sequence[str] = ("",)
) -> list[Alarm]:
    """Returns the alarms that a line of metrics raises; none on a healthy run.

    Looks at the keys that are there and stays silent about the others, so a line of any kind will do. An
    alarm that a fresh run would raise too waits for 200 steps, the frozen codebook for 1,000.

    Args:
        metrics: names as in the metrics file: `loss/...`, `prototypes/used`, `gmm/...`, `features/...`.
        step: optimizer steps done.
        collapses: how the objective's scalars show a collapsed run (`Objective.collapses`).
        prefixes: what the names of each set of prototypes begin with: `patch_` for the patches' own.
    """
    found: list[tuple[str, str | None]] = []
    if step >= _GRACE_STEPS:
        found += [("uniform_collapse", _uniform_collapse(metrics, collapse)) for collapse in collapses]
    for prefix in prefixes:
        own = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
        of_set = [("feature_collapse", _feature_collapse(own, collapses))] if step >= _GRACE_STEPS else []
        for name, (keys, first_step, describe) in _RULES.items():
            if step >= first_step and all(key in own for key in keys):
                of_set.append((name, describe(own)))
        named = f"{prefix}prototypes: " if prefix else ""
        found += [(prefix + name, message and named + message) for name, message in of_set]
    return [Alarm(name, message) for name, message in found if message is not None]


def _uniform_collapse(metrics: Metrics, collapse: Collapse) -> str | None:
    keys = [f"loss/{term}" for term in collapse.terms]
    if not all(key in metrics for key in keys):
        return None
    loss, scale = sum(metrics[key] for key in keys), math.log(collapse.num_choices)
    collapsed = scale if collapse.value is None else collapse.value
    if abs(loss - collapsed) > 0.01 * scale:
        return None
    what = f"{' + '.join(collapse.terms)} is {loss:.3f}"
    if collapse.value is None:
        return (
            f"uniform collapse: {what}, within 1 % of ln {collapse.num_choices} = {scale:.3f}, which a constant "
            f"network reaches; try {collapse.remedy}, or a lower learning rate"
        )
    return (
        f"constant targets: {what}, within 1 % of ln {collapse.num_choices} of {collapsed:.3f}, which a constant "
        f"network reaches; try {collapse.remedy}, or a lower learning rate"
    )


def _prototype_death(metrics: Metrics) -> str | None:
    used, ceiling = metrics["prototypes/used"], metrics["prototypes/used_ceiling"]
    # Few rows cannot use many prototypes, and a mixture that waits for its start uses none of none.
    if used > 0.1 * ceiling or ceiling == 0:
        return None
    return (
        f"prototype death: {100 * used:.1f} % of the prototypes won a view, where {100 * ceiling:.0f} % could have; "
        "try prototypes.gmm.init.method=data_spread or revival.method=split"
    )


def _underflow(metrics: Metrics) -> str | None:
    count = metrics["gmm/count_min"]
    if count > 1e-6:
        return None
    return (
        f"underflow of statistics: the smallest count is {count:.1e}; "
        "use prototypes.gmm.forgetting=responsibility"
    )


def _vanished_means(metrics: Metrics) -> str | None:
    vanished = metrics["gmm/zero_norm"]
    # Not `vanished == 0`: a share that is not a number is no healthy one.
    if vanished <= 0:
        return None
    return (
        f"vanished means: {100 * vanished:.1f} % of the means have shrunk away and count as dead, neither used nor "
        "unique; use prototypes.gmm.forgetting=responsibility or prototypes.gmm.revival"
    )


def _frozen_codebook(metrics: Metrics) -> str | None:
    displacement = metrics["gmm/displacement"]
    if displacement > 1e-3:
        return None
    return (
        f"frozen codebook: the means have turned by {displacement:.1e} in cosine since the start, so their "
        "uniqueness is that of random directions; use prototypes.gmm.forgetting=responsibility "
        "and responsibility_scale=sum"
    )


def _feature_collapse(metrics: Metrics, collapses: Sequence[Collapse]) -> str | None:
    # Where they are not measured they are taken for healthy.
    cosine = metrics.get("features/mean_cosine", 0.0)
    rank = metrics.get("features/effective_rank", math.inf)
    if cosine < 0.99 and rank > 2:
        return None
    remedies = dict.fromkeys(collapse.remedy for collapse in collapses)
    return (
        f"feature collapse: two teacher features have cosine {cosine:.4f} on average, effective rank {rank:.1f}; "
        f"try {', '.join([*remedies, ''])}a lower learning rate"
    )


def _beta_below_critical(metrics: Metrics) -> str | None:
    beta, critical = metrics["gmm/beta"], metrics["gmm/beta_critical"]
    if beta >= critical:
        return None
    return (
        f"beta below critical: beta is {beta:.3f}, below {critical:.3f} all means merge; "
        "set prototypes.gmm.beta.guard=critical"
    )


def _outrun(metrics: Metrics) -> str | None:
    drift, spacing = metrics["gmm/drift_per_revisit"], metrics["gmm/spacing"]
    if drift <= spacing:
        return None
    return (
        f"outrun mixture: between two visits of a component a feature moves by {drift:.3f}, farther than to the next "
        f"component ({spacing:.3f}); use fewer prototypes, a larger batch or a slower teacher (optim.ema_momentum)"
    )


_RULES: dict[str, tuple[tuple[str, ...], int, Callable[[Metrics], str | None]]] = {
    "prototype_death": (("prototypes/used", "prototypes/used_ceiling"), _GRACE_STEPS, _prototype_death),
    "underflow": (("gmm/count_min",), 0, _underflow),
    "vanished_means": (("gmm/zero_norm",), 0, _vanished_means),
    "frozen_codebook": (("gmm/displacement",), _FROZEN_STEPS, _frozen_codebook),
    "outrun": (("gmm/drift_per_revisit", "gmm/spacing"), _GRACE_STEPS, _outrun),
    "beta_below_critical": (("gmm/beta", "gmm/beta_critical"), 0, _beta_below_critical),
}
