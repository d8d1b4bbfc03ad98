"""Cross-entropy of the student's rows with soft targets, whose logits never exist all at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Targets(NamedTuple):
    """What some of the student's rows are compared with.

    Attributes:
        rows: which of the student's rows.
        probs: [n, K] for each of them a sum of distributions, fp32, without gradient.
        mass: how many distributions: what a row of `probs` sums to.
        weight: [n] of each row in the loss, or one number.
    """

    rows: slice
    probs: Tensor
    mass: float
    weight: Tensor | float


def compute_cross_entropy(
    rows: Float[Tensor, "N Q"], columns: Float[Tensor, "K Q"], targets: Iterable[Targets]
) -> Float[Tensor, ""]:
    """Returns sum_n w_n sum_k -t_nk log softmax_k(rows_n . columns), fp32.

    The gradient, w_n (|t_n| softmax - t_n) at the logits, is taken while they exist: going through the targets once
    gives loss and gradients, nothing is kept for the backward pass but [N, Q] and, where the columns are learned,
    [K, Q]. Gradient flows to rows and columns, once (no second derivative). Products follow the ambient autocast,
    everything else is fp32. Not collective.

    Args:
        rows: the student's, temperature and all.
        columns: the student's.
        targets: made one after the other while this runs; a row may come several times or never.
    """
    return _CrossEntropy.apply(rows, columns, targets)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, targets: Iterable[Targets]) -> Tensor:
        loss = torch.zeros((), device=rows.device)
        needs_rows, needs_columns, _ = ctx.needs_input_grad
        row_gradient = torch.zeros_like(rows, dtype=torch.float32) if needs_rows else None
        column_gradient = torch.zeros_like(columns, dtype=torch.float32) if needs_columns else None
        for chosen, probs, mass, weight in targets:
            part = rows[chosen]
            log_probs = torch.log_softmax((part @ columns.to(part.dtype).T).float(), dim=1)
            losses = -(probs * log_probs).sum(1)
            loss += (losses * weight).sum()
            if not (needs_rows or needs_columns):
                continue
            errors = log_probs.exp_().mul_(mass).sub_(probs)
            errors.mul_(weight if isinstance(weight, float) else weight[:, None])
            if row_gradient is not None:
                row_gradient[chosen] += errors @ columns.float()
            if column_gradient is not None:
                column_gradient += errors.T @ part.float()
        ctx.save_for_backward(row_gradient, column_gradient)
        ctx.dtypes = rows.dtype, columns.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        row_gradient, column_gradient = (
            None if gradient is None else (upstream * gradient).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return row_gradient, column_gradient, None
