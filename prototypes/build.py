"""From the options to the estimator and the objective that they name."""

from __future__ import annotations

from typing import Any

import torch

from . import clustering, learned
from .config import Level, ObjectiveConfig, PrototypesConfig
from .estimator import EstimatorContext, PrototypeEstimator
from .families import gmm_diag, gmm_shared, spherical_kmeans, vb_gmm, vmf
from .objectives.carp import CarpTerm
from .objectives.interface import MeanOverRanks, Objective, Term
from .objectives.terms import DinoTerm, PatchTerm
from .statistics import Collectives, Gather, ReduceSum

FAMILIES: tuple[type[PrototypeEstimator], ...] = (
    gmm_diag.DiagonalGmm,
    gmm_shared.SphericalGmm,
    gmm_shared.TiedDiagonalGmm,
    gmm_shared.TiedSphericalGmm,
    vmf.VonMisesFisherMixture,
    spherical_kmeans.SphericalKMeans,
    vb_gmm.VariationalGmm,
    clustering.SinkhornCodes,
)
"""What `prototypes.estimator` chooses among."""


def build_estimator(
    config: PrototypesConfig,
    *,
    seed: int,
    num_observations_per_epoch: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
    rows_per_rank: int = 128,
    reduce_sum: ReduceSum | None = None,
    gather: Gather | None = None,
    device: torch.device | str = "cpu",
) -> PrototypeEstimator:
    """Returns the estimator of `config.mode` and `config.estimator`, its state on `device`, fp32.

    Every rank builds the same state from `seed`; nothing is sent.

    Args:
        config: the prototypes' options.
        seed: the run's seed.
        num_observations_per_epoch: teacher rows in one epoch over all ranks, V_t * images.
        total_steps: optimizer steps of the whole training; schedules run over them.
        rank: this process's rank.
        world_size: number of ranks.
        rows_per_rank: teacher rows that one rank observes in one step; the cost rule's only use.
        reduce_sum: asynchronous in-place all-reduce(SUM); required for more than one rank.
        gather: asynchronous all-gather of equal shapes to [world_size, ...]; None builds it on `reduce_sum`.
        device: where the state lives.

    Raises:
        ValueError: more than one rank without `reduce_sum`.
    """
    context = EstimatorContext(
        seed=seed,
        num_observations_per_epoch=num_observations_per_epoch,
        total_steps=total_steps,
        rows_per_rank=rows_per_rank,
        collectives=Collectives(rank=rank, world_size=world_size, reduce_sum=reduce_sum, gather=gather),
    )
    estimator: PrototypeEstimator
    if config.mode in ("joint", "joint_kp"):
        estimator = learned.JointEstimator(config, context)
    elif config.mode == "partial":
        estimator = clustering.PartialEstimator(config, context)
    elif config.mode == "frozen_random":
        estimator = learned.FrozenRandomEstimator(config, context)
    else:
        estimator = _build_family(config, context)
    return estimator.to(device)


def _build_family(config: PrototypesConfig, context: EstimatorContext) -> PrototypeEstimator:
    return {family.name: family for family in FAMILIES}[config.estimator](config, context)


def build_objective(
    config: ObjectiveConfig,
    prototypes: PrototypesConfig,
    patch_prototypes: PrototypesConfig | None = None,
    *,
    seed: int,
    steps_per_epoch: int = 1,
    collectives: Collectives | None = None,
    mean_over_ranks: MeanOverRanks | None = None,
) -> Objective:
    """Returns what the encoder minimises.

    Args:
        config: the objective's options.
        prototypes: those that the term on views compares rows with.
        patch_prototypes: those of the term on patches; None: the same.
        seed: the run's seed.
        steps_per_epoch: by which schedules count.
        collectives: the exchange between ranks; None in a single process.
        mean_over_ranks: differentiable mean over ranks; None in a single process.
    """
    shared: dict[str, Any] = {"steps_per_epoch": steps_per_epoch, "mean_over_ranks": mean_over_ranks}
    terms: dict[Level, Term] = {}
    if config.instance.name == "carp":
        terms["instance"] = CarpTerm(config.instance, prototypes.partition, seed=seed, **shared)
    elif config.instance.name == "dino":
        terms["instance"] = DinoTerm(
            config.instance, num_prototypes=prototypes.num_prototypes, collectives=collectives, **shared
        )
    if config.patch.name != "none":
        num_prototypes = (patch_prototypes or prototypes).num_prototypes
        terms["patch"] = PatchTerm(
            config.patch, num_prototypes=num_prototypes, collectives=collectives, **shared
        )
    weights: dict[Level, float] = {"instance": config.instance.weight, "patch": config.patch.weight}
    return Objective(terms, weights, config.koleo_weight)
