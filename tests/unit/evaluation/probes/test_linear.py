import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from data.shards import Manifest
from evaluation.config import EvaluationConfig
from evaluation.encoders.backbones import NoFeatures
from evaluation.encoders.encoder import Encoder
from evaluation.encoders.preprocessing import NoPreprocessing
from evaluation.features.bank import FeatureBank
from evaluation.features.processes import Processes
from evaluation.features.session import Session
from evaluation.probes.config import ConfidenceConfig, FewShotConfig, LinearConfig, LogisticConfig
from evaluation.probes.linear import fit_logistic, split_held_out, train_linear_grid
from evaluation.probes.linear_probe import probe_linear
from evaluation.probes.logistic_probe import probe_few_shot, probe_logistic


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
        "steps": 54,
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
    grid = train_linear_grid(features, labels, learning_rates=(0.2,), **grid_options(batch_size=300, steps=3))
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
        features[:1200], labels[:1200], learning_rates=(1e-6, 0.5), **grid_options(steps=240)
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


def session_on_digits(seed=1, keep=1000, **options):
    """Digits in a random order, `keep` of them to learn from; the encoder is the pixels themselves."""
    features, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    manifest = Manifest(split="train", shards=(), classes=tuple("0123456789"))
    banks = tuple(
        FeatureBank({"embedding": features[part]}, labels[part], part, manifest)
        for part in (order[:keep], order[1000:])
    )
    config = EvaluationConfig(
        encoder="pixels", seed=seed, confidence=ConfidenceConfig(resamples=20), **options
    )
    encoder = Encoder("pixels", "pixels", "released", NoFeatures(), NoPreprocessing(), weights_sha256="")
    return Session(config, encoder, Processes(), _banks=banks)


RATES = (0.002, 0.01, 0.05, 0.2, 1.0)


def test_the_linear_probe_is_within_a_point_of_logistic_regression_on_few_images():
    """Ten passes over 1,000 images are ten steps: they left it four points below."""
    strengths = LogisticConfig(inverse_regularisation=(10.0, 100.0))
    session = session_on_digits(2, linear=LinearConfig(learning_rates=RATES), logistic=strengths)
    found = probe_linear(session).figures
    logistic = probe_logistic(session).figures
    assert found["headline"]["top1"] >= logistic["headline"]["top1"] - 0.01
    lengths = [int(steps) for steps in found["held_out_loss_by_steps"]]
    assert lengths == [10 * 2**i for i in range(len(lengths))] and found["steps"] == lengths[-1] >= 320
    assert any("steps, because doubling lowered the held-out loss" in note for note in session.notes)


def test_a_probe_that_took_too_few_steps_is_said_to_be_below_logistic_regression():
    session = session_on_digits(2, linear=LinearConfig(learning_rates=RATES, min_steps=0))
    assert probe_linear(session).figures["steps"] == 10
    (note,) = [note for note in session.notes if "logistic regression on the same features" in note]
    assert "set linear.min_steps" in note


def test_every_image_is_seen_once_before_one_is_seen_twice():
    """Batches that do not divide the set go on into the next pass instead of ending small."""
    features, labels = torch.eye(10), torch.arange(10)
    options = {"learning_rates": (1e-6,), "batch_size": 4, "momentum": 0.0, "weight_decay": 0.0, "seed": 0}
    grids = [train_linear_grid(features, labels, num_classes=10, steps=s, **options) for s in (5, 10)]
    # With almost no learning rate, gradients add up: after 20 images, each was seen twice.
    start = train_linear_grid(features, labels, num_classes=10, steps=0, **options)
    moved = (grids[0].weights - start.weights)[:, 0].diagonal()
    assert (moved > 0).all()


def test_a_solver_that_has_not_converged_is_said():
    session = session_on_digits(logistic=LogisticConfig(inverse_regularisation=(1000.0,), max_iterations=20))
    probe_logistic(session)
    assert any("C = 1000 has not converged after 20 iterations" in note for note in session.notes)
    settled = session_on_digits(logistic=LogisticConfig(inverse_regularisation=(1.0, 10.0, 1000.0)))
    probe_logistic(settled)
    assert not any("converged" in note for note in settled.notes)


def test_shots_that_do_not_exist_are_left_out_and_said():
    session = session_on_digits(keep=200, few_shot=FewShotConfig(shots=(2, 500), draws=1))
    smallest = int(torch.bincount(session.banks[0].labels).min())
    assert set(probe_few_shot(session).figures["shots"]) == {"2"}
    (note,) = session.notes
    assert note.startswith("few_shot: 500 shots are left out") and f"has {smallest} training images" in note
    with pytest.raises(ValueError, match=rf"few_shot.shots is \[500\]; expected at most {smallest}"):
        probe_few_shot(session_on_digits(keep=200, few_shot=FewShotConfig(shots=(500,))))


def test_a_choice_at_the_end_of_the_grid_is_said():
    session = session_on_digits(logistic=LogisticConfig(inverse_regularisation=(0.001, 0.01)))
    probe_logistic(session)
    assert any("0.01 was chosen, the end of the grid" in note for note in session.notes)
