"""The probes: from an encoder's features, weights or images to figures and predictions."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.clustering import agreement, cluster
from evaluation.confidence import bootstrap
from evaluation.fine_tune import probe_fine_tune
from evaluation.knn import HEADLINE_K, classify_knn
from evaluation.linear import LinearGrid, fit_logistic, split_held_out, train_linear_grid
from evaluation.long_tail import LongTailRule, imbalanced_subset, report_long_tail
from evaluation.projections import project
from evaluation.prototype_probe import probe_prototypes
from evaluation.prototypes import assign, load_exported_prototypes
from evaluation.session import Outcome, Session

logger = logging.getLogger(__name__)


def probe_knn(session: Session) -> Outcome:
    """Returns weighted k-NN accuracies for every feature and k; headline k is 20 where it is among them."""
    config, (train, test) = session.config.knn, session.banks
    names = session.features_for(config.features)
    headline = HEADLINE_K if HEADLINE_K in config.k else config.k[0]
    by_feature: dict[str, Any] = {}
    predictions: dict[str, Tensor] = {"labels": test.labels}
    for name in names:
        same = next((n for n in by_feature if torch.equal(train.select(n), train.select(name))), None)
        if same is not None:  # a model that averages its patches: its embedding is their mean
            by_feature[name], predictions[name] = by_feature[same], predictions[same]
            continue
        result = classify_knn(
            train.select(name),
            train.labels,
            test.select(name),
            test.labels,
            ks=config.k,
            num_classes=train.num_classes,
            temperature=config.temperature,
            processes=session.processes,
        )
        by_feature[name] = {
            "top1": {str(k): value for k, value in result.top1.items()},
            "top5": {str(k): value for k, value in result.top5.items()},
        }
        predictions[name] = result.predictions[headline]
    best = max(names, key=lambda name: by_feature[name]["top1"][str(headline)])
    figures = {
        "headline": {
            "top1": by_feature[names[0]]["top1"][str(headline)],
            "k": headline,
            "feature": names[0],
            "predictions": names[0],
        },
        "best_feature_on_test": best,
        "temperature": config.temperature,
        "features": by_feature,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
    }
    return Outcome(figures, predictions)


def probe_linear(session: Session) -> Outcome:
    """Returns the linear probe: learning rate and feature chosen on a held-out part of the training split.

    The whole grid is then trained again on the whole training split; `test_selected` is its best figure on the
    test split, which papers report.
    """
    train, test = session.banks
    names = session.features_for(session.config.linear.features)
    fitted = _fit_linear(session, train.labels, {name: train.select(name) for name in names})
    name, rate_index, grids, held_out_top1 = fitted
    rates = session.config.linear.learning_rates
    _warn_at_edge("linear.learning_rates", rates[rate_index], rates)
    by_feature = {key: grid.top1(test.select(key), test.labels) for key, grid in grids.items()}
    chosen = grids[name].predict(test.select(name))[:, rate_index]
    best = max(((value, key, i) for key, values in by_feature.items() for i, value in enumerate(values)))
    figures = {
        "headline": {
            "top1": by_feature[name][rate_index],
            "feature": name,
            "learning_rate": rates[rate_index],
            "test_selected": best[0],
            "predictions": "selected",
        },
        "interval": _interval(session, chosen, test.labels),
        "held_out_top1": held_out_top1,
        "test_selected": {"top1": best[0], "feature": best[1], "learning_rate": rates[best[2]]},
        "test_top1_by_feature": by_feature,
        "learning_rates": list(rates),
    }
    return Outcome(figures, {"labels": test.labels, "selected": chosen})


def probe_logistic(session: Session) -> Outcome:
    """Returns logistic regression; C is chosen on a held-out part of the training split."""
    config, (train, test) = session.config.logistic, session.banks
    name = session.features_for((config.feature,))[0]
    predicted, strength, held_out = _predict_logistic(
        session, train.select(name), train.labels, test.select(name)
    )
    top1 = float((predicted == test.labels).double().mean())
    figures = {
        "headline": {"top1": top1, "feature": name, "C": strength, "predictions": "selected"},
        "interval": _interval(session, predicted, test.labels),
        "held_out_top1": held_out,
    }
    return Outcome(figures, {"labels": test.labels, "selected": predicted})


def probe_few_shot(session: Session) -> Outcome:
    """Returns logistic regression on a few images per class: mean and standard deviation over draws."""
    config, (train, test) = session.config.few_shot, session.banks
    name = session.features_for((config.feature,))[0]
    features, queries = train.select(name), test.select(name)
    shots: dict[str, Any] = {}
    for count in config.shots:
        accuracies = []
        for draw in range(config.draws):
            chosen = _draw_shots(train.labels, count, seed=session.config.seed * 1009 + draw)
            model = fit_logistic(
                features[chosen],
                train.labels[chosen],
                inverse_regularisation=config.inverse_regularisation,
                num_classes=train.num_classes,
                device=session.processes.device,
            )
            accuracies.append(float((model.predict(queries) == test.labels).double().mean()))
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        shots[str(count)] = {
            "top1": statistics.mean(accuracies),
            "standard_deviation": spread,
            "draws": accuracies,
        }
    headline = {f"top1 {count}-shot": figure["top1"] for count, figure in shots.items()}
    return Outcome({"headline": headline, "shots": shots, "feature": name})


def probe_clustering(session: Session) -> Outcome:
    """Returns how k-means on test features, and prototypes where images can be projected, agree with the classes."""
    config, (_, test) = session.config.clustering, session.banks
    name = session.features_for((config.feature,))[0]
    _, assignments = cluster(
        test.select(name),
        num_clusters=config.num_clusters or test.num_classes,
        restarts=config.restarts,
        max_iterations=config.max_iterations,
        seed=session.config.seed,
    )
    figures: dict[str, Any] = {"headline": agreement(assignments, test.labels), "feature": name}
    folder = session.encoder.folder
    projections = project(folder, test.select("embedding")) if folder is not None else None
    if folder is not None and projections is not None:
        winners = assign(projections, load_exported_prototypes(folder)["teacher"])
        _, dense = winners.unique(return_inverse=True)
        figures["prototypes"] = agreement(dense, test.labels)
    return Outcome(figures)


def probe_long_tail(session: Session) -> Outcome:
    """Returns accuracy by class frequency of a classifier fitted on the (thinned) training split."""
    config, (train, test) = session.config.long_tail, session.banks
    chosen = torch.arange(len(train.labels))
    if config.imbalance_ratio is not None:
        chosen = imbalanced_subset(
            train.labels, train.num_classes, config.imbalance_ratio, session.config.seed
        )
    labels = train.labels[chosen]
    predicted, name = _predict_long_tail(session, chosen)
    confidence = session.config.confidence
    figures = report_long_tail(
        predicted,
        test.labels,
        torch.bincount(labels, minlength=train.num_classes),
        test.manifest.classes,
        rule=LongTailRule(config.few_at_most, config.many_above),
        resamples=confidence.resamples,
        level=confidence.level,
        seed=session.config.seed,
    )
    headline = {
        group: values["top1"] for group, values in figures["groups"].items() if values["top1"] is not None
    }
    about = {"classifier": config.classifier, "feature": name, "imbalance_ratio": config.imbalance_ratio}
    figures = {
        "headline": {**headline, "predictions": "selected"},
        **about,
        "train_images": len(labels),
        **figures,
    }
    return Outcome(figures, {"labels": test.labels, "selected": predicted})


def _predict_long_tail(session: Session, chosen: Tensor) -> tuple[Tensor, str]:
    """Returns the predictions of the long tail's classifier, fitted on the chosen training images, and its feature."""
    config, (train, test) = session.config, session.banks
    labels = train.labels[chosen]
    if config.long_tail.classifier == "linear":
        names = session.features_for(config.linear.features)
        name, rate, grids, _ = _fit_linear(session, labels, {n: train.select(n)[chosen] for n in names})
        return grids[name].predict(test.select(name))[:, rate], name
    if config.long_tail.classifier == "logistic":
        name = session.features_for((config.logistic.feature,))[0]
        predicted, _, _ = _predict_logistic(session, train.select(name)[chosen], labels, test.select(name))
        return predicted, name
    name = session.features_for(config.knn.features)[0]
    k = min(HEADLINE_K, len(labels))
    result = classify_knn(
        train.select(name)[chosen],
        labels,
        test.select(name),
        test.labels,
        ks=(k,),
        num_classes=train.num_classes,
        temperature=config.knn.temperature,
        processes=session.processes,
    )
    return result.predictions[k], name


def _fit_linear(
    session: Session, labels: Tensor, features: dict[str, Tensor]
) -> tuple[str, int, dict[str, LinearGrid], dict[str, list[float]]]:
    """Returns chosen feature, index of its learning rate, grids on the whole split, and held-out accuracies."""
    config = session.config.linear
    num_classes = session.banks[0].num_classes
    fitted, held_out = split_held_out(labels, config.held_out, session.config.seed)

    def train_grid(inputs: Tensor, truth: Tensor) -> LinearGrid:
        return train_linear_grid(
            inputs,
            truth,
            learning_rates=config.learning_rates,
            num_classes=num_classes,
            epochs=config.epochs,
            batch_size=config.batch_size,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            seed=session.config.seed,
            device=session.processes.device,
        )

    held_out_top1 = {
        name: train_grid(inputs[fitted], labels[fitted]).top1(inputs[held_out], labels[held_out])
        for name, inputs in features.items()
    }
    name = max(held_out_top1, key=lambda key: max(held_out_top1[key]))
    rate = max(range(len(config.learning_rates)), key=lambda index: held_out_top1[name][index])
    return name, rate, {key: train_grid(inputs, labels) for key, inputs in features.items()}, held_out_top1


def _predict_logistic(
    session: Session, features: Tensor, labels: Tensor, queries: Tensor
) -> tuple[Tensor, float, dict[str, float]]:
    """Returns predictions, the chosen C, and held-out accuracies by C."""
    config, num_classes = session.config.logistic, session.banks[0].num_classes
    fitted, held_out = split_held_out(labels, config.held_out, session.config.seed)

    def fit(inputs: Tensor, truth: Tensor, strength: float, test_inputs: Tensor) -> Tensor:
        model = fit_logistic(
            inputs,
            truth,
            inverse_regularisation=strength,
            num_classes=num_classes,
            max_iterations=config.max_iterations,
            device=session.processes.device,
        )
        return model.predict(test_inputs)

    accuracies = {
        strength: float(
            (fit(features[fitted], labels[fitted], strength, features[held_out]) == labels[held_out])
            .double()
            .mean()
        )
        for strength in config.inverse_regularisation
    }
    best = max(accuracies, key=lambda strength: accuracies[strength])
    _warn_at_edge("logistic.inverse_regularisation", best, config.inverse_regularisation)
    return fit(features, labels, best, queries), best, {f"{c:g}": value for c, value in accuracies.items()}


def _warn_at_edge(key: str, chosen: float, grid: Sequence[float]) -> None:
    """A choice at the end of its grid may be better beyond it: the figure is then a lower bound."""
    if len(grid) > 1 and chosen in (min(grid), max(grid)):
        logger.warning("%s: %g was chosen, the end of the grid; a wider grid may do better", key, chosen)


def _draw_shots(labels: Tensor, count: int, seed: int) -> Tensor:
    """Returns indices of `count` images per class, or all of a class that has fewer."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])


def _interval(session: Session, predicted: Tensor, labels: Tensor) -> list[float]:
    confidence = session.config.confidence
    right = (predicted == labels).numpy()
    return bootstrap(
        right, resamples=confidence.resamples, level=confidence.level, seed=session.config.seed
    ).as_list()


PROBE_FUNCTIONS: dict[str, Callable[[Session], Outcome]] = {
    "prototypes": probe_prototypes,
    "knn": probe_knn,
    "linear": probe_linear,
    "logistic": probe_logistic,
    "few_shot": probe_few_shot,
    "clustering": probe_clustering,
    "long_tail": probe_long_tail,
    "fine_tune": probe_fine_tune,
}
