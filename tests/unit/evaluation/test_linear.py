import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from evaluation.linear import fit_logistic, split_held_out, train_linear_grid


def digits():
    data = load_digits()
    features = torch.tensor(data.data, dtype=torch.float32)
    return features, torch.tensor(data.target, dtype=torch.int64)


@pytest.mark.learned
@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0])
def test_logistic_regression_is_scikit_learns(strength, record_property):
    features, labels = digits()
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    reference = LogisticRegression(C=strength, max_iter=2000, tol=1e-8).fit(
        unit[:1000].astype("float64"), labels[:1000].numpy()
    )
    model = fit_logistic(features[:1000], labels[:1000], inverse_regularisation=strength, num_classes=10)
    weights = torch.tensor(reference.coef_, dtype=torch.float64)
    record_property("weights", float((model.weights.T - weights).abs().max()))
    assert torch.allclose(model.weights.T, weights, atol=4e-3)
    # Both stop where they have converged well enough: only images on the border between two classes may differ.
    first, second = np.sort(reference.decision_function(unit[1000:]))[:, :-3:-1].T
    clear = torch.tensor(first - second > 0.02)
    same = model.predict(features[1000:]) == torch.tensor(reference.predict(unit[1000:]))
    record_property("images on the border", int((~clear).sum()))
    assert same[clear].all() and clear.double().mean() > 0.95


def grid_options(**changes):
    options = {
        "num_classes": 10,
        "epochs": 3,
        "batch_size": 100,
        "momentum": 0.9,
        "weight_decay": 1e-3,
        "seed": 0,
    }
    return {**options, **changes}


def test_classifiers_of_a_grid_do_not_see_each_other():
    features, labels = digits()
    together = train_linear_grid(features, labels, learning_rates=(0.01, 0.1), **grid_options())
    alone = train_linear_grid(features, labels, learning_rates=(0.1,), **grid_options())
    assert torch.allclose(together.weights[:, 1], alone.weights[:, 0], atol=1e-6)


def test_the_written_gradient_equals_autograd_and_torchs_sgd():
    features, labels = digits()
    features, labels = features[:300], labels[:300]
    grid = train_linear_grid(features, labels, learning_rates=(0.2,), **grid_options(batch_size=300))
    generator = torch.Generator().manual_seed(0)
    scale = features.square().mean().sqrt()
    weight = (torch.randn(64, 1, 10, generator=generator) * 0.01)[:, 0].clone().requires_grad_()
    bias = torch.zeros(10, requires_grad=True)
    groups = [{"params": [weight], "weight_decay": 1e-3}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.2 * 300 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(features / scale @ weight + bias, labels).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(grid.weights[:, 0] * scale, weight.detach(), atol=1e-5)


@pytest.mark.learned
def test_linear_probe_learns_digits(record_property):
    features, labels = digits()
    grid = train_linear_grid(
        features[:1200], labels[:1200], learning_rates=(1e-6, 0.5), **grid_options(epochs=20)
    )
    low, high = grid.top1(features[1200:], labels[1200:])
    record_property("top1", high)
    record_property("top1 of a rate too small", low)
    assert high > 0.88 and low < high


def test_held_out_part_is_stratified_and_apart():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2])
    fitted, held_out = split_held_out(labels, 0.1, seed=3)
    assert sorted(torch.cat([fitted, held_out]).tolist()) == list(range(111))
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [10, 1, 0]
