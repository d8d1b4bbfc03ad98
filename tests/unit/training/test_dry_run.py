"""The dry run's figures beside live tensors; what engines hold on two ranks is in tests/distributed.."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.views.masking import draw_masks
from data.writing.folder_shards import make_folder_shards
from evaluation.probes.knn import build_knn_probe
from models.student_teacher import SelfSupervisedNetwork
from runtime.config import load_config
from runtime.distributed import Process
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from training.config import PretrainConfig
from training.cost import _fake_inputs, buffer_bytes, measure_cost, state_bytes, waiting_bytes
from training.dry_run import describe_run
from training.engines.table import ENGINES
from training.initialisation import check_crop_sizes
from training.patches import read_masks

RECIPES = sorted(p.stem for p in Path("configs").glob("pretrain_*.yaml"))
FAST = {"pretrain_vits16_imagenet_full", "pretrain_resnet50_imagenet_joint"}
SWIN = ("data.global_crop_size=224", "model.image_size=224", "data.local_crop_size=96")
NO_VIT = tuple(
    f"model.{option}=null" for option in ("patch_size", "embed_dim", "depth", "num_heads", "global_pool")
)
ALONE = Process(0, 1, 0, torch.device("cpu"))


def tiny(*overrides):
    return load_config(PretrainConfig, DEMO, [*TINY, *overrides])


def saved_bytes(config, batch, *, bf16):
    """What autograd keeps of one real forward pass on numbers."""
    network = SelfSupervisedNetwork(config.model, "student")
    crops = [torch.randn(2 * batch, 1, 28, 28), torch.randn(batch, 1, 14, 14)]
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        network(crops)
    return sum(saved.values())


@pytest.mark.parametrize("batch", [4, 64])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("option", ["model.drop_path_rate=0.1", "model.head.use_bn=false"])
def test_activations_equal_what_autograd_saves(option, precision, batch):
    # Wide enough for the weights' bf16 copies to weigh in the sum, as in a real network.
    config = tiny(option, "model.embed_dim=96", f"engine.deepspeed_config=ds_configs/zero1_{precision}.json")
    counted = measure_cost(config).activations
    assert counted.per_image * batch + counted.fixed == pytest.approx(
        saved_bytes(config, batch, bf16=precision == "bf16"), rel=0.15
    )
    assert (counted.fixed > 0.1 * counted.per_image) == (precision == "bf16")


def test_checkpointing_keeps_less_and_executes_more():
    plain, checkpointed = (
        measure_cost(tiny("model.depth=8", f"model.activation_checkpointing={flag}"))
        for flag in ("false", "true")
    )
    assert checkpointed.activations.per_image < 0.5 * plain.activations.per_image
    assert plain.executed_flops == plain.dense_flops == checkpointed.dense_flops
    assert 1.2 < checkpointed.executed_flops / checkpointed.dense_flops < 1.34


def test_exact_accumulation_executes_one_more_forward_pass_and_holds_what_waits():
    options = "batch.gradient_accumulation_steps=4", "model.activation_checkpointing=true"
    exact, cheap, one = (
        measure_cost(tiny(*more))
        for more in (options, (*options, "batch.accumulation=per_micro_batch"), options[1:])
    )
    assert exact.dense_flops == cheap.dense_flops == one.dense_flops
    assert cheap.executed_flops == one.executed_flops
    # Dense is three student passes and the teacher's; one more of the student's is recomputation.
    assert exact.executed_flops - cheap.executed_flops == one.executed_flops - one.dense_flops > 0
    crops, rows = 2 * 28 * 28 + 14 * 14, (2 * 3 + 2) * 16
    # Beside the other micro-batches of this step wait the crops of the next one.
    assert waiting_bytes(tiny(*options), 8) == 8 * 4 * (3 * (crops + rows) + 4 * crops)
    assert waiting_bytes(tiny(), 32) == 32 * 4 * crops


def test_fsdp2_computes_in_bf16_alone():
    cost = measure_cost(tiny("engine.name=fsdp2", "engine.precision=bf16", "model.head.use_bn=false"))
    assert cost.fsdp2_activations.per_image < 0.9 * cost.activations.per_image
    assert cost.fsdp2_activations.fixed == 0


def test_a_term_on_patches_is_counted_with_its_head_rows_and_prototypes():
    plain = tiny("prototypes.mode=joint")
    masks = ("data.masks.kind=block", "data.masks.patch_size=7", "model.patch_size=7")
    shared = ("objective.patch.name=ibot", *masks)
    own = (
        "model.patch_head.projection_dim=16",
        "model.patch_head.hidden_dim=32",
        "patch_prototypes.mode=joint",
        "patch_prototypes.num_prototypes=64",
        "patch_prototypes.dim=16",
        "patch_prototypes.partition.size=16",
    )
    without, one, two = (
        measure_cost(tiny("prototypes.mode=joint", *more))
        for more in (("model.patch_size=7",), shared, (*shared, *own))
    )
    assert without.predictor_parameters == 0 and one.predictor_parameters == tiny().model.embed_dim
    assert one.head_parameters == without.head_parameters
    assert two.prototype_parameters == 2 * one.prototype_parameters == 2 * 64 * 16
    config = tiny("prototypes.mode=joint", *shared, *own)
    network = SelfSupervisedNetwork(config.model, "student", config.outputs)
    assert two.head_parameters == sum(
        p.numel() for head in (network.projection_head, network.patch_head) for p in head.parameters()
    )
    # 2 views, 16 patches, half of the crops masked, .3 of theirs hidden.
    crops, patches = _fake_inputs(config, 10)
    assert patches["rows"].shape == (48,) and patches["hidden"].shape == (20, 16) and len(crops) == 2
    assert without.dense_flops < one.dense_flops < 1.5 * without.dense_flops
    assert one.activations.per_image > without.activations.per_image
    states = state_bytes(config.optim, two, "zero0", 1)
    assert states["parameters"] - states["teacher"] == 4 * two.predictor_parameters
    assert plain.patch_rows_per_image == 0 and config.patch_rows_per_image == pytest.approx(4.8)


def test_patches_that_are_left_out_cost_the_student_nothing_and_the_predictor_something():
    masks = ("data.masks.kind=inverse_block", "data.masks.patch_size=7", "model.patch_size=7")
    alone = ("objective.instance.name=none", "objective.patch.name=capi", "data.num_local_crops=0")
    predictor = ("model.predictor.depth=2", "model.predictor.num_heads=1")
    config = tiny(*masks, *alone, *predictor)
    cost = measure_cost(config)
    network = SelfSupervisedNetwork(config.model, "student", config.outputs)
    assert cost.predictor_parameters == sum(p.numel() for p in network.predictor.parameters())
    # The teacher sees 16 patches, the student 6 (of 16, .65 are hidden), three times over.
    plain = measure_cost(tiny("data.num_local_crops=0", "model.patch_size=7"))
    assert 0.4 * plain.dense_flops < cost.dense_flops < plain.dense_flops
    assert config.patch_rows_per_image == 2 * 16
    # As many of every crop as the loader's masks have.
    given = read_masks(draw_masks(config.data, range(5)), "left_out", torch.device("cpu"))
    for role, expected in (("student", given.student), ("teacher", given.teacher)):
        found = _fake_inputs(config, 5, role=role)[1]
        assert {name: part.shape for name, part in found.items()} == {
            name: part.shape for name, part in expected.items()
        }


def test_a_rate_for_what_the_network_lacks_is_refused():
    with pytest.raises(ValueError, match=r"optim\.patch_embed_lr_scale is 0\.5; expected 1 with ResNet"):
        measure_cost(tiny("model.name=resnet18", *NO_VIT, "optim.patch_embed_lr_scale=0.5"))


@pytest.mark.parametrize("mode", ["full", "joint"])
def test_states_without_a_cut_equal_the_networks_bytes(mode):
    config = tiny(f"prototypes.mode={mode}")
    network = SelfSupervisedNetwork(config.model, "student")
    parameters = sum(p.numel() * 4 for p in network.parameters()) + (64 * 16 * 4 if mode == "joint" else 0)
    states = state_bytes(config.optim, measure_cost(config), "zero0", 1)
    assert states["parameters"] == states["gradients"] == states["teacher"] == parameters
    assert states["moments"] == 2 * parameters and states["master"] == 0
    assert (states["estimator"] > 0) == (mode == "full")


def test_lars_has_one_moment():
    config = tiny("optim.optimizer=lars", "engine.deepspeed_config=ds_configs/zero0_fp32.json")
    states = state_bytes(config.optim, measure_cost(config), "zero0", 1)
    assert states["moments"] == states["parameters"]


def test_buckets_and_gathered_parameters_come_from_the_mechanics():
    config = tiny("engine.deepspeed_config=ds_configs/zero3_fp32.json")
    cost = dataclasses.replace(measure_cost(config), backbone_parameters=2 * 10**9)
    assert buffer_bytes(config, cost, "zero0") == 0
    assert buffer_bytes(config, cost, "zero3") == 4 * (5e7 + 1e8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.device=cuda", r"run\.device is 'cuda'; expected a visible CUDA device; set run\.device"),
        (
            "prototypes.gmm.kernel=triton",
            r"prototypes\.gmm\.kernel is triton and .*set prototypes\.gmm\.kernel",
        ),
    ],
)
def test_without_a_gpu_the_dry_run_refuses_what_needs_one(override, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        describe_run(tiny(override), ALONE)
    # A run that is meant for other machines is not held against this one.
    elsewhere = ("run.dry_run_world_size=16", "data.num_lanes=16")
    assert "16 ranks" in describe_run(tiny(override, *elsewhere), ALONE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.split=nosuch", r"data\.split is 'nosuch'; expected one of .*train.*; set data\.split"),
        ("batch.global_batch_size=64", r"batch\.global_batch_size is 64; expected at most the 48 images"),
        ("data.num_workers=2", "holds 3 shards of split 'train'; expected at least 4"),
        ("run.dry_run_world_size=8", "holds 3 shards of split 'train'; expected at least 8"),
        ("data.num_lanes=7", "data.num_lanes is 7; expected a multiple of the world size 2"),
    ],
)
def test_shards_that_a_start_refuses_the_dry_run_refuses(override, message, tmp_path):
    shards = write_digit_shards(tmp_path / "shards", num_train=48, per_shard=16)
    two = dataclasses.replace(ALONE, world_size=2)
    assert "48 images" in describe_run(tiny(f"data.shards={shards}"), two)
    with pytest.raises(ValueError, match=message):
        describe_run(tiny(f"data.shards={shards}", override), two)


def test_tf32_is_refused_beside_the_posterior():
    """Not where a configuration is read: a run that was made so may go on without."""
    asked = ("engine.tf32=true", "objective.instance.logits=posterior")
    with pytest.raises(
        ValueError, match=r"engine\.tf32 is true; expected false with objective\.instance\.logits"
    ):
        describe_run(tiny(*asked), ALONE)
    assert "1 ranks" in describe_run(tiny(*asked[1:]), ALONE)


def test_lanes_that_a_start_refuses_are_refused_where_there_are_no_shards_yet():
    asked = ("data.shards=/nowhere", "run.dry_run_world_size=16", "data.num_workers=8")
    assert "16 ranks" in describe_run(tiny(*asked, "data.num_lanes=128"), ALONE)
    with pytest.raises(ValueError, match=r"num_lanes is 64; .*at least 128 = world size x 8 workers"):
        describe_run(tiny(*asked, "data.num_lanes=64"), ALONE)


def test_a_folder_that_a_start_refuses_the_dry_run_refuses_and_writes_nothing(tmp_path):
    for number in range(40):
        path = tmp_path / "photos" / "train" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((28, 28), number, dtype=np.uint8)).save(path)
    cache = tmp_path / "cache"
    place = (f"data.images={tmp_path / 'photos'}", f"data.cache_dir={cache}")
    own = ("data.shards=null", *place, "evaluation.knn_every_steps=0")  # there is no split to score
    assert "40 images, 1.2 steps per epoch, 2 steps (at most" in describe_run(
        tiny(*own, "optim.epochs=2"), ALONE
    )
    for override, message in (
        ("batch.global_batch_size=64", "expected at most the 40 images of split 'train'"),
        ("data.split=val", r"data\.split is 'val'; expected one of .*photos: train; set data\.split"),
    ):
        with pytest.raises(ValueError, match=message):
            describe_run(tiny(*own, override), ALONE)
    assert not cache.exists()
    made = make_folder_shards(str(tmp_path / "photos"), str(cache))
    written = {path: path.stat().st_mtime_ns for path in Path(made).iterdir()}
    with pytest.raises(ValueError, match="shards of split 'train'; expected at least 64"):
        describe_run(tiny(*own, "data.num_workers=64", "data.num_lanes=64"), ALONE)
    assert written == {path: path.stat().st_mtime_ns for path in Path(made).iterdir()}


def test_splits_that_the_probe_refuses_the_dry_run_refuses(tmp_path):
    """A run found out after its shards were written, and its networks built, that there was nothing to score."""
    probed = "evaluation.knn_every_steps=1"
    shards = f"data.shards={write_digit_shards(tmp_path / 'shards', num_train=48, num_test=16, per_shard=16)}"
    describe_run(tiny(shards, probed), ALONE, build_knn_probe)
    wrong = (
        "evaluation.test_split=val",
        r"evaluation\.test_split is 'val'; expected one of .*: test, train; set",
    )
    with pytest.raises(ValueError, match=wrong[1]):
        describe_run(tiny(shards, probed, wrong[0]), ALONE, build_knn_probe)
    describe_run(tiny(shards, "evaluation.knn_every_steps=0", wrong[0]), ALONE, build_knn_probe)
    for split, suffix in (("train", "a/"), ("test", "a/"), ("val", "")):
        folder = tmp_path / "photos" / split / suffix
        folder.mkdir(parents=True)
        for number in range(40):
            Image.fromarray(np.full((28, 28), number, dtype=np.uint8)).save(folder / f"{split}{number}.png")
    own = (
        "data.shards=null",
        f"data.images={tmp_path / 'photos'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        probed,
    )
    with pytest.raises(
        ValueError, match=r"evaluation\.test_split is 'none'; expected one of .*photos: .*test"
    ):
        describe_run(tiny(*own, "evaluation.test_split=none"), ALONE)
    for split in ("train", "test"):  # no folder, no class
        (tmp_path / "photos" / split / f"{split}.png").write_bytes(next(folder.iterdir()).read_bytes())
    with pytest.raises(
        ValueError, match=r"evaluation\.knn_every_steps is 1; expected 0, as .* no folders of classes"
    ):
        describe_run(tiny(*own), ALONE)


def test_what_the_engine_refuses_the_dry_run_refuses():
    with pytest.raises(ValueError, match="optimizer lars is not supported by zero1"):
        describe_run(tiny("optim.optimizer=lars"), ALONE)
    compiled = "model.compile_blocks=true"
    with pytest.raises(ValueError, match="compile_blocks is not supported by zero3"):
        describe_run(tiny(compiled, "engine.deepspeed_config=ds_configs/zero3_fp32.json"), ALONE)
    assert measure_cost(tiny(compiled)).unsupported == ("zero3", "fsdp2")  # BatchNorm in the head


def test_compiled_blocks_without_a_compiler_are_one_line(monkeypatch, tmp_path):
    compiled = tiny("model.compile_blocks=true")
    monkeypatch.delenv("CXX", raising=False)
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    describe_run(compiled, ALONE)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ValueError, match=r"compile_blocks is true and no C\+\+ compiler is found .*on cpu; set"
    ):
        describe_run(compiled, ALONE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.local_crop_size=13"],
            r"data\.local_crop_size is 13, .*multiple of its patch size 14, such as 14; set data\.local_crop_size$",
        ),
        (
            ["data.global_crop_size=30", "model.image_size=30"],
            r"data\.global_crop_size is 30, .*such as 28; set data\.global_crop_size and model\.image_size",
        ),
        (
            ["model.name=swin_tiny_patch4_window7_224", *NO_VIT, *SWIN],
            r"data\.local_crop_size is 96, .*several sizes, or no local crops; .*data\.num_local_crops=0",
        ),
        (
            ["model.name=swin_tiny_patch4_window7_224", *NO_VIT],
            r"data\.global_crop_size is 28, .*such as 224; set data\.global_crop_size and model\.image_size",
        ),
    ],
)
def test_crops_that_the_network_cannot_take_are_one_line(overrides, message):
    with pytest.raises(ValueError, match=message):
        describe_run(tiny(*overrides), ALONE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_forecast_follows_from_flops_and_says_what_it_assumes(precision, tmp_path):
    config = tiny(
        f"engine.deepspeed_config=ds_configs/zero1_{precision}.json",
        f"data.shards={write_digit_shards(tmp_path)}",
        "optim.steps=1000000000",
    )
    text = describe_run(config, dataclasses.replace(ALONE, world_size=2))
    share, ceiling, rank, both, hours = re.search(
        r"(\d+)% of a product's (\d+) TFLOP/s \(.*\): ([\d,]+) images/s a rank, ([\d,]+) on 2 ranks: ([\d,.]+) h",
        text,
    ).groups()
    rank, both, hours = (float(number.replace(",", "")) for number in (rank, both, hours))
    assert "assumed and not measured" in text and {"fp32": "50", "bf16": "790"}[precision] == ceiling
    dense = measure_cost(config).dense_flops
    assert rank == pytest.approx(int(share) / 100 * int(ceiling) * 1e12 / dense, rel=0.01)
    assert both == pytest.approx(2 * rank, rel=0.01)
    images = 1e9 * config.batch.global_batch_size
    assert hours == pytest.approx(images / both / 3600, abs=0.006)


def test_networks_of_one_size_run_without_local_crops():
    swin = tiny("model.name=swin_tiny_patch4_window7_224", *NO_VIT, *SWIN, "data.num_local_crops=0")
    check_crop_sizes(swin)


def test_the_head_is_as_wide_as_the_measured_embedding():
    cost = measure_cost(tiny("model.name=mobilenetv3_small_100", *NO_VIT, "data.local_crop_size=16"))
    assert cost.head_parameters > 1024 * 32


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_recipes_are_described(name):
    config = load_config(
        PretrainConfig, f"configs/{name}.yaml", ["run.dry_run_world_size=16", "data.num_lanes=320"]
    )
    text = describe_run(config, ALONE)
    lines = [line for line in text.splitlines() if line[2:].startswith(ENGINES)]
    assert len(lines) == len(ENGINES) and [line[0] for line in lines].count("*") == 1
    # LARS and BatchNorm leave a ResNet-50 one engine; a head with BatchNorm alone excludes FSDP2.
    unsupported = len(ENGINES) - 1 if "resnet50" in name else int(config.model.head.use_bn)
    assert sum("not supported" in line for line in lines) == unsupported
    assert all("fits 80 GB, 141 GB" in line or "not supported" in line for line in lines)
    assert "16 ranks" in text
