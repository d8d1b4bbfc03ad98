"""The main job as a user starts it, on real handwritten digits: every mode, every interruption, every export."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from tests.helpers import starts
from tests.helpers.digits import DEMO, TINY


def arguments_of(shards, out, name, *overrides):
    return [
        DEMO,
        *TINY,
        f"data.shards={shards}",
        f"run.output_dir={out}",
        f"run.name={name}",
        *overrides,
    ]


def run(shards, out, name, *overrides, expect=0, in_an_interpreter_of_its_own=False):
    """Runs the program; an own interpreter is what a user starts, and decides anew in which order sets are walked."""
    arguments = arguments_of(shards, out, name, *overrides)
    if in_an_interpreter_of_its_own:
        result = subprocess.run(
            [sys.executable, "pretrain.py", *arguments],
            cwd=starts.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
    else:
        result = starts.run("pretrain", arguments)
    assert result.returncode == expect, result.stderr[-3000:]
    return result


def read_losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


@pytest.mark.parametrize("mode", ["full", "joint", "frozen_random"])
def test_modes_train_from_one_yaml(digit_shards, tmp_path, mode):
    run(digit_shards, tmp_path, mode, f"prototypes.mode={mode}", "optim.steps=12")
    lines = [json.loads(line) for line in (tmp_path / mode / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(13))
    assert all(line["samples_seen"] == 32 * line["step"] for line in lines)
    expected = {"loss/total", "loss/consistency", "loss/entropy", "optim/lr", "throughput/images_per_s"}
    assert expected <= lines[-1].keys()
    assert {"prototypes/unique_0.025", "prototypes/used", "prototypes/dead"} <= lines[-1].keys()
    # Twelve steps hardly move the teacher's average of learned prototypes.
    assert (
        -1
        <= lines[-1]["prototypes/cosine_to_start_min"]
        <= lines[-1]["prototypes/cosine_to_start"]
        <= 1.00001
    )
    if mode != "joint":
        assert (lines[-1]["prototypes/cosine_to_start_min"] > 0.99999) == (mode == "frozen_random")
    assert ("gmm/beta" in lines[-1]) == (mode == "full")
    dense, executed = (lines[-1][f"throughput/mfu_{kind}"] for kind in ("dense", "executed"))
    assert 0 < dense <= executed and lines[-1]["throughput/ceiling_tflops"] > 0
    assert lines[-1]["prototypes/used"] + lines[-1]["prototypes/dead"] == pytest.approx(1)


def test_use_is_counted_to_the_end_of_the_last_epoch(digit_shards, tmp_path):
    """384 images are 5.6 batches of 68: two epochs are eleven steps, and not twice six."""
    run(digit_shards, tmp_path, "epochs", "batch.global_batch_size=68", "optim.epochs=2")
    lines = [json.loads(line) for line in (tmp_path / "epochs" / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if "prototypes/usage_rows" in line]
    assert [line["step"] for line in counted] == [6, 11] == [6, lines[-1]["step"]]
    assert counted[-1]["prototypes/usage_rows"] == 2 * 5 * 68  # both views


def test_no_compiler_is_needed_on_a_cpu(digit_shards, tmp_path):
    """DeepSpeed builds operators where it is not kept from it, while it is imported or at a first start."""
    (tmp_path / "bin").mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    environment |= {"PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    shorter = ("optim.steps=2", "engine.deepspeed_config=ds_configs/zero1_fp32.json")
    result = subprocess.run(
        [sys.executable, "pretrain.py", *arguments_of(digit_shards, tmp_path, "bare", *shorter)],
        cwd=starts.ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert max(read_losses(tmp_path / "bare")) == 2
    assert not (tmp_path / "extensions").exists()


IBOT = (
    "objective.instance.name=dino",
    "objective.koleo_weight=0.1",
    "objective.patch.name=ibot",
    "data.masks.kind=block",
    "data.masks.patch_size=7",
    "data.masks.min_patches=1",
    "model.patch_size=7",
    "model.patch_head.projection_dim=16",
    "model.patch_head.hidden_dim=32",
    "patch_prototypes.mode=full",
    "patch_prototypes.num_prototypes=64",
    "patch_prototypes.dim=16",
    "patch_prototypes.partition.size=16",
    "patch_prototypes.max_rows_per_rank=50",
)


def test_views_and_patches_train_together_and_both_are_exported(digit_shards, tmp_path):
    from safetensors.torch import load_file

    run(digit_shards, tmp_path, "ibot", *IBOT, "optim.steps=6")
    lines = [json.loads(line) for line in (tmp_path / "ibot" / "metrics.jsonl").read_text().splitlines()]
    expected = {"loss/cross_entropy", "loss/koleo", "loss/patch_cross_entropy", "patch_gmm/beta"}
    expected |= {"patch_features/effective_rank", "patch_prototypes/unique_0.025", "patch_prototypes/used"}
    assert expected <= lines[-1].keys()
    folder = tmp_path / "ibot/checkpoints/step-00000006/teacher"
    assert load_file(folder / "patch_prototypes.safetensors")["means"].shape == (64, 16)
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "patch_head.safetensors").items()}
    assert shapes["mlp.0.weight"][0] == 32 and not torch.equal(
        load_file(folder / "projection_head.safetensors")["mlp.0.weight"],
        load_file(folder / "patch_head.safetensors")["mlp.0.weight"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["partial", "full"])
def test_patches_alone_train_and_are_exported(digit_shards, tmp_path, mode):
    capi = (
        "objective.instance.name=none",
        "objective.patch.name=capi",
        "data.num_local_crops=0",
        "data.masks.kind=inverse_block",
        "data.masks.patch_size=7",
        "model.patch_size=7",
        "model.predictor.depth=2",
        "model.predictor.num_heads=1",
        f"prototypes.mode={mode}",
    )
    run(digit_shards, tmp_path, "capi", *capi, "optim.steps=6")
    lines = [json.loads(line) for line in (tmp_path / "capi" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/patch_cross_entropy", "prototypes/used", "features/norm"} <= lines[-1].keys()
    assert (tmp_path / "capi/checkpoints/step-00000006/teacher/prototypes.safetensors").is_file()


@pytest.mark.parametrize("terms", [(), pytest.param(IBOT, marks=pytest.mark.slow)], ids=["carp", "ibot"])
def test_kill_9_and_again_equals_an_uninterrupted_run_bit_for_bit(digit_shards, tmp_path, terms):
    options = ("optim.steps=20", "checkpoint.every_steps=4", "model.drop_path_rate=0.1", "data.num_workers=1")
    options += terms
    run(digit_shards, tmp_path, "whole", *options)
    # The first run dies at step 10, two updates after its newest checkpoint, without a chance to say goodbye.
    victim = starts.start("pretrain", arguments_of(digit_shards, tmp_path, "killed", *options))
    record = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and victim.poll() is None:
        if record.exists() and record.read_text().count("\n") > 10:
            break
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "the run ended before it was killed"
    assert max(read_losses(tmp_path / "killed")) < 20
    run(digit_shards, tmp_path, "killed", *options, in_an_interpreter_of_its_own=True)
    assert "continuing from" in (tmp_path / "killed" / "console.log").read_text()
    whole, resumed = read_losses(tmp_path / "whole"), read_losses(tmp_path / "killed")
    assert resumed == whole
    for path in sorted((tmp_path / "whole/checkpoints/step-00000020").rglob("*.safetensors")):
        twin = tmp_path / "killed" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == twin.read_bytes(), path.name


def test_preemption_signal_saves_and_asks_for_a_requeue(digit_shards, tmp_path):
    process = starts.start("pretrain", arguments_of(digit_shards, tmp_path, "warned", "optim.steps=100000"))
    record = tmp_path / "warned" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if record.exists() and record.read_text().count("\n") > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 75
    last = max(read_losses(tmp_path / "warned"))
    assert (tmp_path / f"warned/checkpoints/step-{last:08d}/COMMIT").exists()


def test_export_loads_everywhere_with_the_live_teachers_features(digit_shards, tmp_path):
    import timm
    from transformers import AutoModel

    run(digit_shards, tmp_path, "exported", "optim.steps=5")
    checkpoint = tmp_path / "exported/checkpoints/step-00000005"
    folder = checkpoint / "teacher"
    from models.vit import build_backbone
    from runtime.config import load_config
    from training.checkpoints.state_files import ConsolidatedState
    from training.config import PretrainConfig

    config = load_config(PretrainConfig, str(tmp_path / "exported/config.yaml"))
    live = build_backbone(config.model, drop_path_rate=0.0)
    prefix = "teacher/network.backbone."
    state = {
        k.removeprefix(prefix): v for k, v in ConsolidatedState(checkpoint).items() if k.startswith(prefix)
    }
    live.load_state_dict(state)
    images = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        features = live.eval()(images)
        from_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        from_transformers = AutoModel.from_pretrained(folder).eval()(images).pooler_output
    assert (from_timm - features).abs().max() < 1e-5
    assert (from_transformers - features).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.shards=nowhere", "data.shards"),
        ("prototypes.partition.size=15", "prototypes.partition.size"),
        ("model.name=vit_tin", "model.name"),
        ("engine.deepspeed_config=missing.json", "engine.deepspeed_config"),
        ("batch.gradient_accumulation_steps=3", "batch.global_batch_size"),
    ],
)
def test_mistakes_found_before_step_0_are_one_line(digit_shards, tmp_path, override, message):
    result = run(digit_shards, tmp_path, "mistake", override, expect=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "mistake/metrics.jsonl").exists()


def test_run_directory_of_another_configuration_is_refused_and_kept(digit_shards, tmp_path):
    run(digit_shards, tmp_path, "claimed", "optim.steps=2")
    before = (tmp_path / "claimed/metrics.jsonl").read_bytes()
    result = run(digit_shards, tmp_path, "claimed", "optim.steps=2", "optim.lr=0.1", expect=2)
    assert "optim.lr is 0.1, but run directory" in result.stderr
    assert (tmp_path / "claimed/metrics.jsonl").read_bytes() == before


def test_accumulation_gives_the_record_and_the_mixture_of_the_whole_batch(digit_shards, tmp_path):
    """Two micro-batches: every figure of the step and the estimator are those of the undivided batch."""
    from training.checkpoints.state_files import load_tree

    # BatchNorm would see half a batch. A start on the data takes rows in the order of one batch.
    options = ("optim.steps=1", "model.head.use_bn=false", "prototypes.gmm.init.method=data")
    figures = []
    for name, accumulation in (("one", 1), ("two", 2)):
        run(digit_shards, tmp_path, name, *options, f"batch.gradient_accumulation_steps={accumulation}")
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        groups = ("loss/", "optim/", "features/", "gmm/", "prototypes/")
        figures.append({key: value for key, value in line.items() if key.startswith(groups)})
    assert {"loss/entropy", "features/effective_rank", "gmm/log_likelihood"} <= figures[0].keys()
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-6)
    one, two = (load_tree(tmp_path / n / "checkpoints/step-00000001", "estimator") for n in ("one", "two"))
    torch.testing.assert_close(one["means"], two["means"], rtol=1e-5, atol=1e-6)


def test_a_folder_of_images_is_enough(tmp_path):
    """Pretraining and evaluation from class folders in `train` and `test`; the shards are made once for both."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    photos, cache = tmp_path / "photos", tmp_path / "cache"
    for index in range(160):
        folder = photos / ("train" if index < 112 else "test") / f"digit-{digits.target[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[index] * 255 / 16).astype("uint8")
        Image.fromarray(pixels).resize((28, 28)).save(folder / f"{index}.png")
    own = (f"data.images={photos}", "data.shards=null", f"data.cache_dir={cache}")
    watched = ("checkpoint.keep_best=true", "checkpoint.every_steps=1", "checkpoint.keep_last=1")
    probed = ("evaluation.knn_every_steps=1", "logging.tensorboard=true", "optim.steps=3")
    for mistake in ("model.name=nosuch", "data.local_crop_size=13", "engine.deepspeed_config=nosuch.json"):
        run("not there", tmp_path, "mine", *own, mistake, expect=2)
        assert not cache.exists()  # which may take hours to write
    result = run("not there", tmp_path, "mine", *own, *watched, *probed)
    assert "writing the 160 images" in result.stderr and re.search(
        r"step 2/3  .*  66\.7 %, \d+ s left", result.stderr
    )
    lines = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    top1 = {line["step"]: line["eval/knn20_top1"] for line in lines if "eval/knn20_top1" in line}
    best = min(step for step in top1 if top1[step] == max(top1.values()))
    kept = {int(path.name[-8:]) for path in (tmp_path / "mine" / "checkpoints").iterdir()}
    assert set(top1) == {1, 2, 3} and kept == {3, best}
    assert len(list((tmp_path / "mine" / "tensorboard").iterdir())) == 1
    (made,) = cache.iterdir()
    written = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert f"shards: {made}" in (tmp_path / "mine" / "config.yaml").read_text()
    small = ("probes=[knn]", "controls=[]", "knn.k=[20]", "data.num_workers=0")
    evaluated = subprocess.run(
        [
            *(sys.executable, "evaluate.py", "configs/eval.yaml", f"encoder={tmp_path / 'mine'}"),
            *(*own, *small, f"features.cache_dir={tmp_path / 'features'}"),
        ],
        cwd=starts.ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert evaluated.returncode == 0, evaluated.stderr[-2000:]
    assert json.loads((tmp_path / "mine" / "results" / "knn.json").read_text())["provenance"][
        "manifest_hashes"
    ]
    assert written == {path: path.stat().st_mtime_ns for path in made.iterdir()}
