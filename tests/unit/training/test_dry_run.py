"""The dry run's figures beside live tensors."""

from pathlib import Path

import pytest
import torch

from models.student_teacher import SelfSupervisedNetwork
from runtime.config import load_config
from runtime.distributed import Process
from tests.helpers.digits import DEMO, TINY
from training.config import PretrainConfig
from training.dry_run import describe_run, measure_cost, state_bytes

RECIPES = sorted(p.stem for p in Path("configs").glob("pretrain_*.yaml"))
FAST = {"pretrain_vits16_imagenet_full", "pretrain_resnet50_imagenet_joint"}


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("mode", ["full", "joint"])
def test_states_equal_summed_bytes_of_live_tensors(mode):
    config = load_config(PretrainConfig, DEMO, [*TINY, f"prototypes.mode={mode}"])
    network = SelfSupervisedNetwork(config.model, "student")
    parameters = bytes_of(network.parameters()) + (64 * 16 * 4 if mode == "joint" else 0)
    states = state_bytes(measure_cost(config), stage=0, world_size=1)
    assert states["parameters"] == states["gradients"] == states["teacher"] == parameters
    assert states["moments"] == 2 * parameters
    assert (states["estimator"] > 0) == (mode == "full")


def test_activations_equal_what_autograd_saves():
    config = load_config(PretrainConfig, DEMO, [*TINY, "model.drop_path_rate=0.1"])
    network = SelfSupervisedNetwork(config.model, "student")
    batch = 16
    crops = [torch.randn(2 * batch, 1, 28, 28), torch.randn(batch, 1, 14, 14)]
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(crops)
    counted = measure_cost(config).activation_bytes * batch
    assert counted == pytest.approx(sum(saved.values()), rel=0.15)


def test_stages_cut_what_they_say():
    cost = measure_cost(load_config(PretrainConfig, DEMO, list(TINY)))
    whole = state_bytes(cost, 0, 4)
    for stage, cut in (
        (1, {"moments"}),
        (2, {"moments", "gradients"}),
        (3, {"moments", "gradients", "parameters", "teacher"}),
    ):
        states = state_bytes(cost, stage, 4)
        for part, size in whole.items():
            assert states[part] == (size / 4 if part in cut else size), (stage, part)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_recipes_are_described(name):
    config = load_config(PretrainConfig, f"configs/{name}.yaml", ["run.dry_run_world_size=16"])
    text = describe_run(config, Process(0, 1, 0, torch.device("cpu")))
    assert "fits 80 GB, 141 GB" in text
    assert "16 ranks" in text
