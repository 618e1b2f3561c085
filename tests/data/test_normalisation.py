"""From bytes to what the network was trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxtransfer.weights import normalize
from tests.support.rounding import rounding

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)


def test_it_is_the_formula_in_float64_to_float32_rounding():
    found = jax.jit(normalize, static_argnums=(1, 2))(IMAGES, MEAN, STD)
    assert found.dtype == jnp.float32
    # Two constants and two operations, on numbers up to 1 that are divided last.
    tolerance = rounding(4) / min(STD)
    np.testing.assert_allclose(found, (IMAGES / 255 - MEAN) / STD, rtol=0, atol=tolerance)


def test_one_number_serves_all_channels():
    np.testing.assert_array_equal(
        normalize(IMAGES, (0.5,), (0.5,)), normalize(IMAGES, (0.5,) * 3, (0.5,) * 3)
    )


def test_the_dtype_is_that_of_the_result_and_not_of_the_arithmetic():
    found = normalize(IMAGES, MEAN, STD, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, normalize(IMAGES, MEAN, STD).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (IMAGES.astype(np.float32), MEAN, STD),
            TypeError,
            "images must be uint8.* got float32.* been normalized",
        ),
        (
            (IMAGES, MEAN[:2], STD * 2),
            ValueError,
            "one value or 3, one per channel, but mean has 2 values and std has 6 values",
        ),
        ((IMAGES, MEAN, (0.1, 0.0, 0.1)), ValueError, r"std must be > 0, got \(0\.1, 0\.0, 0\.1\)"),
        ((IMAGES, MEAN, (float("nan"),)), ValueError, r"std must be > 0, got \(nan,\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        normalize(*arguments)
