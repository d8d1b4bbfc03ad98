"""One of lightly's methods, assembled from its public parts; runs in the environment of benchmarks.peers, by path.

    ENVIRONMENT/bin/python benchmarks/_lightly_method.py SETTINGS.json OUT

Imports nothing of this repository. Writes `OUT/speed.json` and `OUT/encoder.safetensors`: the teacher of `dino`, the
network of `swav` and `simclr`. Encoder, crops, optimizer, schedules, widths and K are what SETTINGS says, the same for
all; what is a method's own (its head's form, loss, temperatures) is lightly's default, which is the paper's, with
SwAV's queue for batches smaller than K (Caron et al. 2020: 3,840 rows, after 7.5 % of the training for 256 images).
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

if __name__ == "__main__" and len(sys.argv) != 3:  # answered before the slow imports
    print(__doc__)
    sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)

import numpy as np
import timm
import torch
from lightly.loss import DINOLoss, NTXentLoss, SwaVLoss
from lightly.models.modules import (
    DINOProjectionHead,
    SimCLRProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
from lightly.transforms.dino_transform import DINOViewTransform
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightly.utils.scheduler import cosine_schedule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

_STRETCH_STEPS = 10  # of one figure of speed
_QUEUE_ROWS, _QUEUE_STARTS = 3840, 0.075


class Method(nn.Module, ABC):
    """What is trained: a loss of two views."""

    backbone: nn.Module

    @abstractmethod
    def forward(self, views: list[Tensor], step: int) -> Tensor:
        """Returns the loss."""

    def after_backward(self, step: int) -> None:
        """Changes gradients; nothing to change but for `dino`."""

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated."""
        return self.backbone


class Dino(Method):
    """DINO (Caron et al. 2021): a student learns what its own moving average says of the other view."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        backbone = build_backbone(settings)
        widths = (backbone.num_features, settings["hidden_dim"], settings["dim"], settings["num_prototypes"])
        self.head, averaged = (DINOProjectionHead(*widths, freeze_last_layer=1) for _ in range(2))
        averaged.load_state_dict(self.head.state_dict())
        self.student = nn.Sequential(backbone, self.head)
        self.teacher = nn.Sequential(copy.deepcopy(backbone), averaged)
        deactivate_requires_grad(self.teacher)
        self.loss = DINOLoss(output_dim=settings["num_prototypes"])

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        """Returns the loss; moves the teacher first, as lightly's example does."""
        momentum = self.settings["ema_momentum"]
        update_momentum(self.student, self.teacher, cosine_schedule(step, self.settings["steps"], *momentum))
        with torch.no_grad():
            targets = [self.teacher(view) for view in views]
        loss: Tensor = self.loss(targets, [self.student(view) for view in views], epoch=self._epoch(step))
        return loss

    def after_backward(self, step: int) -> None:
        """Holds the last layer still during the first epoch."""
        self.head.cancel_last_layer_gradients(current_epoch=self._epoch(step))

    def _epoch(self, step: int) -> int:
        return step // self.settings["steps_per_epoch"]

    @property
    def encoder(self) -> nn.Module:
        """The teacher, as of our own runs."""
        return self.teacher[0]


class SwaV(Method):
    """SwAV (Caron et al. 2020): a view predicts the other one's balanced code."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = build_backbone(settings)
        self.head = SwaVProjectionHead(self.backbone.num_features, settings["hidden_dim"], settings["dim"])
        self.prototypes = SwaVPrototypes(settings["dim"], settings["num_prototypes"])
        self.loss = SwaVLoss()
        self.queues = [torch.empty(0, settings["dim"]) for _ in range(2)]
        self.queue_starts = round(_QUEUE_STARTS * settings["steps"])
        self.needs_queue = settings["batch_size"] < settings["num_prototypes"]

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        """Returns the loss."""
        self.prototypes.normalize()
        projections = [nn.functional.normalize(self.head(self.backbone(view)), dim=1) for view in views]
        earlier = None
        if self.needs_queue and step >= self.queue_starts:
            full = all(len(queue) == _QUEUE_ROWS for queue in self.queues)
            with torch.no_grad():
                earlier = [self.prototypes(queue) for queue in self.queues] if full else None
            self.queues = [
                torch.cat([rows.detach(), queue])[:_QUEUE_ROWS]
                for rows, queue in zip(projections, self.queues, strict=True)
            ]
        loss: Tensor = self.loss([self.prototypes(rows) for rows in projections], [], earlier)
        return loss.squeeze()


class SimClr(Method):
    """SimCLR (Chen et al. 2020): two views of an image among all others of the batch."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = build_backbone(settings)
        self.head = SimCLRProjectionHead(self.backbone.num_features, settings["hidden_dim"], settings["dim"])
        self.loss = NTXentLoss()

    def forward(self, views: list[Tensor], step: int) -> Tensor:
        """Returns the loss."""
        del step
        loss: Tensor = self.loss(*(self.head(self.backbone(view)) for view in views))
        return loss


METHODS: dict[str, type[Method]] = {"dino": Dino, "swav": SwaV, "simclr": SimClr}


def build_backbone(settings: dict[str, Any]) -> Any:
    """Returns timm's network without classifier, fresh."""
    return timm.create_model(
        settings["encoder"], pretrained=False, num_classes=0, **settings["encoder_arguments"]
    )


def build_transform(settings: dict[str, Any]) -> MultiViewTransform:
    """Returns the two views of our recipe in lightly's own steps; blur and solarisation differ between them."""
    recipe = settings["recipe"]
    strength = dict(
        zip(("cj_bright", "cj_contrast", "cj_sat", "cj_hue"), recipe["jitter_strength"], strict=True)
    )
    return MultiViewTransform(
        [
            DINOViewTransform(
                crop_size=settings["image_size"],
                crop_scale=tuple(recipe["global_crop_scale"]),
                hf_prob=recipe["flip"],
                vf_prob=recipe["vertical_flip"],
                cj_prob=recipe["jitter"],
                cj_strength=1.0,
                **strength,
                random_gray_scale=recipe["gray"],
                gaussian_blur=recipe["global_blur"][min(view, len(recipe["global_blur"]) - 1)],
                sigmas=tuple(recipe["blur_sigma"]),
                solarization_prob=recipe["global_solarize"][min(view, len(recipe["global_solarize"]) - 1)],
                normalize={"mean": settings["mean"], "std": settings["std"]},
            )
            for view in range(2)
        ]
    )


def learning_rate(settings: dict[str, Any], step: int) -> float:
    """Returns the rate of a step: linear warm-up, then a cosine."""
    if step < settings["warmup_steps"]:
        return settings["lr"] * step / settings["warmup_steps"]
    done = (step - settings["warmup_steps"]) / max(1, settings["steps"] - settings["warmup_steps"])
    return settings["min_lr"] + (settings["lr"] - settings["min_lr"]) * (1 + math.cos(math.pi * done)) / 2


def train(settings: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the trained encoder, and how fast its training was."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    np.random.seed(settings["seed"])  # lightly's blur and solarisation draw from it
    workers = settings["workers"]
    loader = DataLoader(
        ImageFolder(settings["images"], build_transform(settings)),
        settings["batch_size"],
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    settings["steps_per_epoch"] = len(loader)
    method = METHODS[settings["method"]](settings).train()
    decayed, others = get_weight_decay_parameters([method])
    groups = [
        {"params": [p for p in decayed if p.requires_grad], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in others if p.requires_grad], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), fused=True)
    images_per_s: list[float] = []
    began = stretch = time.perf_counter()
    step, loss = 0, torch.zeros(())
    while step < settings["steps"]:
        for views, _ in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            loss = method(views, step)
            optimizer.zero_grad()
            loss.backward()
            method.after_backward(step)
            nn.utils.clip_grad_norm_(method.parameters(), settings["clip_grad_norm"] or math.inf)
            optimizer.step()
            step += 1
            if step % _STRETCH_STEPS == 0 or step == settings["steps"]:
                now, steps = time.perf_counter(), (step - 1) % _STRETCH_STEPS + 1
                images_per_s.append(steps * settings["batch_size"] / (now - stretch))
                stretch = now
            if step == settings["steps"]:
                break
    seconds = time.perf_counter() - began
    return method.encoder, {
        "seconds": seconds,
        "images_per_s": images_per_s,
        "last_loss": float(loss.detach()),
    }


def main() -> int:
    """Trains, and writes encoder and speed."""
    settings, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    encoder, speed = train(settings)
    if not math.isfinite(speed["last_loss"]):
        print(
            f"error: the last loss of {settings['method']} is {speed['last_loss']}; lower --lr",
            file=sys.stderr,
        )
        return 1
    save_file(
        {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()},
        out / "encoder.safetensors",
    )
    (out / "speed.json").write_text(json.dumps(speed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
