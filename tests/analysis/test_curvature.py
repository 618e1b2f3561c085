"""The Fisher diagonal against formulas, explicit sums and a Hessian."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import flaxtransfer as ft
from flaxtransfer.analysis.curvature import curvature_by_part, fisher_diagonal
from flaxtransfer.recipes.catalog import units
from tests.support.small import batch, network

RANDOM = np.random.default_rng(0)
INPUTS = RANDOM.normal(size=(11, 4)).astype(np.float32)


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def linear_params():
    return {
        "kernel": jnp.asarray(RANDOM.normal(size=(4, 3)), jnp.float32),
        "bias": jnp.asarray(RANDOM.normal(size=3), jnp.float32),
    }


def two_layers(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def two_layer_params():
    return {
        "in": jnp.asarray(RANDOM.normal(size=(4, 5)), jnp.float32),
        "out": jnp.asarray(RANDOM.normal(size=(5, 3)), jnp.float32),
    }


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_softmax_linear_in_closed_form(chunk):
    """X ** 2 * p * (1 - p), the textbook Hessian of multinomial logistic regression."""
    params = linear_params()
    found, count = fisher_diagonal(
        linear, params, [INPUTS[:7], INPUTS[7:]], labels="all", chunk=chunk
    )
    probs = np.asarray(jax.nn.softmax(linear(params, INPUTS)))
    spread = probs * (1 - probs)
    assert count == 11
    wanted = np.einsum("nd,nk->dk", INPUTS**2, spread) / 11
    np.testing.assert_allclose(found["kernel"], wanted, rtol=2e-5)
    np.testing.assert_allclose(found["bias"], spread.mean(0), rtol=2e-5)


def test_softmax_linear_is_the_hessian():
    """Linear in the parameters: Fisher and Hessian of the loss are one, whatever the labels."""
    params = linear_params()
    labels = np.arange(11) % 3

    def loss(kernel):
        log_probs = jax.nn.log_softmax(linear(params | {"kernel": kernel}, INPUTS))
        return -log_probs[np.arange(11), labels].mean()

    hessian = jax.hessian(loss)(params["kernel"])
    found, _ = fisher_diagonal(linear, params, [INPUTS], labels="all")
    np.testing.assert_allclose(
        np.ravel(found["kernel"]), np.diag(hessian.reshape(12, 12)), rtol=1e-4
    )


def test_a_network_against_the_hessian_under_its_own_predictions():
    """The Hessian of the cross-entropy to the network's own (frozen) probabilities, at them.

    For a soft target that equals the prediction the residual term vanishes, and what is left of
    the Hessian is the generalized Gauss-Newton matrix, which is the Fisher information.
    """
    params = two_layer_params()
    target = jax.nn.softmax(two_layers(params, INPUTS))
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(flat):
        return -(target * jax.nn.log_softmax(two_layers(unravel(flat), INPUTS))).sum(1).mean()

    wanted = np.diag(jax.hessian(loss)(flat))
    found, _ = fisher_diagonal(two_layers, params, [INPUTS], labels="all")
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(found)[0], wanted, rtol=1e-3, atol=1e-6
    )


def test_sampled_labels_are_unbiased():
    params = two_layer_params()
    exact, _ = fisher_diagonal(two_layers, params, [INPUTS], labels="all")
    draws = [
        fisher_diagonal(two_layers, params, [np.tile(INPUTS, (40, 1))], seed=seed, chunk=440)[0]
        for seed in range(8)
    ]
    for name, leaf in exact.items():
        many = np.stack([draw[name] for draw in draws])
        error = many.std(axis=0, ddof=1) / np.sqrt(len(draws))
        assert (np.abs(many.mean(axis=0) - leaf) < 6 * error + 1e-6).all()
        assert np.allclose(many.mean(axis=0), leaf, rtol=0.25, atol=0.02)


def test_labels_are_the_networks_own():
    """Certain predictions have no curvature, whatever the data say."""
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.array([40.0, 0.0, 0.0])}
    found, _ = fisher_diagonal(linear, params, [INPUTS])
    assert float(jnp.abs(found["kernel"]).max()) < 1e-12


def test_a_resnet_by_part():
    model, variables = network()
    params = variables["params"]

    def logits(params, images):
        normal = (images / 255.0 - 0.5) / 0.25
        return model.apply({**variables, "params": params}, normal, norm="running")[0]

    fisher, count = fisher_diagonal(logits, params, [batch(0)["image"][:3]], labels="all", chunk=2)
    found = curvature_by_part(fisher, units(params), count)
    assert [part.name for part in found.parts] == [
        "stem",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "head",
    ]
    assert sum(part.share for part in found.parts) == pytest.approx(1)
    stem = np.concatenate(
        [np.ravel(leaf) for leaf in (fisher["conv1"]["kernel"], *fisher["bn1"].values())]
    )
    assert found.parts[0].mean == pytest.approx(stem.mean(), rel=1e-5)
    assert str(found).splitlines()[1].split()[:2] == ["stem", f"{stem.size:,}"]
    kernels = curvature_by_part(fisher, units(params), count, ft.kernels())
    assert kernels.parts[0].parameters == params["conv1"]["kernel"].size
    assert kernels.means()["stem"] == kernels.parts[0].mean


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"labels": "empirical"}, "labels must be 'sampled' or 'all', got 'empirical'"),
        ({"chunk": 0}, "chunk must be >= 1 examples, got 0"),
        ({"batches": []}, "no examples"),
        ({"batches": [np.full((2, 4), np.inf, np.float32)]}, "must be finite"),
    ],
)
def test_errors(arguments, text):
    settings = {"batches": [INPUTS], **arguments}
    with pytest.raises(ValueError, match=text):
        fisher_diagonal(linear, linear_params(), settings.pop("batches"), **settings)


def test_one_draw_of_certain_predictions_has_the_trace():
    """Linear in the parameters, the trace is that of the logits, whichever labels are drawn.

    With labels drawn from the predictions themselves nearly every draw is the label that is
    predicted, whose gradient is next to nothing, and the trace comes out 10,000 times too small.
    """
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.array([9.2, 0.0, 0.0])}
    assert float(jax.nn.softmax(params["bias"])[0]) > 0.9997
    exact, _ = fisher_diagonal(linear, params, [INPUTS], labels="all")
    for seed in range(3):
        drawn, _ = fisher_diagonal(linear, params, [INPUTS], seed=seed)
        for name in exact:
            assert float(drawn[name].sum()) == pytest.approx(float(exact[name].sum()), rel=1e-3)
