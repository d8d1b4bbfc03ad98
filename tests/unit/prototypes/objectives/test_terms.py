"""The terms with targets and their sum: schedules, weights, entropy; the losses themselves are test_targets.py's."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from prototypes.build import build_objective
from prototypes.config import InstanceConfig, ObjectiveConfig, PartitionConfig, PrototypesConfig
from prototypes.objectives.entropy import compute_entropy_deficit
from prototypes.objectives.interface import LogitOperands, Objective, RankBatch, Term, ViewRows
from prototypes.objectives.koleo import compute_embedding_koleo

NUM, DIM = 12, 6
PROTOTYPES = PrototypesConfig(num_prototypes=NUM, dim=DIM, partition=PartitionConfig(size=4))


def draw_batch(seed=0, num_views=3, num_images=5):
    generator = torch.Generator().manual_seed(seed)
    columns = normalize(torch.randn(NUM, DIM, generator=generator), dim=1)
    student = normalize(torch.randn(num_views, num_images, DIM, generator=generator), dim=2)
    teacher = normalize(torch.randn(2, num_images, DIM, generator=generator), dim=2)
    return RankBatch(
        views=ViewRows(LogitOperands(student.requires_grad_(), columns), LogitOperands(teacher, columns)),
        embeddings=torch.randn(2, num_images, 9, generator=generator),
    )


def objective_of(**options):
    koleo_weight = options.pop("koleo_weight", 0.0)
    return build_objective(
        ObjectiveConfig(instance=InstanceConfig(**options), koleo_weight=koleo_weight),
        PROTOTYPES,
        seed=0,
        steps_per_epoch=10,
    )


@pytest.mark.parametrize("logits_per_chunk", [1, 30, 10**6])
def test_the_entropy_of_the_mean_is_the_plain_one_gradient_included(logits_per_chunk):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, DIM, generator=generator, dtype=torch.float32, requires_grad=True)
    columns = torch.randn(NUM, DIM, generator=generator, requires_grad=True)
    found = compute_entropy_deficit(rows, columns, logits_per_chunk=logits_per_chunk)
    gradients = torch.autograd.grad(found, (rows, columns))
    mean = (rows @ columns.T).softmax(1).mean(0)
    expected = math.log(NUM) + (mean * mean.log()).sum()
    torch.testing.assert_close(found, expected)
    for gradient, plain in zip(gradients, torch.autograd.grad(expected, (rows, columns)), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6)


def test_the_entropy_of_rows_that_are_not_there_is_finite():
    assert compute_entropy_deficit(torch.empty(0, DIM), torch.ones(NUM, DIM)) == pytest.approx(math.log(NUM))


def test_the_teachers_temperature_warms_up_linearly():
    objective = objective_of(
        name="dino",
        teacher_temperature=0.07,
        teacher_temperature_start=0.04,
        teacher_temperature_warmup_epochs=3.0,
    )
    term = objective.terms["instance"]
    found = [term.temperature("teacher", step) for step in (0, 15, 30, 99)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert term.temperature("student", 15) == 0.1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("dot", "entropy", 1.0, 1.0)),
        ({"logits": "cosine"}, ("cosine", "entropy", 0.1, 0.1)),
        ({"name": "dino"}, ("cosine", "centre", 0.1, 0.04)),
        ({"name": "dino", "targets": "posterior"}, ("cosine", "posterior", 0.1, 1.0)),
        ({"name": "dino", "logits": "dot", "student_temperature": 0.5}, ("dot", "centre", 0.5, 1.0)),
    ],
)
def test_what_a_term_leaves_open_is_its_methods(options, expected):
    assert InstanceConfig(**options).resolved[:4] == expected


def test_a_temperature_divides_the_logits_of_its_role_alone():
    batch = draw_batch()
    plain = objective_of(logits="cosine", student_temperature=0.5, teacher_temperature=0.2)(batch, step=0)
    (student, columns), (teacher, _) = batch.views
    divided = RankBatch(
        views=ViewRows(LogitOperands(student / 0.5, columns), LogitOperands(teacher / 0.2, columns))
    )
    expected = objective_of(logits="cosine", student_temperature=1.0, teacher_temperature=1.0)(
        divided, step=0
    )
    assert torch.equal(plain["total"], expected["total"])


def test_the_centre_is_the_average_of_the_logits_and_is_taken_off_before_the_temperature():
    objective, batch = objective_of(name="dino", centre_momentum=0.8), draw_batch()
    first = objective(batch, step=0)["total"]
    objective.accept()
    rows, columns = batch.views.teacher
    mean = (rows @ columns.T).mean((0, 1))
    centre = objective.state_dict()["terms.instance.centre"]
    torch.testing.assert_close(centre, 0.2 * mean)
    found = objective(batch, step=1)["total"]
    targets = ((rows @ columns.T - centre) / 0.04).softmax(-1)
    log_probs = (batch.views.student.rows @ columns.T / 0.1).log_softmax(-1)
    pairs = [(i, j) for i in range(3) for j in range(2) if i != j]
    losses = [-(targets[j] * log_probs[i]).sum(-1).mean() for i, j in pairs]
    torch.testing.assert_close(found, torch.stack(losses).mean())
    assert not torch.equal(found, first)


def test_the_sum_weighs_its_terms():
    batch = draw_batch()
    plain = objective_of(name="dino")(batch, step=0)
    weighted = objective_of(name="dino", weight=3.0, koleo_weight=0.5)(batch, step=0)
    koleo = compute_embedding_koleo(batch.embeddings)
    torch.testing.assert_close(weighted["total"], 3 * plain["total"] + 0.5 * koleo)
    assert weighted["cross_entropy"] == plain["cross_entropy"] and weighted["koleo"] == koleo
    assert isinstance(weighted, dict) and next(iter(weighted)) == "total"


def test_terms_of_both_levels_are_told_apart():
    class Constant(Term):
        def forward(self, batch, *, step, micro_step=0):
            return {"total": torch.tensor(2.0), "gap": torch.tensor(1.0)}

    objective = Objective(
        {level: Constant(InstanceConfig()) for level in ("instance", "patch")},
        {"instance": 1.0, "patch": 0.25},
    )
    assert objective(RankBatch(), step=0) == {"total": 2.5, "gap": 1.0, "patch_gap": 1.0}
