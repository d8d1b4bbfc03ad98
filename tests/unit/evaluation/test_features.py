"""Features that a probe must never see, and features that two processes keep on one disk."""

import dataclasses

import pytest

from evaluation.backbones import FeatureModule
from evaluation.config import EvaluationDataConfig, FeaturesConfig
from evaluation.encoder import load_encoder
from evaluation.features import FeatureError, load_features, load_splits
from evaluation.processes import Processes


class OneBadImage(FeatureModule):
    """An encoder whose feature of one image is not finite."""

    def __init__(self, encoder, value, at):
        super().__init__()
        self.encoder, self.value, self.at, self.seen = encoder, value, at, 0

    def forward(self, images):
        features = self.encoder(images)
        if self.seen <= self.at < self.seen + len(images):
            features["mean"][self.at - self.seen, 1] = self.value
        self.seen += len(images)
        return features

    def patch_tokens(self, images):
        return None


def load(encoder, shards, cache, **options):
    data = EvaluationDataConfig(shards=str(shards), num_workers=0)
    manifest = load_splits(data)[1]
    features = FeaturesConfig(cache_dir=str(cache), **options)
    (bank,) = load_features([encoder], manifest, data=data, features=features, processes=Processes())
    return bank


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_names_encoder_and_image(value, run_dir, digits, tmp_path):
    encoder = load_encoder(str(run_dir))
    broken = dataclasses.replace(encoder, module=OneBadImage(encoder.module, value, at=50))
    with pytest.raises(FeatureError, match=r"feature 'mean' of tiny holds NaN.*test-000001.tar, sample 2"):
        load(broken, digits, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")), "a probe could read them from the cache"
