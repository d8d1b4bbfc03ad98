"""Linear classifiers on cached features: a grid trained in one pass, and logistic regression by L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

# Batch size to which learning rates refer (linear scaling, Goyal et al. 2017).
_REFERENCE_BATCH = 256
# Standard deviation of the initial weights, as DINOv2's and CARP's linear probes have it.
_INITIAL_STD = 0.01
_PREDICT_BLOCK = 8192


@dataclass(frozen=True)
class LinearGrid:
    """Classifiers of one feature, one for each learning rate.

    Attributes:
        weights: [D, L, C].
        biases: [L, C].
    """

    weights: Float[Tensor, "D L C"]
    biases: Float[Tensor, "L C"]

    def predict(self, features: Float[Tensor, "B D"]) -> Int64[Tensor, "B L"]:
        """Returns the predicted class of every image under every learning rate."""
        return torch.cat([logits.argmax(dim=2).cpu() for logits in self._logits(features)])

    def loss(self, features: Float[Tensor, "B D"], labels: Int64[Tensor, " B"]) -> list[float]:
        """Returns the mean cross-entropy in nats for every learning rate."""
        total = torch.zeros(self.biases.shape[0], dtype=torch.float64)
        for logits, truth in zip(self._logits(features), labels.split(_PREDICT_BLOCK), strict=True):
            truth = truth.to(logits.device)[:, None].expand(-1, logits.shape[1])
            losses = cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
            total += losses.view(truth.shape).double().sum(dim=0).cpu()
        return (total / len(labels)).tolist()

    def _logits(self, features: Float[Tensor, "B D"]) -> Iterator[Float[Tensor, "b L C"]]:
        flat = self.weights.flatten(1)
        for block in features.split(_PREDICT_BLOCK):
            yield (block.to(flat) @ flat).view(-1, *self.biases.shape).add(self.biases)

    def top1(self, features: Float[Tensor, "B D"], labels: Int64[Tensor, " B"]) -> list[float]:
        """Returns the accuracy in 0..1 for every learning rate."""
        return (self.predict(features) == labels[:, None]).double().mean(dim=0).tolist()


@torch.no_grad()
def train_linear_grid(
    features: Float[Tensor, "B D"],
    labels: Int64[Tensor, " B"],
    *,
    learning_rates: Sequence[float],
    num_classes: int,
    steps: int,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    seed: int,
    device: torch.device | None = None,
) -> LinearGrid:
    """Returns one softmax classifier per learning rate, all trained on the same batches in one pass.

    SGD with momentum and a cosine schedule to 0, without augmentation. The gradient of softmax cross-entropy in
    a linear map is written out, (softmax(x W + b) - onehot)^T x, so that all classifiers share two GEMMs a step;
    they do not see each other. Features are divided by one scalar, their root mean square, which makes a learning
    rate mean the same for encoders of different scale. fp32. Not collective.

    Args:
        features: training features.
        labels: classes.
        learning_rates: per 256 images of batch.
        num_classes: C.
        steps: optimizer steps; passes over the images follow each other, in a new order each.
        batch_size: images per step, or all of them where there are fewer.
        momentum: of SGD.
        weight_decay: of SGD, on weights and not on biases.
        seed: of initial weights and order.
        device: where to train; the CPU by default.
    """
    device = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    scale = features.square().mean().sqrt().clamp_min(1e-12)
    inputs, targets = (features / scale).to(device), labels.to(device)
    num, dim, rates = len(features), features.shape[1], len(learning_rates)
    initial = torch.randn(dim, 1, num_classes, generator=generator) * _INITIAL_STD
    # Rows are classifiers' classes and images come last: softmax then runs over contiguous images.
    table = initial[:, 0].T.repeat(rates, 1).contiguous().to(device)
    biases = torch.zeros(rates * num_classes, 1, device=device)
    velocity, bias_velocity = torch.zeros_like(table), torch.zeros_like(biases)
    peak = torch.tensor(learning_rates, device=device).repeat_interleave(num_classes)[:, None]
    batch_size = min(batch_size, num)
    peak = peak * batch_size / _REFERENCE_BATCH
    for step, index in enumerate(draw_batches(num, batch_size, steps, generator, device)):
        batch = inputs[index]
        logits = torch.addmm(biases, table, batch.T).view(rates, num_classes, batch_size)
        gradient = _logit_gradient(logits, targets[index])
        lr = peak * (0.5 * (1 + math.cos(math.pi * step / steps)))
        velocity.mul_(momentum).addmm_(gradient, batch).add_(table, alpha=weight_decay)
        bias_velocity.mul_(momentum).add_(gradient.sum(dim=1, keepdim=True))
        table.addcmul_(velocity, lr, value=-1)
        biases.addcmul_(bias_velocity, lr, value=-1)
    weights = (table / scale.to(device)).view(rates, num_classes, dim).permute(2, 0, 1).contiguous()
    return LinearGrid(weights, biases.view(rates, num_classes))


def draw_batches(
    num: int, batch_size: int, steps: int, generator: torch.Generator, device: torch.device
) -> Iterator[Int64[Tensor, " b"]]:
    """Yields the images of every step on a device: passes over all of them follow each other, in a new order each.

    Args:
        num: images.
        batch_size: of a step, at most `num`.
        steps: how many.
        generator: on the CPU.
        device: where the images are.
    """
    waiting = torch.empty(0, dtype=torch.int64, device=device)
    for _ in range(steps):
        if len(waiting) < batch_size:
            waiting = torch.cat([waiting, torch.randperm(num, generator=generator).to(device)])
        index, waiting = waiting[:batch_size], waiting[batch_size:]
        yield index


def _logit_gradient(logits: Float[Tensor, "L C B"], labels: Int64[Tensor, " B"]) -> Float[Tensor, "LC B"]:
    """Returns d mean cross-entropy / d logits of every classifier, a row for each of its classes."""
    gradient = logits.softmax(dim=1)
    truth = gradient.new_zeros(logits.shape[1:]).scatter_(0, labels[None], 1.0)
    return gradient.sub_(truth).div_(len(labels)).flatten(0, 1)


def split_held_out(labels: Int64[Tensor, " B"], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Returns indices (fitted, held out), stratified: about `share` of every class with two images or more.

    Raises:
        ValueError: no class has two images, so that there is nothing to choose by.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    held: list[Tensor] = []
    for label in labels.unique():
        members = order[labels[order] == label]
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.append(members[:count])
    held_out = torch.cat(held).sort().values
    if not len(held_out):
        raise ValueError(
            f"no class has two of the {len(labels)} training images; expected some that can be held out to choose by; "
            "set data.max_train_images higher, or probes without linear and logistic"
        )
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[held_out] = True
    return (~is_held).nonzero()[:, 0], held_out


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression.

    Attributes:
        weights: [D, C].
        biases: [C].
        converged: whether the solver stopped by itself and not at its last iteration.
        iterations: that it took.
        on_unit_features: whether features are L2-normalised first.
    """

    weights: Float[Tensor, "D C"]
    biases: Float[Tensor, " C"]
    converged: bool
    iterations: int
    on_unit_features: bool = True

    def predict(self, features: Float[Tensor, "B D"]) -> Int64[Tensor, " B"]:
        """Returns predicted classes of features, which are L2-normalised here if they were in fitting."""
        found = []
        for block in features.split(_PREDICT_BLOCK):
            rows = normalize(block.float(), dim=1) if self.on_unit_features else block
            found.append((rows.to(self.weights) @ self.weights + self.biases).argmax(dim=1).cpu())
        return torch.cat(found)


def fit_logistic(
    features: Float[Tensor, "B D"],
    labels: Int64[Tensor, " B"],
    *,
    inverse_regularisation: float,
    num_classes: int,
    max_iterations: int = 1000,
    device: torch.device | None = None,
    on_unit_features: bool = True,
) -> Logistic:
    """Returns the minimiser of C * sum of cross-entropies + |W|^2 / 2, by L-BFGS.

    The objective of scikit-learn's `LogisticRegression(C=...)`, divided by C * B here so that tolerances do not
    depend on either. Whole-batch, strong Wolfe line search, fp64 on the CPU and fp32 elsewhere. Not collective.

    Args:
        features: training features.
        labels: classes.
        inverse_regularisation: C.
        num_classes: number of classes; one without images keeps a small probability everywhere.
        max_iterations: of L-BFGS, and 1.25 times as many evaluations (its own limit).
        device: where to fit; the CPU by default.
        on_unit_features: L2-normalise the features first.
    """
    device = device or torch.device("cpu")
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    inputs = normalize(features.float(), dim=1) if on_unit_features else features
    inputs = inputs.to(device, dtype)
    targets = labels.to(device)
    weights = torch.zeros(inputs.shape[1], num_classes, device=device, dtype=dtype, requires_grad=True)
    biases = torch.zeros(num_classes, device=device, dtype=dtype, requires_grad=True)
    strength = 0.5 / (inverse_regularisation * len(inputs))
    optimizer = torch.optim.LBFGS(
        [weights, biases],
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ weights + biases, targets) + strength * weights.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    state = optimizer.state[weights]
    within = state["n_iter"] < max_iterations and state["func_evals"] < max_iterations * 5 // 4
    return Logistic(weights.detach(), biases.detach(), within, state["n_iter"], on_unit_features)
