"""Semantic segmentation of frozen patch tokens: k-NN and logistic regression, a class for every patch.

The protocol of CAPI (facebookresearch/capi@98b4fa1, eval_segmentation.py:172-198, 281-333, 346-468): patch tokens of
the last block at the encoder's own size, standardised; 10 % of the training images held out to choose k, distance and
C; fitted again on all; scored on the pixels that the encoder sees, void left out. A patch's label is the class of most
of its pixels. We differ where our k-NN votes by these labels, not pixel by pixel, and where the standardisation is
fitted again with the classifiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation.features.bank import FeatureBank
from evaluation.features.patches import grid_shape
from evaluation.features.session import Outcome, Session
from evaluation.probes.linear import Logistic, fit_logistic
from evaluation.probes.mean_iou import PixelCounts, count_patches, describe_counts, patch_histograms
from evaluation.probes.patch_classifiers import Scaler, classify_patches

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# Test images whose predicted maps are kept for the report.
_SHOWN = 8


@dataclass(frozen=True)
class _Patches:
    """A split's patches: tokens, pixels of each class (void last), and the class of most pixels (C for void)."""

    tokens: Float[Tensor, "B N D"]
    histograms: Int64[Tensor, "B N C+1"]
    labels: Int64[Tensor, "B N"]

    def of(self, images: Tensor) -> _Patches:
        return _Patches(self.tokens[images], self.histograms[images], self.labels[images])


@dataclass(frozen=True)
class _Choice:
    """A classifier: what was chosen for it, how that fared on the held-out part, and its test predictions."""

    chosen: dict[str, Any]
    held_out: dict[str, Any]
    predictions: Int64[Tensor, "B N"]


def probe_segmentation(session: Session) -> Outcome:
    """Returns mean and per-class IoU of every classifier, beside the ceiling of the patch grid and the majority class.

    Collective: queries of k-NN and values of C are dealt to the processes.

    Raises:
        ValueError: too few images or patches.
    """
    config, (train_bank, test_bank) = session.config.segmentation, session.patches
    num_classes = train_bank.num_classes
    height, width = train_bank.labels.shape[1:]
    grid = grid_shape(train_bank.tensors["patch_tokens"].shape[1], (height, width), session.encoder.spec)
    train, test = (_cut(bank, grid, num_classes) for bank in (train_bank, test_bank))
    absent = num_classes - len(train.labels[train.labels < num_classes].unique())
    if absent:
        session.note(f"segmentation: {absent} of {num_classes} classes are the label of no training patch")
    choices: dict[str, _Choice] = {}
    for classifier in config.classifiers:
        choose = _choose_knn if classifier == "knn" else _choose_logistic
        choices[classifier] = choose(session, train, test, num_classes)
    # The class of most pixels wherever a patch has any; void patches count for nobody.
    ceiling = test.histograms[..., :-1].argmax(dim=2)
    majority = train.histograms[..., :-1].sum(dim=(0, 1)).argmax()
    scored = {name: count_patches(test.histograms, choice.predictions) for name, choice in choices.items()}
    scored["ceiling"] = count_patches(test.histograms, ceiling)
    scored["majority"] = count_patches(test.histograms, majority.expand_as(ceiling))
    pixels = test.histograms[..., :-1].long().sum(dim=(0, 1)).tolist()
    figures = _describe(session, scored, choices, pixels, grid)
    kept = {"sample_ids": test_bank.sample_ids[:_SHOWN]}
    for name in choices:
        kept[f"{name}_maps"] = choices[name].predictions[:_SHOWN]
        kept[f"{name}_intersections"] = torch.from_numpy(scored[name].intersections)
        kept[f"{name}_unions"] = torch.from_numpy(scored[name].unions)
    return Outcome(figures, kept)


def _describe(
    session: Session,
    scored: dict[str, PixelCounts],
    choices: dict[str, _Choice],
    pixels: list[int],
    grid: tuple[int, int],
) -> dict[str, Any]:
    train, test = session.patches
    about = describe_counts(
        scored,
        test.manifest.classes,
        pixels,
        confidence=session.config.confidence,
        seed=session.config.seed,
    )
    for name, choice in choices.items():
        about["classifiers"][name] |= {**choice.chosen, "held_out_miou": choice.held_out}
    return {
        "headline": {f"{name}_miou": counts.mean_iou() for name, counts in scored.items()},
        **about,
        "grid": list(grid),
        "image_size": session.encoder.transform.describe().get("image_size", test.labels.shape[-1]),
        "train_images": len(train.labels),
        "test_images": len(test.labels),
    }


def _cut(bank: FeatureBank, grid: tuple[int, int], num_classes: int) -> _Patches:
    histograms = patch_histograms(bank.labels, grid, num_classes)
    if not histograms[..., :-1].any():
        where = f"{bank.manifest.directory}:{bank.manifest.split}"
        raise ValueError(f"every pixel of {where} is void; expected some of a class; look at the label maps")
    # Of equal numbers the first class, and void last.
    return _Patches(bank.tensors["patch_tokens"], histograms, histograms.argmax(dim=2))


def _split_images(num_images: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns indices (fitted, held out) of images at random."""
    if num_images < 2:
        raise ValueError(
            f"the training split has {num_images} image; expected at least 2, of which one can be held out to choose "
            "by; set data.max_train_images higher"
        )
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    count = min(max(round(share * num_images), 1), num_images - 1)
    return order[count:].sort().values, order[:count].sort().values


def _fitting_rows(
    session: Session, patches: _Patches, num_classes: int
) -> tuple[Scaler, Float[Tensor, "M D"], Int64[Tensor, " M"]]:
    """Returns the scaler of a split's patches, and rows and labels of those that have a class and are drawn."""
    limit, labels = session.config.segmentation.max_train_patches, patches.labels.flatten()
    chosen = (labels < num_classes).nonzero()[:, 0]
    if not len(chosen):
        raise ValueError("every training patch is void; expected some with a class; look at the label maps")
    if limit is not None and limit < len(chosen):
        generator = torch.Generator().manual_seed(session.config.seed)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:limit].sort().values]
    scaler = Scaler.fit(patches.tokens)
    return scaler, scaler.rows(patches.tokens.flatten(0, 1)[chosen]), labels[chosen]


def _choose_knn(session: Session, train: _Patches, test: _Patches, num_classes: int) -> _Choice:
    config = session.config.segmentation

    def predict(fitted: _Patches, queried: _Patches, distance: str, ks: tuple[int, ...]) -> dict[int, Tensor]:
        scaler, bank, labels = _fitting_rows(session, fitted, num_classes)
        if max(ks) > len(bank):
            raise ValueError(
                f"segmentation.k is {max(ks)}; expected at most {len(bank)}, the patches of the bank; set "
                "segmentation.k"
            )
        found = classify_patches(
            bank,
            labels,
            scaler.rows(queried.tokens),
            ks=ks,
            distance=distance,
            num_classes=num_classes,
            processes=session.processes,
        )
        return {k: predictions.view(queried.labels.shape) for k, predictions in found.items()}

    parts = _split_images(len(train.labels), config.held_out, session.config.seed)
    fitted, held = (train.of(part) for part in parts)
    held_out: dict[str, dict[str, float]] = {}
    for distance in config.distances:
        found = predict(fitted, held, distance, config.k)
        held_out[distance] = {
            str(k): count_patches(held.histograms, predictions).mean_iou() for k, predictions in found.items()
        }
    distance, k = max(
        ((distance, k) for distance in config.distances for k in config.k),
        key=lambda choice: held_out[choice[0]][str(choice[1])],
    )
    session.note_edge("segmentation.k", float(k), [float(value) for value in config.k])
    predictions = predict(train, test, distance, (k,))[k]
    return _Choice({"k": k, "distance": distance}, held_out, predictions)


def _choose_logistic(session: Session, train: _Patches, test: _Patches, num_classes: int) -> _Choice:
    config, processes = session.config.segmentation, session.processes

    def fit(rows: Tensor, labels: Tensor, strength: float) -> Logistic:
        return fit_logistic(
            rows,
            labels,
            inverse_regularisation=strength,
            num_classes=num_classes,
            max_iterations=config.max_iterations,
            device=processes.device,
            on_unit_features=False,
        )

    parts = _split_images(len(train.labels), config.held_out, session.config.seed)
    fitted, held = (train.of(part) for part in parts)
    scaler, rows, labels = _fitting_rows(session, fitted, num_classes)
    queries = scaler.rows(held.tokens)
    own: dict[float, tuple[float, bool]] = {}
    for number in processes.mine(len(config.inverse_regularisation)):
        strength = config.inverse_regularisation[number]
        model = fit(rows, labels, strength)
        counts = count_patches(held.histograms, model.predict(queries).view(held.labels.shape))
        own[strength] = (counts.mean_iou(), model.converged)
    found = {strength: value for part in processes.gather(own) for strength, value in part.items()}
    best = max(config.inverse_regularisation, key=lambda strength: found[strength][0])
    session.note_edge("segmentation.inverse_regularisation", best, config.inverse_regularisation)
    predictions = None
    converged = True
    if processes.rank == 0:  # one solver, one answer
        scaler, rows, labels = _fitting_rows(session, train, num_classes)
        model = fit(rows, labels, best)
        predictions, converged = (
            model.predict(scaler.rows(test.tokens)).view(test.labels.shape),
            model.converged,
        )
    predictions, converged = processes.gather((predictions, converged))[0]
    short = [f"{strength:g}" for strength, (_, done) in found.items() if not done]
    short += [] if converged or f"{best:g}" in short else [f"{best:g}"]
    if short:
        session.note(
            f"segmentation: logistic regression with C = {', '.join(short)} has not converged; set "
            f"segmentation.max_iterations above {config.max_iterations}"
        )
    held_out = {f"{strength:g}": found[strength][0] for strength in config.inverse_regularisation}
    return _Choice({"C": best, "converged": converged}, held_out, predictions)
