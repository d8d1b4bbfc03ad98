"""Weighted k-nearest-neighbour classification of frozen features, all k at once, exact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from evaluation.config import EvaluationDataConfig
from evaluation.encoders.preprocessing import Preprocessing
from evaluation.features.bank import NonFiniteFeatureError
from evaluation.features.extract import extract_together
from evaluation.features.processes import Processes
from evaluation.features.splits import load_splits

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

logger = logging.getLogger(__name__)

# Queries per block. Blocks, not rows, are dealt to processes: the same GEMMs run for any number of them, so
# that predictions are equal to the last digit.
QUERY_BLOCK = 256
DEFAULT_TEMPERATURE = 0.07
HEADLINE_K = 20
# Training's configuration and process; named by shape, because evaluation does not import training.
TrainingConfig = Any
TrainingProcess = Any


@dataclass(frozen=True)
class KnnResult:
    """Predictions and accuracies for every k.

    Attributes:
        top1: k to accuracy in 0..1.
        top5: k to the share of images whose class is among the min(5, C, k) most voted classes.
        predictions: k to predicted classes.
    """

    top1: dict[int, float]
    top5: dict[int, float]
    predictions: dict[int, Int64[Tensor, " B"]]


def classify_knn(
    bank: Float[Tensor, "M D"],
    bank_labels: Int64[Tensor, " M"],
    queries: Float[Tensor, "B D"],
    query_labels: Int64[Tensor, " B"],
    *,
    ks: Sequence[int],
    num_classes: int,
    temperature: float = DEFAULT_TEMPERATURE,
    processes: Processes | None = None,
) -> KnnResult:
    """Returns the weighted vote of the k nearest bank images for every query and every k.

    vote(c) = sum over the k nearest i with label c of exp((cos(query, i) - cos(query, nearest)) / temperature), on
    L2-normalised features (Wu et al. 2018, section 3.4; the evaluation of DINO and of CARP; the shift divides all votes
    of a query by one number and keeps them finite at any temperature). Neighbours of equal similarity enter by bank
    index, classes of equal vote win by class index. A class without a vote never counts for top-5: where k or C is
    below 5, fewer classes are looked at. Similarities in fp32, votes in fp64, without gradient. Collective when
    `processes` are several: blocks of queries are dealt to them and predictions are gathered.

    Args:
        bank: training features.
        bank_labels: their classes.
        queries: test features.
        query_labels: their classes.
        ks: numbers of neighbours; a k above M is refused.
        num_classes: C.
        temperature: of the vote.
        processes: who shares the work; None for this process alone.

    Raises:
        ValueError: a k exceeds the bank.
    """
    if max(ks) > len(bank):
        raise ValueError(
            f"knn.k is {max(ks)}; expected at most {len(bank)}, the images of the bank; set knn.k"
        )
    processes = processes or Processes()
    device = processes.device
    keys = normalize(bank.float(), dim=1).to(device)
    key_labels = bank_labels.to(device)
    own: list[tuple[int, dict[int, Tensor], dict[int, Tensor]]] = []
    for start, block in _blocks(queries, processes):
        similarities, indices = nearest(normalize(block.float(), dim=1).to(device), keys, max(ks))
        labels = key_labels[indices]
        weights = torch.exp((similarities - similarities[:, :1]).double() / temperature)
        ranked = {k: _vote(weights[:, :k], labels[:, :k], num_classes) for k in ks}
        truth = query_labels[start : start + len(block)].to(device)
        hits = {k: (top == truth[:, None]).any(dim=1).cpu() for k, top in ranked.items()}
        own.append((start, {k: top[:, 0].cpu() for k, top in ranked.items()}, hits))
    everyone = sorted((part for parts in processes.gather(own) for part in parts), key=lambda part: part[0])
    predictions = {k: torch.cat([part[1][k] for part in everyone]) for k in ks}
    hits_at_5 = {k: torch.cat([part[2][k] for part in everyone]) for k in ks}
    return KnnResult(
        top1={k: (predictions[k] == query_labels.cpu()).double().mean().item() for k in ks},
        top5={k: hits_at_5[k].double().mean().item() for k in ks},
        predictions=predictions,
    )


@torch.no_grad()
def nearest(
    queries: Float[Tensor, "B D"], keys: Float[Tensor, "M D"], k: int
) -> tuple[Float[Tensor, "B k"], Int64[Tensor, "B k"]]:
    """Returns similarities and indices of the k keys of largest dot product, ties by lowest index.

    `topk` alone leaves open which of several equal keys it takes; rows where that matters (many, when features
    have nearly collapsed) are cut again at the k-th value.
    """
    similarities = queries @ keys.T
    taken = min(k + 1, keys.shape[0])
    values, indices = similarities.topk(taken, dim=1)
    if taken > k:
        ambiguous = values[:, k - 1] == values[:, k]
        values, indices = values[:, :k], indices[:, :k]
        if bool(ambiguous.any()):
            rows = similarities[ambiguous]
            chosen = _first_k(rows, values[ambiguous, k - 1 :], k)
            indices[ambiguous], values[ambiguous] = chosen, rows.gather(1, chosen)
    # Order equal neighbours inside the k by index too, for the smaller k that are cut from this list.
    by_index = indices.argsort(dim=1)
    values, indices = values.gather(1, by_index), indices.gather(1, by_index)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), indices.gather(1, order)


def _first_k(rows: Tensor, border: Tensor, k: int) -> Int64[Tensor, "B k"]:
    """Returns the indices of all values above `border` [B, 1] and of the first ones equal to it, k in each row."""
    above = rows > border
    level = rows == border
    missing = k - above.sum(dim=1, keepdim=True)
    level &= level.cumsum(dim=1) <= missing
    return (above | level).nonzero()[:, 1].view(len(rows), k)


def _blocks(queries: Tensor, processes: Processes) -> Iterator[tuple[int, Tensor]]:
    num_blocks = -(-len(queries) // QUERY_BLOCK)
    for block in processes.mine(num_blocks):
        start = block * QUERY_BLOCK
        yield start, queries[start : start + QUERY_BLOCK]


def _vote(weights: Tensor, labels: Tensor, num_classes: int) -> Int64[Tensor, "B c"]:
    votes = torch.zeros(len(weights), num_classes, dtype=torch.float64, device=weights.device)
    votes.scatter_add_(1, labels, weights)
    # A stable sort makes equal votes fall to the lower class index.
    ranked_votes, ranked = votes.sort(dim=1, descending=True, stable=True)
    top = ranked[:, : min(5, num_classes)].clone()
    top[ranked_votes[:, : top.shape[1]] == 0] = -1
    return top


class _Embedding(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "B C H W"]) -> dict[str, Tensor]:
        return {"embedding": self.backbone(images)}


def _describe_probe(config: TrainingConfig) -> tuple[EvaluationDataConfig, Preprocessing]:
    data = EvaluationDataConfig(
        shards=config.data.shards,
        train_split=config.data.split,
        test_split=config.evaluation.test_split,
        max_train_images=config.evaluation.knn_train_images,
        max_test_images=config.evaluation.knn_test_images,
        # No loader processes: they would compete with training's own.
        num_workers=0,
    )
    transform = Preprocessing(
        channels=config.data.channels,
        image_size=config.model.image_size,
        pixels=config.data.pixels,
        crop_fraction=1.0,
        interpolation=config.data.interpolation,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
    )
    return data, transform


def build_knn_probe(
    config: TrainingConfig, device: torch.device, process: TrainingProcess | None = None
) -> Callable[[nn.Module], dict[str, float]]:
    """Returns the probe that training calls on the teacher's backbone: {"eval/knn20_top1": accuracy in 0..1}.

    A fixed subset (the first images of both splits; shards are shuffled when written), the backbone's own pooling,
    k = 20, T = 0.07. The backbone is put into eval mode for the probe and back; nothing random is drawn and no gradient
    is recorded, so that training continues as if nothing had happened. With `process`, every rank extracts its
    part and all get the same figure: collective, every rank must call. Features that are not finite give no figure
    and a warning: a probe does not end a run.

    Args:
        config: of the pretraining run: sections `data`, `model` and `evaluation`.
        device: where the backbone lives.
        process: rank, world size and `all_gather_object` of a distributed run; None computes everything here.

    Raises:
        ValueError: unlabelled or missing splits, before training starts.
    """
    data, transform = _describe_probe(config)
    splits = load_splits(data, test_key="evaluation.test_split")
    processes = Processes(device=device)
    if process is not None:
        processes = Processes(
            rank=process.rank, world_size=process.world_size, device=device, gather=process.all_gather_object
        )
    limits = (data.max_train_images, data.max_test_images)

    def probe(backbone: nn.Module) -> dict[str, float]:
        was_training = backbone.training
        backbone.eval()
        try:
            # A loader draws a seed from the global stream even when nothing is random: training's must not move.
            with torch.random.fork_rng(devices=[]):
                train, test = (
                    extract_together(_Embedding(backbone), manifest, transform, data, processes, limit)
                    for manifest, limit in zip(splits, limits, strict=True)
                )
        except NonFiniteFeatureError as error:
            # Every rank has merged the same features and comes here.
            logger.warning("eval/knn%d_top1 is left out: %s", HEADLINE_K, error)
            return {}
        finally:
            backbone.train(was_training)
        result = classify_knn(
            train["embedding"],
            train["labels"],
            test["embedding"],
            test["labels"],
            ks=(min(HEADLINE_K, len(train["labels"])),),
            num_classes=len(splits[0].classes),
            processes=processes,
        )
        return {f"eval/knn{HEADLINE_K}_top1": next(iter(result.top1.values()))}

    return probe
