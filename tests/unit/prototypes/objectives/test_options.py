"""What a term says that it reads it reads, and what it does not read it refuses."""

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch
from torch.nn.functional import normalize

from prototypes.build import build_objective
from prototypes.config import InstanceConfig, ObjectiveConfig, PartitionConfig, PatchConfig, PrototypesConfig
from prototypes.objectives.interface import LogitOperands, PatchRows, RankBatch, ViewRows

NUM, DIM = 12, 6
LEVELS = {"instance": InstanceConfig, "patch": PatchConfig}
TERMS = [(level, name) for level, kind in LEVELS.items() for name in get_args(get_type_hints(kind)["name"])]
# Of every option another value, and what it is read beside.
OTHERS = {
    "weight": (3.0, {}),
    "logits": ("posterior", {}),
    "student_temperature": (0.3, {}),
    "teacher_temperature": (0.3, {}),
    "teacher_temperature_start": (0.2, {}),
    "teacher_temperature_warmup_epochs": (5.0, {"teacher_temperature_start": 0.2}),
    "targets": ("posterior", {}),
    "entropy_weight": (2.0, {"targets": "entropy"}),
    "centre_momentum": (0.5, {"targets": "centre"}),
    "sinkhorn_iterations": (1, {"targets": "sinkhorn"}),
}
UNREAD = {"carp": {"targets", "centre_momentum", "sinkhorn_iterations"}}


def draw_batch():
    generator = torch.Generator().manual_seed(0)

    def operands(*shape):
        rows = normalize(torch.randn(*shape, DIM, generator=generator), dim=-1)
        return LogitOperands(rows, columns)

    columns = normalize(torch.randn(NUM, DIM, generator=generator), dim=1)
    position = torch.arange(10) % 2
    return RankBatch(
        views=ViewRows(operands(3, 5), operands(2, 5)),
        patches=PatchRows(operands(10), operands(10), None, torch.full((10,), 0.1), position, 2),
    )


def run(level, options):
    """What a term computes and asks for in two steps."""
    terms = {"instance": InstanceConfig(name="none")} | {level: LEVELS[level](**options)}
    prototypes = PrototypesConfig(num_prototypes=NUM, dim=DIM, partition=PartitionConfig(size=4))
    objective = build_objective(ObjectiveConfig(**terms), prototypes, seed=0, steps_per_epoch=10)
    figures = [objective.kind(level, "student"), objective.kind(level, "teacher")]
    for step in range(2):
        figures += [float(value) for value in objective(draw_batch(), step=step).values()]
        objective.accept()
    return figures


def test_every_option_of_a_term_is_tried():
    assert set(OTHERS) == {field.name for field in fields(InstanceConfig)} - {"name"}


@pytest.mark.parametrize(("level", "name"), TERMS)
@pytest.mark.parametrize("option", OTHERS)
def test_an_option_changes_something_or_is_refused(level, name, option):
    value, beside = OTHERS[option]
    usual = {"name": name}
    if name == "none" or option in UNREAD.get(name, set()):
        with pytest.raises(
            ValueError, match=rf"^objective.{level}.{option} is .*{name} does not read it; set "
        ):
            LEVELS[level](**usual, **{option: value})
        return
    beside = {} if name == "carp" and "targets" in beside else beside
    assert run(level, usual | beside | {option: value}) != run(level, usual | beside)


@pytest.mark.parametrize("option", [option for option, (_, beside) in OTHERS.items() if beside])
def test_an_option_alone_without_what_it_is_read_beside_is_refused(option):
    value, beside = OTHERS[option]
    elsewhere = {"targets": "posterior"} if "targets" in beside else {}
    key = "objective.instance"
    with pytest.raises(
        ValueError, match=rf"^{key}.{option} is .* reads it beside {next(iter(beside))}=.*alone"
    ):
        InstanceConfig(name="dino", **elsewhere, **{option: value})


def test_saying_what_holds_anyway_is_no_mistake():
    assert InstanceConfig(targets="entropy").resolved == InstanceConfig().resolved
    assert PatchConfig(name="capi", targets="sinkhorn").resolved == PatchConfig(name="capi").resolved
