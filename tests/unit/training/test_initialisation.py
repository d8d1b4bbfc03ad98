"""A run that starts from another run: its teacher, and with `init_head` its head and prototypes. Real runs."""

import json
import shutil

import pytest
import torch

from models.student_teacher import SelfSupervisedNetwork
from prototypes.build import build_estimator
from runtime.config import load_config
from runtime.distributed import Process
from tests.helpers import starts
from tests.helpers.digits import DEMO, TINY, write_digit_shards
from training.checkpoints.files import list_committed
from training.checkpoints.state_files import ConsolidatedState, load_tree
from training.config import PretrainConfig
from training.dry_run import describe_run
from training.engines.interface import TrainedNetwork
from training.initialisation import find_source_checkpoint, initialise_estimator, initialise_network

ALONE = Process(0, 1, 0, torch.device("cpu"))
# FSDP2 starts faster than DeepSpeed, and refuses the demo's BatchNorm. The coupling gives one run both kinds of
# prototypes: a mixture's and those that the loss trains.
SHORT = (
    "prototypes.mode=full",
    "prototypes.coupling.strength=0.5",
    "optim.steps=2",
    "checkpoint.every_steps=1",
    "engine.name=fsdp2",
    "model.head.use_bn=false",
    "evaluation.knn_every_steps=0",
)


def pretrain(out, shards, name, *overrides):
    place = (f"data.shards={shards}", f"run.name={name}", f"run.output_dir={out}")
    ended = starts.run("pretrain", [DEMO, *TINY, *SHORT, *place, *overrides])
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out / name


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_digit_shards(tmp_path_factory.mktemp("digits"), num_train=96, num_test=48)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    return pretrain(tmp_path_factory.mktemp("outputs"), shards, "first")


def configure(source, *overrides):
    return load_config(PretrainConfig, DEMO, [*TINY, *SHORT, f"model.init={source}", *overrides])


def start(config):
    """Returns (student, estimator, source) as the build starts them."""
    estimator = build_estimator(config.prototypes, seed=7, num_observations_per_epoch=96, total_steps=2)
    student = TrainedNetwork(SelfSupervisedNetwork(config.model, "student"), estimator.build_learned())
    source = find_source_checkpoint(config.model, ALONE)
    initialise_network(config.model, source, student)
    initialise_estimator(config.model, source, estimator)
    return student, estimator, source


def teacher_part(source, part):
    state = ConsolidatedState(source)
    prefix = f"teacher/{part}."
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def is_equal(module, tensors):
    own = module.state_dict()
    assert own.keys() == tensors.keys() and own
    return all(torch.equal(own[name], tensors[name]) for name in own)


def test_a_run_gives_its_newest_teacher_and_keeps_its_head(run):
    student, estimator, source = start(configure(run))
    assert source.name == "step-00000002"
    assert is_equal(student.network.backbone, teacher_part(source, "network.backbone"))
    assert not is_equal(student.network.projection_head, teacher_part(source, "network.projection_head"))
    assert estimator.step == 0
    older = run / "checkpoints" / "step-00000001"
    assert start(configure(older))[2] == older


def test_a_run_gives_its_head_and_mixture(run):
    student, estimator, source = start(configure(run, "model.init_head=true"))
    assert is_equal(student.network.projection_head, teacher_part(source, "network.projection_head"))
    saved = load_tree(source, "estimator")
    for name in ("means", "variances", "mixing_weights", "counts", "input_mean", "input_variance"):
        assert torch.equal(getattr(estimator, name), saved[name]), name
    assert estimator.step == saved["_extra_state"]["step"] == 2 and estimator.is_initialised


def test_known_means_are_not_collected_again(run):
    config = configure(run, "model.init_head=true", "prototypes.gmm.init.method=data")
    _, estimator, _ = start(config)
    means = estimator.means.clone()
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    estimator.commit(estimator.observe(rows))
    estimator.accept()
    assert not torch.isclose(estimator.means, rows).all(dim=1).any()
    assert torch.nn.functional.cosine_similarity(estimator.means, means).mean() > 0.9


def test_a_run_gives_prototypes_that_its_loss_trained(run):
    student, _, source = start(configure(run, "model.init_head=true"))
    assert is_equal(student.learned_prototypes, teacher_part(source, "learned_prototypes"))


def test_the_build_starts_there(run, shards, tmp_path):
    following = pretrain(
        tmp_path, shards, "next", f"model.init={run}", "model.init_head=true", "optim.steps=1"
    )
    (checkpoint,) = list_committed(following / "checkpoints")
    assert load_tree(checkpoint, "estimator")["_extra_state"]["step"] == 3
    assert "projection head and prototypes as well" in (following / "console.log").read_text()


def test_the_dry_run_tries_the_start_and_changes_no_other_run(run):
    before = sorted(path.name for path in run.rglob("*"))
    text = describe_run(configure(run, "model.init_head=true"), ALONE)
    assert "--- memory per rank" in text
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj\.bias has shape \(24,\); expected \(48,\)"):
        describe_run(configure(run, "model.embed_dim=48"), ALONE)
    assert sorted(path.name for path in run.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.head.hidden_dim=24"],
            r"tensors of the projection head do not fit: mlp\.0\.bias is \(32,\), expected \(24,\)",
        ),
        (
            ["prototypes.num_prototypes=32"],
            r"tensors of the learned prototypes do not fit: weight is \(64, 16\), expected \(32, 16\)",
        ),
        (
            ["prototypes.num_prototypes=32", "prototypes.coupling.strength=0"],
            r"num_prototypes is 64, expected 32 .*model\.init_head=false",
        ),
        (["prototypes.mode=joint", "prototypes.coupling.strength=0"], "expected joint"),
        (["prototypes.coupling.strength=0", "prototypes.mode=frozen_random"], "expected frozen_random"),
    ],
)
def test_a_head_that_does_not_fit_is_one_line(run, overrides, message):
    with pytest.raises(ValueError, match=message):
        start(configure(run, "model.init_head=true", *overrides))


def test_a_head_of_no_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"model\.init_head is True.*expected a run directory"):
        find_source_checkpoint(configure(tmp_path, "model.init_head=true").model, ALONE)
    with pytest.raises(ValueError, match=r"model\.init_head is True with model\.init 'timm:vit'"):
        configure("timm:vit", "model.init_head=true")


def test_damaged_checkpoints_are_passed_over_and_not_marked(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    newest, older = list_committed(copy / "checkpoints")
    (newest / "estimator.json").write_text(json.dumps({}))
    assert find_source_checkpoint(configure(copy).model, ALONE) == older
    (older / "estimator.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"none of 2 checkpoints is whole; .*set model\.init"):
        find_source_checkpoint(configure(copy).model, ALONE)
    assert not list(copy.rglob("REJECTED"))
