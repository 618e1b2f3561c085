"""Max-pooling: equal to flax's, the peer here, which is `lax.reduce_window` and its scatter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.models.layers import for_platform, max_pool
from tests.support.rounding import rounding


def peer(x, window=3, stride=2, padding=1):
    return nn.max_pool(x, (window,) * 2, (stride,) * 2, ((padding, padding),) * 2)


def value_and_gradient(function, x):
    @jax.jit
    def run(x):
        y, back = jax.vjp(function, x)
        noise = np.random.default_rng(1).standard_normal(y.shape)
        return y, back(jnp.asarray(noise, y.dtype))[0]

    return [np.asarray(array, np.float32) for array in run(x)]


def assert_same(found, wanted, dtype):
    """Each value is one of the image's; a gradient is a sum over the windows that hold a pixel."""
    np.testing.assert_array_equal(found[0], wanted[0])
    tolerance = rounding(9, dtype) * np.abs(wanted[1]).max(initial=0)
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    kind=st.sampled_from([(3, 2, 1), (2, 2, 0), (3, 1, 1), (2, 3, 1)]),
    levels=st.sampled_from([2, 1000]),
)
def test_equals_flax_with_and_without_ties(height, width, kind, levels):
    window, stride, padding = kind
    if min(height, width) + 2 * padding < window:
        return
    # Two levels: nearly every window has a tie, as after a ReLU.
    x = np.random.default_rng(0).integers(0, levels, (2, height, width, 2)).astype(np.float32)
    ours = value_and_gradient(
        lambda x: max_pool(x, window=window, stride=stride, padding=padding), x
    )
    theirs = value_and_gradient(lambda x: peer(x, *kind), x)
    assert_same(ours, theirs, "float32")


def test_the_first_of_equal_values_gets_the_gradient():
    """By hand: one window of four zeros; torch gives the gradient to the first as well."""
    gradient = jax.grad(lambda x: max_pool(x, window=2, padding=0).sum())(jnp.zeros((1, 2, 2, 1)))
    assert gradient[0, :, :, 0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("place", [(0, 0), (1, 1), (3, 2)])
def test_nan_is_never_hidden(place):
    x = jnp.ones((1, 4, 4, 1)).at[0, *place, 0].set(jnp.nan)
    np.testing.assert_array_equal(max_pool(x), peer(x))
    assert jnp.isnan(max_pool(x)).any()


def test_negative_images_are_not_beaten_by_the_padding():
    assert (max_pool(jnp.full((1, 4, 4, 1), -7.0)) == -7).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_every_backend_gives_the_same(backend, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6, 3)), dtype)
    wanted = value_and_gradient(peer, x)
    with for_platform(backend):
        assert max_pool(x).dtype == dtype
        assert_same(value_and_gradient(lambda x: max_pool(x), x), wanted, dtype)
        program = str(jax.make_jaxpr(lambda x: max_pool(x))(x))
    assert ("reduce_window" in program) == (backend != "cpu")


def test_forward_mode_works_too():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 4, 1)), jnp.float32)
    value, tangent = jax.jvp(max_pool, (x,), (2 * x,))
    np.testing.assert_allclose(tangent, 2 * value)
