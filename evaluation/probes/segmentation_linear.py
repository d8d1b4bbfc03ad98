"""The linear segmentation head: BatchNorm and a 1 x 1 convolution on an encoder's last patch tokens, frozen.

The protocol of DINOv3 (facebookresearch/dinov3@6876159, config-ade20k-linear-training.yaml): images scaled, cropped to
the encoder's square and mirrored; AdamW; test images read by a sliding square of 2/3 stride whose logits are averaged.
There the square is 512 pixels: set transform.image_size=512 for an encoder that takes it. Small images are enlarged
until their shorter side is the square's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from data.members import VOID_INDEX
from data.views.config import PixelFormat
from data.views.pictures import Picture, fill_picture
from evaluation.encoders.preprocessing import Preprocessing
from evaluation.features.bank import FeatureError
from evaluation.features.extract import first_id_after, open_stream
from evaluation.features.patches import DensePreprocessing, PatchTokens, grid_shape, square_preprocessing
from evaluation.features.processes import Processes
from evaluation.features.session import Outcome, Session
from evaluation.probes.fine_tune import shuffle_batches, warm_up_and_decay
from evaluation.probes.mean_iou import PixelCounts, count_pixels, describe_counts

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

_INITIAL_STD = 0.01
_BETAS = (0.9, 0.999)


class RandomScene:
    """A random square of the enlarged or reduced image and its label map, mirrored half of the time; picklable.

    Where the image is smaller than the square, the rest is the mean colour and void.

    Args:
        preprocessing: of the encoder.
        scale: smallest and largest shorter side, in sides of the square.
        flip: mirror half of the images.
    """

    def __init__(self, preprocessing: Preprocessing, scale: tuple[float, float], flip: bool) -> None:
        self.dense = DensePreprocessing(preprocessing)
        self.scale = scale
        self.flip = flip

    def __call__(
        self, image: Picture, label_map: Image.Image
    ) -> tuple[Float[Tensor, "C S S"], UInt8[Tensor, "S S"]]:
        """Returns both; draws from torch's stream, which the loader seeds."""
        side = self.dense.preprocessing.side
        low, high = self.scale
        factor, across, down, mirrored = torch.rand(4).tolist()
        shorter = max(1, round(side * (low + (high - low) * factor)))
        image, label_map = _resize(image, label_map, shorter)
        left = round(across * (image.width - side)) if image.width > side else 0
        top = round(down * (image.height - side)) if image.height > side else 0
        preprocessing = self.dense.preprocessing
        square = fill_picture((side, side), preprocessing.format, preprocessing.mean)
        square.paste(image, (-left, -top))  # type: ignore[arg-type]
        labels = Image.new("L", (side, side), VOID_INDEX)
        labels.paste(label_map, (-left, -top))
        if self.flip and mirrored < 0.5:
            flip = Image.Transpose.FLIP_LEFT_RIGHT
            square, labels = square.transpose(flip), labels.transpose(flip)
        return self.dense(square, labels)


class WholeScene:
    """Image and label map with the square's side as their shorter one, the image cut into windows; picklable.

    Args:
        preprocessing: of the encoder.
        stride: from a window to the next, in sides of the square.
    """

    def __init__(self, preprocessing: Preprocessing, stride: float) -> None:
        self.preprocessing = preprocessing
        self.stride = stride

    def __call__(
        self, image: Picture, label_map: Image.Image
    ) -> tuple[Float[Tensor, "W C S S"], UInt8[Tensor, "H W"]]:
        """Returns the windows in row order and the label map."""
        side = self.preprocessing.side
        image, label_map = _resize(image, label_map, side)
        places = window_places(image.height, image.width, side, self.stride)
        windows = [self.preprocessing(image.crop((x, y, x + side, y + side))) for y, x in places]
        return torch.stack(windows), torch.from_numpy(np.array(label_map))


def _resize(image: Picture, label_map: Image.Image, shorter: int) -> tuple[Picture, Image.Image]:
    # Exactly that for the shorter side: a pixel more would be a window more.
    longer = max(shorter, round(shorter * max(image.size) / min(image.size)))
    size = (shorter, longer) if image.width <= image.height else (longer, shorter)
    return image.resize(size, Image.Resampling.BICUBIC), label_map.resize(size, Image.Resampling.NEAREST)


def window_places(height: int, width: int, side: int, stride: float) -> list[tuple[int, int]]:
    """Returns (top, left) of the windows that cover an image, the last ones flush with its edges."""
    step = max(1, round(stride * side))

    def starts(length: int) -> list[int]:
        return [min(start, length - side) for start in range(0, max(length - side, 0) + step, step)]

    # A window that the flush one repeats is taken once.
    return [(top, left) for top in dict.fromkeys(starts(height)) for left in dict.fromkeys(starts(width))]


def merge_windows(
    logits: Float[Tensor, "W C S S"], places: list[tuple[int, int]], size: tuple[int, int]
) -> Float[Tensor, "C H W"]:
    """Returns the mean of the windows' logits at every pixel."""
    side = logits.shape[-1]
    total, number = logits.new_zeros(logits.shape[1], *size), logits.new_zeros(size)
    for window, (top, left) in zip(logits, places, strict=True):
        total[:, top : top + side, left : left + side] += window
        number[top : top + side, left : left + side] += 1
    return total / number


class LinearHead(nn.Module):
    """A frozen encoder's patch tokens, BatchNorm, and a linear map of every patch."""

    def __init__(self, encoder: PatchTokens, dim: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.BatchNorm1d(dim)
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.normal_(self.classifier.weight, std=_INITIAL_STD)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Float[Tensor, "B C S S"]) -> Float[Tensor, "B K S S"]:
        """Returns logits of every pixel, interpolated between patches."""
        with torch.no_grad():
            tokens = self.encoder(images)["patch_tokens"].float()
        rows_and_columns = grid_shape(tokens.shape[1], (images.shape[-2], images.shape[-1]), "the encoder")
        logits = self.classifier(self.norm(tokens.flatten(0, 1))).view(*tokens.shape[:2], -1)
        grid = logits.transpose(1, 2).unflatten(2, rows_and_columns)
        return interpolate(grid, size=images.shape[-2:], mode="bilinear", align_corners=False)


def probe_segmentation_linear(session: Session) -> Outcome:
    """Returns mean and per-class IoU of the linear head after its last step; nothing is chosen.

    Not collective: one process trains, on its device.
    """
    config, (train, test) = session.config.segmentation_linear, session.splits
    device, num_classes = session.processes.device, len(train.classes)
    preprocessing = square_preprocessing(session.encoder)
    encoder = PatchTokens(session.encoder).to(device).eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(session.config.seed)
        side = preprocessing.side
        blank = preprocessing(fill_picture((side, side), preprocessing.format))[None].to(device)
        with torch.no_grad():
            dim = encoder(blank)["patch_tokens"].shape[2]
        head = LinearHead(encoder, dim, num_classes).to(device)
        loss = _train(head, session, preprocessing)
        # Inside too: a loader draws a seed from the global stream even when nothing is random.
        counts, pixels = _score(head.eval(), session, preprocessing)
    about = describe_counts(
        {"linear": counts},
        test.classes,
        pixels,
        confidence=session.config.confidence,
        seed=session.config.seed,
    )
    figures: dict[str, Any] = {
        "headline": {"linear_miou": counts.mean_iou(), "steps": config.steps},
        **about,
        "image_size": preprocessing.side,
        "last_loss": loss,
        "test_images": len(counts.unions),
    }
    kept = {
        "linear_intersections": torch.from_numpy(counts.intersections),
        "linear_unions": torch.from_numpy(counts.unions),
    }
    return Outcome(figures, kept)


def _train(head: LinearHead, session: Session, preprocessing: Preprocessing) -> float:
    """Trains norm and classifier in place and returns the mean loss of the last tenth of the steps."""
    config, device = session.config.segmentation_linear, session.processes.device
    trained = [*head.norm.parameters(), *head.classifier.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, betas=_BETAS)
    losses: list[float] = []
    head.norm.train()
    for step, (images, labels) in zip(range(config.steps), _batches(session, preprocessing), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = warm_up_and_decay(step, config.steps, config.lr, config.warmup)
        with torch.autocast(device.type, torch.bfloat16, enabled=session.config.features.precision == "bf16"):
            logits = head(images.to(device, non_blocking=True)).float()
        truth = labels.to(device).long()
        # Over pixels with a class; a batch of void alone teaches nothing.
        loss = cross_entropy(logits, truth, ignore_index=VOID_INDEX, reduction="sum")
        loss = loss / (truth != VOID_INDEX).sum().clamp_min(1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FeatureError(
                f"the loss of the linear head on {session.encoder.label} is {losses[-1]} in step {step + 1}; expected "
                "a finite one; set segmentation_linear.lr lower or features.precision=fp32"
            )
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _batches(session: Session, preprocessing: Preprocessing) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields random squares of training images without end, whole batches only."""
    config = session.config.segmentation_linear
    transform = RandomScene(preprocessing, config.scale, config.flip)

    def passes() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from _stream(session, transform, preprocessing.format, is_train=True)

    yield from shuffle_batches(
        passes(), batch_size=config.batch_size, buffer=config.shuffle_buffer, seed=session.config.seed
    )


def _stream(
    session: Session, transform: Any, format: PixelFormat, *, is_train: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    data = session.config.data
    manifest = session.splits[0 if is_train else 1]
    limit = data.max_train_images if is_train else data.max_test_images
    before = first_id_after(manifest, limit)
    # Test images differ in their sizes.
    data = data if is_train else replace(data, batch_size=1)
    processes = Processes(device=session.processes.device)
    stream = open_stream(
        manifest, transform, data=data, processes=processes, limit=limit, dense=True, format=format
    )
    for images, labels, ids in stream:
        kept = slice(None) if before is None else ids < before
        if len(images[kept]):
            yield images[kept], labels[kept]


@torch.no_grad()
def _score(head: LinearHead, session: Session, preprocessing: Preprocessing) -> tuple[PixelCounts, list[int]]:
    """Returns the counts of the test split, and the pixels of every class in it."""
    config, device = session.config.segmentation_linear, session.processes.device
    num_classes = head.classifier.out_features
    found = []
    scenes = WholeScene(preprocessing, config.stride)
    for windows, labels in _stream(session, scenes, preprocessing.format, is_train=False):
        size = (labels.shape[1], labels.shape[2])
        places = window_places(*size, preprocessing.side, config.stride)
        with torch.autocast(device.type, torch.bfloat16, enabled=session.config.features.precision == "bf16"):
            logits = torch.cat(
                [head(part.to(device)).float() for part in windows[0].split(config.batch_size)]
            )
        predicted = merge_windows(logits, places, size).argmax(dim=0).cpu()
        found.append(count_pixels(labels[0], predicted, num_classes))
    intersections, unions, pixels = (np.stack(part) for part in zip(*found, strict=True))
    return PixelCounts(intersections, unions), pixels.sum(axis=0).tolist()
