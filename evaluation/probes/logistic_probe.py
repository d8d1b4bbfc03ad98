"""Logistic regression on features: on the whole training split, and on a few images per class."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from evaluation.features.session import Outcome, Session
from evaluation.probes.linear import Logistic, fit_logistic, split_held_out


def probe_logistic(session: Session) -> Outcome:
    """Returns logistic regression; C is chosen on a held-out part of the training split."""
    config, (train, test) = session.config.logistic, session.banks
    name = session.features_for((config.feature,))[0]
    predicted, strength, held_out = predict_logistic(
        session, train.select(name), train.labels, test.select(name)
    )
    top1 = float((predicted == test.labels).double().mean())
    figures = {
        "headline": {"top1": top1, "feature": name, "C": strength, "predictions": "selected"},
        "interval": session.interval(predicted, test.labels),
        "held_out_top1": held_out,
    }
    return Outcome(figures, {"labels": test.labels, "selected": predicted})


def predict_logistic(
    session: Session, features: Tensor, labels: Tensor, queries: Tensor
) -> tuple[Tensor, float, dict[str, float]]:
    """Returns predictions, the chosen C, and held-out accuracies by C."""
    config = session.config.logistic
    fitted, held_out = split_held_out(labels, config.held_out, session.config.seed)
    accuracies: dict[float, float] = {}
    for strength in config.inverse_regularisation:
        model = _fit(session, features[fitted], labels[fitted], strength)
        accuracies[strength] = float((model.predict(features[held_out]) == labels[held_out]).double().mean())
    best = max(accuracies, key=lambda strength: accuracies[strength])
    session.note_edge("logistic.inverse_regularisation", best, config.inverse_regularisation)
    predicted = _fit(session, features, labels, best).predict(queries)
    return predicted, best, {f"{c:g}": value for c, value in accuracies.items()}


def _fit(session: Session, inputs: Tensor, truth: Tensor, strength: float) -> Logistic:
    limit = session.config.logistic.max_iterations
    model = fit_logistic(
        inputs,
        truth,
        inverse_regularisation=strength,
        num_classes=session.banks[0].num_classes,
        max_iterations=limit,
        device=session.processes.device,
    )
    if not model.converged:
        session.note(
            f"logistic regression with C = {strength:g} has not converged after {model.iterations} iterations; "
            f"set logistic.max_iterations above {limit}"
        )
    return model


def probe_few_shot(session: Session) -> Outcome:
    """Returns logistic regression on a few images per class: mean and standard deviation over draws.

    Numbers of shots that a class of the training split does not have are left out and said.

    Raises:
        ValueError: none of the numbers can be drawn.
    """
    config, (train, test) = session.config.few_shot, session.banks
    name = session.features_for((config.feature,))[0]
    features, queries = train.select(name), test.select(name)
    shots: dict[str, Any] = {}
    for count in _possible_shots(session):
        accuracies = []
        for draw in range(config.draws):
            chosen = _draw_shots(train.labels, count, seed=session.config.seed * 1009 + draw)
            model = _fit(session, features[chosen], train.labels[chosen], config.inverse_regularisation)
            accuracies.append(float((model.predict(queries) == test.labels).double().mean()))
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        shots[str(count)] = {
            "top1": statistics.mean(accuracies),
            "standard_deviation": spread,
            "draws": accuracies,
        }
    headline = {f"top1 {count}-shot": figure["top1"] for count, figure in shots.items()}
    return Outcome({"headline": headline, "shots": shots, "feature": name})


def _possible_shots(session: Session) -> list[int]:
    asked, train = session.config.few_shot.shots, session.banks[0]
    counts = torch.bincount(train.labels, minlength=train.num_classes)
    present = counts[counts > 0]
    smallest = int(present.min())
    name = train.manifest.classes[int((counts == smallest).nonzero()[0])]
    possible = [count for count in asked if count <= smallest]
    if not possible:
        raise ValueError(
            f"few_shot.shots is {list(asked)}; expected at most {smallest}, the training images of class {name!r}; "
            "set few_shot.shots"
        )
    for count in sorted(set(asked) - set(possible)):
        session.note(
            f"few_shot: {count} shots are left out, because class {name!r} has {smallest} training images"
        )
    return possible


def _draw_shots(labels: Tensor, count: int, seed: int) -> Tensor:
    """Returns indices of `count` images of every class that has any."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])
