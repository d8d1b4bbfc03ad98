"""One loss over the rows of many micro-batches, with the graph of one at a time.

A loss that is no sum over images (the entropy of a batch's mean, a centre, a Sinkhorn balance) must see the rows of the
whole batch. Rows are small, graphs are not: the gradient is first taken at the rows, then carried into the network
micro-batch by micro-batch (the gradient cache of Gao et al. 2021, arXiv 2101.06983). Nothing here knows which loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.engines.interface import Engine, NetworkOutput
from training.patches import MaskedPatches, join_ragged, split_ragged

# From the student's rows to named scalars; `total` is what is minimised.
RowLoss = Callable[[NetworkOutput], dict[str, Tensor]]
# The fields of an output with as many rows of every image.
_ROWS = ("projections", "embeddings")


class MicroBatch(NamedTuple):
    """What the student is given of one micro-batch.

    Attributes:
        crops: one tensor per resolution.
        num_images: B.
        patches: which patches are hidden and projected; None where none are.
    """

    crops: Sequence[Tensor]
    num_images: int
    patches: MaskedPatches | None = None


def join(
    outputs: Sequence[NetworkOutput], num_images: int, patch_counts: Sequence[Sequence[int]] = ()
) -> NetworkOutput:
    """Returns what one forward pass over the images of all micro-batches gives: rows by view, then by image.

    Args:
        outputs: of equally large micro-batches, from the same weights, so that their prototypes are the same.
        num_images: images of one micro-batch, B; each output has [V * B, P] projections.
        patch_counts: of each micro-batch, rows of patches of each view.
    """
    if len(outputs) == 1:
        return outputs[0]
    first = outputs[0]
    fields: dict[str, Tensor | None] = {}
    for name in _ROWS:
        parts = [getattr(output, name) for output in outputs]
        fields[name] = None if parts[0] is None else _join_rows(parts, num_images)
    if first.patch_projections is not None:
        patches = [output.patch_projections for output in outputs if output.patch_projections is not None]
        fields["patch_projections"] = join_ragged(patches, patch_counts)
    return first._replace(**fields)


def split(
    gradient: NetworkOutput, num_parts: int, num_images: int, patch_counts: Sequence[Sequence[int]] = ()
) -> Iterator[NetworkOutput]:
    """Yields each micro-batch's gradient, the inverse of `join`.

    All micro-batches share the prototypes: each carries an equal part of their gradient, whose sum counts once, and no
    engine meets a parameter without a gradient.
    """
    parts: dict[str, Sequence[Tensor]] = {}
    for name, value in gradient._asdict().items():
        if value is None:
            continue
        if name in _ROWS:
            parts[name] = _split_rows(value, num_parts, num_images)
        elif name == "patch_projections":
            parts[name] = split_ragged(value, patch_counts) if num_parts > 1 else [value]
        else:
            parts[name] = [value / num_parts] * num_parts
    for index in range(num_parts):
        own: dict[str, Any] = {name: values[index] for name, values in parts.items()}
        yield NetworkOutput(**({"projections": None} | own))


def _join_rows(parts: Sequence[Tensor], num_images: int) -> Tensor:
    return torch.cat([part.unflatten(0, (-1, num_images)) for part in parts], dim=1).flatten(0, 1)


def _split_rows(rows: Tensor, num_parts: int, num_images: int) -> list[Tensor]:
    return [part.flatten(0, 1) for part in rows.unflatten(0, (-1, num_parts, num_images)).unbind(1)]


def differentiate(loss: RowLoss, student: NetworkOutput) -> tuple[dict[str, Tensor], NetworkOutput]:
    """Returns the loss's scalars and the gradient of its `total` at whatever the student gave; no graph.

    Collective where the loss is. What the loss does not use has the gradient 0.
    """
    leaves = [None if value is None else value.detach().requires_grad_() for value in student]
    with torch.enable_grad():
        terms = loss(NetworkOutput._make(leaves))
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(terms["total"], given, allow_unused=True, materialize_grads=True))
    gradient = NetworkOutput._make(None if leaf is None else next(gradients) for leaf in leaves)
    return {name: value.detach() for name, value in terms.items()}, gradient


class StudentPass:
    """The student's forward pass over the micro-batches that share a loss, and the way of a gradient back into it.

    One micro-batch is run once and its graph kept. Several are run without a graph, and each again with its graph once
    the gradient at the rows is known: a second forward pass is the price, and no more than one micro-batch's graph is
    ever alive. The second time every layer draws the random numbers of the first (drop path, dropout), so that the
    gradient is that of the loss. BatchNorm uses each micro-batch's own statistics both times and its running
    statistics move once. Collective like the engine's forward pass.

    Args:
        engine: whose student runs.
        micro_batches: equally large.

    Attributes:
        output: rows of all micro-batches, as of one batch.
    """

    def __init__(self, engine: Engine, micro_batches: Sequence[MicroBatch]) -> None:
        self._engine = engine
        self._micro_batches = micro_batches
        self._num_images = micro_batches[0].num_images
        self._patch_counts = [micro.patches.student_counts for micro in micro_batches if micro.patches]
        self._replays: list[_RandomState] = []
        self._with_graph: NetworkOutput | None = None
        if len(micro_batches) == 1:
            self._with_graph = self.output = engine.forward_student(*_given(micro_batches[0]))
            return
        outputs = []
        for micro in micro_batches:
            self._replays.append(_RandomState(micro.crops[0].device))
            outputs.append(engine.forward_student_without_graph(*_given(micro)))
        self.output = join(outputs, self._num_images, self._patch_counts)

    def backward(self, gradient: NetworkOutput, *, weight: float = 1.0, is_last: bool = True) -> None:
        """Adds `weight` times the gradient to the student's parameters, through every micro-batch's graph. Collective.

        Args:
            gradient: at `output`, as `differentiate` returns it.
            weight: of this loss among the step's losses.
            is_last: whether this ends the step's accumulation.
        """
        num_parts = len(self._micro_batches)
        parts = split(gradient, num_parts, self._num_images, self._patch_counts)
        for index, part in enumerate(parts):
            output = self._take(index)
            # Its derivative at the output is the part, bit for bit: engines want a scalar to begin from.
            products = [
                (value * slope).sum()
                for value, slope in zip(output, part, strict=True)
                if value is not None and slope is not None
            ]
            scalar = weight * torch.stack(products).sum()
            self._engine.backward(scalar, is_last_micro_step=is_last and index == num_parts - 1)

    def _take(self, index: int) -> NetworkOutput:
        """Returns a micro-batch's output with its graph, which is let go of here."""
        if self._with_graph is not None:
            output, self._with_graph = self._with_graph, None
            return output
        with self._replays[index].replayed():
            return self._engine.forward_student(*_given(self._micro_batches[index]))


def _given(micro: MicroBatch) -> tuple[Sequence[Tensor], Mapping[str, Tensor] | None]:
    return micro.crops, None if micro.patches is None else micro.patches.student


class _RandomState:
    """The state of torch's generators on the CPU and on the device, as it is now."""

    def __init__(self, device: torch.device) -> None:
        self._gpus = [device] if device.type == "cuda" else []
        self._cpu_state = torch.get_rng_state()
        self._gpu_states = [torch.cuda.get_rng_state(gpu) for gpu in self._gpus]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draws from this state inside, and goes on outside as if nothing had been drawn."""
        with torch.random.fork_rng(devices=self._gpus):
            torch.set_rng_state(self._cpu_state)
            for gpu, state in zip(self._gpus, self._gpu_states, strict=True):
                torch.cuda.set_rng_state(state, gpu)
            yield
