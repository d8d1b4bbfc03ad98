"""Fine-tuning of the whole encoder by a short recipe, and its test accuracy after the last epoch."""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import RandomResizedCrop

from data.datasets import Manifest
from data.views.pictures import Picture
from evaluation.confidence import bootstrap
from evaluation.encoders.backbones import FeatureModule, TimmFeatures
from evaluation.encoders.encoder import Transform
from evaluation.features.bank import FeatureError, select_feature
from evaluation.features.extract import first_id_after, open_stream
from evaluation.features.processes import Processes
from evaluation.features.session import Outcome, Session
from evaluation.probes.config import FineTuneConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

logger = logging.getLogger(__name__)

# As in the recipes of BEiT and MAE.
_BETAS, _ASPECT = (0.9, 0.999), (3 / 4, 4 / 3)
# Standard deviation of the classifier's initial weights; its biases start at 0.
_INITIAL_STD = 0.01
_REFERENCE_BATCH = 256


class RandomCropAndFlip:
    """A random part of the image, mirrored half of the time, then the encoder's own preprocessing; picklable.

    Args:
        transform: of the encoder: its size, mean and std.
        scale_min: smallest share of the area; 1 shows the image whole.
        flip: mirror half of the images.
    """

    def __init__(self, transform: Transform, scale_min: float, flip: bool) -> None:
        self.transform = transform
        self.scale_min = scale_min
        self.flip = flip

    def __call__(self, image: Picture) -> Float[Tensor, "C H W"]:
        """Returns the augmented image in fp32; draws from torch's stream, which the loader seeds."""
        if self.scale_min < 1:
            outline = torch.empty(image.height, image.width, device="meta")
            top, left, height, width = RandomResizedCrop.get_params(
                outline, [self.scale_min, 1.0], list(_ASPECT)
            )
            image = image.crop((left, top, left + width, top + height))
        if self.flip and torch.rand(()).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.transform(image)


class Classifier(nn.Module):
    """An encoder with a linear classifier on one of its features."""

    def __init__(self, encoder: FeatureModule, feature: str, dim: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature = feature
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=_INITIAL_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C"]:
        """Returns logits."""
        return self.head(select_feature(self.encoder(images), self.feature))


def probe_fine_tune(session: Session) -> Outcome:
    """Returns top-1 after fine-tuning the encoder on the training split; nothing is chosen on the test split.

    Not collective: one process trains, on its device.
    """
    config, (train, test) = session.config.fine_tune, session.splits
    device = session.processes.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(session.config.seed)
        classifier = _build_classifier(session, len(train.classes)).to(device)
        losses = _train(classifier, session)
        # Inside too: a loader draws a seed from the global stream even when nothing is random.
        predicted, labels = _predict(classifier.eval(), session)
    right = (predicted == labels).numpy()
    confidence = session.config.confidence
    interval = bootstrap(
        right, resamples=confidence.resamples, level=confidence.level, seed=session.config.seed
    )
    figures: dict[str, Any] = {
        "headline": {"top1": interval.value, "feature": config.feature, "predictions": "fine_tuned"},
        "interval": interval.as_list(),
        "epochs": config.epochs,
        "loss_by_epoch": losses,
        "train_images": _count(train.num_samples, session.config.data.max_train_images),
        "test_images": len(labels),
    }
    logger.info("fine-tuned on %s, scored on %s", train.directory, test.directory)
    return Outcome(figures, {"labels": labels, "fine_tuned": predicted})


def _build_classifier(session: Session, num_classes: int) -> Classifier:
    encoder = copy.deepcopy(session.encoder.module)
    # Pixels and weights files have nothing to tune.
    if not list(encoder.parameters()):
        raise FeatureError(
            f"probes hold 'fine_tune', and {session.encoder.spec} has no weights to tune; expected a network; "
            "set probes"
        )
    images = next(iter(_stream(session, session.splits[1], session.encoder.transform)))[0][:2]
    with torch.no_grad():
        dim = select_feature(encoder(images), session.config.fine_tune.feature).shape[1]
    encoder.requires_grad_(True)
    return Classifier(encoder, session.config.fine_tune.feature, dim, num_classes)


def _train(classifier: Classifier, session: Session) -> list[float]:
    """Fine-tunes in place and returns the mean training loss of every epoch."""
    config, (train, _) = session.config.fine_tune, session.splits
    device = session.processes.device
    optimizer = torch.optim.AdamW(_parameter_groups(classifier, config), lr=config.lr, betas=_BETAS)
    num_images = _count(train.num_samples, session.config.data.max_train_images)
    total = config.epochs * math.ceil(num_images / config.batch_size)
    augment = RandomCropAndFlip(session.encoder.transform, config.crop_scale_min, config.flip)
    classifier.train()
    losses, step = [], 0
    for epoch in range(config.epochs):
        sum_of_losses, seen = 0.0, 0
        mixed = shuffle_batches(
            _stream(session, train, augment),
            batch_size=config.batch_size,
            buffer=config.shuffle_buffer,
            seed=session.config.seed * 1009 + epoch,
        )
        for images, labels in mixed:
            rate = rate_at(step, total, config)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=_precision(session) == "bf16"):
                logits = classifier(images.to(device, non_blocking=True)).float()
            loss = cross_entropy(logits, labels.to(device), label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sum_of_losses, seen, step = (
                sum_of_losses + loss.item() * len(labels),
                seen + len(labels),
                step + 1,
            )
        losses.append(sum_of_losses / max(seen, 1))
        if not math.isfinite(losses[-1]):
            raise FeatureError(
                f"the fine-tuning loss of {session.encoder.label} is {losses[-1]} in epoch {epoch + 1}; expected a "
                "finite one; set fine_tune.lr lower or features.precision=fp32"
            )
        logger.info("fine-tuning epoch %d/%d: loss %.4f", epoch + 1, config.epochs, losses[-1])
    return losses


def rate_at(step: int, total: int, config: FineTuneConfig) -> float:
    """Returns the learning rate of a step: `warm_up_and_decay`, scaled by the batch."""
    return warm_up_and_decay(step, total, config.lr * config.batch_size / _REFERENCE_BATCH, config.warmup)


def warm_up_and_decay(step: int, total: int, peak: float, warmup_share: float) -> float:
    """Returns the learning rate of a step: linear over a share of all, up to `peak`, then cosine to 0."""
    warmup = round(warmup_share * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def shuffle_batches(
    batches: Iterator[tuple[Tensor, Tensor]], *, batch_size: int, buffer: int, seed: int
) -> Iterator[tuple[Float[Tensor, "B C H W"], Int64[Tensor, " B"]]]:
    """Yields the same images in batches of one size (the last may be smaller), drawn from a buffer at random."""
    draw = random.Random(seed)
    held: list[tuple[Tensor, Tensor]] = []
    chosen: list[tuple[Tensor, Tensor]] = []
    for images, labels in batches:
        for item in zip(images, labels, strict=True):
            if len(held) < buffer:
                held.append(item)
                continue
            index = draw.randrange(buffer)
            chosen.append(held[index])
            held[index] = item
            if len(chosen) == batch_size:
                yield _stack(chosen)
                chosen = []
    draw.shuffle(held)
    chosen += held
    for start in range(0, len(chosen), batch_size):
        yield _stack(chosen[start : start + batch_size])


def _stack(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in items]), torch.stack([label for _, label in items])


def _parameter_groups(classifier: Classifier, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Returns groups with `lr_scale`: timm's layer-wise decay where the network declares its layers."""
    encoder = classifier.encoder
    head = {"params": list(classifier.head.parameters()), "lr_scale": 1.0, "weight_decay": 0.0}
    if isinstance(encoder, TimmFeatures) and hasattr(encoder.model, "group_matcher"):
        groups = param_groups_layer_decay(
            encoder.model,
            weight_decay=config.weight_decay,
            no_weight_decay_list=getattr(encoder.model, "no_weight_decay", set)(),
            layer_decay=config.layer_decay,
        )
        return [*groups, head]
    matrices = [p for p in encoder.parameters() if p.ndim > 1]
    vectors = [p for p in encoder.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "lr_scale": 1.0, "weight_decay": config.weight_decay},
        {"params": vectors, "lr_scale": 1.0, "weight_decay": 0.0},
        head,
    ]


def _stream(
    session: Session, manifest: Manifest, transform: Transform | RandomCropAndFlip
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and labels of a split, up to its configured limit; every label is a class."""
    data = session.config.data
    train, _ = session.splits
    limit = data.max_train_images if manifest is train else data.max_test_images
    before = first_id_after(manifest, limit)
    for images, labels, ids in open_stream(
        manifest,
        transform,
        data=data,
        processes=Processes(device=session.processes.device),
        limit=limit,
        format=session.encoder.transform.format,
    ):
        if before is not None:
            images, labels = images[ids < before], labels[ids < before]
        if bool(((labels < 0) | (labels >= len(manifest.classes))).any()):
            raise FeatureError(
                f"an image of {manifest.directory}:{manifest.split} has no label among its "
                f"{len(manifest.classes)} classes; expected one for every image; make the shards with labels"
            )
        if len(labels):
            yield images, labels


@torch.no_grad()
def _predict(classifier: Classifier, session: Session) -> tuple[Tensor, Tensor]:
    device, (_, test) = session.processes.device, session.splits
    predicted, truth = [], []
    for images, labels in _stream(session, test, session.encoder.transform):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=_precision(session) == "bf16"):
            predicted.append(classifier(images.to(device)).argmax(dim=1).cpu())
        truth.append(labels)
    return torch.cat(predicted), torch.cat(truth)


def _precision(session: Session) -> str:
    return session.config.features.precision


def _count(num_samples: int, limit: int | None) -> int:
    return num_samples if limit is None else min(limit, num_samples)
