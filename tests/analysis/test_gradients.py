"""Gradients beside weights: against the plain loss, and where the damage is known."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from flaxtransfer.analysis.curvature import mean_gradient, relative_gradient_norms
from flaxtransfer.classifier import Classifier
from flaxtransfer.masks import glob
from flaxtransfer.recipes.catalog import units
from flaxtransfer.training.evaluation import init_head_from_probe
from tests.support.small import PREPROCESSING, batch, network

MODEL, VARIABLES = network()
PARAMS = VARIABLES["params"]


def test_the_mean_gradient_is_that_of_the_mean_loss():
    batches = [batch(0), batch(1) | {"weight": np.array([1, 1, 1, 0, 0, 0, 0, 0.0])}]
    found = mean_gradient(Classifier(MODEL, VARIABLES, PREPROCESSING), batches)
    images = np.concatenate([batch(0)["image"], batch(1)["image"][:3]]) / np.float32(255)
    labels = np.concatenate([batch(0)["label"], batch(1)["label"][:3]])

    @jax.jit
    @jax.grad
    def of_loss(params):
        logits, _ = MODEL.apply({**VARIABLES, "params": params}, (images - 0.5) / 0.25)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    wanted = of_loss(PARAMS)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-5)


def test_the_damaged_part_has_the_largest_ratio():
    """A network that fits its images, and then one stage of it is damaged."""
    batches = [batch(n) for n in range(6)]
    params, _ = init_head_from_probe(Classifier(MODEL, VARIABLES, PREPROCESSING), batches)
    before = ratios(params, batches)
    kernel = params["layer2"]["0"]["conv2"]["kernel"]
    noise = np.random.default_rng(0).normal(size=kernel.shape) * float(np.std(kernel)) * 2
    params["layer2"]["0"]["conv2"]["kernel"] = kernel + noise.astype(np.float32)
    after = ratios(params, batches)
    assert after["layer2"] > 3 * before["layer2"]


def ratios(params, batches):
    variables = {**VARIABLES, "params": params}
    gradient = mean_gradient(Classifier(MODEL, variables, PREPROCESSING), batches)
    return relative_gradient_norms(params, gradient, units(params))


def test_a_head_that_is_zero_pulls_at_nothing():
    params = {**PARAMS, "fc": {name: 0 * leaf for name, leaf in PARAMS["fc"].items()}}
    gradient = mean_gradient(
        Classifier(MODEL, {**VARIABLES, "params": params}, PREPROCESSING), [batch(0)]
    )
    body = {name: mask for name, mask in units(params).items() if name != "head"}
    with pytest.raises(ValueError, match="is the head zero"):
        relative_gradient_norms(params, gradient, body)
    with pytest.raises(ValueError, match="the weights of head are all zero"):
        relative_gradient_norms(params, gradient, units(params))


ONE = {"a": {"kernel": np.ones(2)}, "b": {"kernel": np.ones(2)}}


def like(value):
    return jax.tree.map(lambda leaf: np.full_like(leaf, value), ONE)


@pytest.mark.parametrize(
    ("gradient", "parts", "text"),
    [
        ({"a": ONE["a"]}, {"a": glob("a/**")}, "different trees: b/kernel"),
        (like(1.0), {"c": glob("c/**")}, "the parts c have no leaf"),
        (like(float("nan")), {"a": glob("a/**")}, "must be finite"),
        (like(0.0), {"a": glob("a/**"), "b": glob("b/**")}, "is the head zero"),
    ],
)
def test_errors(gradient, parts, text):
    with pytest.raises(ValueError, match=text):
        relative_gradient_norms(ONE, gradient, parts)


def test_no_examples():
    with pytest.raises(ValueError, match="no examples"):
        mean_gradient(Classifier(MODEL, VARIABLES, PREPROCESSING), [])
