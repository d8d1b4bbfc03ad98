"""Responsibilities that are not negligible: found, counted and shared as those of all components are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prototypes.mixture.sparse import (
    bound_dropped,
    find_top_logits,
    is_soft,
    keep_largest,
    keep_whole_,
    make_logit_blocks,
)
from prototypes.statistics import Collectives
from tests.unit.prototypes.lockstep import Lockstep


def in_blocks(logits):
    blocks = make_logit_blocks(*logits.shape, logits.device)
    blocks.flatten(1)[:, : logits.shape[1]] = logits
    return blocks


def spread(sparse, num_components):
    """The responsibilities as a table over all components."""
    table = torch.zeros(len(sparse.component), num_components)
    return table.scatter_add_(1, sparse.component, sparse.gamma)


def draw(num_rows, num_components, scale=8.0, seed=0):
    return (
        scale * torch.randn(num_rows, num_components, generator=torch.Generator().manual_seed(seed))
        - 20_000.0
    )


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("num_components", [1, 37, 512, 1300])
def test_what_is_kept_is_every_responsibility_above_the_threshold(num_components, fixed):
    logits, threshold = draw(23, num_components), 1e-4
    exact = torch.softmax(logits.double(), 1)
    top = find_top_logits(in_blocks(logits), threshold, largest=num_components, fixed=fixed)
    normaliser = torch.logsumexp(logits.double(), 1)
    normaliser -= logits.double().amax(1)
    np.testing.assert_allclose(top.log_normaliser.double(), normaliser, rtol=0, atol=1e-5)
    assert torch.equal(top.maximum, logits.amax(1))
    kept = keep_largest(top, threshold)
    clear = (exact / threshold - 1).abs() > 1e-2
    expected = torch.where(exact > threshold, exact, 0)
    torch.testing.assert_close(kept.dropped.double(), 1 - expected.sum(1), rtol=0, atol=1e-5)
    found = spread(kept, num_components)
    assert torch.equal((found > 0)[clear], (expected > 0)[clear])
    torch.testing.assert_close(found.double(), expected / expected.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(23))
    assert torch.equal(kept.winner, logits.argmax(1))
    assert kept.has_winner.all()


@hypothesis_settings(max_examples=20)
@given(
    num_rows=st.integers(0, 9),
    num_components=st.integers(1, 1100),
    scale=st.floats(0.0, 40.0),
    largest=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_both_searches_keep_the_same(num_rows, num_components, scale, largest, seed):
    blocks = in_blocks(draw(num_rows, num_components, scale, seed))
    near, all_places = (
        keep_largest(find_top_logits(blocks, 1e-6, largest, fixed=fixed), 1e-6) for fixed in (False, True)
    )
    assert ((near.gamma > 0).sum(1) <= largest).all()
    torch.testing.assert_close(near.dropped, all_places.dropped, rtol=0, atol=1e-5)
    if scale > 1:  # ties may fall to either
        left, right = (spread(found, num_components) for found in (near, all_places))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=2e-6)


def test_a_row_with_more_than_the_largest_drops_the_rest():
    logits = torch.zeros(3, 10)
    logits[1, 4] = 30.0
    logits[2, 5] = 0.5
    kept = keep_largest(find_top_logits(in_blocks(logits), 1e-3, largest=4), 1e-3)
    exact = torch.softmax(logits[2].double(), 0).sort().values[-4:]
    torch.testing.assert_close(kept.dropped, torch.tensor([0.6, 0.0, float(1 - exact.sum())]))
    torch.testing.assert_close(kept.gamma[0], torch.full((4,), 0.25))
    torch.testing.assert_close(kept.gamma[2].sort().values.double(), exact / exact.sum())
    assert torch.equal(kept.gamma[1].sort().values, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert torch.equal(kept.winner[1:], torch.tensor([4, 5]))


@pytest.mark.parametrize(("num_rows", "num_components"), [(0, 2048), (1, 37), (300, 2048), (7, 5000)])
@pytest.mark.parametrize("scale", [0.5, 3.0, 40.0])
def test_whole_rows_keep_in_their_place_what_lists_keep(num_rows, num_components, scale):
    logits = draw(num_rows, num_components, scale)
    listed = keep_largest(find_top_logits(in_blocks(logits), 1e-4, num_components), 1e-4)
    whole = keep_whole_(logits, 1e-4)
    assert whole.component is None
    assert whole.gamma is logits
    assert torch.equal(whole.winner, listed.winner)
    assert whole.has_winner.all()
    torch.testing.assert_close(whole.gamma, spread(listed, num_components), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(whole.dropped, listed.dropped, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.log_normaliser, listed.log_normaliser, rtol=0, atol=1e-2)


def test_rows_are_soft_where_most_blocks_of_many_come_near_the_maximum():
    for scale, expected in ((1.0, True), (40.0, False)):
        assert is_soft(in_blocks(draw(16, 8192, scale)), 1e-7) == expected
        assert not is_soft(in_blocks(draw(16, 1024, scale)), 1e-7)
    assert not is_soft(in_blocks(draw(0, 8192)), 1e-7)


def test_a_row_whose_responsibilities_are_all_below_the_threshold_drops_everything():
    kept = keep_largest(find_top_logits(in_blocks(torch.zeros(1, 1000)), 0.01, 128), 0.01)
    whole = keep_whole_(torch.zeros(1, 1000), 0.01)
    for found in (kept, whole):
        assert float(found.dropped) == 1.0
        assert found.gamma.sum() == 0


def test_hard_assignments_share_ties():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 1.0, 1.0, 1.0]])
    kept = keep_largest(find_top_logits(in_blocks(logits), 1e-6, 128), 1e-6, hard=True)
    assert torch.equal(spread(kept, 4), torch.tensor([[0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(kept.dropped, torch.zeros(2))


@pytest.mark.parametrize("hard", [False, True])
def test_ranges_of_components_on_three_ranks_are_one(hard):
    logits = draw(11, 36, scale=4.0)
    whole = keep_largest(find_top_logits(in_blocks(logits), 1e-4, 128), 1e-4, hard=hard)
    ranks = Lockstep(3)

    def body(rank):
        across = Collectives(rank, 3, ranks.reduce_sum(rank), ranks.gather(rank))
        own = find_top_logits(in_blocks(logits[:, 12 * rank : 12 * rank + 12]), 1e-4, 128)
        return keep_largest(own, 1e-4, hard=hard, across=across)

    parts = ranks.run(body)
    torch.testing.assert_close(torch.cat([spread(part, 12) for part in parts], 1), spread(whole, 36))
    for part in parts:
        torch.testing.assert_close(part.dropped, whole.dropped, rtol=0, atol=1e-5)
    owners = torch.stack([part.has_winner for part in parts])
    assert torch.equal(owners.sum(0), torch.ones(11, dtype=torch.int64))
    winner = sum((part.winner + 12 * rank) * part.has_winner for rank, part in enumerate(parts))
    assert torch.equal(winner, whole.winner)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0, 30.0])
def test_what_a_sparse_step_would_leave_out_is_bounded_from_all_responsibilities(scale):
    """A mixture that is soft everywhere has no responsibility below the threshold, and far more than are kept."""
    logits, threshold, largest = draw(40, 700, scale), 1e-5, 20
    left = keep_largest(find_top_logits(in_blocks(logits), threshold, largest), threshold).dropped
    bound = bound_dropped(torch.softmax(logits, 1), threshold, largest)
    assert (bound >= left - 1e-5).all()
    if scale in (0.0, 1.0):
        assert (bound > 0.5).all()
    if scale == 30.0:
        torch.testing.assert_close(bound, left, rtol=0, atol=1e-5)
