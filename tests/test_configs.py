"""Every YAML and JSON loads, every option is read by code, and a typo is one line within seconds."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from audit.cells import iterate_cells
from audit.config import AuditConfig
from evaluation.config import PROBES, EvaluationConfig
from evaluation.probes import config as probe_options
from prototypes.config import EstimatorName
from runtime.config import ConfigError, build_config, config_hash, iterate_keys, load_config, read_yaml
from training.config import PretrainConfig

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "models", "prototypes", "data", "training", "evaluation", "report", "audit", "runtime", "slurm", "benchmarks",
)  # fmt: skip
PRETRAIN_CONFIGS = sorted((ROOT / "configs").glob("pretrain_*.yaml"))
DEMO = ROOT / "configs" / "pretrain_vit-mini_fashion-mnist_full.yaml"


def attributes_read():
    """Names that code reads as an attribute, outside the dataclass declarations themselves."""
    names = set()
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    for path in [*paths, ROOT / "pretrain.py", ROOT / "evaluate.py"]:
        tree = ast.parse(path.read_text())
        # What __post_init__ reads is validation: an option that only its own check reads does nothing.
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                node.body = [item for item in node.body if getattr(item, "name", "") != "__post_init__"]
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


def unread_options(config_class):
    read = attributes_read()
    return sorted(key for key in iterate_keys(config_class) if key.rsplit(".", 1)[-1] not in read)


@pytest.mark.parametrize("path", PRETRAIN_CONFIGS, ids=lambda path: path.stem)
def test_pretrain_config_loads(path):
    assert path.stem == f"pretrain_{load_config(PretrainConfig, str(path)).run.name}"
    header = path.read_text().splitlines()[:6]
    assert any("python pretrain.py" in line or "torchrun" in line or "sbatch" in line for line in header), (
        "the first lines of a configuration say how to run it"
    )


@pytest.mark.parametrize(
    "path",
    [path for path in PRETRAIN_CONFIGS if re.search(r"^# Hardware: \d+ GPUs", path.read_text(), re.M)],
    ids=lambda path: path.stem,
)
def test_a_recipe_starts_on_the_gpus_that_its_header_names(path):
    header, config = path.read_text(), load_config(PretrainConfig, str(path))
    ranks = int(re.search(r"^# Hardware: (\d+) GPUs", header, re.M)[1])
    nodes, per_node = (
        int(number) for number in re.search(r"--nodes (\d+) --gpus-per-node (\d+)", header).groups()
    )
    assert nodes * per_node == ranks
    for world_size in (1, 8, ranks, 32):  # 32: the size of docs/slurm.md
        config.data.check_ranks(world_size)
        config.batch.micro_batch_size_per_gpu(world_size)


def test_every_base_is_one():
    named = "\n".join(line for path in PRETRAIN_CONFIGS for line in path.read_text().splitlines()[:8])
    bases = sorted((ROOT / "configs" / "base").glob("*.yaml"))
    assert bases and [path.name for path in bases if f"base/{path.name}" not in named] == []
    assert [path.name for path in bases if "run" in read_yaml(str(path))] == [], "a run's name is its file's"


# Arms of one comparison differ in what they compare; a base mended for one is mended for both.
@pytest.mark.parametrize(
    "full",
    [path for path in PRETRAIN_CONFIGS if path.stem.endswith("_full") and "fashion" not in path.stem],
    ids=lambda path: path.stem,
)
def test_full_and_joint_differ_in_their_prototypes_alone(full):
    joint = full.with_name(full.name.replace("_full", "_joint"))
    first, second = (load_config(PretrainConfig, str(path)) for path in (full, joint))
    assert (first.prototypes.mode, second.prototypes.mode) == ("full", "joint")
    of_patches = [config.patch_prototypes and config.patch_prototypes.mode for config in (first, second)]
    assert of_patches in ([None, None], ["full", "joint"])
    own = {name: getattr(first, name) for name in ("run", "prototypes", "patch_prototypes")}
    own["optim"] = dataclasses.replace(  # of prototypes that the loss trains
        second.optim, prototype_frozen_epochs=first.optim.prototype_frozen_epochs
    )
    assert first == dataclasses.replace(second, **own)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_config_sets_mechanics_only(path):
    from training.engines.mechanics import read_mechanics

    assert "zero_optimization" in read_mechanics(str(path))


def test_deepspeed_config_that_sets_the_batch_is_refused(tmp_path):
    from training.engines.mechanics import read_mechanics

    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": 8}))
    with pytest.raises(ValueError, match="train_batch_size"):
        read_mechanics(str(path))


@pytest.mark.parametrize(
    "key", ["offload_optimizer", "compute_grad_norm", "zero_quantized_gradients", "stge"]
)
def test_deepspeed_config_that_moves_the_optimizer_or_its_norm_is_refused(key, tmp_path):
    from training.engines.mechanics import read_mechanics

    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1, key: {"device": "cpu"}}}))
    with pytest.raises(
        ValueError, match=rf"zero_optimization\.{key}; expected only allgather.*remove the key"
    ):
        read_mechanics(str(path))


def test_deepspeed_config_may_fetch_nothing_ahead_and_keep_nothing_whole(tmp_path):
    from training.engines.mechanics import read_mechanics

    nothing = dict.fromkeys(
        (
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
        ),
        0,
    )
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **nothing}}))
    assert read_mechanics(str(path))["zero_optimization"] == {"stage": 3, **nothing}


@pytest.mark.parametrize(
    "content",
    [
        b"[1]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"zero_optimization": 3}',
        b'{"zero_optimization": {"stage": 9}}',
        b'{"zero_optimization": {"stage": true}}',
        b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}',
        b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": 0.5}}',
        b'{"zero_optimization": {"stage": 1, "allgather_bucket_size": 0}}',
        b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": 1e999}}',
        b'{"zero_optimization": {"stage": 2, "overlap_comm": "maybe"}}',
        b'{"torch_autocast": "on"}',
        b'{"comms_logger": 3}',
        b'{"wall_clock_breakdown": "on"}',
        b'{"torch_autocast": {"enabled": "maybe"}}',
        b'{"torch_autocast": {"enabled": true, "dtype": "float12"}}',
        b'{"torch_autocast": {"enabled": true, "lower_precision_safe_modules": ["torch.nn.Linear"]}}',
    ],
    ids=lambda content: content[:44].decode(errors="replace"),
)
def test_deepspeed_config_of_another_shape_is_refused(content, tmp_path):
    from training.engines.mechanics import read_mechanics

    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*(mend the file|expected one such as)"):
        read_mechanics(str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("eval*.yaml")), ids=lambda path: path.stem)
def test_evaluation_config_loads(path):
    load_config(EvaluationConfig, str(path))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("audit_*.yaml")), ids=lambda path: path.stem)
def test_every_arm_of_an_audit_is_a_configuration(path):
    config = load_config(AuditConfig, str(path))
    resolved = set()
    for cell in iterate_cells(config, tuple(config.arms)):
        pretrain, *evaluations = (command[2:] for command in cell.commands())
        for evaluate in evaluations:
            load_config(EvaluationConfig, evaluate[0], evaluate[1:])
        built = load_config(PretrainConfig, pretrain[0], pretrain[1:])
        resolved.add(config_hash(dataclasses.replace(built, run=dataclasses.replace(built.run, name="same"))))
    assert len(resolved) == len(config.arms) * len(config.seeds), "two arms are the same run"


@pytest.mark.parametrize("config_class", [PretrainConfig, EvaluationConfig, AuditConfig])
def test_every_option_is_read(config_class):
    assert unread_options(config_class) == []


def test_what_can_be_named_can_be_built_and_what_can_be_built_can_be_named():
    from evaluation.probes.run import PROBE_FUNCTIONS
    from prototypes.build import FAMILIES

    assert set(PROBES) == set(PROBE_FUNCTIONS)
    assert set(get_args(EstimatorName)) == {family.name for family in FAMILIES}


def test_every_probes_options_are_options_of_an_evaluation():
    declared = {item for item in vars(probe_options).values() if dataclasses.is_dataclass(item)}
    attached = {hint for hint in get_type_hints(EvaluationConfig).values() if dataclasses.is_dataclass(hint)}
    assert declared <= attached


def test_an_option_that_nobody_reads_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Planted:
        an_option_that_no_code_reads: int = 1

    assert unread_options(Planted) == ["an_option_that_no_code_reads"]


def run_pretrain(*arguments):
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "pretrain.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return result, time.monotonic() - started


@pytest.mark.parametrize("argument", ["--local_rank=1", "--local-rank=1"])
def test_what_launchers_add_is_passed_over(argument):
    result, _ = run_pretrain(argument, "nowhere.yaml")
    assert result.returncode == 2 and "configuration file is 'nowhere.yaml'" in result.stderr


def test_a_launchers_variable_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    result, _ = run_pretrain("nowhere.yaml")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate"),
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("num_prototypes=8", "did you mean prototypes.num_prototypes?"),
        ("optim.lr=fast", "optim.lr is 'fast' (str); expected float"),
        ("prototypes.mode=ful", "did you mean full?"),
        ("prototypes.partition.size=1000", "prototypes.partition.size"),
        ("objective.instance.targets=centre", "objective.instance.targets is centre; expected null, as"),
        ("objective.logits=cosine", "set objective.instance.logits"),
        ("data=3", "expected a section"),
        ("nonsense", "expected key.sub=value"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(override, expected):
    result, seconds = run_pretrain(str(DEMO), override)
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    assert seconds < 5 * (1 + 2 * int(sys.gettrace() is not None))


@pytest.mark.parametrize("path", ["missing.yaml", "LICENSE", "README.md"])
def test_what_is_no_configuration_is_refused(path):
    result, _ = run_pretrain(path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_configuration_modules_import_no_torch():
    modules = "runtime.config, runtime.program, training.config, evaluation.config, audit.config"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules, 'torch is loaded'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_missing_key_names_itself():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Section:
        shards: str

    with pytest.raises(ConfigError, match="shards is missing"):
        build_config(Section, {})


def test_tagged_yaml_constructs_nothing(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "hostile.yaml"
    path.write_text(
        f"run: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]\n"
    )
    with pytest.raises(ConfigError):
        load_config(PretrainConfig, str(path))
    assert not canary.exists()


@pytest.mark.parametrize("program", [PretrainConfig, EvaluationConfig])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"images": "PHOTOS", "shards": "datasets/mine"},
            r"^data\.images is 'PHOTOS' and data\.shards is 'datasets/mine'; expected one of them; set "
            r"data\.shards=null, or data\.images=null$",
        ),
        ({"images": ""}, r"^data\.images is ''; expected a folder, or null; set data\.images$"),
        ({"shards": ""}, r"^data\.shards is ''; expected a folder, or null; set data\.shards$"),
    ],
)
def test_images_lie_in_one_place(program, data, message):
    given = read_yaml(str(DEMO)) if program is PretrainConfig else {"encoder": "raw-pixels", "data": {}}
    for shards in ("datasets/mine", None):
        one = {"images": None if shards else "PHOTOS", "shards": shards}
        build_config(program, {**given, "data": {**given["data"], **one}})
    with pytest.raises(ConfigError, match=message):
        build_config(program, {**given, "data": {**given["data"], "images": None, "shards": None, **data}})


def test_images_in_no_place_or_a_test_split_beside_them_are_refused():
    given = read_yaml(str(DEMO))
    with pytest.raises(
        ConfigError, match=r"^data\.shards is null; expected a folder of shards, or .*data\.images"
    ):
        build_config(PretrainConfig, {**given, "data": {**given["data"], "shards": None}})
    own = {"images": "PHOTOS", "test_shards": "datasets/test"}
    with pytest.raises(
        ConfigError, match=r"^data\.images is 'PHOTOS' and data\.test_shards is 'datasets/test'"
    ):
        build_config(EvaluationConfig, {"encoder": "raw-pixels", "data": own})
