"""Every recipe of docs/cookbook.md as it is written there, with stand-ins for weights and photographs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COOKBOOK = ROOT / "docs" / "cookbook.md"
# The configuration of the recipes as a network of two blocks on 28 pixels.
SMALL = (
    "model.patch_size=14 model.embed_dim=24 model.depth=2 model.num_heads=2 model.image_size=28 "
    "model.head.hidden_dim=32 model.head.projection_dim=16 prototypes.dim=16 prototypes.num_prototypes=64 "
    "prototypes.partition.size=16 data.global_crop_size=28 data.num_local_crops=1 data.num_workers=0 data.num_lanes=8 "
    "data.shuffle_window=16 batch.global_batch_size=16 batch.gradient_accumulation_steps=1 run.device=cpu"
)
# What stands in a recipe is not repeated here: the last of two values counts, and the recipe's is to be read.
REPLACED = {
    "data.local_crop_size=98": "data.local_crop_size=14",
    "ds_configs/zero2_bf16.json": "ds_configs/zero2_fp32.json",
    "pip install onnx onnxruntime onnxscript\n": "",
}
ARCHITECTURE = "vit_small_patch14_dinov2"  # of the weights that the recipes go on from
DONOR = {"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}


def recipes() -> dict[str, list[tuple[str, str]]]:
    """Title to (language, code) of its blocks."""
    text = COOKBOOK.read_text()
    sections = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    blocks = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return {title: blocks.findall(body) for title, body in zip(sections[::2], sections[1::2], strict=True)}


class Kitchen:
    """A folder in which the recipes' relative places lie, and what replaces what only a user has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "PHOTOS").mkdir()
        generator = np.random.default_rng(0)
        for number in range(320):
            pixels = generator.integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "PHOTOS" / f"{number}.png")
        for name in ("configs", "ds_configs", "pretrain.py", "evaluate.py"):
            (root / name).symlink_to(ROOT / name)

    def cook(self, title: str, block: int | None = None) -> str:
        """Runs a recipe, or one block of it, and returns what it prints."""
        said = []
        for language, code in recipes()[title] if block is None else [recipes()[title][block]]:
            command = (
                [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", self._small(code)]
            )
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
            }
            done = subprocess.run(
                command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=280
            )
            assert done.returncode == 0, f"{code}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
            said.append(done.stdout + done.stderr)
        return "\n".join(said)

    def _small(self, code: str) -> str:
        for written, stand_in in REPLACED.items():
            code = code.replace(written, stand_in)
        length = "" if "optim.steps" in code else "optim.steps=2"
        engine = "" if "deepspeed_config" in code else "engine.deepspeed_config=ds_configs/zero1_fp32.json"
        crops = "" if "local_crop_size" in code else "data.local_crop_size=14"
        options = f"{SMALL} {length} {crops} optim.warmup_epochs=0"
        code = re.sub(r"(pretrain\.py \S+\.yaml)", rf"\1 {options} {engine}", code)
        if "torchrun" in code:  # the first of the two starts has the configuration's engine
            code = code.replace(
                "run.name=moved optim.steps=2",
                "run.name=moved optim.steps=2 " + "engine.deepspeed_config=ds_configs/zero1_fp32.json",
            )
        return code

    def write_donor(self, folder: str, **options: int) -> None:
        """A network of the released weights' architecture, untrained; small with `DONOR`."""
        from timm.models import save_for_hf

        donor = timm.create_model(ARCHITECTURE, **options)
        save_for_hf(donor, str(self.root / folder), model_args=options, safe_serialization=True)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory: pytest.TempPathFactory) -> Kitchen:
    return Kitchen(tmp_path_factory.mktemp("kitchen"))


def test_every_recipe_with_code_is_cooked_here() -> None:
    tested = set(re.findall(r"cook\(\"([^\"]+)\"", Path(__file__).read_text()))
    assert {title for title, blocks in recipes().items() if blocks} == tested


def test_somebodys_head(kitchen: Kitchen) -> None:
    prototypes = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    prototypes[20:] = prototypes[:20]
    state = {"head.last_layer.weight_v": prototypes, "head.last_layer.weight_g": torch.ones(40, 1)}
    torch.save({"teacher": state, "student": state}, kitchen.root / "CHECKPOINT.pth")
    assert "50.0" in kitchen.cook("Audit somebody's head")


@pytest.mark.slow  # a dry run, a pretraining, a report, an export: a minute of one core
def test_a_small_vit_its_record_and_its_onnx_file(kitchen: Kitchen) -> None:
    assert "memory per rank" in kitchen.cook("A small ViT on one GPU", 0)
    assert "step 2/2" in kitchen.cook("A small ViT on one GPU", 1)
    assert (kitchen.root / "outputs" / "mine" / "report" / "index.html").is_file()
    assert re.search(r"step 2: loss \d", kitchen.cook("Read a record"))
    assert "outputs within 0.0001" in kitchen.cook("An encoder as one ONNX file")


@pytest.mark.slow  # two pretrainings
def test_released_weights_with_and_without_a_network(
    kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch
) -> None:
    kitchen.write_donor("donor", **DONOR)
    monkeypatch.setitem(REPLACED, "timm:vit_small_patch14_dinov2.lvd142m", "local-dir:donor")
    assert "step 2/2" in kitchen.cook("Continue from released weights")
    # What is fetched is the donor, by the same two calls.
    monkeypatch.setitem(
        REPLACED,
        'timm.create_model("vit_small_patch14_dinov2.lvd142m", pretrained=True, num_classes=0)',
        'timm.create_model("local-dir:donor", pretrained=True, num_classes=0)',
    )
    monkeypatch.setitem(
        REPLACED, '"weights/dinov2-small", safe', f'"weights/dinov2-small", model_args={DONOR}, safe'
    )
    assert "step 2/2" in kitchen.cook("A cluster without a network")


@pytest.mark.slow  # two starts, the second of two ranks
def test_a_run_moves_from_one_process_to_two(kitchen: Kitchen) -> None:
    said = kitchen.cook("Go on with other hardware")
    assert "step 4/4" in said and "newest whole checkpoint" in said


@pytest.mark.slow  # eight dry runs of a ViT-S
def test_what_trains_is_accepted_as_it_is_written(kitchen: Kitchen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made smaller: the recipes' own sizes, shards, loader processes and weights go together."""
    from data import make_shards
    from runtime.config import load_config
    from runtime.distributed import Process
    from training.config import PretrainConfig
    from training.dry_run import describe_run

    monkeypatch.chdir(kitchen.root)
    kitchen.write_donor("weights/dinov2-small", num_classes=0)
    code = "\n".join(code for blocks in recipes().values() for language, code in blocks if language == "bash")
    commands = [shlex.split(line) for line in code.replace("\\\n", " ").splitlines()]
    (made,) = [command for command in commands if "data.make_shards" in command]
    assert make_shards.main(made[made.index("imagefolder") :]) == 0
    starts = [command for command in commands if "pretrain.py" in command]
    # What the table says of other weights is the same start with another name.
    continued = next(command for command in starts if "run.name=continued" in command)
    for name, spec, sizes in re.findall(
        r"^\| .*? \| `(\w+)` \| `timm:(.*?)` \| (\d+ and \d+)", COOKBOOK.read_text(), re.MULTILINE
    ):
        assert spec in timm.list_models(pretrained=True) and spec.partition(".")[0] == name
        whole, part = sizes.split(" and ")
        crops = [f"data.global_crop_size={whole}", f"data.local_crop_size={part}"]
        starts.append([*continued, f"model.name={name}", "model.init=random", *crops])
    assert len(starts) == 9
    for command in starts:
        at = command.index("pretrain.py") + 1
        overrides = [
            argument.replace(f"timm:{ARCHITECTURE}.lvd142m", "local-dir:weights/dinov2-small")
            for argument in command[at + 1 :]
        ]
        config = load_config(PretrainConfig, command[at], [*overrides, "run.device=cpu"])
        num_ranks = 2 if command[0] == "torchrun" else 1
        said = describe_run(config, Process(0, num_ranks, 0, torch.device("cpu")))
        assert re.search(r"320 images, 1\.2 steps per epoch, \d+ steps", said), said[-2000:]
