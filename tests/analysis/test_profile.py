"""Features of every depth in one pass, and what a probe makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from flaxtransfer.analysis.profile import probe_profile, segment_features
from flaxtransfer.features import ridge_path, standardisation
from flaxtransfer.training.probing import pooled_features

from ..training.small import PREPROCESSING, batch, network


def test_features_are_the_means_of_the_maps():
    model, variables = network()
    batches = [batch(0), batch(1) | {"weight": np.array([1, 1, 1, 0, 0, 0, 0, 0.0])}]
    features, labels = segment_features(model, variables, batches, PREPROCESSING)
    assert {name: values.shape for name, values in features.items()} == {
        "stem": (11, 4), "layer1": (11, 4), "layer2": (11, 8), "layer3": (11, 16),
        "layer4": (11, 32),
    }  # fmt: skip
    assert list(features) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    images = batch(0)["image"].astype(np.float32) / 255
    maps, _ = model.apply(variables, (images - 0.5) / 0.25, norm="running", stop="layer3")
    np.testing.assert_allclose(features["layer2"][:8], maps.mean((1, 2)), rtol=1e-5, atol=1e-6)
    pooled, same = pooled_features(model, variables, batches, PREPROCESSING)
    np.testing.assert_allclose(features["layer4"], pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(labels, same)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_probe_for_each(kind):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    telling = random.normal(size=(60, 5)) + 6 * np.eye(5)[labels]
    profile = probe_profile({"stem": random.normal(size=(60, 4)), "layer1": telling}, labels,
                            kind=kind)  # fmt: skip
    assert [probe.segment for probe in profile.probes] == ["stem", "layer1"]
    assert profile.best.segment == "layer1"
    assert profile.probes[0].accuracy < 0.6
    if kind == "ridge":
        path = ridge_path(standardisation(telling)(telling), labels)
        assert profile.best.accuracy == path.accuracy
    first = str(profile).splitlines()[2].split()
    assert first[:2] == ["layer1", "5"]


def test_errors_name_the_segment():
    with pytest.raises(ValueError, match=r"the features of stem cannot be probed: .*not finite"):
        probe_profile({"stem": np.full((9, 2), np.nan)}, np.arange(9) % 2)
    with pytest.raises(ValueError, match="kind is 'ridge' or 'logistic', not 'svm'"):
        probe_profile({}, [], kind="svm")


def test_nothing_to_probe():
    model, variables = network()
    with pytest.raises(ValueError, match="no examples"):
        segment_features(model, variables, [], PREPROCESSING)
