"""What masks say of patches, alike for one batch and for its micro-batches; and rows that stand for others."""

import dataclasses

import pytest
import torch

from prototypes.config import PatchConfig
from runtime.distributed import Process
from tests.helpers.terms import build_config, masks_of, part_of
from training.build import build_sets
from training.engines.interface import NetworkOutput
from training.engines.synchronization import Synchronization
from training.patches import join_patches, join_ragged, read_masks, split_ragged

CPU = torch.device("cpu")
CONFIG = build_config(patch=PatchConfig(name="ibot"))
MASKS = masks_of(CONFIG, 8, seed=0)


def test_hidden_patches_are_rows_with_one_voice_for_each_masked_crop():
    patches = read_masks(MASKS, "hidden", CPU)
    flat = MASKS.hidden.flatten()
    assert torch.equal(patches.student["hidden"], MASKS.hidden.flatten(0, 1))
    assert torch.equal(patches.student["rows"], flat.nonzero().squeeze(1))
    assert patches.student["rows"] is patches.teacher["rows"] and patches.target is None
    assert patches.student_counts == MASKS.hidden.flatten(1).sum(1).tolist()
    assert torch.equal(patches.position, patches.student["rows"] % 16)
    masked = MASKS.hidden.any(-1)
    assert patches.weight.sum() == pytest.approx(float(masked.float().mean()))
    for crop in range(16):
        own = patches.weight[patches.student["rows"] // 16 == crop]
        assert own.sum() == pytest.approx(float(masked.flatten()[crop]) / 16)


def test_left_out_patches_are_compared_with_all_of_the_teachers():
    masks = dataclasses.replace(MASKS, hidden=torch.zeros(2, 4, 16, dtype=torch.bool))
    masks.hidden[..., 3:9] = True
    masks = dataclasses.replace(masks, predicted=masks.hidden & (torch.arange(16) % 2 == 0))
    patches = read_masks(masks, "left_out", CPU)
    assert patches.student["visible"].tolist() == [[0, 1, 2, *range(9, 16)]] * 8
    assert patches.student["predicted"].tolist() == [[4, 6, 8]] * 8
    assert torch.equal(patches.teacher["rows"], torch.arange(128))
    assert torch.equal(patches.position[patches.target], torch.tensor([4, 6, 8] * 8))
    assert patches.weight.tolist() == pytest.approx([1 / 24] * 24)


@pytest.mark.parametrize("kind", ["hidden", "left_out"])
def test_patches_of_micro_batches_are_those_of_one_batch(kind):
    masks = MASKS
    if kind == "left_out":
        hidden = torch.zeros(2, 8, 16, dtype=torch.bool)
        hidden[..., 5:] = True
        predicted = torch.zeros_like(hidden).scatter_(2, torch.randint(5, 16, (2, 8, 1)), True)
        masks = dataclasses.replace(MASKS, hidden=hidden, predicted=predicted)
    whole = read_masks(masks, kind, CPU)
    parts = [read_masks(part_of(masks, index, 4), kind, CPU) for index in range(4)]
    joined = join_patches(parts)
    assert joined.student_counts == whole.student_counts and joined.teacher_counts == whole.teacher_counts
    assert joined.shape == whole.shape
    torch.testing.assert_close(joined.weight, whole.weight)
    assert torch.equal(joined.position, whole.position)
    assert (joined.target is None) == (kind == "hidden")
    if joined.target is not None:
        assert torch.equal(joined.target, whole.target)
    # The networks' rows of each micro-batch, put together, are in the order of one batch.
    tokens = torch.arange(2 * 8 * 16).view(2, 8, 16)
    counts = [part.teacher_counts for part in parts]
    rows = [
        tokens[:, 2 * index : 2 * index + 2].flatten()[part.teacher["rows"]]
        for index, part in enumerate(parts)
    ]
    assert torch.equal(join_ragged(rows, counts), tokens.flatten()[whole.teacher["rows"]])
    for row, back in zip(rows, split_ragged(join_ragged(rows, counts), counts), strict=True):
        assert torch.equal(row, back)


def test_of_many_rows_a_few_are_observed_with_the_weight_of_all():
    config = build_config(
        patch=PatchConfig(name="ibot"), patch_mode="full", max_rows_per_rank=10, mode="joint"
    )
    sets = build_sets(config, 500, Process(0, 1, 0, CPU), Synchronization(1))
    assert [one.section for one in sets] == ["prototypes", "patch_prototypes"]
    patches = read_masks(MASKS, "hidden", CPU)
    number = len(patches.weight)
    rows = torch.randn(number, 8)
    seen = []
    estimator = sets[1].estimator
    observe = estimator.observe

    def watching(rows, weight=None, group=None, is_last=True):
        seen.append((rows, weight))
        return observe(rows, weight, group, is_last)

    estimator.observe = watching
    for _ in range(2):
        torch.manual_seed(3)
        estimator.commit(sets[1].observe(NetworkOutput(None, None, rows), patches, by_position=False))
        estimator.accept()
    (chosen, weight), (again, _) = seen
    assert torch.equal(chosen, again) and len(chosen) == 10 < number
    assert float(weight.sum()) == pytest.approx(number) and len(set(weight.tolist())) == 1
    assert (chosen[:, None] == rows).all(-1).any(1).all()
    assert float(estimator.assignment().mass.sum()) == pytest.approx(number, rel=1e-4)
