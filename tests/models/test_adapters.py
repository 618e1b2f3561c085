"""Input adapters: what they compute, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from flaxtransfer.models.adapters import Adapter, apply, init
from flaxtransfer.models.band_init import by_wavelength, replicate


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["linear", "curves"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_gray_starts_as_replication_bit_for_bit(kind, dtype):
    adapter = Adapter(bands=1, kind=kind)
    images = jnp.asarray(4 * normal(2, 5, 6, 1), dtype)
    seen = jax.jit(apply, static_argnums=0)(adapter, init(adapter), images)
    assert seen.dtype == dtype
    assert (np.asarray(seen) == np.asarray(replicate(images))).all()


@pytest.mark.parametrize("bands", [1, 2, 13])
def test_linear_is_a_matrix_over_the_bands(bands):
    adapter = Adapter(bands)
    kernel = normal(1, 1, bands, 3)
    images = normal(2, 4, 5, bands, seed=1)
    np.testing.assert_allclose(
        apply(adapter, init(adapter, kernel), jnp.asarray(images)),
        images @ kernel[0, 0],
        rtol=1e-5,
        atol=1e-5,
    )


@settings(max_examples=10, derandomize=True)
@given(
    bands=st.integers(1, 3),
    knots=st.integers(2, 9),
    low=st.floats(-3, -0.5),
    width=st.floats(0.6, 5),
    seed=st.integers(0, 99),
)
def test_curves_interpolate_between_their_knots(bands, knots, low, width, seed):
    # The peer is numpy's interp; each curve is moved so that it passes through the origin.
    adapter = Adapter(bands, "curves", knots, (low, low + width))
    curves = normal(bands, knots, 3, seed=seed)
    kernel = normal(1, 1, bands, 3, seed=seed + 1)
    images = 3 * normal(1, 4, 4, bands, seed=seed + 2)
    at = np.linspace(low, low + width, knots)
    expected = images @ kernel[0, 0]
    for band in range(bands):
        for channel in range(3):
            tone = curves[band, :, channel]
            expected[..., channel] += np.interp(images[..., band], at, tone) - np.interp(
                0, at, tone
            )
    params = {"kernel": jnp.asarray(kernel), "curves": jnp.asarray(curves)}
    seen = apply(adapter, params, jnp.asarray(images))
    np.testing.assert_allclose(seen, expected, atol=2e-4)


def test_nothing_stays_nothing():
    # The stem pads with zeros: a curve that lifts zero would draw a frame around every image.
    adapter = Adapter(2, "curves")
    params = init(adapter) | {"curves": jnp.asarray(normal(2, 9, 3))}
    np.testing.assert_allclose(apply(adapter, params, jnp.zeros((1, 3, 3, 2))), 0, atol=1e-6)


@pytest.mark.parametrize(("kind", "rank"), [("linear", 1), ("curves", 3)])
def test_only_curves_give_gray_channels_of_different_content(kind, rank):
    adapter = Adapter(1, kind)
    params = jax.tree.map(lambda leaf: leaf + normal(*leaf.shape), init(adapter))
    seen = apply(adapter, params, jnp.asarray(normal(1, 20, 20, 1)))
    values = np.linalg.svd(np.asarray(seen).reshape(-1, 3), compute_uv=False)
    assert (values > 1e-2 * values[0]).sum() == rank


def test_flat_curves_learn():
    adapter = Adapter(1, "curves")
    images = jnp.asarray(normal(1, 16, 16, 1))
    wanted = jnp.concatenate([images, jnp.abs(images), jnp.sin(3 * images)], axis=-1)

    @jax.jit
    def loss(params):
        return jnp.mean((apply(adapter, params, images) - wanted) ** 2)

    params = init(adapter)
    first = loss(params)
    step = jax.jit(jax.grad(loss))
    for _ in range(100):
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, step(params))
    assert loss(params) < 0.1 * first


def test_the_gradient_of_curves_is_that_of_their_definition():
    # Central differences in float64 are the peer.
    with jax.enable_x64(True):
        adapter = Adapter(2, "curves", 5)
        curves, images = normal(2, 5, 3).astype(float), normal(1, 3, 3, 2, seed=1).astype(float)
        kernel = jnp.asarray(normal(1, 1, 2, 3), float)

        def value(curves, images):
            return jnp.sum(apply(adapter, {"kernel": kernel, "curves": curves}, images) ** 2)

        check_grads(value, (curves, images), 1, modes=["rev"], eps=1e-6)


def test_an_adapter_is_a_value():
    assert hash(Adapter(3)) == hash(Adapter(bands=3))
    assert Adapter(1, span=[-1, 1]) == Adapter(1, span=(-1, 1))
    assert hash(Adapter(1, span=[-1, 1])) == hash(Adapter(1, span=(-1, 1)))


def test_init_takes_any_kernel_and_dtype():
    params = init(Adapter(4, "curves", 5), by_wavelength([490, 560, 665, 842]), dtype=jnp.bfloat16)
    assert {name: leaf.dtype for name, leaf in params.items()} == dict.fromkeys(
        ("kernel", "curves"), jnp.bfloat16
    )
    assert params["curves"].shape == (4, 5, 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"bands": 0}, "bands must be an integer >= 1, got 0"),
        ({"bands": -2}, "got -2"),
        ({"bands": 1.0}, r"got 1\.0"),
        ({"bands": True}, "got True"),
        ({"bands": 1, "kind": "curve"}, "got 'curve'; did you mean 'curves'"),
        ({"bands": 1, "knots": 1}, "knots must be an integer >= 2, got 1"),
        ({"bands": 1, "span": (1, -1)}, r"two increasing numbers, got \(1, -1\)"),
        ({"bands": 1, "span": (0, float("nan"))}, "span must be"),
        ({"bands": 1, "span": 2}, "span must be two increasing numbers"),
        ({"bands": 1, "span": "ab"}, "span must be two increasing numbers"),
        ({"bands": 0, "kind": "x", "knots": 0}, "bands must .*knots must .*kind must"),
    ],
)
def test_what_is_no_adapter_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Adapter(**fields)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 8, 8, 3), r"\[batch, height, width, 4\], got .*; Adapter\(bands=3\) would fit"),
        ((8, 8, 4), r"images\[None\] makes a batch"),
    ],
)
def test_images_of_other_bands_are_refused(shape, text):
    with pytest.raises(ValueError, match=text):
        apply(Adapter(4), init(Adapter(4)), jnp.zeros(shape))


def test_images_of_integers_are_refused():
    with pytest.raises(TypeError, match="normalized and floating, got uint8"):
        apply(Adapter(1), init(Adapter(1)), jnp.zeros((1, 2, 2, 1), jnp.uint8))


def test_parameters_of_another_adapter_are_refused():
    images = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(
        ValueError, match=r"kernel must have shape \(1, 1, 4, 3\), got \(1, 1, 3, 3\)"
    ):
        apply(Adapter(4), init(Adapter(3)), images)
    with pytest.raises(
        ValueError, match="'curves' adapter must have the parameters curves, kernel, got"
    ):
        apply(Adapter(4, "curves"), init(Adapter(4)), images)
    with pytest.raises(
        ValueError, match=r"curves of .* must have shape \(4, 9, 3\), got \(4, 5, 3\)"
    ):
        apply(Adapter(4, "curves"), init(Adapter(4, "curves", 5)), images)


def test_a_kernel_of_other_bands_is_refused():
    with pytest.raises(
        ValueError, match=r"must have shape \(1, 1, 4, 3\), got \(1, 1, 3, 3\): give one c"
    ):
        init(Adapter(4), by_wavelength([490, 560, 665]))
    with pytest.raises(ValueError, match="must be finite"):
        init(Adapter(1), np.full((1, 1, 1, 3), np.nan))
