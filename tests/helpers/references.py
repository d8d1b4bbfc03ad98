"""Our losses on the inputs that other projects' losses were recorded on: see the README beside the recordings.

Each case returns, under the names of the recording, what a rank contributes to the mean over ranks: its loss; its rows'
gradients in their places among everybody's, zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from prototypes.clustering import PartialEstimator
from prototypes.config import ClusteringConfig, PrototypesConfig
from prototypes.config import PartitionConfig as Partition
from prototypes.estimator import EstimatorContext
from prototypes.objectives.dino import dino_loss
from prototypes.objectives.interface import MeanOverRanks, compute_mask_weights
from prototypes.objectives.koleo import compute_embedding_koleo
from prototypes.objectives.logits import ChunkedLogits
from prototypes.objectives.patches import patch_loss
from prototypes.objectives.sinkhorn import compute_sinkhorn_offsets, pick_offsets
from prototypes.objectives.targets import compute_mean_logits, move_centre
from prototypes.statistics import Collectives

FOLDER = Path(__file__).resolve().parents[1] / "unit/prototypes/objectives/references"
# Less than one row's: every row is a chunk.
LOGITS_PER_CHUNK = 1


class Rank(NamedTuple):
    """One of the ranks that share the recorded images."""

    collectives: Collectives = Collectives()
    mean_over_ranks: MeanOverRanks | None = None

    def own(self, num_images: int) -> slice:
        share = num_images // self.collectives.world_size
        return slice(self.collectives.rank * share, (self.collectives.rank + 1) * share)

    def put(self, rows: Tensor, chosen: object, like: Tensor) -> Tensor:
        """Returns rows in their places among those of all ranks."""
        everyone = torch.zeros_like(like)
        everyone[chosen] = rows
        return everyone


class Recording:
    """A recording's tensors and the numbers in its metadata."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", framework="pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def number(self, name: str) -> float:
        return float(self.metadata[name])


def compute_dino(rank: Rank) -> dict[str, Tensor]:
    """DINO's loss with a centre, which moves."""
    saved = Recording("dino")
    first = compute_mean_logits(
        saved["first_teacher"][:, rank.own(8)], saved["teacher_prototypes"], rank.mean_over_ranks
    )
    momentum = saved.number("centre_momentum")
    before = move_centre(torch.zeros_like(first), first, momentum)
    return {"centre_before": before} | _class_term(saved, before, rank)


def compute_ibot(rank: Rank) -> dict[str, Tensor]:
    """iBOT's two terms, each with its centre; the patches' is over masked and other patches."""
    saved, own = Recording("ibot"), rank.own(8)
    found = _class_term(saved, saved["centre_before"], rank)
    del found["student_prototypes_gradient"]
    masks, centre = saved["masks"][:, own], saved["patch_centre_before"]
    student = saved["student_patches"][:, own].clone().requires_grad_()
    prototypes = saved["patch_prototypes"].clone().requires_grad_()
    teacher, columns = saved["teacher_patches"][:, own], saved["teacher_patch_prototypes"]
    temperature = saved.number("patch_teacher_temperature")
    loss = patch_loss(
        student[masks] / saved.number("student_temperature"),
        teacher[masks] / temperature,
        prototypes,
        columns,
        compute_mask_weights(masks),
        offsets=centre[None] / temperature,
        mean_over_ranks=rank.mean_over_ranks,
        logits_per_chunk=LOGITS_PER_CHUNK,
    ).total
    at_student, at_prototypes = torch.autograd.grad(loss, (student, prototypes))
    mean = compute_mean_logits(teacher, columns, rank.mean_over_ranks)
    return found | {
        "patch_loss": loss.detach(),
        "student_patches_gradient": rank.put(at_student, (slice(None), own), saved["student_patches"]),
        "patch_prototypes_gradient": at_prototypes,
        "patch_centre_after": move_centre(centre, mean, saved.number("centre_momentum")),
    }


def compute_dinov2_class(rank: Rank) -> dict[str, Tensor]:
    """DINOv2's Sinkhorn over the global batch, and its loss of the class token."""
    saved, own = Recording("dinov2_class"), rank.own(8)
    offsets, probs = _balance(saved, saved["teacher"][:, own].flatten(0, 1), rank)
    loss, gradients = _differentiate_dino(saved, offsets, rank)
    targets = rank.put(probs.view(2, -1, probs.shape[1]), (slice(None), own), saved["targets"])
    return {"targets": targets * rank.collectives.world_size, "loss": loss} | gradients


def compute_dinov2_patches(rank: Rank) -> dict[str, Tensor]:
    """DINOv2's loss of masked patches, with Sinkhorn and with a centre; ranks hold different numbers of rows."""
    saved, own = Recording("dinov2_patches"), rank.own(8)
    image = saved["masks"].nonzero()[:, 1]
    rows = (image >= own.start) & (image < own.stop)
    weight = compute_mask_weights(saved["masks"][:, own])
    temperature = saved.number("teacher_temperature")
    offsets, probs = _balance(saved, saved["teacher"][rows], rank)
    found = {"targets": rank.put(probs, rows, saved["targets"]) * rank.collectives.world_size}
    for prefix, chosen in (("", offsets), ("centred_", saved["centre_before"][None] / temperature)):
        student = saved["student"][rows].clone().requires_grad_()
        prototypes = saved["student_prototypes"].clone().requires_grad_()
        loss = patch_loss(
            student / saved.number("student_temperature"),
            saved["teacher"][rows] / temperature,
            prototypes,
            saved["teacher_prototypes"],
            weight,
            offsets=chosen,
            mean_over_ranks=rank.mean_over_ranks,
            logits_per_chunk=LOGITS_PER_CHUNK,
        ).total
        at_student, at_prototypes = torch.autograd.grad(loss, (student, prototypes))
        found[f"{prefix}loss"] = loss.detach()
        found[f"{prefix}student_gradient"] = rank.put(at_student, rows, saved["student"])
        if not prefix:
            found["student_prototypes_gradient"] = at_prototypes
    mean = compute_mean_logits(saved["teacher"][rows], saved["teacher_prototypes"], rank.mean_over_ranks)
    return found | {
        "centre_after": move_centre(saved["centre_before"], mean, saved.number("centre_momentum"))
    }


def compute_koleo(rank: Rank) -> dict[str, Tensor]:
    """DINOv2's KoLeo, whose neighbours are a rank's own: alike on one rank only."""
    embeddings = Recording("koleo")["embeddings"].clone().requires_grad_()
    loss = compute_embedding_koleo(embeddings)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, embeddings)[0]}


def compute_capi(rank: Rank) -> dict[str, Tensor]:
    """CAPI's clustering by positions with its gradient, and the predictions' loss."""
    saved = Recording("capi")
    patches = saved["patches"][rank.own(8)]
    num_images, num_positions, _ = patches.shape
    position = torch.arange(num_positions).repeat(num_images)
    clustering = ClusteringConfig(
        target_temperature=saved.number("target_temperature"),
        prediction_temperature=saved.number("prediction_temperature"),
        sinkhorn_iterations=int(saved.number("sinkhorn_iterations")),
    )
    config = PrototypesConfig(
        mode="partial", num_prototypes=40, dim=12, partition=Partition(size=8), clustering=clustering
    )
    context = EstimatorContext(
        seed=0, num_observations_per_epoch=1, total_steps=1, collectives=rank.collectives
    )
    estimator = PartialEstimator(config, context)
    table = torch.cat([saved["teacher_weight"], saved["teacher_bias"][:, None]], dim=1)
    estimator.means.copy_(table)
    handle = estimator.observe(patches.flatten(0, 1), group=position).handle
    assert handle is not None
    summed = handle.wait()
    num_rows = summed[-2]
    gradient = summed[:-3].view_as(table) / num_rows
    return {
        "clustering_loss": summed[-3] / num_rows,
        "teacher_weight_gradient": gradient[:, :-1],
        "teacher_bias_gradient": gradient[:, -1],
    } | _capi_predictions(saved, estimator, position, rank)


def _capi_predictions(
    saved: Recording, estimator: PartialEstimator, position: Tensor, rank: Rank
) -> dict[str, Tensor]:
    """The predictions' loss against targets that were balanced over all patches of a position."""
    own, share = rank.own(8), rank.own(24)
    num_positions = int(position.max()) + 1
    rows = F.normalize(saved["patches"][own].flatten(0, 1), dim=1)
    rows = estimator.extend_rows(rows) / saved.number("target_temperature")
    logits = ChunkedLogits(rows, estimator.means, LOGITS_PER_CHUNK)
    offsets = compute_sinkhorn_offsets(
        logits,
        int(saved.number("sinkhorn_iterations")),
        rank.collectives,
        group=position,
        num_groups=num_positions,
    )
    whole = torch.cat([chunk for _, chunk in logits])
    assignments = torch.softmax(whole - pick_offsets(offsets, position), dim=1).view(-1, num_positions, 40)
    index = saved["predict_index"][share] - own.start * num_positions
    predictions = saved["predictions"][share].clone().requires_grad_()
    weight = saved["student_weight"].clone().requires_grad_()
    loss = patch_loss(
        F.normalize(predictions, dim=1) / saved.number("student_temperature"),
        rows[index],
        F.normalize(weight, dim=1),
        estimator.means,
        torch.full((len(index),), 1 / len(index)),
        offsets=offsets,
        group=position[index],
        mean_over_ranks=rank.mean_over_ranks,
        logits_per_chunk=LOGITS_PER_CHUNK,
    ).total
    at_predictions, at_weight = torch.autograd.grad(loss, (predictions, weight))
    world_size = rank.collectives.world_size
    return {
        "assignments": rank.put(assignments, own, saved["assignments"]) * world_size,
        "targets": rank.put(assignments.flatten(0, 1)[index], share, saved["targets"]) * world_size,
        "loss": loss.detach(),
        "predictions_gradient": rank.put(at_predictions, share, saved["predictions"]),
        "student_weight_gradient": at_weight,
    }


def _class_term(saved: Recording, centre: Tensor, rank: Rank) -> dict[str, Tensor]:
    offsets = centre[None] / saved.number("teacher_temperature")
    loss, gradients = _differentiate_dino(saved, offsets, rank)
    mean = compute_mean_logits(
        saved["teacher"][:, rank.own(8)], saved["teacher_prototypes"], rank.mean_over_ranks
    )
    return {
        "loss": loss,
        "centre_after": move_centre(centre, mean, saved.number("centre_momentum")),
    } | gradients


def _differentiate_dino(saved: Recording, offsets: Tensor, rank: Rank) -> tuple[Tensor, dict[str, Tensor]]:
    own = rank.own(8)
    student = saved["student"][:, own].clone().requires_grad_()
    prototypes = saved["student_prototypes"].clone().requires_grad_()
    loss = dino_loss(
        student / saved.number("student_temperature"),
        saved["teacher"][:, own] / saved.number("teacher_temperature"),
        prototypes,
        saved["teacher_prototypes"],
        offsets=offsets,
        mean_over_ranks=rank.mean_over_ranks,
        logits_per_chunk=LOGITS_PER_CHUNK,
    ).total
    at_student, at_prototypes = torch.autograd.grad(loss, (student, prototypes))
    return loss.detach(), {
        "student_gradient": rank.put(at_student, (slice(None), own), saved["student"]),
        "student_prototypes_gradient": at_prototypes,
    }


def _balance(saved: Recording, teacher: Tensor, rank: Rank) -> tuple[Tensor, Tensor]:
    """Sinkhorn's offsets, and its targets of all rows."""
    rows = teacher / saved.number("teacher_temperature")
    logits = ChunkedLogits(rows, saved["teacher_prototypes"], LOGITS_PER_CHUNK)
    offsets = compute_sinkhorn_offsets(logits, int(saved.number("sinkhorn_iterations")), rank.collectives)
    return offsets, torch.softmax(torch.cat([chunk for _, chunk in logits]) - offsets, dim=1)


CASES: dict[str, Callable[[Rank], dict[str, Tensor]]] = {
    "dino": compute_dino,
    "ibot": compute_ibot,
    "dinov2_class": compute_dinov2_class,
    "dinov2_patches": compute_dinov2_patches,
    "koleo": compute_koleo,
    "capi": compute_capi,
}
