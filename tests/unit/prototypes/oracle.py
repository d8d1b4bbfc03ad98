"""The equations once more, naively, in NumPy float64: nothing here is shared with the code under test."""

import numpy as np


def log_joint(h, means, variances, weights):
    """log pi_k + log N(h_i; mu_k, diag var_k) by the broadcast form [N, K, P]."""
    difference = h[:, None, :] - means[None]
    densities = -0.5 * (difference**2 / variances + np.log(2 * np.pi * variances)).sum(-1)
    return np.log(weights) + densities


def responsibilities(log_rho, beta=1.0):
    tempered = beta * log_rho
    tempered = tempered - tempered.max(axis=1, keepdims=True)
    gamma = np.exp(tempered)
    return gamma / gamma.sum(axis=1, keepdims=True)


def shrink(variances, counts, prior, strength):
    return (counts[:, None] * variances + strength * prior) / (counts[:, None] + strength)


def m_step(h, gamma, means, variances, counts, memory):
    """S <- d S + Omega s for S in {S0, S1, S2}, then mu = S1/S0, var = S2/S0 - mu^2."""
    lam = 1 - 1 / memory
    mass = gamma.sum(0)
    d = lam**mass
    omega = (1 - d) / (1 - lam)
    safe = np.maximum(mass, 1e-300)[:, None]
    s0, s1, s2 = counts, counts[:, None] * means, counts[:, None] * (variances + means**2)
    s0 = d * s0 + omega
    s1 = d[:, None] * s1 + omega[:, None] * (gamma.T @ h) / safe
    s2 = d[:, None] * s2 + omega[:, None] * (gamma.T @ h**2) / safe
    new_means = s1 / s0[:, None]
    return new_means, s2 / s0[:, None] - new_means**2, s0


def sequential_means(h, gamma, means, counts, memory):
    """One sample after the other, each with gain Omega(gamma_ik)."""
    lam = 1 - 1 / memory
    s0, s1 = counts.copy(), counts[:, None] * means
    for row, weight in zip(h, gamma, strict=True):
        d = lam**weight
        omega = (1 - d) / (1 - lam)
        s0 = d * s0 + omega
        s1 = d[:, None] * s1 + omega[:, None] * row
    return s1 / s0[:, None]


def carp(student, teacher, student_prototypes, teacher_prototypes, partition, entropy_weight=1.0):
    """CARP's loss by loops over blocks and pairs of views."""
    eps = float(np.finfo(np.float32).eps)
    consistency, entropy = [], []
    for block in partition:
        p = [responsibilities(view @ student_prototypes[block].T) for view in student]
        q = [responsibilities(view @ teacher_prototypes[block].T) for view in teacher]
        for i, p_i in enumerate(p):
            for j, q_j in enumerate(q):
                if i != j:
                    consistency.append(-np.log(np.clip((p_i * q_j).sum(1), eps, 1 - eps)).mean())
        m = np.concatenate(p + q).mean(0)
        entropy.append(np.log(len(block)) + (m * np.log(np.clip(m, eps, 1 - eps))).sum())
    return np.mean(consistency) + entropy_weight * np.mean(entropy), np.mean(consistency), np.mean(entropy)


def koleo(prototypes, partition):
    losses = []
    for block in partition:
        rows = prototypes[block]
        distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        losses.append(-np.log(distances.min(1)).mean())
    return np.mean(losses)


def count_unique(prototypes, eps):
    """Greedy leader cover, one row after the other."""
    rows = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    leaders = []
    for row in rows:
        if not leaders or not (1 - np.array(leaders) @ row < eps).any():
            leaders.append(row)
    return len(leaders)


def vmf_log_normaliser(kappa, dim):
    from scipy.special import ive

    order = dim / 2 - 1
    log_bessel = np.log(ive(order, kappa)) + kappa
    return order * np.log(kappa) - dim / 2 * np.log(2 * np.pi) - log_bessel


def merge(old, counts, gamma, values, memory):
    """S/S0 after S <- d S + Omega sum_i gamma_i f_i / w, for running means `old` of any f."""
    mass = gamma.sum(0)
    forgotten = 1 - (1 - 1 / memory) ** mass
    new_counts = (1 - forgotten) * counts + forgotten * memory
    rate = (forgotten * memory / new_counts)[:, None]
    return (1 - rate) * old + rate * (gamma.T @ values) / np.maximum(mass, 1e-300)[:, None]


def vmf_concentration(lengths, counts, dim, prior_variance, strength, floor):
    kappa = lengths * (dim - lengths**2) / (1 - lengths**2)
    spread = (counts / kappa + strength * prior_variance) / (counts + strength)
    return np.minimum(1 / spread, 1 / (floor * prior_variance))


def vmf_log_joint(h, means, weights, kappa):
    directions = means / np.linalg.norm(means, axis=1, keepdims=True)
    return np.log(weights) + kappa * (h @ directions.T) + vmf_log_normaliser(kappa, h.shape[1])


def variational_log_joint(h, means, variances, counts, weights, prior_mean, prior_variance, options):
    """E[log pi_k] + E[log N(h; mu_k, 1/tau_k)] under Dirichlet and Normal-Gamma posteriors, dimension by dimension."""
    from scipy.special import digamma

    mean_strength, shape0, alpha0, evidence = options
    result = np.empty((len(h), len(means)))
    alpha = alpha0 + evidence * weights
    for k, n in enumerate(counts):
        kappa = mean_strength + n
        centre = (mean_strength * prior_mean + n * means[k]) / kappa
        shape = shape0 + n / 2
        rate = shape0 * prior_variance + n * variances[k] / 2
        rate = rate + mean_strength * n / (2 * kappa) * (means[k] - prior_mean) ** 2
        expected_log_precision = digamma(shape) - np.log(rate)
        square = shape / rate * (h - centre) ** 2 + 1 / kappa
        result[:, k] = 0.5 * (expected_log_precision - np.log(2 * np.pi) - square).sum(1)
        result[:, k] += digamma(alpha[k]) - digamma(alpha.sum())
    return result


def running_moments(mean, covariance, batch, rate):
    """Mean and covariance of the mixture of the past (weight 1 - rate) and a batch (weight rate)."""
    new_mean = (1 - rate) * mean + rate * batch.mean(0)
    second = (1 - rate) * (covariance + np.outer(mean, mean)) + rate * batch.T @ batch / len(batch)
    return new_mean, second - np.outer(new_mean, new_mean)


def critical_beta(rows):
    return 1 / np.linalg.eigvalsh(np.corrcoef(rows.T))[-1]


def perplexity(hits):
    share = hits[hits > 0] / hits.sum()
    return np.exp(-(share * np.log(share)).sum())
