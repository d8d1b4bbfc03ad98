"""Five sharding modes on two gloo ranks: bitwise resume, agreed skips, the sharded average, any to any."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.digits import write_digit_shards
from tests.helpers.engine_scenarios import ENGINES, iterate
from tests.helpers.ranks import run_ranks
from training.config import OptimConfig
from training.cost import Activations, Cost, state_bytes
from training.engines.table import UNSUPPORTED

FAST = [
    *({"scenario": "resume_twice", "engine": e, "accumulation": 1, "precision": "fp32"} for e in ENGINES),
    *({"scenario": "skip_moves_nothing", "engine": e, "poison": "nan"} for e in ENGINES),
    *({"scenario": "clipped", "engine": e} for e in ENGINES),
    *({"scenario": "averages_in_fp32", "engine": e} for e in ("zero1", "zero2", "zero3")),
    *({"scenario": "ema_reference", "engine": e} for e in ("zero3", "fsdp2")),
    *({"scenario": "live_bytes", "engine": e} for e in ENGINES),
    *({"scenario": "first_moves", "engine": e} for e in ENGINES),
    *({"scenario": "writes_a_parameter", "engine": e} for e in ENGINES),
    *({"scenario": "waits", "engine": e, "mode": "full"} for e in ENGINES),
    *(
        {"scenario": "options_change_nothing", "engine": e, "activation_checkpointing": True}
        for e in ("zero3", "fsdp2")
    ),
]

# Every term, and two together; each with learned prototypes and with a mixture (`of_modes`).
TERMS: dict[str, dict[str, str]] = {
    "carp": {"instance": "carp"},
    "dino": {"instance": "dino"},
    "ibot": {"instance": "none", "patch": "ibot"},
    "capi": {"instance": "none", "patch": "capi"},
    "dino+ibot": {"instance": "dino", "patch": "ibot"},
}
DINO_IBOT = TERMS["dino+ibot"] | {"patch_mode": "joint"}
ONE_STEP = [
    *({"scenario": "one_step", "engine": e, "mode": "joint_kp", "accumulation": 4} for e in ENGINES),
    *({"scenario": "one_step", "engine": e, "mode": "full", "accumulation": 2} for e in ("zero1", "fsdp2")),
    {"scenario": "one_step", "engine": "fsdp2", "mode": "joint", "accumulation": 2, **TERMS["dino"]},
    {
        "scenario": "one_step",
        "engine": "zero1",
        "mode": "full",
        "accumulation": 1,
        **TERMS["dino"],
        "targets": "sinkhorn",
    },
    # Patches with prototypes of their own, and with those of the views; each kind of engine.
    *(
        {"scenario": "one_step", "engine": e, "mode": "joint", "accumulation": 2, **DINO_IBOT}
        for e in ("zero2", "zero3", "fsdp2")
    ),
    {"scenario": "one_step", "engine": "zero1", "mode": "full", "accumulation": 2, "patch": "ibot"},
    # Patches alone; CAPI's predictor, targets by position and clustering loss.
    {"scenario": "one_step", "engine": "fsdp2", "mode": "joint", "accumulation": 1, **TERMS["ibot"]},
    {"scenario": "one_step", "engine": "zero3", "mode": "partial", "accumulation": 2, **TERMS["capi"]},
    {"scenario": "one_step", "engine": "fsdp2", "mode": "partial", "accumulation": 1, **TERMS["capi"]},
    {"scenario": "one_step", "engine": "zero1", "mode": "full", "accumulation": 2, **TERMS["capi"]},
]
RESUMED = [
    {"scenario": "resume_step", "engine": "zero1", "mode": "partial", **TERMS["capi"]},
    {
        "scenario": "resume_step",
        "engine": "fsdp2",
        "mode": "joint",
        **TERMS["dino+ibot"],
        "patch_mode": "full",
    },
]
TARGETS = ("entropy", "centre", "sinkhorn", "posterior")
MODES = ("full", "joint", "joint_kp", "partial", "frozen_random")


def run_scenarios(
    scenarios: list[dict[str, Any]], world_size: int, work: Path, name: str, timeout_s: float = 280
) -> list[dict[str, Any]]:
    (work / f"{name}.json").write_text(json.dumps(scenarios))
    arguments = [str(work), str(work / f"{name}.json"), str(work / f"{name}-found.json")]
    run_ranks(
        "tests.helpers.engine_scenarios",
        arguments,
        world_size,
        log_dir=work / f"{name}-logs",
        timeout_s=timeout_s,
    )
    return json.loads((work / f"{name}-found.json").read_text())


def root_of(work: Path, engine: str) -> str:
    return str(work / f"checkpoints-{engine}-1-fp32")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def two_ranks(work: Path) -> list[dict[str, Any]]:
    crossing = [
        {"scenario": "continue_from", "engine": engine, "root": root_of(work, other)}
        for engine, other in (("fsdp2", "zero3"), ("zero3", "fsdp2"), ("zero1", "zero0"), ("zero2", "zero3"))
    ]
    # 520 images in two parts of a full and a small batch; of 300 the second rank keeps none of its small one.
    shards = write_digit_shards(work / "digits", num_train=520, num_test=60, per_shard=130)
    probing = [{"scenario": "probe_with_unequal_parts", "engine": e, "shards": shards} for e in ENGINES]
    return run_scenarios(FAST + crossing + ONE_STEP + RESUMED + probing, 2, work, "two", timeout_s=580)


def check_resume(found: dict[str, Any]) -> None:
    assert found["differing"] == []
    assert found["first_other_step"] is None
    assert found["unmoved"] == []
    assert found["tensors"] == 141


@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_twice_is_bitwise(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="resume_twice", engine=engine)
    check_resume(found)


def test_all_engines_train_alike(two_ranks: list[dict[str, Any]]) -> None:
    reference, *others = iterate(two_ranks, scenario="resume_twice")
    for found in others:
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-6)
        assert found["norms"] == pytest.approx(reference["norms"], rel=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bad_gradient_on_one_rank_moves_nothing_anywhere(
    two_ranks: list[dict[str, Any]], engine: str
) -> None:
    (found,) = iterate(two_ranks, scenario="skip_moves_nothing", engine=engine)
    assert found["applied"] is False and found["differing"] == [] and found["trace"] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_longer_than_allowed_is_cut(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="clipped", engine=engine)
    reference = next(iterate(two_ranks, scenario="clipped", engine="zero0"))
    assert found["norm"] == pytest.approx(reference["norm"], rel=1e-5) and found["norm"] > 0
    assert found["tensors"] == reference["tensors"] > 30
    assert found["error"] <= 1e-4  # nothing cut: .9; the customary 1e-6 beside a norm of .002: 5e-5


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_gradients_of_a_bf16_step_are_averaged_in_fp32(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="averages_in_fp32", engine=engine)
    # ZeRO-3 gathers weights in bf16, where a rank's own gradients of a block that is applied twice are summed too.
    errors = [e for n, e in found["errors"].items() if engine != "zero3" or "projection_head" in n]
    assert len(errors) >= 4 and max(errors) <= 1e-6  # averaged in bf16: .004


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_with_unequal_parts_probe_together(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="probe_with_unequal_parts", engine=engine)
    reference = next(iterate(two_ranks, scenario="probe_with_unequal_parts", engine="zero0"))
    assert found["top1"][0] == found["top1"][1] > 0.2
    assert found["top1"] == pytest.approx(reference["top1"], abs=0.04)
    assert found["probed"] == found["plain"]


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_sharded_average_is_the_average(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="ema_reference", engine=engine)
    assert found["error"] <= 1e-6
    assert found["moved"] > 1e-4
    assert found["forward_error"] <= 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_the_patch_embedding_moves_at_its_own_rate(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="first_moves", engine=engine)
    moves = dict(found["moves"])
    embedding = moves.pop("student/network.backbone.patch_embed.proj.weight")
    blocks = [move for name, move in moves.items() if "backbone.blocks" in name]
    assert len(blocks) == 8 and 0.15 < embedding / statistics.median(blocks) < 0.25


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_is_overwritten_and_trains_on(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="writes_a_parameter", engine=engine)
    name = "learned_prototypes.weight"
    assert found["changed"] == [f"student/{name}", f"teacher/{name}"] and found["written"]
    assert found["read"] <= 1e-6
    least, most = found["moved"]
    # A step of AdamW at 1e-2; an fp32 copy that was left goes back by about 1.
    assert least > 0 and most < 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_the_dry_run_knows_what_a_rank_holds(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="live_bytes", engine=engine)
    cost = Cost(
        backbone_parameters=found["parameters"],
        head_parameters=0,
        predictor_parameters=0,
        prototype_parameters=0,
        dense_flops=0,
        executed_flops=0,
        activations=Activations(0, 0),
        fsdp2_activations=Activations(0, 0),
        largest_unit_numel=0,
        unsupported=(),
        estimator_bytes=0,
    )
    expected = sum(state_bytes(OptimConfig(), cost, engine, 2).values())
    assert found["bytes"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_waits_for_the_device_twice_at_most(
    two_ranks: list[dict[str, Any]], engine: str, record_property: Callable[[str, float], None]
) -> None:
    (found,) = iterate(two_ranks, scenario="waits", engine=engine)
    record_property("waits", sum(found["waits"].values()))
    record_property("vendor_waits", sum(found["vendor_waits"].values()))
    assert 1 <= sum(found["waits"].values()) <= 2, found["waits"]
    if engine in ("zero1", "zero2"):  # they are given the gradient's norm
        assert not found["vendor_waits"]


def check_options(found: dict[str, Any]) -> None:
    assert found["finite"] and found["with_option"] == pytest.approx(found["plain"], rel=1e-5)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_recomputed_blocks_train_alike(two_ranks: list[dict[str, Any]], engine: str) -> None:
    (found,) = iterate(two_ranks, scenario="options_change_nothing", engine=engine)
    check_options(found)


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    engines = [engine for engine in ENGINES if engine not in UNSUPPORTED["compile_blocks"]]
    scenarios = [
        {"scenario": "options_change_nothing", "engine": engine, "compile_blocks": True, **extra}
        for engine in engines
        for extra in ({"drop_path_rate": 0.5}, {"activation_checkpointing": True, "drop_path_rate": 0.5})
    ]
    scenarios += [
        {"scenario": "options_change_nothing", "engine": engine, "activation_checkpointing": True}
        for engine in ("zero0", "zero1", "zero2")
    ]
    found = run_scenarios(scenarios, 2, tmp_path, "options")
    assert len(found) == len(scenarios)
    for entry in found:
        check_options(entry)


def test_any_engine_continues_any_others_checkpoint(two_ranks: list[dict[str, Any]]) -> None:
    crossings = list(iterate(two_ranks, scenario="continue_from"))
    assert len(crossings) == 4
    for found in crossings:
        assert found["differing_after_load"] == []
        assert found["losses"] == pytest.approx(crossings[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("world_size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_any_world_size_continues_any_others_checkpoint(
    two_ranks: list[dict[str, Any]], work: Path, world_size: int
) -> None:
    engines = ENGINES if world_size == 4 else ("zero1", "zero3", "fsdp2")
    scenarios = [{"scenario": "continue_from", "engine": e, "root": root_of(work, "zero2")} for e in engines]
    found = run_scenarios(scenarios, world_size, work, f"world{world_size}")
    expected = next(iterate(two_ranks, scenario="continue_from"))["losses"]
    for entry in found:
        assert entry["differing_after_load"] == []
        assert entry["losses"] == pytest.approx(expected, rel=1e-5)


def check_one_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Loss, every gradient, the estimator's state and figures of the whole batch, each within 1e-5 of its scale."""
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5 * expected["loss"]["total"])
    assert found["figures"] == pytest.approx(expected["figures"], rel=1e-5)
    for part in ("gradients", "estimator"):
        assert found[part].keys() == expected[part].keys()
    scale = max(abs(value) for values in expected["gradients"].values() for value in values)
    assert scale > 1e-4
    for name, values in expected["gradients"].items():
        assert found["gradients"][name] == pytest.approx(values, rel=0, abs=1e-5 * scale), name
    for name, values in expected["estimator"].items():
        size = max(map(abs, values))
        assert found["estimator"][name] == pytest.approx(values, rel=0, abs=1e-5 * size), name


@pytest.fixture(scope="module")
def undivided(work: Path) -> dict[str, dict[str, Any]]:
    """One rank, one micro-batch: what every division of the batch must learn, by mode."""
    scenarios = [
        *({"scenario": "one_step", "engine": "zero0", "mode": mode, "accumulation": 1} for mode in MODES),
        {"scenario": "one_step", "engine": "zero3", "mode": "joint_kp", "accumulation": 4},
        *(
            entry | {"engine": "zero0", "accumulation": 1}
            for entry in ONE_STEP
            if entry.keys() & {"instance", "patch"}
        ),
    ]
    found = run_scenarios(scenarios, 1, work, "undivided")
    (divided,) = iterate(found, accumulation=4)
    return {what_of(entry): entry for entry in iterate(found, accumulation=1)} | {"divided": divided}


def what_of(entry: dict[str, Any]) -> str:
    """What a scenario of one step learns, however its batch is divided."""
    names = ("mode", "instance", "targets", "patch", "patch_mode")
    return " ".join(str(entry.get(name)) for name in names)


def test_micro_batches_and_ranks_divide_a_batch_exactly(
    two_ranks: list[dict[str, Any]], undivided: dict[str, dict[str, Any]]
) -> None:
    found = list(iterate(two_ranks, scenario="one_step"))
    assert len(found) == len(ONE_STEP)
    for entry in [*found, undivided["divided"]]:
        assert any("learned_prototypes" in name for name in entry["gradients"]) == (entry["mode"] != "full")
        check_one_step(entry, undivided[what_of(entry)])
    assert any("centre" in name for entry in found for name in entry["estimator"])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_mode_and_engine_divides_a_batch_exactly(
    undivided: dict[str, dict[str, Any]], tmp_path: Path, world_size: int
) -> None:
    scenarios = [
        {"scenario": "one_step", "engine": engine, "mode": mode, "accumulation": accumulation}
        for engine in ENGINES
        for mode in MODES
        for accumulation in (1, 2, 4)
    ]
    for entry in run_scenarios(scenarios, world_size, tmp_path, "divided", timeout_s=580):
        check_one_step(entry, undivided[what_of(entry)])


@pytest.mark.slow
def test_every_term_on_patches_divides_a_batch_exactly(tmp_path: Path) -> None:
    """iBOT with every mode of its prototypes, every engine: one rank and one micro-batch, or two of each."""
    scenarios = [
        {"scenario": "one_step", "mode": "joint", "patch": "ibot", "patch_mode": mode} for mode in MODES
    ]
    whole = run_scenarios(
        [entry | {"engine": "zero0", "accumulation": 1} for entry in scenarios], 1, tmp_path, "whole"
    )
    divided = [entry | {"engine": e, "accumulation": 2} for entry in scenarios for e in ENGINES]
    expected = {what_of(entry): entry for entry in whole}
    for found in run_scenarios(divided, 2, tmp_path, "divided", timeout_s=580):
        check_one_step(found, expected[what_of(found)])


def of_modes(scenario: str, **options: Any) -> list[dict[str, Any]]:
    """Every term, its prototypes learned in the way of its method and estimated by a mixture."""
    return [
        {"scenario": scenario, "mode": mode, **terms, **options}
        | ({"patch_mode": mode} if name == "dino+ibot" else {})
        for name, terms in TERMS.items()
        for mode in ("partial" if name == "capi" else "joint", "full")
    ]


@pytest.mark.slow
def test_every_term_and_engine_divides_a_batch_exactly(tmp_path: Path) -> None:
    """One rank with four micro-batches, and two ranks with one, against one rank with one."""
    whole = run_scenarios(of_modes("one_step", engine="zero0", accumulation=1), 1, tmp_path, "whole")
    expected = {what_of(entry): entry for entry in whole}
    assert len(expected) == 2 * len(TERMS)
    for world_size, accumulation in ((1, 4), (2, 1)):
        divided = [
            entry for e in ENGINES for entry in of_modes("one_step", engine=e, accumulation=accumulation)
        ]
        for found in run_scenarios(divided, world_size, tmp_path, f"by{world_size}", timeout_s=580):
            check_one_step(found, expected[what_of(found)])


def check_resumed_step(found: dict[str, Any]) -> None:
    assert found["differing"] == []
    assert found["losses"] == found["resumed_losses"] and len(set(found["losses"])) == 3
    assert {"student", "teacher", "optimizer", "usage"} <= set(found["parts"])


def test_whole_steps_resume_bitwise(two_ranks: list[dict[str, Any]]) -> None:
    found = list(iterate(two_ranks, scenario="resume_step"))
    assert len(found) == len(RESUMED)
    for entry in found:
        check_resumed_step(entry)
    assert "estimator" in found[0]["parts"]  # what clusters the teacher's prototypes
    assert {"objective", "patch_estimator", "patch_usage"} <= set(found[1]["parts"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_term_resumes_bitwise_under_every_engine(tmp_path: Path, engine: str) -> None:
    found = run_scenarios(of_modes("resume_step", engine=engine), 2, tmp_path, "resumed", timeout_s=580)
    assert len(found) == 2 * len(TERMS)
    for entry in found:
        check_resumed_step(entry)


@pytest.mark.slow
def test_every_target_divides_a_batch_exactly(tmp_path: Path) -> None:
    """DINO's loss, every mode and kind of targets: one rank and one micro-batch, or two of each."""
    scenarios = [
        {"scenario": "one_step", "engine": "zero0", "mode": mode, **TERMS["dino"], "targets": targets}
        for mode in MODES
        for targets in TARGETS
        if targets != "posterior" or mode == "full"
    ]
    whole, divided = (
        run_scenarios(
            [entry | {"accumulation": number} for entry in scenarios], number, tmp_path, f"by{number}"
        )
        for number in (1, 2)
    )
    for found, expected in zip(divided, whole, strict=True):
        check_one_step(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bitwise_with_accumulation_and_bf16(engine: str, tmp_path: Path) -> None:
    scenarios = [
        {"scenario": "resume_twice", "engine": engine, "accumulation": 2, "precision": "fp32"},
        {"scenario": "resume_twice", "engine": engine, "accumulation": 1, "precision": "bf16"},
        {"scenario": "skip_moves_nothing", "engine": engine, "poison": "inf"},
        {"scenario": "ema_reference", "engine": engine},
    ]
    variants = {"fsdp2": [], "zero0": ["batch_norm", "lars"]}.get(engine, ["batch_norm"])
    scenarios += [{**scenarios[0], "accumulation": 1, "variant": variant} for variant in variants]
    found = run_scenarios(scenarios, 2, tmp_path, "slow")
    check_resume(found[0])
    check_resume(found[1])
    assert found[2]["applied"] is False and found[2]["differing"] == [] and found[2]["trace"] == []
    assert found[3]["error"] <= 1e-6
    for variant in found[4:]:
        assert variant["differing"] == [] and variant["first_other_step"] is None
