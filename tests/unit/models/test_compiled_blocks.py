"""Compiled blocks: few graphs whatever the drop path, and the numbers of timm's own blocks."""

import functools
from collections import Counter

import pytest
import torch

from models.config import ModelConfig
from models.vit import build_backbone, compile_blocks
from runtime.config import load_config
from training.config import PretrainConfig


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs by what is being run; `graphs.running` names it."""
    counted = Counter()
    counted.running = ""

    def backend(module, _inputs):
        counted[counted.running] += 1
        return module.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield counted
    torch.compiler.reset()


def pair_of(config):
    """A student and its teacher at a small width, both compiled, in train mode."""
    student, teacher = build_backbone(config), build_backbone(config, drop_path_rate=0.0)
    for network in (student, teacher):
        compile_blocks(network)
        network.train()
    return student, teacher.requires_grad_(False)


@pytest.mark.parametrize("size", ["vits16", "vitb16", "vitl16"])
def test_a_shipped_recipe_compiles_at_most_two_graphs_per_crop_size_and_network(size, graphs, caplog):
    config = load_config(PretrainConfig, f"configs/pretrain_{size}_imagenet_full.yaml", [])
    assert config.model.drop_path_rate > 0 and config.data.num_local_crops > 0
    narrow = ModelConfig(
        **{name: getattr(config.model, name) for name in ("name", "image_size", "drop_path_rate")},
        embed_dim=16,
        num_heads=2,
    )
    student, teacher = pair_of(narrow)
    assert len(student.blocks) == {"vits16": 12, "vitb16": 12, "vitl16": 24}[size]
    for _ in range(2):
        for side in (config.data.global_crop_size, config.data.local_crop_size):
            graphs.running = f"student {side}"
            crops = torch.randn(3, 3, side, side)
            # Accumulation runs every crop without a graph first.
            with torch.random.fork_rng(), torch.no_grad():
                first = student(crops)
            assert first.grad_fn is None
            second = student(crops)
            assert torch.equal(first, second)
            second.sum().backward()
        graphs.running = f"teacher {config.data.global_crop_size}"
        with torch.no_grad():
            teacher(torch.randn(3, 3, config.data.global_crop_size, config.data.global_crop_size))
    # An evaluation between the steps, with a smaller last batch, compiles nothing.
    graphs.running = "evaluation"
    with torch.inference_mode():
        for number in (3, 2, 1):
            teacher.eval()(torch.randn(number, 3, 224, 224))
    assert dict(graphs) == {"student 224": 2, "student 96": 2, "teacher 224": 1}
    assert "recompile" not in caplog.text


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_blocks_are_timms_bit_for_bit(graphs, activation_checkpointing):
    """The same seed gives the same masks, outputs and gradients as timm's own drop path, block by block."""
    config = ModelConfig(
        image_size=32,
        patch_size=8,
        embed_dim=16,
        depth=6,
        num_heads=2,
        drop_path_rate=0.6,
        init_values=0.1,
        activation_checkpointing=activation_checkpointing,
    )
    torch.manual_seed(0)
    plain, compiled = build_backbone(config).train(), build_backbone(config).train()
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    found = []
    for network in (plain, compiled):
        torch.manual_seed(7)
        outputs = [network(torch.randn(5, 3, side, side)) for side in (32, 16)]
        torch.cat(outputs).square().sum().backward()
        found.append([*outputs, *(p.grad for p in network.parameters()), torch.rand(1)])
    for expected, value in zip(*found, strict=True):
        assert torch.equal(expected, value)
    graphs.running = "eval"
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(images), compiled.eval()(images))
    assert graphs["eval"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_timms_in_each_precision(dtype):
    from timm.layers import DropPath

    from models.vit import _DrawnDropPath

    branch = torch.randn(64, 3, 5).to(dtype)
    ours, theirs = _DrawnDropPath(0.3, scale_by_keep=True), DropPath(0.3)
    torch.manual_seed(3)
    ours.draw(branch.float())
    torch.manual_seed(3)
    assert torch.equal(ours(branch), theirs(branch))
    assert torch.equal(ours.eval()(branch), branch)
