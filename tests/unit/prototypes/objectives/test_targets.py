"""Cross-entropy in chunks, what its targets' figures say, Sinkhorn's offsets, weights of masked patches."""

import math

import pytest
import torch
import torch.nn.functional as F

from prototypes.objectives.dino import dino_loss
from prototypes.objectives.interface import compute_mask_weights
from prototypes.objectives.koleo import compute_embedding_koleo
from prototypes.objectives.logits import ChunkedLogits
from prototypes.objectives.patches import patch_loss
from prototypes.objectives.sinkhorn import compute_sinkhorn_offsets, count_groups, pick_offsets
from prototypes.statistics import Collectives
from tests.helpers.counting import largest_tensor
from tests.unit.prototypes.lockstep import Lockstep


def make_inputs(num_views=4, num_images=6, dim=8, num_prototypes=24):
    student = 3 * torch.randn(num_views, num_images, dim)
    teacher = 3 * torch.randn(2, num_images, dim)
    prototypes = F.normalize(torch.randn(num_prototypes, dim), dim=1)
    return student.requires_grad_(), teacher, prototypes.requires_grad_()


def whole_loss(student, teacher, student_prototypes, teacher_prototypes, offsets):
    """The same loss with every logit at once, plain autograd."""
    log_probs = (student @ student_prototypes.T).log_softmax(-1)
    targets = (teacher @ teacher_prototypes.detach().T - offsets).softmax(-1)
    pairs = [(i, j) for i in range(len(student)) for j in range(len(teacher)) if i != j]
    return -torch.stack([(targets[j] * log_probs[i]).sum(-1).mean() for i, j in pairs]).mean()


@pytest.mark.parametrize("num_views", [1, 2, 4])
@pytest.mark.parametrize("logits_per_chunk", [1, 100, 10**9])
def test_chunks_change_neither_loss_nor_gradient(num_views, logits_per_chunk):
    student, teacher, prototypes = make_inputs(num_views)
    other, offsets = torch.randn_like(prototypes), torch.randn(1, 24)
    loss = dino_loss(
        student, teacher, prototypes, other, offsets=offsets, logits_per_chunk=logits_per_chunk
    ).total
    expected = whole_loss(student, teacher, prototypes, other, offsets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    # A factor behind the loss reaches the gradient that was taken before it was known.
    found = torch.autograd.grad(2 * loss, (student, prototypes))
    torch.testing.assert_close(
        found, torch.autograd.grad(2 * expected, (student, prototypes)), rtol=1e-4, atol=1e-7
    )


def test_detached_prototypes_get_no_gradient_and_nothing_runs_twice():
    student, teacher, prototypes = make_inputs()
    fixed = prototypes.detach()
    (joint,) = torch.autograd.grad(dino_loss(student, teacher, prototypes, fixed).total, student)
    dino_loss(student, teacher, fixed, fixed).total.backward()
    torch.testing.assert_close(student.grad, joint)
    assert fixed.grad is None
    with torch.no_grad():
        assert not dino_loss(student, teacher, prototypes, fixed).total.requires_grad


def test_gradients_come_in_the_dtype_of_their_leaves():
    student, teacher, prototypes = make_inputs()
    student = student.detach().bfloat16().requires_grad_()
    loss = dino_loss(student, teacher.bfloat16(), prototypes, prototypes.detach()).total
    gradients = torch.autograd.grad(loss, (student, prototypes))
    assert loss.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]


def test_never_more_logits_than_asked_for():
    student, teacher, prototypes = make_inputs(num_views=10, num_images=32, num_prototypes=240)

    def views():
        dino_loss(student, teacher, prototypes, prototypes.detach(), logits_per_chunk=4800).total.backward()

    def patches():
        rows = student.flatten(0, 1)
        chunks = ChunkedLogits(rows, prototypes, 4800)
        position = torch.arange(320) % 16
        offsets = compute_sinkhorn_offsets(chunks, 3, Collectives(), group=position, num_groups=16)
        weight = torch.full((320,), 1 / 320)
        loss = patch_loss(
            rows, rows.detach(), prototypes, prototypes.detach(), weight, offsets=offsets, group=position,
            logits_per_chunk=4800,
        )  # fmt: skip
        loss.total.backward()

    for body in (views, patches):
        assert largest_tensor(body) <= 4800


def test_one_chunk_is_computed_once_and_several_are_not_kept():
    chunks = ChunkedLogits(torch.randn(10, 4), torch.randn(6, 4), logits_per_chunk=60)
    first, again = [next(iter(chunks))[1] for _ in range(2)]
    assert first is again
    several = ChunkedLogits(torch.randn(10, 4), torch.randn(6, 4), logits_per_chunk=30)
    assert next(iter(several))[1] is not next(iter(several))[1]
    assert [chosen for chosen, _ in several] == [slice(0, 5), slice(5, 10)]


def test_information_is_zero_for_either_collapse_and_log_k_for_a_perfect_partition():
    student, _, _ = make_inputs(num_images=24)
    prototypes = torch.eye(8)
    same = torch.randn(1, 1, 8).expand(2, 24, 8)
    uniform = dino_loss(student, torch.zeros(2, 24, 8), prototypes, prototypes)
    one_hot = dino_loss(student, 1e3 * same, prototypes, prototypes)
    apart = dino_loss(student, 1e3 * torch.eye(8).repeat(3, 1).expand(2, 24, 8), prototypes, prototypes)
    assert uniform.target_information.item() == pytest.approx(0, abs=1e-5)
    assert uniform.target_entropy.item() == pytest.approx(math.log(8), rel=1e-5)
    assert one_hot.target_information.item() == pytest.approx(0, abs=1e-5)
    assert one_hot.target_entropy.item() == pytest.approx(0, abs=1e-5)
    assert apart.target_information.item() == pytest.approx(math.log(8), rel=1e-5)


def test_figures_of_two_ranks_are_those_of_their_rows_together():
    _, teacher, prototypes = (value.detach() for value in make_inputs())
    rows, weight = teacher.flatten(0, 1), torch.full((12,), 1 / 12)
    whole = patch_loss(rows, rows, prototypes, prototypes, weight)
    ranks, parts = Lockstep(2), (slice(0, 3), slice(3, 12))

    def body(rank):
        def mean_over_ranks(tensor):
            return ranks.reduce_sum(rank)(tensor.clone()).wait() / 2

        own = rows[parts[rank]]
        return patch_loss(
            own, own, prototypes, prototypes, weight[parts[rank]], mean_over_ranks=mean_over_ranks
        )

    for found in ranks.run(body):
        torch.testing.assert_close(found[1:], whole[1:], rtol=1e-5, atol=1e-6)


def test_a_rank_without_masked_patches_has_the_loss_0():
    _, _, prototypes = make_inputs()
    none = torch.empty(0, 8, requires_grad=True)
    chunks = ChunkedLogits(none, prototypes)
    offsets = compute_sinkhorn_offsets(chunks, 3, Collectives())
    assert bool(offsets.isfinite().all())
    found = patch_loss(none, none, prototypes, prototypes, torch.empty(0), offsets=offsets)
    assert found.total.item() == 0 and math.isfinite(found.target_information)
    assert torch.autograd.grad(found.total, none)[0].shape == (0, 8)


# ------------------------------------------------------------------------------------ Sinkhorn


def plain_sinkhorn(logits, weight, group, num_iterations):
    """Row and column divisions in float64, group by group."""
    targets = torch.empty_like(logits, dtype=torch.float64)
    for value in group.unique():
        part, own = logits[group == value].double(), weight[group == value].double()
        part = (part - part.max()).exp()
        for _ in range(num_iterations):
            part = part / (own[:, None] * part).sum(0)
            part = part / part.sum(1, keepdim=True)
        targets[group == value] = part
    return targets.float()


def balance(rows, columns, weight, group, num_iterations, collectives, logits_per_chunk=10**6):
    chunks = ChunkedLogits(rows, columns, logits_per_chunk)
    number = 1 if group is None else count_groups(group, collectives)
    offsets = compute_sinkhorn_offsets(
        chunks, num_iterations, collectives, weight=weight, group=group, num_groups=number
    )
    assert bool(offsets.isfinite().all())
    return torch.softmax(rows @ columns.T - pick_offsets(offsets, group), dim=1)


@pytest.mark.parametrize("logits_per_chunk", [1, 35, 10**6])
def test_offsets_give_the_targets_of_plain_divisions(logits_per_chunk):
    rows, columns, weight = 6 * torch.randn(30, 4), torch.randn(5, 4), torch.rand(30)
    group = torch.randint(0, 3, (30,))
    for groups in (group, torch.zeros(30, dtype=torch.int64)):
        expected = plain_sinkhorn(rows @ columns.T, weight, groups, 3)
        found = balance(
            rows, columns, weight, None if groups.max() == 0 else groups, 3, Collectives(), logits_per_chunk
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_balances_within_each_group_and_a_weight_of_0_is_no_row():
    group, weight = torch.arange(40) % 2, torch.ones(40)
    weight[30:] = 0
    rows, columns = torch.randn(40, 5), torch.randn(5, 5)
    targets = balance(rows, columns, weight, group, 50, Collectives())
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    for value in (0, 1):
        column_sums = targets[:30][group[:30] == value].sum(0)
        torch.testing.assert_close(column_sums, torch.full((5,), 3.0), rtol=1e-3, atol=0)


def test_logits_far_beyond_the_range_of_exp_are_balanced():
    """Columns that differ by 600 nats: exp spans 1e260 there."""
    rows = torch.cat([torch.randn(40, 3), torch.ones(40, 1)], dim=1)
    columns = torch.cat([torch.randn(4, 3), torch.tensor([[0.0], [200.0], [-400.0], [100.0]])], dim=1)
    targets = balance(rows, columns, None, None, 50, Collectives())
    torch.testing.assert_close(targets.sum(0), torch.full((4,), 10.0), rtol=1e-3, atol=0)


def test_ranks_without_rows_of_some_group_balance_with_the_others():
    """Rank 1 holds no row of the groups 1 and 3, rank 2 no row at all; group 2 has a row nowhere."""
    rows, columns, weight = torch.randn(30, 5), torch.randn(5, 5), torch.rand(30) + 0.5
    group = torch.tensor([0, 1, 3]).repeat(10)
    order = torch.cat([torch.arange(24), torch.tensor([24, 27, 25, 26, 28, 29])])
    rows, weight, group = rows[order], weight[order], group[order]
    parts = [torch.cat([torch.arange(24), torch.arange(26, 30)]), torch.arange(24, 26), torch.arange(0)]
    expected = balance(rows, columns, weight, group, 4, Collectives())
    ranks = Lockstep(3)

    def body(rank):
        own = parts[rank]
        collectives = Collectives(rank, 3, ranks.reduce_sum(rank), ranks.gather(rank))
        return balance(rows[own], columns, weight[own], group[own], 4, collectives, 35)

    for found, own in zip(ranks.run(body), parts, strict=True):
        torch.testing.assert_close(found, expected[own], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ masks and KoLeo


def test_every_masked_crop_counts_alike_and_unmasked_ones_count():
    masks = torch.zeros(2, 3, 16, dtype=torch.bool)
    masks[0, 0, :4] = masks[0, 1, :1] = masks[1, 2] = True
    weights = compute_mask_weights(masks)
    assert weights.shape == (21,)
    torch.testing.assert_close(weights[:5], torch.tensor([1 / 24] * 4 + [1 / 6]))
    assert float(weights.sum()) == pytest.approx(3 / 6)


def test_an_only_image_has_no_neighbour_to_be_pushed_from():
    """One image a rank: nothing, rather than the distance to itself."""
    embeddings = torch.randn(2, 1, 4, requires_grad=True)
    loss = compute_embedding_koleo(embeddings)
    loss.backward()
    assert loss == 0 and torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def test_koleo_of_embeddings_ignores_their_length_and_spreads_equal_ones_without_blowing_up():
    embeddings = torch.randn(2, 12, 8)
    lengths = 0.1 + torch.rand(2, 12, 1)
    torch.testing.assert_close(
        compute_embedding_koleo(embeddings * lengths),
        compute_embedding_koleo(embeddings),
        rtol=1e-5,
        atol=1e-5,
    )
    twins = embeddings[:, :1].expand(2, 12, 8).clone().requires_grad_()
    loss = compute_embedding_koleo(twins)
    loss.backward()
    assert loss.item() == pytest.approx(-2 * math.log(1e-4), rel=1e-3)
    assert bool(twins.grad.isfinite().all())
