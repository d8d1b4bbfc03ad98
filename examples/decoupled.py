"""Decoupled prototypes on one page: a plain loop, a small encoder, images that are drawn on the spot.

    python -m examples.decoupled

The prototypes are the means of a Gaussian mixture that online EM fits to the teacher's projections. The encoder learns
to give two views of an image the same prototypes, and its loss cannot move them. In a program of your own:
`pip install .`, then `from decoupled_prototypes import ...`.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prototypes import (
    GmmConfig,
    PartitionConfig,
    PrototypeEstimator,
    PrototypesConfig,
    UsageCounter,
    build_estimator,
    carp_loss,
    count_unique,
    draw_partition,
)

SEED, NUM_IMAGES, BATCH, STEPS, PRINT_EVERY = 0, 4096, 128, 600, 60
K, P = 256, 32  # prototypes, and the width of the projections that they live among
CONFIG = PrototypesConfig(
    num_prototypes=K, dim=P, partition=PartitionConfig(size=64), gmm=GmmConfig(standardise=True)
)
EMA_MOMENTUM = 0.99


def draw_images(number: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Returns images [N, 3, size, size] of ten patterns, of any place, scale and colours, and which [N]."""
    line = torch.linspace(-1, 1, size).expand(number, size, size)
    x, y = line - 0.4 * torch.rand(number, 1, 1) + 0.2, line.mT - 0.4 * torch.rand(number, 1, 1) + 0.2
    scale = 0.3 + 0.3 * torch.rand(number, 1, 1)
    radius, columns, rows = (x**2 + y**2).sqrt(), (4 * x / scale).sin(), (4 * y / scale).sin()
    stripes = [columns, rows, columns * rows, (4 * (x + y) / scale).sin(), (4 * radius / scale).sin()]
    solids = [scale - radius, scale - torch.maximum(x.abs(), y.abs()), scale - x.abs() - y.abs()]
    outlines = [scale / 3 - (radius - scale).abs(), scale / 3 - torch.minimum(x.abs(), y.abs())]
    patterns = torch.stack(stripes + solids + outlines)
    labels = torch.arange(number) % len(patterns)
    mask = torch.sigmoid(10 * patterns[labels, torch.arange(number)])[:, None]
    background, colour = torch.rand(2, number, 3, 1, 1)
    return torch.lerp(background, colour, mask) + 0.1 * torch.randn(number, 3, size, size), labels


def augment(images: Tensor) -> Tensor:
    """Returns one view of each image: a random part of it in other colours."""
    zoom = 0.6 + 0.4 * torch.rand(len(images), 1, 1)
    place = (1 - zoom) * (2 * torch.rand(len(images), 2, 1) - 1)
    grid = F.affine_grid(torch.cat([zoom * torch.eye(2), place], 2), list(images.shape), align_corners=False)
    gain, shift = torch.rand(2, len(images), 3, 1, 1)
    return (F.grid_sample(images, grid, align_corners=False) - shift) * (0.5 + gain)


def build_network() -> tuple[nn.Sequential, nn.Sequential]:
    """Returns (encoder, head). Any encoder does; the head's last layer is not normalised: its scale is learned."""

    def block(channels: int, width: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]

    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), *pool)
    return encoder, nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, P))


def build_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """Returns the student's optimizer; the prototypes are no parameters."""
    return torch.optim.AdamW(student.parameters(), lr=1e-3)


def build_mixture() -> PrototypeEstimator:
    """Returns the estimator of CONFIG; its memory is derived from the length of an epoch."""
    return build_estimator(CONFIG, seed=SEED, num_observations_per_epoch=2 * NUM_IMAGES, total_steps=STEPS)


def train_step(
    student: nn.Module,
    teacher: nn.Module,
    estimator: PrototypeEstimator,
    optimizer: torch.optim.Optimizer,
    views: Tensor,
    step: int,
) -> Tensor:
    """Returns the loss of one step on views [V, B, 3, H, W] of B images: everything that is the method."""
    with torch.no_grad():
        teacher_rows = teacher(views.flatten(0, 1))
    observation = estimator.observe(teacher_rows)  # E-step; over several ranks its sums are now under way
    student_rows = student(views.flatten(0, 1))
    estimator.commit(observation)  # M-step: the prototypes of this very step
    partition = draw_partition(K, CONFIG.partition.size, seed=SEED, step=step)
    rows, prototypes = estimator.logit_operands(student_rows, "student")
    targets, target_prototypes = estimator.logit_operands(teacher_rows, "teacher")
    rows, targets = (part.unflatten(0, views.shape[:2]) for part in (rows, targets))
    loss = carp_loss(rows, targets, prototypes, target_prototypes, partition).total
    if not loss.isfinite():
        estimator.discard()  # the mixture is what it was before this batch
        return loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    estimator.accept()  # the candidate becomes the state
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 1 - EMA_MOMENTUM)
    return loss.detach()


@torch.no_grad()
def measure_knn(encoder: nn.Module, images: Tensor, labels: Tensor, queries: int = 1000) -> float:
    """Returns the share of the first images whose pattern is that of most of their 10 nearest others."""
    rows = F.normalize(torch.cat([encoder(part) for part in images.split(512)]), dim=1)
    nearest = (rows[:queries] @ rows[queries:].T).topk(10).indices
    votes = F.one_hot(labels[queries:][nearest]).sum(1).argmax(1)
    return float((votes == labels[:queries]).float().mean())


def main() -> None:
    """Trains for STEPS steps and prints loss, unique and used as it goes."""
    torch.manual_seed(SEED)
    images, labels = draw_images(NUM_IMAGES)
    encoder, head = build_network()
    untrained, student = copy.deepcopy(encoder), nn.Sequential(encoder, head)
    teacher = copy.deepcopy(student).requires_grad_(False)
    estimator, optimizer, usage = build_mixture(), build_optimizer(student), UsageCounter(K)
    print(f"{K} prototypes; loss at chance {math.log(CONFIG.partition.size):.2f}")
    for step in range(STEPS):
        batch = images[torch.randint(NUM_IMAGES, (BATCH,))]
        views = torch.stack([augment(batch), augment(batch)])
        loss = train_step(student, teacher, estimator, optimizer, views, step)
        if assignment := estimator.assignment():
            usage.add_assignment(assignment)  # who won a row in the E-step
        if (step + 1) % PRINT_EVERY == 0:
            unique, found = count_unique(estimator.prototypes("teacher"))[0.025] / K, usage.metrics()
            used = f"used {found['prototypes/used']:6.1%} of at most {found['prototypes/used_ceiling']:.1%}"
            print(f"step {step + 1:4d}  loss {float(loss):.3f}  unique {unique:6.1%}  {used}", flush=True)
            usage.reset()
    trained, at_random = (measure_knn(network, images, labels) for network in (teacher[0], untrained))
    print(f"k-NN: trained {trained:.1%}, untrained {at_random:.1%}; chance 10%")


if __name__ == "__main__":
    main()
