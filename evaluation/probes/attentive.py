"""The attentive probe: one learned query attends to an encoder's patch tokens, a linear classifier reads the result.

The protocol of CAPI (facebookresearch/capi@98b4fa1, eval_classification.py:188-234, 328-340, 431): heads of 64
dimensions, every learning rate with every weight decay, AdamW, a linear warmup and a cosine. We differ where images are
not augmented (tokens are cached), tokens are divided by their root mean square, and the chosen classifier is trained
again on the whole training split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaluation.features.session import Outcome, Session
from evaluation.probes.config import AttentiveConfig
from evaluation.probes.linear import draw_batches, split_held_out

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_HEAD_DIM, _REFERENCE_BATCH = 64, 256
_INITIAL_STD = 0.02
_BETAS = (0.9, 0.95)
_PREDICT_BLOCK = 256

_Setting = tuple[float, float]  # learning rate per 256 images, weight decay


class AttentiveGrid(nn.Module):
    """Attentive classifiers that do not see each other, computed side by side.

    softmax_n(q . (W_k x_n) / sqrt(d)) weights the values W_v x_n + b_v, head by head; a linear map follows. Scores are
    computed as (W_k^T q) . x_n and values as W_v (sum_n a_n x_n) + b_v: the same function for N / heads of the price
    that keys and values of every token have. A bias of the keys would add one number to all scores of a head, which
    the softmax takes away; there is none.

    Args:
        dim: D of the tokens.
        num_classes: C.
        num: classifiers, L.
        generator: of their initial weights, the same for all: truncated normal of std 0.02, biases 0.

    Raises:
        ValueError: D is no multiple of its number of heads.
    """

    def __init__(self, dim: int, num_classes: int, num: int, generator: torch.Generator) -> None:
        super().__init__()
        self.num_heads = max(1, dim // _HEAD_DIM)
        if dim % self.num_heads:
            raise ValueError(
                f"the encoder's patch tokens have {dim} dimensions; expected a multiple of {_HEAD_DIM}, the dimensions "
                "of a head; set probes without attentive"
            )

        def draw(*shape: int) -> nn.ParameterList:
            initial = torch.empty(*shape)
            nn.init.trunc_normal_(initial, std=_INITIAL_STD, generator=generator)
            return nn.ParameterList(initial.clone() for _ in range(num))

        def zeros(size: int) -> nn.ParameterList:
            return nn.ParameterList(torch.zeros(size) for _ in range(num))

        self.query, self.key, self.value = draw(dim), draw(dim, dim), draw(dim, dim)
        self.classifier = draw(num_classes, dim)
        self.value_bias, self.classifier_bias = zeros(dim), zeros(num_classes)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "L B C"]:
        """Returns the logits of every classifier."""
        batch, _, dim = tokens.shape
        query, key, value = (torch.stack(list(part)) for part in (self.query, self.key, self.value))
        heads = (len(query), self.num_heads, dim // self.num_heads)
        # W_k^T q of every head: what a token is multiplied with.
        folded = torch.einsum("lhe,lhed->lhd", query.view(heads), key.view(*heads, dim))
        scores = tokens @ folded.reshape(-1, dim).T / math.sqrt(heads[2])
        pooled = (scores.softmax(dim=1).transpose(1, 2) @ tokens).view(batch, *heads[:2], dim)
        read = torch.einsum("blhd,lhed->lbhe", pooled, value.view(*heads, dim)).flatten(2)
        read = read + torch.stack(list(self.value_bias))[:, None]
        logits = read @ torch.stack(list(self.classifier)).transpose(1, 2)
        return logits + torch.stack(list(self.classifier_bias))[:, None]

    def parameter_groups(self, settings: Sequence[_Setting]) -> list[dict[str, Any]]:
        """Returns AdamW's groups: each classifier's rate as `base_lr`, its weight decay not on biases."""
        groups: list[dict[str, Any]] = []
        for index, (rate, decay) in enumerate(settings):
            weights = [part[index] for part in (self.query, self.key, self.value, self.classifier)]
            biases = [part[index] for part in (self.value_bias, self.classifier_bias)]
            groups.append({"params": weights, "base_lr": rate, "weight_decay": decay})
            groups.append({"params": biases, "base_lr": rate, "weight_decay": 0.0})
        return groups


@dataclass(frozen=True)
class _Fit:
    """Trained classifiers and the scalar by which they divide tokens."""

    grid: AttentiveGrid
    scale: float
    device: torch.device

    @torch.no_grad()
    def logits(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "L B C"]:
        blocks = tokens.split(_PREDICT_BLOCK)
        return torch.cat(
            [self.grid(_prepare(block, self.scale, self.device)).cpu() for block in blocks], dim=1
        )


def probe_attentive(session: Session) -> Outcome:
    """Returns top-1 of the attentive probe; rate and decay are chosen on a held-out part of the training split.

    Not collective: one process trains, on its device.
    """
    config, (train, test) = session.config.attentive, session.patches
    tokens, seed = train.tensors["patch_tokens"], session.config.seed
    settings = [(rate, decay) for rate in config.learning_rates for decay in config.weight_decays]
    fitted, held_out = split_held_out(train.labels, config.held_out, seed)
    device, num_classes = session.processes.device, train.num_classes
    steps = count_steps(config, len(train.labels))

    def fit(images: Tensor, chosen: Sequence[_Setting]) -> _Fit:
        return fit_attentive(
            tokens[images],
            train.labels[images],
            chosen,
            config=config,
            num_classes=num_classes,
            steps=steps,
            seed=seed,
            device=device,
        )

    logits = fit(fitted, settings).logits(tokens[held_out])
    truth = train.labels[held_out]
    top1 = (logits.argmax(dim=2) == truth).double().mean(dim=1).tolist()
    losses = [float(cross_entropy(own, truth)) for own in logits]
    best = max(range(len(settings)), key=lambda index: (top1[index], -losses[index]))
    rate, decay = settings[best]
    session.note_edge("attentive.learning_rates", rate, config.learning_rates)
    if steps < config.steps:
        session.note(
            f"attentive: {steps} of {config.steps} steps, {config.epochs} passes over the training images"
        )
    predicted = (
        fit(torch.arange(len(tokens)), [settings[best]]).logits(test.tensors["patch_tokens"])[0].argmax(dim=1)
    )
    figures = {
        "headline": {
            "top1": float((predicted == test.labels).double().mean()),
            "learning_rate": rate,
            "weight_decay": decay,
            "feature": "patch_tokens",
            "predictions": "selected",
        },
        "interval": session.interval(predicted, test.labels),
        "steps": steps,
        "held_out_top1": [
            {"learning_rate": r, "weight_decay": d, "top1": value}
            for (r, d), value in zip(settings, top1, strict=True)
        ],
    }
    return Outcome(figures, {"labels": test.labels, "selected": predicted})


def count_steps(config: AttentiveConfig, num_images: int) -> int:
    """Returns the optimizer steps: `steps`, or `epochs` passes where these are fewer."""
    return min(config.steps, math.ceil(config.epochs * num_images / config.batch_size))


def fit_attentive(
    tokens: Float[Tensor, "B N D"],
    labels: Int64[Tensor, " B"],
    settings: Sequence[_Setting],
    *,
    config: AttentiveConfig,
    num_classes: int,
    steps: int,
    seed: int,
    device: torch.device,
) -> _Fit:
    """Returns one classifier for each setting, all trained on the same batches; fp32, without augmentation.

    Args:
        tokens: training patch tokens in any type.
        labels: classes.
        settings: (learning rate per 256 images of batch, weight decay) of each classifier.
        config: batch size and warmup.
        num_classes: C.
        steps: optimizer steps.
        seed: of initial weights and order.
        device: where to train.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = AttentiveGrid(tokens.shape[2], num_classes, len(settings), generator).to(device)
    optimizer = torch.optim.AdamW(grid.parameter_groups(settings), lr=0.0, betas=_BETAS)
    sample = tokens[torch.randperm(len(tokens), generator=generator)[:_PREDICT_BLOCK]]
    scale = max(float(sample.float().square().mean().sqrt()), 1e-12)
    batch_size = min(config.batch_size, len(tokens))
    for step, index in enumerate(draw_batches(len(tokens), batch_size, steps, generator, tokens.device)):
        for group in optimizer.param_groups:
            group["lr"] = (
                group["base_lr"] * batch_size / _REFERENCE_BATCH * rate_at(step, steps, config.warmup)
            )
        logits = grid(_prepare(tokens[index], scale, device))
        truth = labels[index].to(device)
        # The sum: a classifier's gradient is then that of its own mean.
        loss = sum(cross_entropy(own, truth) for own in logits)
        assert isinstance(loss, Tensor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return _Fit(grid.eval(), scale, device)


def rate_at(step: int, total: int, warmup: float) -> float:
    """Returns the factor on the learning rate: linear from 0 over a share of the steps, then cosine to 0."""
    first = round(warmup * total)
    if step < first:
        return step / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(total - first, 1)))


def _prepare(tokens: Tensor, scale: float, device: torch.device) -> Tensor:
    return tokens.to(device, non_blocking=True).float() / scale
