import contextlib
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from data.config import DataConfig
from evaluation.features.processes import Processes
from evaluation.probes import knn
from evaluation.probes.knn import build_knn_probe, classify_knn, nearest


def split_digits():
    digits = load_digits()
    features = torch.tensor(digits.data, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


@pytest.mark.learned
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_scikit_learn_for_every_k(temperature, record_property):
    bank, bank_labels, queries, labels = split_digits()
    ks = (1, 10, 20, 100, 200)
    result = classify_knn(bank, bank_labels, queries, labels, ks=ks, num_classes=10, temperature=temperature)
    unit, unit_queries = (torch.nn.functional.normalize(x, dim=1).numpy() for x in (bank, queries))
    for k in ks:
        reference = KNeighborsClassifier(
            k, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / temperature)
        ).fit(unit, bank_labels.numpy())
        expected = reference.predict(unit_queries)
        # Where rounding may give the vote to another class, it says nothing: votes nearer than 1e-3 of them all.
        first, second = np.sort(reference.predict_proba(unit_queries))[:, :-3:-1].T
        clear = first - second > 1e-3
        found = result.predictions[k]
        record_property(f"closest votes at {k}", (first - second).min())
        assert np.array_equal(found.numpy()[clear], expected[clear]) and clear.mean() > 0.98
        assert result.top1[k] == pytest.approx((found == labels).double().mean().item(), abs=0)


@pytest.mark.parametrize("temperature", [0.07, 0.005, 0.002])
def test_votes_stay_finite_at_any_temperature(temperature):
    """exp(1 / .005) is above fp32's largest number: every vote was infinity, and the lowest class won."""
    bank, bank_labels, queries, labels = split_digits()
    found = classify_knn(
        bank, bank_labels, queries, labels, ks=(20,), num_classes=10, temperature=temperature
    )
    unit, asked = (torch.nn.functional.normalize(x, dim=1) for x in (bank, queries))
    similarities, indices = nearest(asked, unit, 20)
    shifted = (similarities.double() - similarities.double().amax(dim=1, keepdim=True)) / temperature
    votes = torch.zeros(len(labels), 10, dtype=torch.float64)
    votes.scatter_add_(1, bank_labels[indices], shifted.exp())
    assert torch.equal(found.predictions[20], votes.argmax(dim=1)) and found.top1[20] > 0.9


def test_a_small_vote_by_hand():
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    weights = [math.exp(s / 2.0) for s in (1.0, 0.6, 0.0)]
    assert weights[0] < weights[1] + weights[2]  # the two others outvote the nearest
    result = classify_knn(bank, labels, query, torch.tensor([1]), ks=(1, 3), num_classes=2, temperature=2.0)
    assert (result.predictions[1].item(), result.predictions[3].item()) == (0, 1)
    assert (result.top1[1], result.top1[3]) == (0.0, 1.0)


def test_equal_neighbours_enter_by_index_and_equal_votes_fall_to_the_lower_class():
    bank = torch.tensor([[1.0, 0.0]] * 6)
    labels = torch.tensor([3, 2, 2, 1, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    result = classify_knn(bank, labels, query, torch.tensor([3]), ks=(1, 2, 3, 6), num_classes=4)
    assert [result.predictions[k].item() for k in (1, 2, 3, 6)] == [3, 2, 2, 1]


def test_ties_at_the_kth_neighbour_equal_a_stable_sort():
    generator = torch.Generator().manual_seed(1)
    # Three distinct directions only: every cut runs through equal similarities.
    directions = torch.nn.functional.normalize(torch.randn(3, 4, generator=generator), dim=1)
    keys = directions[torch.randint(3, (200,), generator=generator)]
    queries = torch.nn.functional.normalize(torch.randn(9, 4, generator=generator), dim=1)
    values, indices = nearest(queries, keys, 50)
    expected_values, expected = (queries @ keys.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, expected[:, :50]) and torch.equal(values, expected_values[:, :50])


def test_top5_looks_at_no_more_classes_than_voted():
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    result = classify_knn(bank, labels, torch.eye(3), torch.tensor([0, 0, 0]), ks=(1, 3), num_classes=3)
    assert result.top5[1] == pytest.approx(1 / 3)  # with one neighbour, one class has a vote
    assert result.top5[3] == 1.0


def test_blocks_dealt_to_two_processes_give_the_same_predictions(monkeypatch):
    bank, bank_labels, queries, labels = split_digits()
    monkeypatch.setattr(knn, "QUERY_BLOCK", 64)
    alone = classify_knn(bank, bank_labels, queries, labels, ks=(20,), num_classes=10)
    parts = []
    for rank in range(2):
        keep = Processes(rank=rank, world_size=2, gather=lambda own: parts.append(own) or [own])
        # Half of the predictions cannot be compared with all labels.
        with contextlib.suppress(RuntimeError):
            classify_knn(bank, bank_labels, queries, labels, ks=(20,), num_classes=10, processes=keep)
    both = sorted((part for own in parts for part in own), key=lambda part: part[0])
    assert torch.equal(torch.cat([part[1][20] for part in both]), alone.predictions[20])


def test_more_neighbours_than_images_are_refused():
    with pytest.raises(ValueError, match=r"knn.k is 4; expected at most 3"):
        classify_knn(torch.eye(3), torch.arange(3), torch.eye(3), torch.arange(3), ks=(4,), num_classes=3)


class _Pretraining:
    class evaluation:
        test_split, knn_train_images, knn_test_images = "test", 200, 96

    class model:
        image_size = 28

    def __init__(self, shards):
        self.data = DataConfig(shards=shards, channels=1, mean=(0.3,), std=(0.35,))


def test_features_that_are_not_finite_end_no_run(digits, caplog):
    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1) / 0.0

    assert build_knn_probe(_Pretraining(digits), torch.device("cpu"))(Broken()) == {}
    assert "eval/knn20_top1 is left out" in caplog.text


def test_a_split_that_is_not_there_is_named_by_trainings_own_option(digits, monkeypatch):
    monkeypatch.setattr(_Pretraining.evaluation, "test_split", "nosuch")
    with pytest.raises(ValueError, match=r"^evaluation\.test_split is 'nosuch'.*set evaluation\.test_split$"):
        build_knn_probe(_Pretraining(digits), torch.device("cpu"))


@pytest.mark.learned
def test_the_probe_in_training_disturbs_nothing(digits, record_property):
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5)).train()
    probe = build_knn_probe(_Pretraining(digits), torch.device("cpu"))
    before = torch.get_rng_state()
    first, second = probe(backbone), probe(backbone)
    assert torch.equal(before, torch.get_rng_state()) and backbone.training
    record_property("top1", first["eval/knn20_top1"])
    assert first == second and first["eval/knn20_top1"] > 0.6  # pixels of digits: dropout is off
