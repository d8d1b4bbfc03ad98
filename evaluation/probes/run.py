"""The probes: from an encoder's features, weights or images to figures and predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evaluation.encoders.projections import find_spaces, project
from evaluation.features.session import Outcome, Session
from evaluation.probes.attentive import probe_attentive
from evaluation.probes.clustering import agreement, cluster
from evaluation.probes.fine_tune import probe_fine_tune
from evaluation.probes.knn import HEADLINE_K, classify_knn
from evaluation.probes.linear_probe import fit_linear, probe_linear
from evaluation.probes.logistic_probe import predict_logistic, probe_few_shot, probe_logistic
from evaluation.probes.long_tail import LongTailRule, imbalanced_subset, report_long_tail
from evaluation.probes.prototype_audit import assign, load_exported_prototypes
from evaluation.probes.prototype_probe import probe_prototypes
from evaluation.probes.segmentation import probe_segmentation
from evaluation.probes.segmentation_linear import probe_segmentation_linear


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


def probe_clustering(session: Session) -> Outcome:
    """Returns how k-means on test features, and prototypes where images can be projected, agree with the classes."""
    config, (_, test) = session.config.clustering, session.banks
    name = session.features_for((config.feature,))[0]
    _, assignments, converged = cluster(
        test.select(name),
        num_clusters=config.num_clusters or test.num_classes,
        restarts=config.restarts,
        max_iterations=config.max_iterations,
        seed=session.config.seed,
    )
    if not converged:
        session.note(
            f"clustering: k-means was still moving after {config.max_iterations} iterations; "
            "set clustering.max_iterations higher"
        )
    figures: dict[str, Any] = {"headline": agreement(assignments, test.labels), "feature": name}
    folder = session.encoder.folder
    space = None if folder is None else find_spaces(folder, session.encoder.run_dir).get("instance")
    projections = None
    if folder is not None and space is not None:
        projections = project(folder, test.select("embedding"), space)
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
    absent = train.num_classes - len(labels.unique())
    if absent:
        session.note(
            f"long_tail: {absent} of {train.num_classes} classes have no training image and count as tail"
        )
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
        fit = fit_linear(session, labels, {n: train.select(n)[chosen] for n in names})
        predicted = fit.grids[fit.feature].predict(test.select(fit.feature))
        return predicted[:, fit.rate_index], fit.feature
    if config.long_tail.classifier == "logistic":
        name = session.features_for((config.logistic.feature,))[0]
        predicted, _, _ = predict_logistic(session, train.select(name)[chosen], labels, test.select(name))
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


PROBE_FUNCTIONS: dict[str, Callable[[Session], Outcome]] = {
    "prototypes": probe_prototypes,
    "knn": probe_knn,
    "linear": probe_linear,
    "logistic": probe_logistic,
    "few_shot": probe_few_shot,
    "clustering": probe_clustering,
    "long_tail": probe_long_tail,
    "fine_tune": probe_fine_tune,
    "attentive": probe_attentive,
    "segmentation": probe_segmentation,
    "segmentation_linear": probe_segmentation_linear,
}
