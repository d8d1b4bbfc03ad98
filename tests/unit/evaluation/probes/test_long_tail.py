import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.confidence import bootstrap
from evaluation.probes.long_tail import LongTailRule, imbalanced_subset, report_long_tail


@given(st.data())
def test_groups_equal_a_hand_count(data):
    num_classes = data.draw(st.integers(1, 8))
    counts = data.draw(st.lists(st.integers(0, 150), min_size=num_classes, max_size=num_classes))
    few = data.draw(st.integers(0, 100))
    rule = LongTailRule(few, few + data.draw(st.integers(0, 60)))
    pairs = data.draw(
        st.lists(
            st.tuples(st.integers(0, num_classes - 1), st.integers(0, num_classes - 1)),
            min_size=1,
            max_size=40,
        )
    )
    predicted, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    report = report_long_tail(
        predicted,
        labels,
        torch.tensor(counts),
        tuple("abcdefgh"[:num_classes]),
        rule=rule,
        resamples=5,
        level=0.9,
        seed=0,
    )
    for group, holds in (
        ("head", lambda n: n > rule.many_above),
        ("tail", lambda n: n <= rule.few_at_most and n <= rule.many_above),
        ("medium", lambda n: rule.few_at_most < n <= rule.many_above),
    ):
        member = [(p, t) for p, t in pairs if holds(counts[t])]
        expected = None if not member else sum(p == t for p, t in member) / len(member)
        found = report["groups"][group]
        assert found["images"] == len(member) and found["classes"] == sum(map(holds, counts))
        assert found["top1"] == (None if expected is None else pytest.approx(expected))
    by_class = [
        np.mean([p == t for p, t in pairs if t == c])
        for c in range(num_classes)
        if any(t == c for _, t in pairs)
    ]
    assert report["balanced_accuracy"]["value"] == pytest.approx(np.mean(by_class))
    assert report["groups"]["overall"]["top1"] == pytest.approx(np.mean([p == t for p, t in pairs]))


def test_the_inaturalist_thresholds():
    rule = LongTailRule()
    assert [rule.group(n) for n in (1, 20, 21, 100, 101)] == ["tail", "tail", "medium", "medium", "head"]


def test_thinning_follows_the_exponential_profile():
    labels = torch.arange(10).repeat_interleave(600)
    kept = imbalanced_subset(labels, 10, 100.0, seed=0)
    counts = torch.bincount(labels[kept]).tolist()
    assert counts == [round(600 * 100 ** (-c / 9)) for c in range(10)]
    assert len(set(kept.tolist())) == len(kept)
    assert torch.equal(kept, imbalanced_subset(labels, 10, 100.0, seed=0))


def test_a_class_without_images_thins_no_other():
    labels = torch.arange(10).repeat_interleave(600)
    labels = labels[labels != 4]
    counts = torch.bincount(labels[imbalanced_subset(labels, 10, 100.0, seed=0)], minlength=10).tolist()
    assert counts == [0 if c == 4 else round(600 * 100 ** (-c / 9)) for c in range(10)]


def test_the_interval_covers_a_known_share_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap(generator.random(150) < 0.7, resamples=200, level=0.9, seed=trial)
        covered += interval.low <= 0.7 <= interval.high
    assert 160 <= covered <= 196
