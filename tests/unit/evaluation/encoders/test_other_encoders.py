"""Everyone else's encoders go through every probe with no line of code: random weights saved to disk."""

import json

import pytest
import timm

import evaluate as program
from runtime.program import run_program
from tests.unit.evaluation.conftest import write_run

PROBES = ("knn", "linear", "logistic", "few_shot", "clustering", "long_tail", "fine_tune", "attentive")


def timm_convnet(folder):
    model = timm.create_model("resnet10t", num_classes=0)
    data = {"input_size": (3, 32, 32), "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "crop_pct": 1.0}
    timm.models.save_for_hf(model, str(folder), safe_serialization=True, data_config=data)
    return f"local-dir:{folder}"


def transformers_dinov2(folder):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**size, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(folder)
    return f"hf:{folder}"


def our_export(folder):
    return str(write_run(folder) / "checkpoints" / "step-00000010" / "teacher")


@pytest.mark.parametrize("save", [timm_convnet, transformers_dinov2, our_export])
def test_every_probe(save, tmp_path, digits):
    spec = save(tmp_path / "encoder")
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"data: {{shards: {digits}, num_workers: 0}}\nfeatures: {{cache_dir: {tmp_path / 'features'}}}\n"
        "knn: {k: [5, 20]}\nlinear: {epochs: 2, min_steps: 0}\nfew_shot: {shots: [1], draws: 2}\n"
        "confidence: {resamples: 50}\nattentive: {epochs: 1, learning_rates: [1e-3], weight_decays: [5e-4]}\n"
        "fine_tune: {epochs: 1, batch_size: 64, shuffle_buffer: 100}\n"
        "long_tail: {imbalance_ratio: 10, few_at_most: 8, many_above: 20, classifier: linear}\n"
    )
    out = tmp_path / "results"
    arguments = [str(config), f"encoder={spec}", f"probes=[{','.join(PROBES)}]", f"output_dir={out}"]
    assert run_program(program.main, arguments) == 0
    assert {path.stem for path in out.glob("*.json")} == set(PROBES)
    for path in out.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["encoder"]["role"] == ("teacher" if save is our_export else "released")
        if "top1" in content["figures"]["headline"]:
            assert 0 <= content["figures"]["headline"]["top1"] <= 1
