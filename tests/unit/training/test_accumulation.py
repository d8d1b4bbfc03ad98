"""Micro-batches learn what one batch of all of them does: loss, gradients, mixture and figures."""

import dataclasses
import math
import weakref

import pytest
import torch

from data.views.augmentations import Crops
from prototypes.config import CouplingConfig, InstanceConfig, PatchConfig
from prototypes.mixture.config import GmmConfig, InitialisationConfig
from prototypes.objectives.carp import carp_loss
from prototypes.objectives.interface import Objective, Term
from prototypes.objectives.koleo import compute_koleo
from prototypes.objectives.partitions import draw_partition
from runtime.distributed import Process
from tests.helpers.plain_engine import PlainEngine
from tests.helpers.terms import VIT, build_config, masks_of, part_of, spread_
from training.accumulation import MicroBatch, StudentPass, differentiate, join, split
from training.build import assemble_step, build_sets, build_trained_network
from training.config import BatchConfig
from training.config_difference import find_differences
from training.engines.interface import NetworkOutput
from training.engines.synchronization import Synchronization
from training.schedules import StepSchedule

IMAGES, PROTOTYPES, BLOCK = 16, 64, 16
NUM_SAMPLES = 500
# Fresh heads give almost equal logits and gradients that cancel; wider projections make this a test of the algebra.
SPREAD = 50.0
SCHEDULE = StepSchedule(lr=0.1, weight_decay=0.0, ema_momentum=0.9)

ARMS = {
    "joint": {"mode": "joint"},
    "joint_kp": {"mode": "joint_kp"},
    "partial": {"mode": "partial", "coupling": CouplingConfig(tie=0.5)},
    "frozen_random": {"mode": "frozen_random"},
    "coupled": {"coupling": CouplingConfig(strength=0.5)},
    # Rows become means in their order: the order of the micro-batches must be that of one batch.
    "start_on_data": {"gmm": GmmConfig(init=InitialisationConfig(method="data"))},
    **{
        name: {"estimator": name}
        for name in (
            "gmm_diag",
            "gmm_spherical",
            "gmm_tied_diag",
            "gmm_tied_spherical",
            "vmf",
            "sph_kmeans",
            "vb_gmm",
            "sinkhorn",
        )
    },
}


def draw_micro_batches(number, seed=0, config=None):
    """The same images, two global views and one local, in `number` micro-batches; masks, where the run has any."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, IMAGES, 1, 16, 16, generator=generator)
    masks = None if config is None else masks_of(config, IMAGES, seed)
    views = images[: 1 if config is None else config.data.num_local_crops, :, :, :8, 4:12]
    pairs = zip(images.chunk(number, 1), views.chunk(number, 1), strict=True)
    return [Crops(a, b, part_of(masks, index, number)) for index, (a, b) in enumerate(pairs)]


def build_step(accumulation=1, **options):
    config = build_config(num_prototypes=PROTOTYPES, num_images=IMAGES, accumulation=accumulation, **options)
    process, synchronization = Process(0, 1, 0, torch.device("cpu")), Synchronization(1)
    sets = build_sets(config, NUM_SAMPLES, process, synchronization)
    torch.manual_seed(0)
    student, teacher = (build_trained_network(config, role, sets=sets) for role in ("student", "teacher"))
    spread_(student, SPREAD)
    teacher.begin_as(student)
    step = assemble_step(config, NUM_SAMPLES, process, synchronization, sets, PlainEngine(student, teacher))
    step.config = config
    return step


def train(accumulation, num_steps=2, **options):
    """Outcome and gradients of each step, and the step object as it ends."""
    step, outcomes = build_step(accumulation, **options), []
    for index in range(num_steps):
        torch.manual_seed(index)
        outcome = step(draw_micro_batches(accumulation, index, step.config), index, SCHEDULE)
        assert outcome.applied
        outcomes.append((outcome, step.engine.gradients))
    return outcomes, step


def assert_close(found, expected, name):
    """Within 1e-5 of the tensor's own largest entry."""
    assert float((found - expected).abs().max()) <= 1e-5 * max(float(expected.abs().max()), 1e-30), name


def check_equal_steps(found, expected):
    pairs = zip(found, expected, strict=True)
    for number, ((outcome, gradients), (outcome_of_one, gradients_of_one)) in enumerate(pairs):
        assert outcome.loss.keys() == outcome_of_one.loss.keys()
        for name, value in outcome_of_one.loss.items():
            # Of the whole: the entropy is a small difference of two logarithms.
            error = abs(float(outcome.loss[name] - value))
            assert error <= 1e-5 * float(outcome_of_one.loss["total"]), name
        scale = max(float(gradient.abs().max()) for gradient in gradients_of_one.values())
        for name, gradient in gradients_of_one.items():
            # Entries that cancel to nothing (an attention's key bias) have no relative error of their own. A second
            # step stands on what the first one's rounding has moved: 1.2e-5 was seen there, 4e-7 in a first step.
            bound = 1e-5 if number == 0 else 5e-5
            assert float((gradients[name] - gradient).abs().max()) <= bound * scale, name
        for section, (projections, *_) in outcome_of_one.sets.items():
            assert_close(outcome.sets[section].projections, projections, section)


def check_equal_sets(found, expected):
    for own, other in zip(found.sets, expected.sets, strict=True):
        state = other.estimator.state_dict()
        for name, value in own.estimator.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert_close(value, state[name], name)
        metrics = other.estimator.metrics()
        for name, value in own.estimator.metrics().items():
            assert value == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("arm", ARMS)
def test_micro_batches_equal_one_batch(arm):
    expected, one = train(1, **ARMS[arm])
    found, four = train(4, **ARMS[arm])
    check_equal_steps(found, expected)
    trains_prototypes = arm in ("joint", "joint_kp", "partial", "coupled")
    assert ("learned_prototypes.weight" in found[0][1]) == trains_prototypes
    check_equal_sets(four, one)
    assert four.sets[0].usage.by_logits.sum() == one.sets[0].usage.by_logits.sum() == 2 * 2 * IMAGES


@pytest.mark.parametrize(
    "instance",
    [InstanceConfig(logits="cosine"), InstanceConfig(logits="posterior")],
    ids=lambda o: o.logits,
)
def test_micro_batches_equal_one_batch_with_other_logits(instance):
    # One step: posterior logits are differences of large numbers, and their gradient here is 20 times the others'.
    expected, _ = train(1, num_steps=1, instance=instance)
    found, _ = train(4, num_steps=1, instance=instance)
    check_equal_steps(found, expected)


def dino(**options):
    return {"instance": InstanceConfig(name="dino", **options)}


# Each kind of targets with a mode, and each mode with a kind of targets.
DINO_ARMS = {
    "centre, joint": {"mode": "joint", "koleo_weight": 0.1, **dino(targets="centre")},
    "centre, full": dino(targets="centre"),
    "sinkhorn, full": dino(targets="sinkhorn"),
    "sinkhorn, joint_kp": {"mode": "joint_kp", **dino(targets="sinkhorn")},
    "entropy, partial": {**ARMS["partial"], **dino(targets="entropy")},
    "entropy, frozen": {**ARMS["frozen_random"], **dino(targets="entropy")},
    "posterior, full": dino(targets="posterior"),
    "posterior, vmf": {**ARMS["vmf"], **dino(targets="posterior")},
    "dot, joint": {"mode": "joint", **dino(logits="dot", targets="centre", teacher_temperature=0.5)},
}


def ibot(**options):
    return {"patch": PatchConfig(name="ibot", **options)}


# Each kind of targets of patches with a mode; shared head and prototypes, own ones, no term on views.
PATCH_ARMS = {
    "ibot centre, carp joint, shared": {"mode": "joint", **ibot(targets="centre")},
    "ibot sinkhorn, dino full, shared": {**dino(), **ibot(targets="sinkhorn")},
    "ibot centre, carp full, own joint": {"patch_mode": "joint", **ibot(targets="centre")},
    "ibot posterior, dino joint, own full": {
        "mode": "joint",
        "patch_mode": "full",
        **dino(targets="sinkhorn"),
        **ibot(targets="posterior"),
    },
    "ibot entropy, carp joint_kp, own partial": {
        "mode": "joint_kp",
        "patch_mode": "partial",
        **ibot(targets="entropy"),
    },
    "ibot centre, frozen": {**ARMS["frozen_random"], "patch_mode": "frozen_random", **ibot(targets="centre")},
}
NO_VIEWS = {"instance": InstanceConfig(name="none")}
CAPI_ARMS = {
    "capi alone, partial": {**ARMS["partial"], **NO_VIEWS, "patch": PatchConfig(name="capi")},
    "capi alone, full": {**NO_VIEWS, "patch": PatchConfig(name="capi")},
    "capi alone, sinkhorn codes": {**ARMS["sinkhorn"], **NO_VIEWS, "patch": PatchConfig(name="capi")},
    "capi centre, dino joint, own joint": {
        "mode": "joint",
        "patch_mode": "joint",
        **dino(targets="sinkhorn"),
        "patch": PatchConfig(name="capi", targets="centre"),
    },
}
TERM_ARMS = DINO_ARMS | PATCH_ARMS | CAPI_ARMS


@pytest.mark.parametrize("arm", TERM_ARMS)
def test_micro_batches_equal_one_batch_with_other_terms(arm):
    """Two steps: the second is taken against what the objective remembers of the first."""
    expected, one = train(1, **TERM_ARMS[arm])
    found, four = train(4, **TERM_ARMS[arm])
    check_equal_steps(found, expected)
    check_equal_sets(four, one)
    state = one.objective.state_dict()
    terms = {"instance": one.config.objective.instance, "patch": one.config.objective.patch}
    centred = {
        f"terms.{level}.centre"
        for level, term in terms.items()
        if term.name not in ("carp", "none") and term.resolved.targets == "centre"
    }
    assert set(state) == centred
    for name, value in four.objective.state_dict().items():
        assert value.abs().max() > 0
        assert_close(value, state[name], name)
    if "koleo" in found[0][0].loss:
        values = [float(outcome.loss["koleo"]) for outcome, _ in found]
        assert all(map(math.isfinite, values)) and arm == "centre, joint"


def modules(step):
    return [step.engine.student, step.engine.teacher, step.objective, *(one.estimator for one in step.sets)]


@pytest.mark.parametrize("arm", TERM_ARMS)
def test_a_resumed_run_goes_on_bit_for_bit(arm):
    _, whole = train(1, num_steps=2, **TERM_ARMS[arm])
    _, again = train(1, num_steps=1, **TERM_ARMS[arm])
    resumed = build_step(**TERM_ARMS[arm])
    for own, saved in zip(modules(resumed), modules(again), strict=True):
        own.load_state_dict(saved.state_dict())
    torch.manual_seed(1)
    assert resumed(draw_micro_batches(1, 1, resumed.config), 1, SCHEDULE).applied
    for found, expected in zip(modules(resumed), modules(whole), strict=True):
        for name, value in expected.state_dict().items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(found.state_dict()[name], value), name


def test_a_skipped_step_leaves_the_centre(arm="centre, joint"):
    _, step = train(1, num_steps=1, **DINO_ARMS[arm])
    before = step.objective.state_dict()["terms.instance.centre"].clone()
    step.engine.gradients_are_finite = lambda: torch.tensor(False)
    assert not step(draw_micro_batches(1, seed=1), 1, SCHEDULE).applied
    assert torch.equal(step.objective.state_dict()["terms.instance.centre"], before)
    del step.engine.gradients_are_finite
    assert step(draw_micro_batches(1, seed=1), 1, SCHEDULE).applied
    _, unskipped = train(1, num_steps=2, **DINO_ARMS[arm])
    after = unskipped.objective.state_dict()["terms.instance.centre"]
    assert torch.equal(step.objective.state_dict()["terms.instance.centre"], after)


def test_per_micro_batch_is_the_mean_of_the_micro_batches_losses():
    """The gap that `exact` closes, and that its twin is what it says: each micro-batch's own loss, averaged."""
    (whole, _), *_ = train(1, num_steps=1, mode="joint")[0]
    (found, gradients), *_ = train(4, num_steps=1, how="per_micro_batch", mode="joint")[0]
    assert abs(float(found.loss["entropy"] / whole.loss["entropy"]) - 1) > 1e-3
    step = build_step(mode="joint")
    losses = []
    for index, micro in enumerate(draw_micro_batches(4)):
        partition = draw_partition(PROTOTYPES, BLOCK, seed=0, step=0, micro_step=index)
        crops = [micro.global_crops.flatten(0, 1), micro.local_crops.flatten(0, 1)]
        student, teacher = step.engine.forward_student(crops), step.engine.forward_teacher(crops[:1])
        losses.append(
            carp_loss(
                student.projections.unflatten(0, (3, 4)),
                teacher.projections.unflatten(0, (2, 4)),
                student.learned_prototypes,
                teacher.learned_prototypes,
                partition,
            ).total
        )
    torch.stack(losses).mean().backward()
    assert_close(found.loss["total"], torch.stack(losses).mean(), "total")
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in step.engine.student.named_parameters():
        assert float((gradients[name] - parameter.grad).abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize("arm", ["joint", "joint_kp", "gmm_diag"])
def test_one_micro_batch_is_the_plain_gradient_bit_for_bit_and_one_pass(arm):
    results = [train(1, num_steps=1, how=how, **ARMS[arm]) for how in ("exact", "per_micro_batch")]
    step = build_step(**ARMS[arm])
    (micro,) = draw_micro_batches(1)
    crops = [micro.global_crops.flatten(0, 1), micro.local_crops.flatten(0, 1)]
    teacher = step.engine.forward_teacher(crops[:1])
    step.sets[0].estimator.commit(step.sets[0].estimator.observe(teacher.projections))
    student = step.engine.forward_student(crops)
    rows, columns = step.sets[0].estimator.logit_operands(
        student.projections, "student", student.learned_prototypes
    )
    goal_rows, goal_columns = step.sets[0].estimator.logit_operands(
        teacher.projections, "teacher", teacher.learned_prototypes
    )
    partition = draw_partition(PROTOTYPES, BLOCK, seed=0, step=0)
    loss = carp_loss(
        rows.unflatten(0, (-1, IMAGES)),
        goal_rows.unflatten(0, (-1, IMAGES)),
        columns,
        goal_columns,
        partition,
    )
    total = loss.total
    if arm == "joint_kp":
        total = total + step.sets[0].estimator.config.koleo_weight * compute_koleo(columns, partition)
    total.backward()
    for ((outcome, gradients),), found in results:
        assert torch.equal(outcome.loss["total"], total.detach())
        assert torch.equal(outcome.loss["entropy"], loss.entropy.detach())
        for name, parameter in step.engine.student.named_parameters():
            assert torch.equal(gradients[name], parameter.grad), name
        assert found.engine.num_passes == 1


def test_price_is_one_more_forward_pass_and_only_where_it_buys_something():
    for how, accumulation, passes in (("exact", 4, 8), ("per_micro_batch", 4, 4), ("exact", 1, 1)):
        assert train(accumulation, num_steps=1, how=how)[1].engine.num_passes == passes
        batch = BatchConfig(global_batch_size=16, gradient_accumulation_steps=accumulation, accumulation=how)
        assert batch.runs_student_twice == (passes > accumulation)


def test_both_passes_draw_the_same_drop_path():
    model = dataclasses.replace(VIT, drop_path_rate=0.5)
    step = build_step(2, model=model)
    seen = []
    forward = step.engine.forward_student

    def watching(crops, patches=None):
        output = forward(crops, patches)
        seen.append(output.projections.detach().clone())
        return output

    step.engine.forward_student = watching
    torch.manual_seed(5)
    step(draw_micro_batches(2), 0, SCHEDULE)
    first, second, first_again, second_again = seen
    assert torch.equal(first, first_again) and torch.equal(second, second_again)
    after = torch.rand(1)
    # The second pass leaves the generator where the first left it.
    torch.manual_seed(5)
    step = build_step(2, model=model)
    torch.manual_seed(5)
    for micro in draw_micro_batches(2):
        step.engine.forward_student([micro.global_crops.flatten(0, 1), micro.local_crops.flatten(0, 1)])
    assert torch.equal(after, torch.rand(1))
    # Otherwise two passes of one micro-batch would differ: the rate is high enough to see it.
    crops = [draw_micro_batches(1)[0].global_crops.flatten(0, 1)]
    assert not torch.equal(*(step.engine.forward_student(crops).projections for _ in range(2)))


def test_running_statistics_move_once_by_each_micro_batch_s_own_statistics():
    model = dataclasses.replace(VIT, head=dataclasses.replace(VIT.head, use_bn=True))
    step, reference = build_step(4, model=model), build_step(4, model=model)
    step(draw_micro_batches(4), 0, SCHEDULE)
    for micro in draw_micro_batches(4):
        reference.engine.forward_student([micro.global_crops.flatten(0, 1), micro.local_crops.flatten(0, 1)])
    found, expected = (dict(s.engine.student.named_buffers()) for s in (step, reference))
    assert any("running_var" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def peak_of_saved_bytes(accumulation):
    """Most bytes that autograd kept at once in a step whose micro-batches have four images, whatever their number."""
    step = build_step(accumulation, mode="joint")
    micro_batches = [draw_micro_batches(4, seed=index)[0] for index in range(accumulation)]
    alive, peak = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            alive += tensor.nbytes
            peak = max(peak, alive)
            weakref.finalize(self, self.drop, tensor.nbytes)

        @staticmethod
        def drop(num_bytes):
            nonlocal alive
            alive -= num_bytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step(micro_batches, 0, SCHEDULE)
    assert alive == 0
    return peak


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    one, eight = peak_of_saved_bytes(1), peak_of_saved_bytes(8)
    assert eight <= 1.1 * one


def test_a_pass_over_several_micro_batches_holds_no_graph():
    engine = build_step(mode="joint").engine
    given = [MicroBatch([micro.global_crops.flatten(0, 1)], IMAGES // 4) for micro in draw_micro_batches(4)]
    output = StudentPass(engine, given).output
    assert output.projections.grad_fn is None and output.learned_prototypes.grad_fn is None


@pytest.mark.parametrize("with_patches", [False, True])
def test_join_is_the_order_of_one_batch_and_split_its_inverse(with_patches):
    rows = torch.arange(3 * 4 * 2.0).view(3, 4, 2)
    # Two views of two micro-batches: rows of patches by view, then by micro-batch.
    counts = [[1, 3], [2, 0]]
    patches = [torch.tensor([[0.0], [3.0], [4.0], [5.0]]), torch.tensor([[1.0], [2.0]])]
    parts = [
        NetworkOutput(part.flatten(0, 1), torch.ones(5, 2), patches[index] if with_patches else None)
        for index, part in enumerate(rows.chunk(2, dim=1))
    ]
    joined = join(parts, 2, counts)
    assert torch.equal(joined.projections, rows.flatten(0, 1))
    assert (joined.patch_projections is not None) == with_patches
    for part, back in zip(parts, split(joined, 2, 2, counts), strict=True):
        assert torch.equal(part.projections, back.projections)
        if with_patches:
            assert torch.equal(joined.patch_projections, torch.arange(6.0)[:, None])
            assert torch.equal(part.patch_projections, back.patch_projections)
        else:
            assert back.patch_projections is None
        assert torch.equal(back.learned_prototypes, torch.full((5, 2), 0.5))


def test_differentiate_gives_zero_where_the_loss_uses_nothing():
    student = NetworkOutput(torch.ones(2, 3), torch.ones(4, 3))
    terms, gradient = differentiate(lambda s: {"total": s.projections.square().sum()}, student)
    assert terms["total"] == 6 and not terms["total"].requires_grad
    assert torch.equal(gradient.projections, 2 * torch.ones(2, 3))
    assert torch.equal(gradient.learned_prototypes, torch.zeros(4, 3))
    assert gradient.patch_projections is None


class TwoTerms(Term):
    """A loss that is no sum over images and shares nothing with CARP's."""

    def forward(self, batch, *, step, micro_step=0):
        self.asked = (step, micro_step, batch.num_parts)
        student, teacher = (side.rows @ side.columns.T for side in batch.views)
        mean = student.softmax(-1).mean((0, 1))
        agreement = (student[: len(teacher)] * teacher.detach()).mean()
        return {"total": 10 + (mean * mean.log()).sum() + agreement, "agreement": agreement}


@pytest.mark.parametrize("arm", ["joint", "gmm_diag"])
def test_a_step_runs_any_objective_and_returns_its_scalars(arm):
    outcomes = []
    for accumulation in (1, 4):
        step = build_step(accumulation, **ARMS[arm])
        term = TwoTerms(InstanceConfig(logits="cosine"))
        step.objective = Objective({"instance": term}, {"instance": 1.0})
        torch.manual_seed(0)
        outcome = step(draw_micro_batches(accumulation), 3, SCHEDULE)
        assert outcome.applied and list(outcome.loss) == ["total", "agreement"]
        assert term.asked == (3, 0, accumulation)
        outcomes.append([(outcome, step.engine.gradients)])
    check_equal_steps(*outcomes)


@pytest.mark.parametrize(
    ("saved", "current", "key"),
    [
        (("exact", 1), ("exact", 4), None),
        (("per_micro_batch", 1), ("exact", 4), None),
        (("per_micro_batch", 2), ("per_micro_batch", 4), "batch.gradient_accumulation_steps"),
        (("exact", 2), ("per_micro_batch", 2), "batch.accumulation"),
    ],
)
def test_a_resume_compares_what_accumulation_learns(saved, current, key):
    configs = [
        {"batch": {"accumulation": how, "gradient_accumulation_steps": steps}}
        for how, steps in (saved, current)
    ]
    assert list(find_differences(*configs)) == ([] if key is None else [key])


@pytest.mark.parametrize("section", ["prototypes", "patch_prototypes"])
@pytest.mark.parametrize(
    ("option", "differing"),
    [("blocks_per_chunk", []), ("size", ["{}.partition.size"])],
    ids=["chunks", "size"],
)
def test_a_resume_may_compute_the_loss_in_other_chunks(section, option, differing):
    """Runs of a version whose default was a number of blocks go on under one that leaves it to the device."""
    saved, current = ({section: {"partition": {option: value}}} for value in (8, None))
    assert list(find_differences(saved, current)) == [name.format(section) for name in differing]
