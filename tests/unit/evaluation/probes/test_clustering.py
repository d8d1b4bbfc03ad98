import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from evaluation.probes.clustering import agreement, cluster, match


@pytest.mark.parametrize("seed", range(5))
def test_agreement_equals_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 6, 300)
    assignments = np.where(generator.random(300) < 0.6, (labels + 2) % 6, generator.integers(0, 9, 300))
    found = agreement(torch.tensor(assignments), torch.tensor(labels))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, assignments))
    assert found["ari"] == pytest.approx(adjusted_rand_score(labels, assignments))
    table = np.zeros((9, 6))
    np.add.at(table, (assignments, labels), 1)
    rows, columns = linear_sum_assignment(-table)
    assert found["accuracy"] == pytest.approx(table[rows, columns].sum() / 300)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (7, 3), (10, 10)])
def test_matching_is_the_cheapest(shape):
    for seed in range(20):
        cost = np.random.default_rng(seed).normal(size=shape)
        rows, columns = match(cost)
        best = cost[linear_sum_assignment(cost)].sum()
        assert len(set(rows)) == len(set(columns)) == min(shape)
        assert cost[rows, columns].sum() == pytest.approx(best)


@pytest.mark.learned
def test_k_means_finds_separated_groups():
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(5, 16)
    labels = torch.arange(5).repeat_interleave(40)
    points = centres[labels] + 0.05 * torch.randn(200, 16, generator=generator)
    _, assignments, converged = cluster(points, num_clusters=5, restarts=5, max_iterations=50, seed=0)
    assert agreement(assignments, labels)["ari"] == 1.0 and converged
    noise = torch.randn(200, 16, generator=generator)
    assert not cluster(noise, num_clusters=20, restarts=1, max_iterations=1, seed=0)[2]
    with pytest.raises(ValueError, match=r"clustering.num_clusters is 201"):
        cluster(points, num_clusters=201, restarts=1, max_iterations=1, seed=0)
