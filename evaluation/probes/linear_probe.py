"""The linear probe: learning rate, feature and length of training chosen on a held-out part of the training split."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.features.session import Outcome, Session
from evaluation.probes.linear import LinearGrid, fit_logistic, split_held_out, train_linear_grid

# A longer training is not tried where the last doubling lowered the held-out cross-entropy by less than this share.
_SETTLED = 0.01
# Logistic regression beside the probe, on so many of its images: what the probe should not be far below.
_REFERENCE_IMAGES, _REFERENCE_STRENGTH, _REFERENCE_ITERATIONS = 10_000, 100.0, 100
# Points of held-out accuracy, beyond one standard error, from which the difference is said.
_FAR_BELOW = 0.01


@dataclass(frozen=True)
class LinearFit:
    """A grid of linear classifiers, trained on the whole training split, and how they were chosen.

    Attributes:
        feature: chosen feature.
        rate_index: index of the chosen learning rate.
        grids: feature to classifiers.
        held_out_top1: feature to accuracies on the held-out part, one for each learning rate.
        steps: optimizer steps of each training.
        held_out_loss: smallest cross-entropy on the held-out part by number of steps, for every length tried.
        logistic_top1: held-out accuracy of logistic regression on the chosen feature of some of the same images.
    """

    feature: str
    rate_index: int
    grids: dict[str, LinearGrid]
    held_out_top1: dict[str, list[float]]
    steps: int
    held_out_loss: dict[int, float]
    logistic_top1: float


def probe_linear(session: Session) -> Outcome:
    """Returns the linear probe: learning rate and feature chosen on a held-out part of the training split.

    The whole grid is then trained again on the whole training split; `test_selected` is its best figure on the
    test split, which papers report.
    """
    train, test = session.banks
    names = session.features_for(session.config.linear.features)
    fit = fit_linear(session, train.labels, {name: train.select(name) for name in names})
    rates = session.config.linear.learning_rates
    by_feature = {key: grid.top1(test.select(key), test.labels) for key, grid in fit.grids.items()}
    chosen = fit.grids[fit.feature].predict(test.select(fit.feature))[:, fit.rate_index]
    best = max(((value, key, i) for key, values in by_feature.items() for i, value in enumerate(values)))
    figures: dict[str, Any] = {
        "headline": {
            "top1": by_feature[fit.feature][fit.rate_index],
            "feature": fit.feature,
            "learning_rate": rates[fit.rate_index],
            "test_selected": best[0],
            "predictions": "selected",
        },
        "interval": session.interval(chosen, test.labels),
        "steps": fit.steps,
        "held_out_loss_by_steps": {str(steps): loss for steps, loss in fit.held_out_loss.items()},
        "held_out_top1": fit.held_out_top1,
        "held_out_top1_of_logistic": fit.logistic_top1,
        "test_selected": {"top1": best[0], "feature": best[1], "learning_rate": rates[best[2]]},
        "test_top1_by_feature": by_feature,
        "learning_rates": list(rates),
    }
    return Outcome(figures, {"labels": test.labels, "selected": chosen})


def fit_linear(session: Session, labels: Tensor, features: dict[str, Tensor]) -> LinearFit:
    """Returns the classifiers of every feature, and which of them the held-out part prefers.

    Training starts with `linear.epochs` passes and doubles, on the part that is not held out, until `linear.min_steps`
    or until doubling no longer lowers the held-out cross-entropy. What limits the figure is said: too few steps,
    a choice at the end of the grid, an accuracy far below that of logistic regression.

    Args:
        session: configuration and classes.
        labels: of the training images.
        features: name to features of the same images.
    """
    config = session.config.linear
    fitted, held_out = split_held_out(labels, config.held_out, session.config.seed)

    def train_grid(inputs: Tensor, truth: Tensor, steps: int) -> LinearGrid:
        return train_linear_grid(
            inputs,
            truth,
            learning_rates=config.learning_rates,
            num_classes=session.banks[0].num_classes,
            steps=steps,
            batch_size=config.batch_size,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            seed=session.config.seed,
            device=session.processes.device,
        )

    steps = config.epochs * math.ceil(len(labels) / config.batch_size)
    most = max(steps, config.min_steps)
    smallest: dict[int, float] = {}
    while True:
        grids = {n: train_grid(inputs[fitted], labels[fitted], steps) for n, inputs in features.items()}
        losses = {n: grid.loss(features[n][held_out], labels[held_out]) for n, grid in grids.items()}
        before = min(smallest.values(), default=math.inf)
        smallest[steps] = min(min(values) for values in losses.values())
        if steps == most or smallest[steps] > (1 - _SETTLED) * before:
            break
        steps = min(2 * steps, most)
    top1 = {n: grid.top1(features[n][held_out], labels[held_out]) for n, grid in grids.items()}
    # A small held-out part has many ties: the smaller loss decides them.
    name, rate = max(
        ((n, index) for n, values in top1.items() for index in range(len(values))),
        key=lambda choice: (top1[choice[0]][choice[1]], -losses[choice[0]][choice[1]]),
    )
    session.note_edge("linear.learning_rates", config.learning_rates[rate], config.learning_rates)
    if steps < most:
        session.note(
            f"linear: {steps} of {most} steps, because doubling lowered the held-out loss by less than 1 %"
        )
    reference = _logistic_top1(session, features[name], labels, fitted, held_out)
    own = top1[name][rate]
    if reference - own > _FAR_BELOW + math.sqrt(own * (1 - own) / len(held_out)):
        session.note(
            f"linear: {100 * own:.1f} % on the held-out part, where logistic regression on the same "
            f"features has {100 * reference:.1f} %; set linear.min_steps or linear.learning_rates higher"
        )
    whole = {key: train_grid(inputs, labels, steps) for key, inputs in features.items()}
    return LinearFit(name, rate, whole, top1, steps, smallest, reference)


def _logistic_top1(
    session: Session, features: Tensor, labels: Tensor, fitted: Tensor, held_out: Tensor
) -> float:
    """Returns the held-out accuracy of a quick logistic regression on a random part of the fitted images."""
    generator = torch.Generator().manual_seed(session.config.seed)
    chosen = fitted[torch.randperm(len(fitted), generator=generator)[:_REFERENCE_IMAGES]]
    model = fit_logistic(
        features[chosen],
        labels[chosen],
        inverse_regularisation=_REFERENCE_STRENGTH,
        num_classes=session.banks[0].num_classes,
        max_iterations=_REFERENCE_ITERATIONS,
        device=session.processes.device,
    )
    return float((model.predict(features[held_out]) == labels[held_out]).double().mean())
