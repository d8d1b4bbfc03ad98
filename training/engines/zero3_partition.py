"""Parameters that ZeRO-3 has cut: reading and writing them whole without a second copy of the model.

DeepSpeed cuts a parameter's flat numbers into W equal, padded pieces; `parameter.ds_tensor` is this rank's. What
is here works on those pieces alone, so that no write can be lost: a write into a gathered parameter without
`modifier_rank` is dropped in silence. The collectives are the caller's, because only engines talk to a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Whole tensors that are gathered at once: few enough to fit anywhere, many enough to keep the wire busy.
GATHER_BYTES = 64 * 2**20

AllGather = Callable[[Tensor, int], Tensor]


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Returns the shape that a cut parameter has when whole."""
    return tuple(_cut(parameter).ds_shape)


def piece_of(whole: Tensor, rank: int, piece_numel: int) -> Tensor:
    """Returns rank `rank`'s flat piece of a whole tensor, shorter than `piece_numel` (or empty) at the end."""
    return whole.reshape(-1)[rank * piece_numel : (rank + 1) * piece_numel]


def write_piece_(target: Tensor, whole: Tensor, rank: int) -> None:
    """Writes this rank's piece of a whole tensor into `target` in place; the padding becomes 0."""
    piece = piece_of(whole, rank, target.numel())
    target.zero_()
    target[: piece.numel()].copy_(piece)


def gather_pieces(
    named: Sequence[tuple[str, nn.Parameter]],
    read_piece: Callable[[nn.Parameter], Tensor],
    all_gather: AllGather,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, whole tensor on the CPU), gathering many small pieces at once. Collective.

    Args:
        named: cut parameters by name, in the same order on all ranks.
        read_piece: this rank's flat piece that belongs to a parameter: its value, or one of its moments.
        all_gather: (flat piece, its numel) to the flat pieces of all ranks in rank order.
    """
    for bucket in _buckets(named):
        pieces = [read_piece(parameter).detach().reshape(-1) for _, parameter in bucket]
        flat = torch.cat(pieces)
        by_rank = all_gather(flat, flat.numel()).view(-1, flat.numel())
        start = 0
        for (name, parameter), piece in zip(bucket, pieces, strict=True):
            numel = piece.numel()
            whole = by_rank[:, start : start + numel].reshape(-1)[: _cut(parameter).ds_numel]
            yield name, whole.view(whole_shape(parameter)).cpu()
            start += numel


def value_piece(parameter: nn.Parameter) -> Tensor:
    """Returns this rank's flat piece of a cut parameter, not a copy."""
    return _cut(parameter).ds_tensor


def _buckets(named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        nbytes = int(_cut(parameter).ds_numel) * parameter.element_size()
        if bucket and size + nbytes > GATHER_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += nbytes
    if bucket:
        yield bucket


def _cut(parameter: nn.Parameter) -> Any:
    """A parameter with the attributes that DeepSpeed gives it."""
    return parameter
