import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.config import EvaluationConfig, EvaluationDataConfig, FeaturesConfig
from evaluation.encoders.load import load_encoder
from evaluation.features.processes import Processes
from evaluation.features.session import Session
from evaluation.probes.config import FineTuneConfig
from evaluation.probes.fine_tune import (
    Classifier,
    RandomCropAndFlip,
    _parameter_groups,
    probe_fine_tune,
    rate_at,
    shuffle_batches,
)


def session(run_dir, digits, tmp_path, **recipe):
    config = EvaluationConfig(
        encoder=str(run_dir),
        data=EvaluationDataConfig(shards=digits, num_workers=0),
        features=FeaturesConfig(cache_dir=str(tmp_path / "features")),
        fine_tune=FineTuneConfig(batch_size=32, shuffle_buffer=200, crop_scale_min=1.0, flip=False, **recipe),
    )
    return Session(config, load_encoder(str(run_dir)), Processes())


def test_tokens_and_positions_do_not_decay(run_dir, digits, tmp_path):
    opened = session(run_dir, digits, tmp_path)
    classifier = Classifier(opened.encoder.module.requires_grad_(True), "cls", 24, 10)
    groups = _parameter_groups(classifier, FineTuneConfig(weight_decay=0.05))
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in opened.encoder.module.named_parameters() if id(p) in decaying}
    assert any(name.endswith("attn.qkv.weight") for name in names)
    assert not [name for name in names if "cls_token" in name or "pos_embed" in name]


@pytest.mark.learned
def test_fine_tuning_learns_and_leaves_encoder_and_generator_alone(
    run_dir, digits, tmp_path, record_property
):
    # The mean of the patches: a class token of width 24 learns so late that rounding decides what it has learned.
    recipe = {"feature": "mean", "epochs": 16, "lr": 0.06, "label_smoothing": 0.0}
    first = session(run_dir, digits, tmp_path, **recipe)
    before = {name: tensor.clone() for name, tensor in first.encoder.module.state_dict().items()}
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    outcome = probe_fine_tune(first)
    assert torch.equal(torch.get_rng_state(), stream)
    losses = outcome.figures["loss_by_epoch"]
    record_property("top1", outcome.figures["headline"]["top1"])
    record_property("loss", losses[-1])
    # 384 images and two blocks of width 24 from random weights: far above chance (0.1), far from finished (0.55 to
    # 0.59 over four seeds, with losses from 2.3 down to 1.0 to 1.15).
    assert outcome.figures["headline"]["top1"] > 0.35
    assert len(losses) == 16 and losses[-1] < losses[0] - 0.7
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in first.encoder.module.state_dict().items()
    )


def test_fine_tuning_repeats(run_dir, digits, tmp_path):
    found = [probe_fine_tune(session(run_dir, digits, tmp_path, epochs=1, lr=0.08)) for _ in range(2)]
    assert found[0].figures == found[1].figures
    assert torch.equal(found[0].predictions["fine_tuned"], found[1].predictions["fine_tuned"])


def test_every_image_is_seen_once_an_epoch_in_another_order():
    images = torch.arange(53).view(-1, 1)
    batches = [(part, part[:, 0]) for part in images.split(10)]
    epochs = [list(shuffle_batches(iter(batches), batch_size=8, buffer=20, seed=seed)) for seed in (0, 1)]
    orders = [torch.cat([labels for _, labels in epoch]) for epoch in epochs]
    assert [len(labels) for _, labels in epochs[0]] == [8] * 6 + [5]
    for order, epoch in zip(orders, epochs, strict=True):
        assert sorted(order.tolist()) == list(range(53))
        assert all(torch.equal(part[:, 0], labels) for part, labels in epoch)
    assert not torch.equal(orders[0], orders[1]) and orders[0].tolist() != list(range(53))


def test_the_rate_rises_and_falls():
    config = FineTuneConfig(lr=1.0, batch_size=512, warmup=0.1)
    rates = [rate_at(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == max(rates) == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] < 0.01


def test_a_crop_is_a_part_of_the_image_under_the_encoders_own_preprocessing(run_dir):
    encoder = load_encoder(str(run_dir))
    image = Image.fromarray(np.tile(np.arange(28, dtype=np.uint8)[None] * 9, (28, 1)))
    whole = encoder.transform(image)
    assert torch.equal(RandomCropAndFlip(encoder.transform, 1.0, False)(image), whole)
    torch.manual_seed(0)
    crops = [RandomCropAndFlip(encoder.transform, 0.2, True)(image) for _ in range(40)]
    assert all(crop.shape == whole.shape and not torch.equal(crop, whole) for crop in crops)
    rising = [bool(crop[0, 0, -1] > crop[0, 0, 0]) for crop in crops]
    assert 5 < sum(rising) < 35  # the rest is mirrored


def test_what_has_no_weights_is_refused(digits, run_dir, tmp_path):
    from evaluation.encoders.load import load_controls

    pixels = load_controls(load_encoder(str(run_dir)), ("raw-pixels",), seeds=1)[0]
    base = session(run_dir, digits, tmp_path)
    with pytest.raises(ValueError, match="no weights to tune"):
        probe_fine_tune(Session(base.config, pixels, Processes()))
