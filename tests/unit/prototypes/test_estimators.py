"""What holds for every estimator behind the one interface: hygiene, skipped steps, state, properties."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from prototypes.build import build_estimator
from prototypes.config import ClusteringConfig, CouplingConfig, PrototypesConfig
from prototypes.families.vmf import compute_concentration, compute_log_normaliser, compute_resultant_length
from prototypes.mixture.config import AnnealingConfig, InitialisationConfig, RevivalConfig, VarianceConfig
from prototypes.mixture.revival import find_starved, revive_
from tests.unit.prototypes import oracle
from tests.unit.prototypes.building import (
    MIXTURES,
    assert_same_state,
    build,
    clustered_rows,
    exact_gmm,
    make_config,
    set_state,
    take_step,
    tensors,
)

OBSERVING = (*[("full", name) for name in (*MIXTURES, "sinkhorn")], ("partial", "gmm_diag"))
ALL_MODES = (*OBSERVING, ("joint", "gmm_diag"), ("joint_kp", "gmm_diag"), ("frozen_random", "gmm_diag"))


def build_mode(mode, estimator, **options):
    return build(make_config(16, 8, mode=mode, estimator=estimator, **options))


def run_mode(estimator, num_steps=4, start=0):
    for step in range(start, start + num_steps):
        take_step(estimator, clustered_rows(48, 8, seed=step))


@pytest.mark.parametrize(("mode", "name"), ALL_MODES)
def test_prototypes_are_unit_rows_and_alike_before_and_after_accept(mode, name):
    estimator = build_mode(mode, name)
    module = estimator.build_learned()
    learned = None if module is None else module()
    run_mode(estimator)
    estimator.commit(estimator.observe(clustered_rows(48, 8, seed=9)))
    for role in ("student", "teacher"):
        rows = estimator.prototypes(role, learned).clone()
        assert rows.shape == (16, 8)
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(16))
        assert rows.requires_grad == (role == "student" and mode in ("joint", "joint_kp", "partial"))
    published = estimator.prototypes("teacher", learned).clone()
    estimator.accept()
    torch.testing.assert_close(estimator.prototypes("teacher", learned), published, rtol=0, atol=0)


@pytest.mark.parametrize(("mode", "name"), OBSERVING)
def test_bad_rows_leave_the_state_as_if_they_were_absent(mode, name):
    rows = clustered_rows(48, 8)
    left, right = build_mode(mode, name), build_mode(mode, name)
    for step in range(3):
        good = clustered_rows(48, 8, seed=step)
        bad = good.clone()
        huge = torch.full((1, 8), 1e30)
        bad = torch.cat([bad[:7], torch.full((1, 8), torch.nan), bad[7:], good[:1] * torch.inf, huge])
        take_step(left, good)
        take_step(right, bad)
    assert_same_state(tensors(left), tensors(right))
    assert 3.0 in right.metrics().values()
    assert rows.isfinite().all()


@pytest.mark.parametrize(("mode", "name"), OBSERVING)
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_without_a_good_row_moves_nothing(mode, name, first):
    estimator = build_mode(mode, name)
    if not first:
        run_mode(estimator)
    before = tensors(estimator)
    take_step(estimator, torch.full((16, 8), torch.nan))
    assert_same_state(before, tensors(estimator))
    run_mode(estimator)
    assert all(value.isfinite().all() for value in tensors(estimator).values())


@pytest.mark.parametrize(("mode", "name"), OBSERVING)
def test_discard_leaves_every_bit(mode, name):
    estimator = build_mode(mode, name)
    run_mode(estimator)
    before, prototypes = tensors(estimator), estimator.prototypes("teacher").clone()
    extra = estimator.get_extra_state()
    estimator.commit(estimator.observe(10 * torch.randn(48, 8)))
    assert not torch.equal(estimator.prototypes("teacher"), prototypes)
    estimator.discard()
    assert_same_state(before, tensors(estimator))
    assert torch.equal(estimator.prototypes("teacher"), prototypes)
    assert estimator.get_extra_state() == extra
    # and the next step is that of an estimator that never saw the skipped one
    twin = build_mode(mode, name)
    run_mode(twin)
    run_mode(estimator, start=7)
    run_mode(twin, start=7)
    assert_same_state(tensors(twin), tensors(estimator))


@pytest.mark.parametrize(("mode", "name"), OBSERVING)
def test_micro_batches_are_one_batch(mode, name):
    whole, parts = build_mode(mode, name), build_mode(mode, name)
    for step in range(3):
        rows = clustered_rows(48, 8, seed=step)
        take_step(whole, rows)
        for index, part in enumerate(rows.split(16)):
            observation = parts.observe(part, is_last=index == 2)
        parts.commit(observation)
        parts.accept()
    assert_same_state(tensors(whole), tensors(parts))


@pytest.mark.parametrize(("mode", "name"), ALL_MODES)
def test_state_resumes_bitwise(mode, name):
    estimator = build_mode(mode, name)
    run_mode(estimator, 3)
    saved = {
        key: value.clone() if isinstance(value, torch.Tensor) else dict(value)
        for key, value in estimator.state_dict().items()
    }
    run_mode(estimator, 5, start=3)
    resumed = build(make_config(16, 8, mode=mode, estimator=name), seed=1)
    resumed.load_state_dict(saved)
    run_mode(resumed, 5, start=3)
    assert_same_state(tensors(estimator), tensors(resumed))
    assert estimator.get_extra_state() == resumed.get_extra_state()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("means"), "means is missing"),
        (lambda state: state.update(means=state["means"][:, :4]), r"means has shape \(16, 4\)"),
        (lambda state: state.update(counts=state["counts"].double()), "counts has dtype torch.float64"),
        (lambda state: state.update(surprise=torch.ones(1)), "surprise is not expected"),
        (lambda state: state["_extra_state"].update(schema=99), "schema is 99, expected 1"),
        (lambda state: state["_extra_state"].update(num_prototypes=8), "num_prototypes is 8, expected 16"),
        (lambda state: state["_extra_state"].update(estimator="vmf"), "estimator is vmf"),
        (lambda state: state.pop("_extra_state"), "_extra_state is missing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_in_one_line(spoil, message):
    estimator = build_mode("full", "gmm_diag")
    state = estimator.state_dict()
    state["_extra_state"] = dict(state["_extra_state"])
    spoil(state)
    before = tensors(estimator)
    with pytest.raises(ValueError, match=message) as raised:
        estimator.load_state_dict(state)
    assert "\n" not in str(raised.value)
    assert_same_state(before, tensors(estimator))


@pytest.mark.learned
@pytest.mark.parametrize("name", MIXTURES)
def test_every_family_finds_clusters(name, record_property):
    rows = torch.nn.functional.normalize(clustered_rows(600, 16, spread=0.1, seed=1), dim=1)
    beta = AnnealingConfig(schedule="constant", guard=None)
    config = make_config(
        16, 16, estimator=name, beta=beta, kmeans_temperature=0.05, init=InitialisationConfig(method="data")
    )
    estimator = build(config)
    start = None
    for _ in range(25):
        for batch in rows.split(100):
            take_step(estimator, batch)
        start = float(estimator.log_likelihood(rows).mean()) if start is None else start
    nearest = (rows @ estimator.prototypes("teacher").T).amax(1)
    rise = float(estimator.log_likelihood(rows).mean()) - start
    record_property("cosine", float(nearest.mean()))
    record_property("rise", rise)
    assert nearest.mean() > 0.98
    assert rise > -0.05
    gamma = estimator.responsibilities(rows)
    torch.testing.assert_close(gamma.sum(1), torch.ones(600))


@pytest.mark.learned
def test_sinkhorn_codes_learn_to_predict_their_targets(record_property):
    fast = ClusteringConfig(learning_rate=0.02, warmup_fraction=0.0)
    config = make_config(16, 8, estimator="sinkhorn")
    estimator = build(dataclasses.replace(config, clustering=fast), total_steps=60)
    losses = []
    for step in range(60):
        take_step(estimator, clustered_rows(64, 8, seed=step % 4))
        losses.append(estimator.metrics()["clustering/loss"])
    fall = np.mean(losses[:8]) - np.mean(losses[-8:])
    record_property("fall", fall)
    assert fall > 0.05


def test_sinkhorn_gradient_is_autograd_s():
    estimator = build_mode("partial", "gmm_diag")
    rows = torch.randn(12, 8)
    weight = torch.rand(12)
    handle = estimator.observe(rows, weight=weight).handle
    reduced = handle.wait()
    unit = torch.cat([torch.nn.functional.normalize(rows, dim=1), torch.ones(12, 1)], dim=1)
    table = estimator.means.clone().requires_grad_()
    targets = torch.exp(unit.double() @ table.detach().double().T / 0.06)
    for _ in range(3):
        targets = targets / (weight[:, None] * targets).sum(0)
        targets = targets / targets.sum(1, keepdim=True)
    targets = targets.float()
    loss = -(weight * (targets * torch.log_softmax(unit @ table.T / 0.12, dim=1)).sum(1)).sum()
    loss.backward()
    torch.testing.assert_close(reduced[:-3].view(16, 9), table.grad, rtol=1e-4, atol=1e-4)
    assert float(reduced[-3]) == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(("mode", "name"), [("partial", "gmm_diag"), ("full", "sinkhorn")])
def test_views_beside_patches_are_balanced_among_themselves(mode, name):
    """Rows without a group beside rows with one ended the first step."""
    views, patches, position = torch.randn(6, 8), torch.randn(10, 8), torch.arange(10) % 4
    mixed, named = build_mode(mode, name), build_mode(mode, name)
    mixed.observe(views, is_last=False)
    found = mixed.observe(patches, group=position)
    everything = torch.cat([views, patches])
    expected = named.observe(everything, group=torch.cat([torch.full((6,), 4), position]))
    assert torch.equal(found.handle.wait(), expected.handle.wait())


def test_the_teacher_s_clustering_logits_are_those_that_it_clusters_by():
    """CAPI hands the student the clustering's own assignments: at unit length they said next to nothing."""
    estimator = build(make_config(16, 8, mode="partial"))
    take_step(estimator, clustered_rows(64, 8))
    rows = torch.randn(2, 5, 8)
    operands, columns = estimator.logit_operands(rows, "teacher", kind="clustering")
    unit = torch.nn.functional.normalize(rows, dim=-1)
    expected = unit @ estimator.means[:, :8].T + estimator.means[:, 8]
    torch.testing.assert_close(operands @ columns.T, expected)
    assert 2 < columns[:, :8].norm(dim=1).mean() < 4  # the root of 8, not 1
    assert estimator.logit_operands(rows[:0, 0], "teacher", kind="clustering")[0].shape == (
        0,
        9,
    )  # nothing hidden
    operands, columns = estimator.logit_operands(rows, "teacher", kind="cosine")
    torch.testing.assert_close(operands @ columns.T, unit @ estimator.prototypes("teacher").T)
    operands, columns = estimator.logit_operands(rows, "teacher", kind="dot")
    torch.testing.assert_close(operands @ columns.T, rows @ estimator.prototypes("teacher").T)


# ------------------------------------------------------------------------------- properties


@hypothesis_settings(max_examples=15)
@given(seed=st.integers(0, 1000), number=st.integers(2, 40))
def test_order_of_the_batch_does_not_matter(seed, number):
    rows = clustered_rows(number, 8, seed=seed)
    order = torch.randperm(number)
    left, right = build_mode("full", "gmm_diag"), build_mode("full", "gmm_diag")
    for _ in range(2):
        take_step(left, rows)
        take_step(right, rows[order])
    for key, value in tensors(left).items():
        torch.testing.assert_close(value, tensors(right)[key], rtol=1e-4, atol=1e-5)


@hypothesis_settings(max_examples=10)
@given(seed=st.integers(0, 1000))
def test_permuting_the_components_permutes_the_result(seed):
    rows = clustered_rows(32, 8, seed=seed)
    order = torch.randperm(16)
    left, right = build_mode("full", "gmm_diag"), build_mode("full", "gmm_diag")
    right.means.copy_(left.means[order])
    for _ in range(3):
        take_step(left, rows)
        take_step(right, rows)
    for name in ("means", "variances", "counts", "mixing_weights"):
        torch.testing.assert_close(getattr(left, name)[order], getattr(right, name), rtol=1e-4, atol=1e-5)


@hypothesis_settings(max_examples=10)
@given(offset=st.floats(-5, 5), seed=st.integers(0, 1000))
def test_translation_of_raw_input_translates_the_means_alone(offset, seed):
    rows = clustered_rows(64, 8, seed=seed)
    left, right = (build(make_config(16, 8, **exact_gmm())) for _ in range(2))
    right.means.add_(offset)
    for _ in range(3):
        take_step(left, rows)
        take_step(right, rows + offset)
    torch.testing.assert_close(left.means + offset, right.means, rtol=0, atol=2e-3)
    torch.testing.assert_close(left.variances, right.variances, rtol=0, atol=2e-3)
    torch.testing.assert_close(left.mixing_weights, right.mixing_weights, rtol=0, atol=1e-3)


@hypothesis_settings(max_examples=30)
@given(shift=st.sampled_from([-1e4, -100.0, 0.0, 100.0, 1e4]), seed=st.integers(0, 1000))
def test_responsibilities_sum_to_one_under_any_shift_of_the_logits(shift, seed):
    from prototypes.mixture.assignments import normalise_responsibilities_

    logits = 4 * torch.randn(9, 33, generator=torch.Generator().manual_seed(seed))
    logits = (logits * 64).round() / 64
    shifted = normalise_responsibilities_(logits + shift)
    torch.testing.assert_close(shifted.sum(1), torch.ones(9), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        shifted, normalise_responsibilities_(logits.clone()), rtol=1e-4, atol=1e-3 * (abs(shift) > 1000)
    )


def test_mixing_weights_stay_a_distribution_above_the_floor():
    estimator = build_mode("full", "gmm_diag")
    for step in range(40):
        take_step(estimator, clustered_rows(48, 8, num_clusters=2, seed=step))
        assert float(estimator.mixing_weights.sum()) == pytest.approx(1, abs=1e-5)
        assert (estimator.mixing_weights >= 0.1 / 16 * 0.9).all()


def test_weights_count_rows():
    rows = clustered_rows(20, 8)
    left, right = build_mode("full", "gmm_diag"), build_mode("full", "gmm_diag")
    take_step(left, torch.cat([rows, rows[:5]]))
    take_step(right, rows, weight=torch.tensor([2.0] * 5 + [1.0] * 15))
    for key, value in tensors(left).items():
        torch.testing.assert_close(value, tensors(right)[key], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- options


def test_balance_moves_mass_to_the_unused():
    plain, balanced = build(make_config(16, 8)), build(make_config(16, 8, balance=1.0))
    for estimator in (plain, balanced):
        set_state(estimator)
        estimator.usage.copy_(torch.softmax(torch.linspace(2, -2, 16), dim=0))
    rows = torch.randn(100, 8)
    used = plain.usage
    assert (balanced.responsibilities(rows) * used).sum() < (plain.responsibilities(rows) * used).sum()


def test_the_reported_perplexity_is_that_of_the_balanced_responsibilities():
    estimator = set_state(build(make_config(16, 8, balance=3.0)))
    estimator.usage.copy_(torch.softmax(torch.linspace(4, -4, 16), dim=0))
    rows = clustered_rows(12, 8)
    gamma = estimator.responsibilities(rows)
    expected = torch.special.entr(gamma).sum(1).mean().exp()
    take_step(estimator, rows)
    assert estimator.metrics()["gmm/responsibility_perplexity"] == pytest.approx(float(expected), rel=1e-3)


def test_geometric_schedule_starts_from_the_critical_value_and_ends_at_one():
    config = make_config(16, 8, beta=AnnealingConfig())
    estimator = build(config, total_steps=100)
    take_step(estimator, clustered_rows(200, 8))
    critical = estimator.annealing.beta_critical
    assert 1 / 8 <= critical <= 1
    assert estimator.annealing.start == pytest.approx(min(1.0, max(0.3, 3 * critical)))
    for step in range(10):
        assert estimator.annealing.beta >= min(1.0, 2 * critical) - 1e-9
        take_step(estimator, clustered_rows(50, 8, seed=step))
    assert estimator.annealing.beta == 1.0


@pytest.mark.parametrize("name", MIXTURES)
def test_without_forgetting_no_mean_follows_a_row_and_revival_still_moves_means(name):
    revival = RevivalConfig(method="reseed", interval_steps=100, max_share=1.0, row_distance=0.01)
    still, moving = (
        build_mode("full", name, forgetting=forgetting, revival=revival, standardise=True)
        for forgetting in ("none", "responsibility")
    )
    run_mode(still, 1), run_mode(moving, 1)
    start = still.means.clone()
    run_mode(still, start=1), run_mode(moving, start=1)
    assert float(still.assignment().hits.sum()) == 48 and not torch.equal(moving.means, start)
    torch.testing.assert_close(still.means, start, rtol=0, atol=0)
    torch.testing.assert_close(still.cosines_to_start(still.prototypes("teacher")), torch.ones(16))
    still.usage[0] = 0.0
    assert still.reseed(100) > 0 and not torch.equal(still.means[0], start[0])


@pytest.mark.parametrize(("mode", "name"), ALL_MODES)
def test_the_cosine_to_the_start_tells_what_moved(mode, name):
    # Clustered prototypes have a rate of their own, at which four steps turn them by 1e-7.
    config = make_config(16, 8, mode=mode, estimator=name)
    estimator = build(dataclasses.replace(config, clustering=ClusteringConfig(learning_rate=0.5)))
    module = estimator.build_learned()
    learned = None if module is None else module()
    start = estimator.prototypes("teacher", learned).clone()
    torch.testing.assert_close(estimator.cosines_to_start(start), torch.ones(16))
    run_mode(estimator)
    if module is not None:
        with torch.no_grad():
            module.weight[3] = -module.weight[3]
    now = estimator.prototypes("teacher", None if module is None else module())
    found = estimator.cosines_to_start(now)
    torch.testing.assert_close(found, (start * now).sum(1))
    if mode == "joint":
        assert int((found < 0.999).sum()) == 1 and float(found[3]) == pytest.approx(-1)
    assert (float(found.min()) < 0.999) == (mode != "frozen_random")


def test_a_mixture_starts_where_its_rows_were_placed():
    config = make_config(16, 8, init=InitialisationConfig(method="data"))
    estimator = build(dataclasses.replace(config, coupling=CouplingConfig(strength=0.5)))
    learned = estimator.build_learned()()
    run_mode(estimator, 1)
    torch.testing.assert_close(
        estimator.cosines_to_start(estimator.prototypes("teacher", learned)), torch.ones(16)
    )
    run_mode(estimator, 3, start=1)
    assert float(estimator.cosines_to_start(estimator.prototypes("teacher", learned)).max()) < 1 - 1e-5


def test_learned_prototypes_may_start_at_the_means():
    config = make_config(16, 8, init=InitialisationConfig(method="data"))
    coupling = CouplingConfig(strength=1.0, start="means")
    estimator = build(dataclasses.replace(config, coupling=coupling))
    starts = []
    for step in range(3):
        take_step(estimator, clustered_rows(10, 8, seed=step))
        starts.append(estimator.learned_start())
        if step == 1:
            means = torch.nn.functional.normalize(estimator.means, dim=1)
    # Of 16 means ten come from the first step, six from the second; no other step knows a start.
    assert starts[0] is None and starts[2] is None
    torch.testing.assert_close(starts[1], means)
    torch.testing.assert_close(estimator.cosines_to_start(starts[1]), torch.ones(16))


@pytest.mark.parametrize(
    "options", [{"strength": 0.0}, {"strength": 1.0, "init": "sphere"}], ids=["no coupling", "no features"]
)
def test_a_start_at_the_means_needs_both(options):
    config = make_config(16, 8, init=InitialisationConfig(method=options.pop("init", "data")))
    with pytest.raises(ValueError, match=r"prototypes\.coupling\.start is means; expected directions unless"):
        dataclasses.replace(config, coupling=CouplingConfig(start="means", **options))


@pytest.mark.parametrize("method", ["data", "data_spread"])
def test_starts_from_features(method):
    init = InitialisationConfig(method=method, warmup_fraction=0.0)
    estimator = build(make_config(16, 8, init=init))
    rows = torch.nn.functional.normalize(clustered_rows(24, 8, spread=0.01), dim=1)
    start = estimator.means.clone()
    take_step(estimator, rows[:10])
    if method == "data":
        torch.testing.assert_close(estimator.means[:10], rows[:10])
        assert torch.equal(estimator.means[10:], start[10:])
    take_step(estimator, rows[10:])
    if method == "data":
        torch.testing.assert_close(estimator.means, rows[:16])
    else:
        placed = estimator.collected.placed
        assert placed == oracle.count_unique(rows[:16].numpy(), 0.1)
        assert torch.equal(estimator.means[placed:], start[placed:])
    assert estimator.collected.seen == 16
    torch.testing.assert_close(estimator.variances[3], estimator.row_variance)


def test_a_start_from_spread_features_waits_and_starts_every_component_afresh():
    init = InitialisationConfig(method="data_spread", warmup_fraction=0.05)
    estimator = build(make_config(16, 8, init=init), total_steps=100)
    start = estimator.means.clone()
    for step in range(5):
        take_step(estimator, clustered_rows(40, 8, seed=step))
        assert torch.equal(estimator.means, start)
    take_step(estimator, 0.01 * torch.randn(40, 8) + torch.ones(8))
    assert torch.equal(estimator.counts, torch.ones(16))
    torch.testing.assert_close(estimator.variances, estimator.row_variance.expand(16, 8))
    take_step(estimator, clustered_rows(40, 8, seed=9))
    assert not torch.equal(estimator.counts, torch.ones(16))


def test_centre_and_standardise_move_logits_with_the_features():
    rows = clustered_rows(200, 8) * torch.linspace(0.5, 3, 8) + 7.0
    estimator = build(make_config(16, 8, center=True, standardise=True))
    take_step(estimator, rows)
    seen = estimator.preprocess(rows)
    assert seen.mean(0).abs().max() < 0.2
    z = rows.clone().requires_grad_()
    operand, columns = estimator.logit_operands(z, "student")
    expected = (rows - estimator.input_mean) / estimator.input_variance.sqrt()
    torch.testing.assert_close(operand.detach(), expected, rtol=1e-4, atol=1e-4)
    (operand @ columns.T).sum().backward()
    assert z.grad.isfinite().all()


def test_posterior_logits_are_the_tempered_log_joint():
    estimator = build(make_config(16, 8, beta=AnnealingConfig(schedule="constant", end=0.5, guard=None)))
    run_mode(estimator)
    rows = torch.randn(2, 5, 8)
    operand, columns = estimator.logit_operands(rows, "teacher", kind="posterior")
    posterior = torch.softmax(operand @ columns.T, dim=-1)
    expected = estimator.responsibilities(rows.flatten(0, 1)).view(2, 5, 16)
    torch.testing.assert_close(posterior, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"set .*objective\.instance\.logits=dot"):
        build_mode("frozen_random", "gmm_diag").logit_operands(rows, "teacher", kind="posterior")


@pytest.mark.learned
@pytest.mark.parametrize("method", ["split", "reseed"])
def test_revival_moves_starved_components_alike(method):
    revival = RevivalConfig(method=method, interval_steps=1, max_share=0.5)
    left, right = (build(make_config(16, 8, revival=revival)) for _ in range(2))
    for estimator in (left, right):
        run_mode(estimator)
        estimator.usage.copy_(torch.tensor([0.0] * 4 + [1 / 12] * 12))
        before = estimator.means.clone()
        moved = estimator.reseed(step=1)
        assert 1 <= moved <= 8
        changed = (estimator.means != before).any(1)
        assert changed[:4].any()
        assert estimator.counts[changed].min() >= 0.5
        assert estimator.means.isfinite().all()
        assert float(estimator.mixing_weights.sum()) == pytest.approx(1, abs=1e-5)
    assert_same_state(tensors(left), tensors(right))
    assert left.reseed(step=0) == 0


@pytest.mark.learned
@pytest.mark.parametrize("name", MIXTURES)
def test_a_split_shares_what_the_parent_has_and_its_child_survives(name, record_property):
    """Planted: half of the components hold everything; a child must win rows beside its narrow parent."""
    rows = clustered_rows(2000, 64, num_clusters=8, spread=0.4, seed=1)
    narrow = VarianceConfig(floor=0.02, shrinkage=0.0)
    config = make_config(16, 64, estimator=name, kmeans_temperature=0.02, variance=narrow)
    estimator = build(config, num_observations_per_epoch=2000, total_steps=1000)
    estimator.means[:8] = torch.nn.functional.normalize(rows[:8], dim=1)
    estimator.means[8:] = -estimator.means[:8]
    for batch in rows.split(100):
        take_step(estimator, batch)
    estimator.usage[8:] = 0
    estimator.usage /= estimator.usage.sum()
    before = {table: getattr(estimator, table).clone() for table in ("counts", "usage")}
    revival = RevivalConfig(method="split", max_share=0.5, duplicate_distance=0.0)
    moved = revive_(estimator, None, revival, seed=0, step=1)
    assert moved >= 4
    children = (estimator.usage[8:] > 0).nonzero().squeeze(1) + 8
    parents = (estimator.usage[:8] < before["usage"][:8] * 0.9).nonzero().squeeze(1)
    assert len(children) == len(parents) == moved
    for table, total in before.items():
        shared = getattr(estimator, table)
        torch.testing.assert_close(shared[children].sum(), shared[parents].sum())
        torch.testing.assert_close(shared[parents].sum(), total[parents].sum() / 2)
    for batch in rows.repeat(2, 1).split(100):
        take_step(estimator, batch)
    alive = float((estimator.usage[children] * 16 > 0.05).float().mean())
    record_property("moved", moved)
    record_property("alive", alive)
    assert alive >= 0.6  # of eight; 0.75 under vb_gmm, 1 under the others


@pytest.mark.learned
def test_starvation_shows_within_an_epoch(record_property):
    estimator = build(make_config(16, 8, **exact_gmm()), num_observations_per_epoch=10_000, total_steps=400)
    estimator.means[0] = 300.0
    for step in range(100):
        take_step(estimator, clustered_rows(100, 8, num_clusters=15, spread=1.0, seed=step))
    record_property("share", float(estimator.usage[0] * 16))
    assert find_starved(estimator.usage)[0]


def test_coupling_is_full_at_zero_and_joint_at_one():
    for strength in (0.0, 0.3, 1.0):
        config = PrototypesConfig(
            num_prototypes=16,
            dim=8,
            partition=make_config().partition,
            coupling=CouplingConfig(strength=strength),
        )
        estimator = build(config)
        module = estimator.build_learned()
        run_mode(estimator)
        estimated = torch.nn.functional.normalize(estimator.means, dim=1)
        if strength == 0:
            assert module is None
            torch.testing.assert_close(estimator.prototypes("student"), estimated)
            continue
        learned = module()
        rows = estimator.prototypes("student", learned)
        (rows * torch.randn(16, 8)).sum().backward()
        assert module.weight.grad.abs().max() > 0
        if strength == 1:
            torch.testing.assert_close(rows, learned)
        else:
            expected = torch.nn.functional.normalize(0.3 * learned + 0.7 * estimated, dim=1)
            torch.testing.assert_close(rows, expected)


def test_tie_pulls_the_student_s_prototypes():
    config = make_config(16, 8, mode="partial")
    config = PrototypesConfig(
        mode="partial", num_prototypes=16, dim=8, partition=config.partition, coupling=CouplingConfig(tie=2.0)
    )
    estimator = build(config)
    learned = torch.nn.functional.normalize(torch.randn(16, 8), dim=1).requires_grad_()
    loss = estimator.auxiliary_loss(learned)
    expected = 2 * (learned - estimator.prototypes("teacher")).square().sum(1).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(("dim", "kappa"), [(8, 0.5), (8, 50.0), (64, 5.0), (256, 30.0), (256, 3000.0)])
def test_vmf_normaliser_and_concentration(dim, kappa):
    value = float(compute_log_normaliser(torch.tensor([kappa]), dim)[0])
    expected = oracle.vmf_log_normaliser(np.float64(kappa), dim)
    if not np.isfinite(expected):
        pytest.fail("the oracle overflowed: choose another kappa")
    assert value == pytest.approx(expected, rel=1e-4, abs=2e-3)
    length = compute_resultant_length(torch.tensor(kappa), dim)
    assert float(compute_concentration(length[None], dim)[0]) == pytest.approx(kappa, rel=1e-2)


def test_world_size_without_a_collective_is_refused():
    with pytest.raises(ValueError, match="world_size is 2 without reduce_sum"):
        build_estimator(
            make_config(), seed=0, num_observations_per_epoch=10, total_steps=1, world_size=2, rank=0
        )


def test_config_modules_import_no_torch():
    import subprocess
    import sys

    code = "import prototypes.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
