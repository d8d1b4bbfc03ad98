"""CARP's loss, its gradients and its partitions."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prototypes.config import PartitionConfig
from prototypes.objectives.carp import carp_loss, count_blocks_per_chunk
from prototypes.objectives.koleo import compute_koleo
from prototypes.objectives.partitions import draw_partition
from tests.helpers.counting import largest_tensor
from tests.unit.prototypes import oracle


def make_inputs(num_views=4, num_samples=6, dim=8, num_prototypes=24, size=6):
    student = torch.randn(num_views, num_samples, dim, requires_grad=True)
    teacher = torch.randn(2, num_samples, dim)
    prototypes = torch.nn.functional.normalize(torch.randn(num_prototypes, dim), dim=1)
    partition = draw_partition(num_prototypes, size, seed=0, step=3)
    return student, teacher, prototypes, partition


def test_equals_the_float64_oracle():
    student, teacher, prototypes, partition = make_inputs()
    other = torch.nn.functional.normalize(torch.randn_like(prototypes), dim=1)
    loss = carp_loss(3 * student, 3 * teacher, prototypes, other, partition, entropy_weight=0.7)
    arrays = [value.detach().double().numpy() for value in (3 * student, 3 * teacher, prototypes, other)]
    expected = oracle.carp(*arrays, partition.numpy(), entropy_weight=0.7)
    np.testing.assert_allclose([value.item() for value in loss], expected, rtol=1e-5, atol=1e-6)


def whole_loss(student, teacher, student_prototypes, teacher_prototypes, partition):
    """The same loss with every logit at once, plain autograd."""
    eps = torch.finfo(torch.float32).eps

    def probs(rows, prototypes):
        logits = rows @ prototypes.T
        return logits[..., partition].softmax(-1)

    p, q = probs(student, student_prototypes), probs(teacher.detach(), teacher_prototypes.detach())
    pairs = [(i, j) for i in range(len(p)) for j in range(len(q)) if i != j]
    agreement = torch.stack([(p[i] * q[j]).sum(-1) for i, j in pairs])
    mean = torch.cat([p, q]).mean((0, 1))
    entropy = (math.log(partition.shape[1]) + (mean * mean.clamp(eps, 1 - eps).log()).sum(-1)).mean()
    return -agreement.clamp(eps, 1 - eps).log().mean() + entropy


@pytest.mark.parametrize("blocks_per_chunk", [1, 3, 100])
def test_chunks_and_recomputation_change_neither_value_nor_gradient(blocks_per_chunk):
    student, teacher, prototypes, partition = make_inputs()
    weight = prototypes.clone().requires_grad_()
    loss = carp_loss(student, teacher, weight, prototypes, partition, blocks_per_chunk=blocks_per_chunk)
    gradients = torch.autograd.grad(loss.total, (student, weight))
    expected = whole_loss(student, teacher, weight, prototypes, partition)
    expected_gradients = torch.autograd.grad(expected, (student, weight))
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-7)


def test_detached_prototypes_get_no_gradient_and_leave_the_projections_gradient_alone():
    student, teacher, prototypes, partition = make_inputs()
    learned = prototypes.clone().requires_grad_()
    joint = carp_loss(student, teacher, learned, learned, partition).total
    (joint_gradient,) = torch.autograd.grad(joint, student)
    full = carp_loss(student, teacher, prototypes, prototypes, partition).total
    full.backward()
    assert prototypes.grad is None
    torch.testing.assert_close(student.grad, joint_gradient)


def test_collapsed_solutions_cost_the_log_of_the_block_size():
    _, _, prototypes, partition = make_inputs()
    nothing = torch.zeros(4, 6, 8)
    uniform = carp_loss(nothing, nothing[:2], prototypes, prototypes, partition)
    assert uniform.total.item() == pytest.approx(math.log(6), rel=1e-5)
    # One direction, very long: all samples agree on one prototype per block.
    constant = 1e4 * torch.randn(8).expand(4, 6, 8)
    one_hot = carp_loss(constant, constant[:2], prototypes, prototypes, partition)
    assert one_hot.total.item() == pytest.approx(math.log(6), rel=1e-3)


def test_mean_over_ranks_gives_the_gradient_of_the_concatenated_batch():
    """Two ranks by hand: forward the true mean, backward the identity, gradients averaged."""
    student, teacher, prototypes, partition = make_inputs(num_samples=6)
    whole = carp_loss(student, teacher, prototypes, prototypes, partition)
    (expected,) = torch.autograd.grad(whole.total, student)
    halves = [(student[:, :3], teacher[:, :3]), (student[:, 3:], teacher[:, 3:])]
    local_means = []

    def record(mean):
        local_means.append(mean.detach())
        return mean

    for z, h in halves:
        carp_loss(z, h, prototypes, prototypes, partition, mean_over_ranks=record)
    true_mean = torch.stack(local_means).mean(0)
    gradients, losses = [], []
    for z, h in halves:
        z = z.detach().requires_grad_()
        loss = carp_loss(
            z,
            h,
            prototypes,
            prototypes,
            partition,
            mean_over_ranks=lambda mean: mean + (true_mean - mean).detach(),
        )
        gradients.append(torch.autograd.grad(loss.total, z)[0] / 2)
        losses.append(loss.total)
    torch.testing.assert_close(torch.cat(gradients, dim=1), expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(sum(losses) / 2, whole.total, rtol=1e-5, atol=1e-6)


def test_permuting_the_components_with_the_partition_leaves_the_loss():
    student, teacher, prototypes, partition = make_inputs()
    order = torch.randperm(len(prototypes))
    inverse = torch.argsort(order)
    loss = carp_loss(student, teacher, prototypes, prototypes, partition).total
    permuted = carp_loss(student, teacher, prototypes[order], prototypes[order], inverse[partition]).total
    torch.testing.assert_close(loss, permuted)


def test_no_tensor_of_all_logits_is_made():
    student, teacher, prototypes, partition = make_inputs(num_prototypes=480, size=6)

    def body():
        carp_loss(student, teacher, prototypes, prototypes, partition, blocks_per_chunk=4).total.backward()

    biggest = largest_tensor(body)
    all_logits = 4 * 6 * 480
    assert biggest < all_logits / 2


@pytest.mark.parametrize(
    ("blocks", "device", "num_parts", "expected"),
    [(None, "cpu", 1, 8), (None, "cpu", 4, 2), (None, "cuda", 4, 64), (6, "cuda", 2, 3), (1, "cpu", 4, 1)],
)
def test_blocks_at_once_are_asked_for_or_the_device_s(blocks, device, num_parts, expected):
    """On a GPU the rows count, of however many micro-batches: 2^25 logits are 64 blocks of 512 with 1,024 rows."""
    partition = PartitionConfig(size=512, blocks_per_chunk=blocks)
    found = count_blocks_per_chunk(partition, num_rows=1024, num_parts=num_parts, device=torch.device(device))
    assert found == expected


@hypothesis_settings(max_examples=30)
@given(
    num_blocks=st.integers(1, 12),
    size=st.integers(2, 9),
    seed=st.integers(0, 2**31),
    step=st.integers(0, 10**6),
    micro_step=st.integers(0, 7),
)
def test_partition_holds_every_prototype_once_and_is_a_function_of_its_arguments(
    num_blocks, size, seed, step, micro_step
):
    number = num_blocks * size
    first = draw_partition(number, size, seed=seed, step=step, micro_step=micro_step)
    again = draw_partition(number, size, seed=seed, step=step, micro_step=micro_step)
    assert first.shape == (num_blocks, size)
    assert torch.equal(first, again)
    assert torch.equal(first.flatten().sort().values, torch.arange(number))


def test_partitions_differ_between_steps_micro_steps_and_seeds():
    drawn = [
        draw_partition(64, 8, seed=seed, step=step, micro_step=micro_step)
        for seed, step, micro_step in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10, 0), (0, 1, 10)]
    ]
    for index, left in enumerate(drawn):
        for right in drawn[index + 1 :]:
            assert not torch.equal(left, right)


def test_partition_refuses_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match=r"partition\.size is 7; expected a divisor of 64"):
        draw_partition(64, 7, seed=0, step=0)


def test_koleo_equals_the_oracle_and_pushes_neighbours_apart():
    prototypes = torch.nn.functional.normalize(torch.randn(24, 8), dim=1).requires_grad_()
    partition = draw_partition(24, 6, seed=0, step=0)
    loss = compute_koleo(prototypes, partition)
    expected = oracle.koleo(prototypes.detach().double().numpy(), partition.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    moved = torch.nn.functional.normalize(prototypes - 0.05 * prototypes.grad, dim=1)
    assert compute_koleo(moved, partition) < loss


@pytest.mark.parametrize("mode", ["full", "joint", "partial"])
def test_resume_reproduces_the_next_twenty_losses_bitwise(mode):
    """A linear encoder against the estimator's prototypes: everything that a run keeps, saved in the middle."""
    from tests.unit.prototypes.building import build, clustered_rows, make_config

    def make():
        torch.manual_seed(1)
        estimator = build(make_config(24, 8, mode=mode, size=6))
        encoder, learned = torch.nn.Linear(8, 8), estimator.build_learned()
        parameters = [*encoder.parameters(), *(learned.parameters() if learned is not None else ())]
        return estimator, torch.nn.ModuleList([encoder, *([] if learned is None else [learned])]), parameters

    def run(estimator, modules, parameters, steps):
        optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
        for step in steps:
            views = clustered_rows(32, 8, seed=step).view(2, 16, 8)
            with torch.no_grad():
                h = modules[0](views)
            estimator.commit(estimator.observe(h.flatten(0, 1)))
            learned = modules[1]() if len(modules) > 1 else None
            rows_s, columns_s = estimator.logit_operands(modules[0](views), "student", learned)
            rows_t, columns_t = estimator.logit_operands(h, "teacher", learned)
            partition = draw_partition(24, 6, seed=0, step=step)
            loss = carp_loss(rows_s, rows_t, columns_s, columns_t, partition).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            estimator.accept()
            losses.append(loss.item())
        return losses

    estimator, modules, parameters = make()
    run(estimator, modules, parameters, range(10))
    saved = copy.deepcopy((estimator.state_dict(), modules.state_dict()))
    expected = run(estimator, modules, parameters, range(10, 30))
    resumed, resumed_modules, resumed_parameters = make()
    resumed.load_state_dict(saved[0])
    resumed_modules.load_state_dict(saved[1])
    assert run(resumed, resumed_modules, resumed_parameters, range(10, 30)) == expected
