"""Which patches of a micro-batch are hidden, predicted and compared: numbers that the host makes of the loader's masks.

The device is never asked how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.views.masking import Masks
from prototypes.objectives.interface import compute_mask_weights


@dataclass(frozen=True)
class MaskedPatches:
    """The patches of V views of B images, n of each crop.

    Attributes:
        student: what the student's network is given (`SelfSupervisedNetwork.forward`).
        teacher: what the teacher's is given.
        student_counts: rows of the student of each view, R in all.
        teacher_counts: rows of the teacher of each view, T in all.
        target: int64 [R] each row's patch among all V * B * n; None where the teacher's rows are the student's.
        weight: fp32 [R] of each row in the loss.
        position: int64 [T] of the teacher's rows in the grid.
        shape: (V, B, n).
    """

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    student_counts: Sequence[int]
    teacher_counts: Sequence[int]
    target: Tensor | None
    weight: Tensor
    position: Tensor
    shape: tuple[int, int, int]


def read_masks(masks: Masks, kind: str, device: torch.device) -> MaskedPatches:
    """Returns what masks say, on the device.

    Args:
        masks: of V views of B images, on the CPU.
        kind: `hidden` (behind a mask token; teacher's rows are those of the predicted patches) or `left_out` (as
            many of every crop; teacher's rows are those of all patches).
        device: where the networks are.
    """
    hidden, chosen = masks.hidden, masks.predicted
    num_views, num_images, num_patches = hidden.shape
    rows = chosen.flatten().nonzero().squeeze(1)
    counts = chosen.flatten(1).sum(1).tolist()
    places = torch.arange(num_patches).expand(num_views * num_images, num_patches)

    def send(tensor: Tensor) -> Tensor:
        return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

    there = send(rows)
    if kind == "hidden":
        student = {"hidden": send(hidden.flatten(0, 1)), "rows": there}
        teacher, teacher_counts, target = {"rows": there}, counts, None
        position = send(rows % num_patches)
    else:
        crops = hidden.flatten(0, 1)
        student = {
            "visible": send(places[~crops].view(len(crops), -1)),
            "predicted": send(places[chosen.flatten(0, 1)].view(len(crops), -1)),
        }
        teacher, target = {"rows": send(torch.arange(hidden.numel()))}, there
        teacher_counts = [num_images * num_patches] * num_views
        position = send(places.flatten())
    weight = send(compute_mask_weights(chosen))
    shape = (num_views, num_images, num_patches)
    return MaskedPatches(student, teacher, counts, teacher_counts, target, weight, position, shape)


def join_ragged(parts: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> Tensor:
    """Returns the rows of several micro-batches in the order of one batch: by view, then by micro-batch.

    Args:
        parts: rows of each micro-batch, by view.
        counts: how many of each micro-batch belong to each view.
    """
    if len(parts) == 1:
        return parts[0]
    pieces = [part.split(list(number)) for part, number in zip(parts, counts, strict=True)]
    return torch.cat([piece for view in zip(*pieces, strict=True) for piece in view])


def split_ragged(rows: Tensor, counts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns each micro-batch's rows, the inverse of `join_ragged`."""
    sizes = [number for view in zip(*counts, strict=True) for number in view]
    pieces = rows.split(sizes)
    return [torch.cat(pieces[index :: len(counts)]) for index in range(len(counts))]


def join_patches(parts: Sequence[MaskedPatches]) -> MaskedPatches:
    """Returns the patches of several micro-batches as those of one, but for what the networks are given.

    Raises:
        ValueError: micro-batches of different sizes.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    student_counts = [part.student_counts for part in parts]
    teacher_counts = [part.teacher_counts for part in parts]
    target = None
    if first.target is not None:
        targets = [_shift_target(part, index, len(parts)) for index, part in enumerate(parts)]
        target = join_ragged(targets, student_counts)
    num_views, num_images, num_patches = first.shape
    return MaskedPatches(
        student={},
        teacher={},
        student_counts=[sum(view) for view in zip(*student_counts, strict=True)],
        teacher_counts=[sum(view) for view in zip(*teacher_counts, strict=True)],
        target=target,
        weight=join_ragged([part.weight / len(parts) for part in parts], student_counts),
        position=join_ragged([part.position for part in parts], teacher_counts),
        shape=(num_views, num_images * len(parts), num_patches),
    )


def _shift_target(part: MaskedPatches, index: int, num_parts: int) -> Tensor:
    """Returns where a micro-batch's targets stand among all patches of the joined batch."""
    assert part.target is not None
    _, num_images, num_patches = part.shape
    of_view = num_images * num_patches
    view = part.target // of_view
    return part.target + of_view * (view * (num_parts - 1) + index)
