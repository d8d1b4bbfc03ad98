"""Planted prototypes in the state-dict layout of every supported family give the known counts.

The layouts are built from modules of the same names as in the official code; where each was read stands in
`evaluation/encoders/public_heads.py`.
"""

import argparse
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import evaluate as program
from evaluation.encoders.public_heads import LAYOUTS, project_by_state, read_prototypes
from evaluation.encoders.weights_files import WeightsFileError, read_weights_file
from evaluation.probes.prototype_audit import audit
from runtime.program import run_program

K, P, D = 12, 16, 8
EPS = (0.025, 0.5)


def planted(kind):
    """A [12, 16] matrix and its number of unique prototypes at eps = 0.025 and 0.5."""
    generator = torch.Generator().manual_seed(len(kind))
    orthogonal = torch.linalg.qr(torch.randn(P, P, generator=generator)).Q[:K]
    if kind == "orthogonal":
        return orthogonal, (12, 12)
    if kind == "duplicates":  # three directions, four times each, of different lengths
        return orthogonal[:3].repeat(4, 1) * torch.arange(1, K + 1)[:, None], (3, 3)
    if kind == "antipodal":
        return torch.cat([orthogonal[:1].repeat(6, 1), -orthogonal[:1].repeat(6, 1)]), (2, 2)
    # Pairs at 60 degrees: cosine distance .5 - tiny, apart at .025 and together at .5.
    half = orthogonal[:6]
    return torch.cat([half, 0.51 * half + 0.86 * orthogonal[6:]]), (12, 6)


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
KINDS = ("orthogonal", "duplicates", "antipodal", "pairs")


class WeightNormHead(nn.Module):
    """DINOHead of DINO, CARP, iBOT (with `last_layer2`) and DINOv2; DINOv3 leaves the weight norm out."""

    def __init__(self, matrix, *, weight_norm=True, patch=None, use_bn=False):
        super().__init__()
        norm = [nn.BatchNorm1d(D)] if use_bn else []
        self.mlp = nn.Sequential(nn.Linear(D, D), *norm, nn.GELU(), nn.Linear(D, P))
        self.last_layer = self._layer(matrix, weight_norm)
        if patch is not None:
            self.last_layer2 = self._layer(patch, weight_norm)

    @staticmethod
    def _layer(matrix, weight_norm):
        layer = nn.Linear(P, K, bias=False)
        layer.weight.data.copy_(matrix)
        return nn.utils.weight_norm(layer) if weight_norm else layer


def named(prefix, module):
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def dino(teacher, student):
    return {
        "student": named("module.head.", WeightNormHead(student)),
        "teacher": named("head.", WeightNormHead(teacher, use_bn=True)),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(K, P)}}},
        "args": argparse.Namespace(arch="vit_small"),
        "epoch": 3,
    }


def ibot(teacher, student):
    return {
        "student": named("module.head.", WeightNormHead(student, patch=student)),
        "teacher": named("head.", WeightNormHead(teacher, patch=teacher)),
    }


def dinov2(teacher, student):
    return {
        "teacher": {
            **named("dino_head.", WeightNormHead(teacher)),
            **named("ibot_head.", WeightNormHead(student)),
            "backbone.cls_token": torch.zeros(1, 1, D),
        }
    }


def dinov3(teacher, student):
    return {
        "teacher": {
            **named("dino_head.", WeightNormHead(teacher, weight_norm=False)),
            **named("ibot_head.", WeightNormHead(student, weight_norm=False)),
        }
    }


def capi(teacher, student):
    layer = nn.Linear(P, K)
    layer.weight.data.copy_(teacher)
    predictor = {"last_layer.weight_g": student.norm(dim=1, keepdim=True), "last_layer.weight_v": student}
    return {
        "model": {
            **named("teacher.head.module.layer.", layer),
            **{f"student.head.module.{name}": tensor for name, tensor in predictor.items()},
        }
    }


def swav(teacher, student):
    module = nn.Module()
    module.projection_head = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, P))
    module.prototypes = nn.Module()
    for index, matrix in enumerate((teacher, student)):
        layer = nn.Linear(P, K, bias=False)
        layer.weight.data.copy_(matrix)
        module.prototypes.add_module(f"prototypes{index}", layer)
    return {"epoch": 1, "state_dict": named("module.", module)}


def msn(teacher, student):
    head = nn.Sequential()
    head.add_module("fc1", nn.Linear(D, D))
    head.add_module("bn1", nn.BatchNorm1d(D))
    head.add_module("gelu1", nn.GELU())
    head.add_module("fc3", nn.Linear(D, P))
    return {
        "encoder": named("module.fc.", head),
        "target_encoder": named("module.fc.", head),
        "prototypes": teacher,
        "loss": np.float64(0.5),
    }


# family -> (builder, name of the matrix that holds `teacher`, the one that holds `student` or None)
FAMILIES = {
    "DINO or CARP": (dino, "teacher", "student"),
    "iBOT": (ibot, "teacher", "student"),
    "DINOv2": (dinov2, "teacher dino_head", "teacher ibot_head"),
    "DINOv3": (dinov3, "teacher dino_head", "teacher ibot_head"),
    "CAPI": (capi, "teacher", "student"),
    "SwAV": (swav, "prototypes0", "prototypes1"),
    "MSN or PMSN": (msn, "prototypes", None),
}


def test_every_family_is_tested():
    assert set(FAMILIES) == set(LAYOUTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_planted_prototypes_give_the_known_counts(family, kind, tmp_path):
    build, teacher, student = FAMILIES[family]
    (matrix, expected), (other, others) = planted(kind), planted("orthogonal")
    path = tmp_path / "checkpoint.pth"
    torch.save(build(matrix, other), path)
    found = {m.name: m for m in read_prototypes(str(path))}
    assert set(found) == {name for name in (teacher, student) if name}
    for name, counts in ((teacher, expected), (student, others)):
        if name is None:
            continue
        figures = audit(found[name].tensor, thresholds=EPS, angle_pairs=100, seed=0)
        assert found[name].family == family
        assert (figures["unique"]["0.025"], figures["unique"]["0.5"]) == counts
    assert torch.allclose(found[teacher].tensor, matrix, atol=1e-5)


@pytest.mark.parametrize("family", ["DINO or CARP", "DINOv2", "DINOv3", "SwAV", "MSN or PMSN"])
def test_the_head_in_front_projects_as_the_module_does(family, tmp_path):
    torch.manual_seed(0)
    matrix, _ = planted("orthogonal")
    content = FAMILIES[family][0](matrix, matrix)
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    found = read_prototypes(str(path))[0]
    embedding = torch.randn(5, D)
    if family == "SwAV":
        module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, P))
    elif family == "MSN or PMSN":
        module = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.GELU(), nn.Linear(D, P))
    else:
        norm = [nn.BatchNorm1d(D)] if any("running_mean" in name for name in found.mlp) else []
        module = nn.Sequential(nn.Linear(D, D), *norm, nn.GELU(), nn.Linear(D, P))
    ordered = sorted(
        found.mlp, key=lambda name: (int("".join(c for c in name.split(".")[0] if c.isdigit())), "bn" in name)
    )
    module.load_state_dict(dict(zip(module.state_dict(), (found.mlp[name] for name in ordered), strict=True)))
    assert torch.allclose(project_by_state(found, embedding), module.eval()(embedding), atol=1e-6)
    with pytest.raises(WeightsFileError, match=f"expected {D}"):
        project_by_state(found, torch.randn(5, D + 1))


def test_patch_heads_stand_behind_no_image_embedding(tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(dinov2(planted("orthogonal")[0], planted("pairs")[0]), path)
    assert [bool(m.mlp) for m in read_prototypes(str(path))] == [True, False]


def test_weight_norm_of_todays_torch_and_a_learned_length(tmp_path):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(P, K, bias=False))
    layer.parametrizations.weight.original0.data.mul_(3)
    state = {f"teacher.head.last_layer.{name}": tensor for name, tensor in layer.state_dict().items()}
    save_file(state, tmp_path / "head.safetensors")
    (found,) = read_prototypes(str(tmp_path / "head.safetensors"))
    assert torch.allclose(found.tensor, layer.weight, atol=1e-6)


def test_any_tensor_by_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a.codebook": planted("duplicates")[0], "bias": torch.zeros(3)}, path)
    (found,) = read_prototypes(f"{path}#a.codebook")
    assert found.family == "named tensor" and found.tensor.shape == (K, P)
    with pytest.raises(WeightsFileError, match=r"'b' of .* is absent.*a.codebook \[12, 16\]"):
        read_prototypes(f"{path}#b")
    with pytest.raises(WeightsFileError, match=r"no prototypes of a known layout.*a.codebook \[12, 16\]"):
        read_prototypes(str(path))


def test_parts_that_an_index_lists_are_one_file(tmp_path):
    """`model.safetensors.index.json`, as the hub's libraries write it, was called no pickle of plain tensors."""
    codebook = planted("duplicates")[0]
    save_file({"teacher.head.layer.weight": codebook}, tmp_path / "model-1-of-2.safetensors")
    save_file({"bias": torch.zeros(3)}, tmp_path / "model-2-of-2.safetensors")
    places = {"teacher.head.layer.weight": "model-1-of-2.safetensors", "bias": "model-2-of-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (found,) = read_prototypes(str(index))
    assert found.family == "CAPI" and torch.equal(found.tensor, codebook)
    assert torch.equal(read_prototypes(f"{index}#teacher.head.layer.weight")[0].tensor, codebook)
    for lost in ("../elsewhere.safetensors", "absent.safetensors"):
        index.write_text(json.dumps({"weight_map": places | {"x": lost}}))
        with pytest.raises(WeightsFileError, match=r"names 1 files that are not beside it"):
            read_prototypes(str(index))
    for content in ("[]", "{}", '{"weight_map": [1]}', "no JSON"):
        index.write_text(content)
        with pytest.raises(WeightsFileError, match=r"is no index of weights files") as caught:
            read_prototypes(str(index))
        assert "\n" not in str(caught.value)


class _Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("how", ["torch", "plain", "zip-less"])
def test_a_hostile_pickle_is_refused_and_never_runs(how, tmp_path, capsys):
    canary, path = tmp_path / "canary", tmp_path / "checkpoint.pth"
    content = {"teacher": {"head.last_layer.weight": _Hostile(canary)}}
    if how == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    arguments = ["configs/eval_fashion_mnist.yaml", f"encoder={path}", "probes=[prototypes]", "controls=[]"]
    assert run_program(program.main, [*arguments, f"output_dir={tmp_path}"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and ".safetensors where you trust it" in errors[0]
    assert not canary.exists()


def test_what_is_no_weights_file_is_one_line(tmp_path):
    for name in ("empty.pth", "text.pth", "text.safetensors"):
        (tmp_path / name).write_text("" if name == "empty.pth" else "no weights at all")
        with pytest.raises(WeightsFileError) as caught:
            read_weights_file(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(WeightsFileError, match="expected an existing file"):
        read_weights_file(tmp_path / "absent.pth")


def evaluate(tmp_path, *arguments):
    base = ["configs/eval_fashion_mnist.yaml", f"output_dir={tmp_path / 'out'}", "controls=[]"]
    return run_program(program.main, [*base, *arguments])


def test_a_weights_file_goes_through_the_program(tmp_path, capsys):
    path = tmp_path / "swav.pth.tar"
    torch.save(swav(planted("antipodal")[0], planted("pairs")[0]), path)
    assert evaluate(tmp_path, f"encoder={path}", "probes=[prototypes]") == 0
    assert "prototypes0 (SwAV)" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "prototypes.json").read_text())
    assert result["figures"]["roles"]["prototypes0"]["unique"]["0.025"] == 2
    assert (
        result["encoder"]["role"] == "released"
        and (tmp_path / "out" / "prototypes.png").stat().st_size > 9000
    )
    assert evaluate(tmp_path, f"encoder={path}", "probes=[prototypes,knn]") == 2
    assert "'knn' needs a network" in capsys.readouterr().err


def test_usage_of_a_head_beside_its_backbone(tmp_path, run_dir, digits):
    """The tiny encoder's embedding has 24 dimensions: a DINO head for it, fed by the images' features."""
    torch.manual_seed(1)
    head = nn.Module()
    head.mlp = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 16))
    head.last_layer = nn.utils.weight_norm(nn.Linear(16, 40, bias=False))
    path = tmp_path / "dino.pth"
    torch.save({"teacher": named("head.", head)}, path)
    arguments = [f"encoder={run_dir}", f"prototypes.weights={path}", "probes=[prototypes,knn]", "knn.k=[20]"]
    arguments += [
        f"data.shards={digits}",
        "data.num_workers=0",
        f"features.cache_dir={tmp_path / 'features'}",
    ]
    assert evaluate(tmp_path, *arguments) == 0
    usage = json.loads((tmp_path / "out" / "prototypes.json").read_text())["figures"]["image_usage"]
    assert usage["teacher"]["images"] == 96 and usage["teacher"]["feature"] == "cls"
    assert (
        0 < usage["teacher"]["used_by_logits"] <= usage["teacher"]["used_ceiling"] == 1
        and sum(usage["teacher"]["largest_counts"]) == 96
    )


@pytest.mark.parametrize(
    "name", ["model.100.rank_0.pth", "model_0124999.rank_0.pth", "zero_pp_rank_0_mp_rank_00.pt"]
)
def test_one_ranks_part_is_not_taken_for_the_whole(name, tmp_path):
    """Of 380 prototypes on two ranks, 190 were audited and reported as all."""
    for rank in range(2):
        torch.save(
            {"head.layer.weight": torch.randn(190, 8)}, tmp_path / name.replace("rank_0", f"rank_{rank}", 1)
        )
    with pytest.raises(WeightsFileError, match=r"is the part of rank 0 .*beside 1 others.*join the parts"):
        read_prototypes(str(tmp_path / name))
    (named,) = read_prototypes(f"{tmp_path / name}#head.layer.weight")
    assert named.tensor.shape == (190, 8)
    torch.save({"teacher.head.layer.weight": torch.randn(38, 8)}, tmp_path / "mp_rank_00_model_states.pt")
    assert read_prototypes(str(tmp_path / "mp_rank_00_model_states.pt"))[0].tensor.shape == (38, 8)
