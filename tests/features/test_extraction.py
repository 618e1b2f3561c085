"""Features of every depth in one pass, against the network stopped there."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import flaxtransfer as ft
from tests.support.small import PREPROCESSING, batch, network

PADDED = batch(1) | {"weight": np.array([1, 1, 1, 0, 0, 0, 0, 0.0])}


def test_features_are_the_means_of_the_maps():
    model, variables = network()
    features, labels = ft.features.segment_features(
        ft.Classifier(model, variables, PREPROCESSING), [batch(0), PADDED]
    )
    assert {name: values.shape for name, values in features.items()} == {
        "stem": (11, 4),
        "layer1": (11, 4),
        "layer2": (11, 8),
        "layer3": (11, 16),
        "layer4": (11, 32),
    }
    assert list(features) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    np.testing.assert_array_equal(labels, [*batch(0)["label"], *batch(1)["label"][:3]])
    images = batch(0)["image"].astype(np.float32) / 255
    for name, following in zip(model.segments[:5], model.segments[1:], strict=False):
        maps, _ = model.apply(variables, (images - 0.5) / 0.25, norm="running", stop=following)
        wanted = maps.mean((1, 2))
        np.testing.assert_allclose(features[name][:8], wanted, rtol=1e-5, atol=1e-6)
        assert features[name].dtype == np.float32


def test_the_head_sees_the_pooled_ones():
    model, variables = network()
    variables["params"]["fc"]["kernel"] = jax.random.normal(jax.random.key(3), (32, 3))
    pooled, labels = ft.features.pooled_features(
        ft.Classifier(model, variables, PREPROCESSING), [batch(0), PADDED]
    )
    predictions = ft.predict(ft.Classifier(model, variables, PREPROCESSING), [batch(0), PADDED])
    head = variables["params"]["fc"]
    np.testing.assert_allclose(
        pooled @ head["kernel"] + head["bias"], predictions.logits, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(labels, predictions.labels)


def test_segments_come_in_their_order_and_no_further_than_asked():
    model, variables = network()
    below = {
        name: {path: leaf for path, leaf in tree.items() if path not in ("layer3", "layer4", "fc")}
        for name, tree in variables.items()
    }
    features, _ = ft.features.segment_features(
        ft.Classifier(model, below, PREPROCESSING), [batch(0)], ("layer2", "stem")
    )
    assert list(features) == ["stem", "layer2"]


def test_bfloat16_features_are_float32():
    model, variables = network()
    half = ft.resnet(model.config, dtype="bfloat16")
    features, _ = ft.features.segment_features(
        ft.Classifier(half, variables, PREPROCESSING), [batch(0)], ("layer1",)
    )
    exact, _ = ft.features.segment_features(
        ft.Classifier(model, variables, PREPROCESSING), [batch(0)], ("layer1",)
    )
    assert features["layer1"].dtype == np.float32
    np.testing.assert_allclose(features["layer1"], exact["layer1"], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        (
            ("layer5",),
            r"no features of 'layer5'; did you mean 'layer1'.*that have are stem, layer1",
        ),
        (("head",), "no features of 'head'"),
        ((), "no segment was asked for"),
        ("layer4", r"\('layer4',\)"),
    ],
)
def test_segments_that_have_no_features(segments, text):
    with pytest.raises(ValueError, match=text):
        ft.features.segment_features(ft.Classifier(*network(), PREPROCESSING), [batch(0)], segments)


def test_nothing_to_take_features_of():
    with pytest.raises(ValueError, match="no examples"):
        ft.features.pooled_features(ft.Classifier(*network(), PREPROCESSING), [])
