"""The E-step of a batch and its sufficient statistics: of all components, or of those that the batch touches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..config import PrototypesConfig
from ..estimator import EstimatorContext
from ..statistics import Collectives, FlatStatistics
from . import sparse
from .assignments import count_winners_, probe_assignments, tile_rows
from .exchange import Exchange, choose_method
from .kernel import KEPT, choose_kernel, find_obstacle, require_kernel
from .model import Mixture, iterate_chunks
from .sparse import (
    SparseResponsibilities,
    TopLogits,
    bound_dropped,
    count_places,
    find_top_logits,
    is_soft,
    keep_largest,
    keep_whole_,
    make_logit_blocks,
)
from .touched import StepStatistics, sum_touched

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

logger = logging.getLogger(__name__)

LOGITS_BYTES = 256 * 2**20
_PROBED_ROWS = 16


class Batch(NamedTuple):
    """What one step observes.

    Attributes:
        inputs: [N, P] finite projections.
        rows: [N, P] the same as the mixture models them.
        weight: [N] their weights.
    """

    inputs: Tensor
    rows: Tensor
    weight: Tensor


class ObservingMixture(Mixture):
    """A mixture that can say how a batch is assigned. Logits and statistics are buffers, allocated once.

    Where the natural parameters of a component depend on its own tables alone, those of all components, [K, F], are
    kept from one sparse step to the next, and only those of components that have moved are computed. They are a
    function of the state and no part of it.
    """

    def __init__(self, config: PrototypesConfig, context: EstimatorContext) -> None:
        super().__init__(config, context)
        self.exchange = self.choose_exchange()
        self._blocks: Tensor | None = None
        self._hits: Tensor | None = None
        self._natural: tuple[Tensor, Tensor] | None = None
        self._natural_is_current = False
        self._said_why_dense = False
        self.kernel: str | None = None  # until the first sparse step

    def choose_exchange(self, method: str | None = None) -> Exchange:
        """Returns the exchange by `method`, or by the configured one."""
        method = method or choose_method(
            self.gmm,
            num_prototypes=self.num_prototypes,
            dim=self.dim,
            rows_per_rank=self.context.rows_per_rank,
            world_size=self.context.collectives.world_size,
        )
        return Exchange(self.gmm.synchronization, self.context.collectives, self.num_prototypes, method)

    def may_be_sparse(self) -> bool:
        """Returns whether this mixture takes sparse steps here, and says once why not."""
        reason = None
        if self.gmm.forgetting == "uniform":
            reason = "uniform forgetting touches every component"
        elif self.exchange.needs_table and not sparse.may_wait(self.means.device):
            reason = (
                f"{self.exchange.method} moves tables of all components, and a GPU would have to wait to learn which "
                "of them have mass; prototypes.gmm.synchronization.method=sparse has no tables"
            )
        if reason and self.gmm.sparse.threshold > 0 and not self._said_why_dense:
            logger.info("every step of the mixture takes all responsibilities: %s", reason)
            self._said_why_dense = True
        return self.is_sparse and reason is None

    def begin_batch(self, num_rows: int) -> Tensor:
        """Makes room for logits, [n, C, B] of this rank's prototypes, and counts no winners yet."""
        own = self.exchange.own.stop - self.exchange.own.start
        rows_per_chunk = max(1, min(num_rows, LOGITS_BYTES // (4 * own)))
        if self._blocks is None or len(self._blocks) != rows_per_chunk or self._hits is None:
            self._blocks = make_logit_blocks(rows_per_chunk, own, self.means.device)
            self._hits = torch.zeros(self.num_prototypes, device=self.means.device)
        self._hits.zero_()
        return self._blocks

    # ---------------------------------------------------------------- all components

    def sum_all_(self, batch: Batch, found: FlatStatistics) -> None:
        """E-step and statistics w_k = sum_i gamma_ik, S_k = sum_i gamma_ik s(h_i - m), then centred, in place.

        Where steps may be sparse, `dropped` becomes what such a step would have left out.
        """
        own, across = self.exchange.own, self.exchange.reduce_over_prototypes()
        blocks = self.begin_batch(len(batch.rows))
        assert self._hits is not None
        mass, sums = found.mass[own].zero_(), found.moments[own]
        found.tail.zero_()
        if len(batch.rows) == 0:
            sums.zero_()
        shifted = batch.rows - self.reference()
        features = self.row_features(shifted)
        observed = self.row_statistics(shifted) * batch.weight[:, None]
        penalty, threshold = self._balance_penalty(), self.gmm.sparse.threshold
        penalty = None if penalty is None else penalty[own]
        places = count_places(own.stop - own.start, self.means.device)
        for rows in _iterate_rows(len(batch.rows), len(blocks)):
            logits = blocks[: rows.stop - rows.start].flatten(1)[:, : own.stop - own.start]
            self._log_joint(features[rows], own, out=logits)
            if rows.start == 0:
                self._probe(logits[:_PROBED_ROWS], found.sums, penalty, across)
            for tile in _iterate_rows(len(logits), tile_rows(logits, across)):
                gamma, weight = self.assign_(logits[tile], penalty, across), batch.weight[rows][tile]
                count_winners_(self._hits[own], gamma, weight, across)
                if self.is_sparse:
                    if self.kernel == "triton":  # which keeps no more than these
                        gamma = gamma.topk(min(KEPT, gamma.shape[1]), dim=1).values
                    found.sums["dropped"].add_(weight @ bound_dropped(gamma, threshold, places, across))
            mass.addmv_(logits.T, batch.weight[rows])
            torch.addmm(sums, logits.T, observed[rows], beta=0 if rows.start == 0 else 1, out=sums)
        for chunk in iterate_chunks(own, self.means.device):
            self.centre_statistics_(chunk, found.mass[chunk], found.moments[chunk])

    def _probe(
        self,
        log_joint: Float[Tensor, "N K"],
        sums: dict[str, Tensor],
        penalty: Float[Tensor, " K"] | None,
        across: Collectives | None,
    ) -> None:
        probe = probe_assignments(log_joint, self.annealing.beta, penalty, across)
        sums["num_probed"].fill_(float(len(log_joint)))
        sums["log_likelihood"].copy_(probe.log_likelihood)
        sums["log_perplexity"].copy_(probe.log_perplexity)

    # ---------------------------------------------------------------- components that are touched

    def find_responsibilities(self, batch: Batch, sums: dict[str, Tensor]) -> SparseResponsibilities:
        """Returns the responsibilities above the threshold, of this rank's prototypes; fills the probe's sums.

        Counts the winners on the way. Collective where prototypes are split over ranks.
        """
        own, across = self.exchange.own, self.exchange.reduce_over_prototypes()
        blocks = self.begin_batch(len(batch.rows))
        assert self._hits is not None
        features = self.row_features(batch.rows - self.reference())
        penalty = self._balance_penalty()
        threshold, is_hard = self.gmm.sparse.threshold, self.assigns_hard
        # Whole rows stay where the logits were: there is room for one chunk of them, and none to send.
        may_be_whole = (
            sparse.may_wait(self.means.device)
            and len(batch.rows) <= len(blocks)
            and not (is_hard or across or self.exchange.method == "sparse")
        )
        parts = []
        for rows in _iterate_rows(len(batch.rows), len(blocks)) or [slice(0, 0)]:
            filled = blocks[: rows.stop - rows.start]
            probed = filled[:_PROBED_ROWS]
            top = self._find_top(features[rows], own, penalty, filled, unless_soft=may_be_whole)
            if top is None:
                probed = probed.clone()
                found = keep_whole_(filled.flatten(1)[:, : own.stop - own.start], threshold)
            else:
                found = keep_largest(top, threshold, hard=is_hard, across=across)
            if rows.start == 0:
                if self.kernel == "triton" and not self._probe_follows(penalty):
                    self._write_logits(features[rows][:_PROBED_ROWS], own, penalty, probed)
                self._probe_found(probed, found, sums, penalty, across)
            counted = found.has_winner & (batch.weight[rows] > 0)
            self._hits[own].scatter_add_(0, found.winner, counted.to(self._hits.dtype))
            parts.append(found)
        found = parts[0] if len(parts) == 1 else _join(parts)
        sums["dropped"].copy_(batch.weight @ found.dropped)
        return found

    def _find_top(
        self,
        features: Tensor,
        own: slice,
        penalty: Tensor | None,
        blocks: Float[Tensor, "N C B"],
        *,
        unless_soft: bool,
    ) -> TopLogits | None:
        """Returns the largest t_ik = beta log rho_ik - penalty_k of each row; the torch path leaves all in `blocks`.

        None with `unless_soft` where those of the first rows are soft; then nothing was looked for.
        """
        paths = {
            "torch": lambda: self._find_top_with_torch(features, own, penalty, blocks),
            "triton": lambda: self._find_top_with_triton(features, own, penalty),
        }
        if self.kernel is None:
            self.kernel = self._choose_kernel(paths, features.device)
        if unless_soft and self.kernel == "torch":
            self._write_logits(features, own, penalty, blocks)
            soft = is_soft(blocks[:_PROBED_ROWS], self.gmm.sparse.threshold)
            return None if soft else self._list_logits(blocks, own)
        return paths[self.kernel]()

    def _choose_kernel(self, paths: dict[str, Callable[[], TopLogits]], device: torch.device) -> str:
        require_kernel(self.gmm.kernel, device)
        if self.gmm.kernel != "auto":
            return self.gmm.kernel
        obstacle = find_obstacle(device)
        if obstacle is None:
            return choose_kernel(paths, self.context.collectives)
        if device.type == "cuda":
            logger.info("E-step kernel: torch, because %s", obstacle)
        return "torch"

    def resume_kernel(self, kernel: str | None) -> None:
        """Takes over what a timing has chosen before, where it can run here."""
        if self.gmm.kernel == "auto" and find_obstacle(self.means.device) is None:
            self.kernel = kernel

    def _find_top_with_torch(
        self, features: Tensor, own: slice, penalty: Tensor | None, blocks: Float[Tensor, "N C B"]
    ) -> TopLogits:
        self._write_logits(features, own, penalty, blocks)
        return self._list_logits(blocks, own)

    def _list_logits(self, blocks: Float[Tensor, "N C B"], own: slice) -> TopLogits:
        places = count_places(own.stop - own.start, self.means.device)
        return find_top_logits(blocks, self.gmm.sparse.threshold, places)

    def _find_top_with_triton(self, features: Tensor, own: slice, penalty: Tensor | None) -> TopLogits:
        from .triton_e_step import scan_components

        if self._keeps_natural and not self._natural_is_current:
            for part in iterate_chunks(own, self.means.device):
                self._read_natural(part)
            self._natural_is_current = True
        theta, bias = self._read_natural(own)
        return scan_components(
            features.contiguous(),
            theta.contiguous(),
            self._offset(bias, own, penalty),
            self.annealing.beta,
            min(KEPT, 1 << (len(theta).bit_length() - 1)),
            self.gmm.kernel_product,
        )

    def _write_logits(
        self, features: Tensor, own: slice, penalty: Tensor | None, blocks: Float[Tensor, "N C B"]
    ) -> None:
        """Writes t_ik of all components to `blocks`."""
        logits = blocks.flatten(1)
        for part in [own] if self._natural_is_current else iterate_chunks(own, self.means.device):
            theta, bias = self._read_natural(part)
            columns = logits[:, part.start - own.start : part.stop - own.start]
            offset = self._offset(bias, part, penalty)
            torch.addmm(offset, features, theta.T, alpha=self.annealing.beta, out=columns)
        self._natural_is_current = self._keeps_natural

    def _offset(self, bias: Tensor, part: slice, penalty: Tensor | None) -> Float[Tensor, " k"]:
        offset = self.annealing.beta * (bias + self.log_mixing_weights(part))
        return offset if penalty is None else offset - penalty[part]

    def _probe_follows(self, penalty: Tensor | None) -> bool:
        """Whether what was kept of a row says its likelihood, which is that at beta 1, and its perplexity."""
        return self.annealing.beta == 1.0 and penalty is None and not self.assigns_hard

    def _probe_found(
        self,
        blocks: Float[Tensor, "N C B"],
        found: SparseResponsibilities,
        sums: dict[str, Tensor],
        penalty: Float[Tensor, " K"] | None,
        across: Collectives | None,
    ) -> None:
        """As `_probe`, from the logits where what was kept does not say it."""
        number, beta = len(blocks), self.annealing.beta
        if not self._probe_follows(penalty):
            own = self.exchange.own
            tempered = blocks.flatten(1)[:, : own.stop - own.start]
            penalty = None if penalty is None else penalty[own]
            log_joint = (tempered if penalty is None else tempered + penalty) / beta
            self._probe(log_joint, sums, penalty, across)
            return
        gamma = found.gamma[:number]
        log_perplexity = -torch.special.xlogy(gamma, gamma).sum()
        if across is not None:
            log_perplexity = across.start_sum(log_perplexity).wait()
        sums["num_probed"].fill_(float(number))
        sums["log_likelihood"].copy_(found.log_normaliser[:number].sum())
        sums["log_perplexity"].copy_(log_perplexity)

    def sum_found(
        self,
        index: Int64[Tensor, "N m"] | None,
        gamma: Float[Tensor, "N m"],
        batch: Batch,
        sums: dict[str, Tensor],
    ) -> StepStatistics:
        """Returns the centred statistics of the components that the batch touches, of this rank's range."""
        own = self.exchange.own
        shifted = batch.rows - self.reference()
        touched, mass, moments = sum_touched(
            index, gamma, self.row_statistics(shifted), batch.weight, own.stop - own.start
        )
        touched = touched + own.start
        self.centre_statistics_(touched, mass, moments)
        all_masses = torch.zeros(self.num_prototypes, device=mass.device).index_copy_(0, touched, mass)
        return StepStatistics(touched, mass, moments, all_masses, sums)

    @property
    def assigns_hard(self) -> bool:
        """Whether a row's maximum has all its responsibility."""
        return False

    # ---------------------------------------------------------------- natural parameters

    def _read_natural(self, part: slice) -> tuple[Tensor, Tensor]:
        """Returns natural parameters of a range of components: those that are kept, or new ones, which are kept."""
        if self._natural_is_current and self._natural is not None:
            return self._natural[0][part], self._natural[1][part]
        theta, bias = self.natural_parameters(part)
        if self._keeps_natural:
            if self._natural is None:
                self._natural = (
                    theta.new_empty(self.num_prototypes, theta.shape[1]),
                    bias.new_empty(self.num_prototypes),
                )
            self._natural[0][part], self._natural[1][part] = theta, bias
        return theta, bias

    @property
    def _keeps_natural(self) -> bool:
        return self.keeps_reference and not self.moves_together

    def refresh_natural_(self, components: Tensor) -> None:
        """Computes the natural parameters of components anew, after their tables have moved."""
        if not self._natural_is_current or self._natural is None:
            return
        for part in components.split(_chunk_size(components)):
            theta, bias = self.natural_parameters(part)
            self._natural[0].index_copy_(0, part, theta)
            self._natural[1].index_copy_(0, part, bias)


def _chunk_size(components: Tensor) -> int:
    first = next(iterate_chunks(slice(0, max(1, len(components))), components.device))
    return first.stop


def _iterate_rows(number: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, number)) for start in range(0, number, size)]


def _join(parts: list[SparseResponsibilities]) -> SparseResponsibilities:
    width = max(part.gamma.shape[1] for part in parts)

    def widen(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1])) if values.dim() == 2 else values

    return SparseResponsibilities(
        *(torch.cat([widen(part) for part in field]) for field in zip(*parts, strict=True))
    )
