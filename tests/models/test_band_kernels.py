"""Kernels for bands: scipy and analytic cases; folding against convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from flaxtransfer.models.adapters import Adapter, apply, fold, init
from flaxtransfer.models.band_init import (
    average_kernels,
    by_wavelength,
    luminance,
    repeat_kernels,
    replicate,
    sum_kernels,
)

SENTINEL_2 = {
    "B1": 443,
    "B2": 490,
    "B3": 560,
    "B4": 665,
    "B5": 705,
    "B6": 740,
    "B7": 783,
    "B8": 842,
    "B8A": 865,
    "B9": 945,
    "B10": 1375,
    "B11": 1610,
    "B12": 2190,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolve(images, kernel, padding=3):
    return lax.conv_general_dilated(
        images,
        kernel,
        (2, 2),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


# Where an adapter starts


@pytest.mark.parametrize("bands", [1, 3, 13])
def test_luminance_is_the_mean(bands):
    images = normal(1, 4, 4, bands)
    seen = apply(Adapter(bands), init(Adapter(bands)), jnp.asarray(images))
    np.testing.assert_allclose(seen, np.repeat(images.mean(-1, keepdims=True), 3, -1), atol=1e-6)


def test_sentinel_2_keeps_its_colors():
    names = np.array(list(SENTINEL_2))
    kernel = by_wavelength(list(SENTINEL_2.values()))[0, 0]
    assert names[kernel.argmax(axis=0)].tolist() == ["B4", "B3", "B2"]
    assert (kernel.max(axis=0) > 0.5).all()
    np.testing.assert_allclose(kernel.sum(axis=0), 1, rtol=1e-12)
    # B7 and longer waves, seven bands, share a tenth.
    np.testing.assert_allclose(kernel[6:], 0.1 / 7)


def test_weights_are_gaussian():
    # scipy's density is the peer.
    centers = np.array([450.0, 520.0, 600.0, 700.0])
    expected = scipy.stats.norm.pdf(centers[:, None], [660, 560, 490], 40)
    kernel = by_wavelength(centers, width_nm=40)[0, 0]
    np.testing.assert_allclose(kernel, expected / expected.sum(axis=0), rtol=1e-10)


@settings(max_examples=50, derandomize=True)
@given(
    centers=st.lists(st.floats(200, 15000), min_size=1, max_size=20),
    invisible=st.floats(0, 0.9),
    width=st.floats(1, 500),
    data=st.data(),
)
def test_weights_are_shares_and_follow_their_bands(centers, invisible, width, data):
    order = data.draw(st.permutations(range(len(centers))))
    options = {"invisible": invisible, "width_nm": width}
    kernel = by_wavelength(centers, **options)
    assert kernel.shape == (1, 1, len(centers), 3)
    assert (kernel >= 0).all()
    np.testing.assert_allclose(kernel.sum(axis=2), 1, rtol=1e-9)
    moved = by_wavelength([centers[i] for i in order], **options)
    np.testing.assert_allclose(moved, kernel[:, :, list(order)], atol=1e-12)


def test_bands_without_visible_light_are_averaged():
    assert (by_wavelength([1375, 1610]) == luminance(2)).all()


def test_visible_bands_alone_have_everything():
    assert by_wavelength([665])[0, 0].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([],), r"must have shape \[bands\].*got \(0,\)"),
        ((560,), r"must have shape \[bands\].*got \(\)"),
        (([560, -1],), "wavelengths must be positive"),
        (([560, float("nan")],), "wavelengths must be positive"),
        (([0.49, 0.56, 0.665],), ">= 100 nm, got 0.49; multiply µm by 1000"),
    ],
)
def test_wavelengths_that_are_none(arguments, text):
    with pytest.raises(ValueError, match=text):
        by_wavelength(*arguments)


@pytest.mark.parametrize("option", [{"width_nm": 0}, {"invisible": 1}, {"invisible": -0.1}])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .*got"):
        by_wavelength([560], **option)


# Kernels of the stem


def test_summing_kernels_is_replicating_images():
    with jax.enable_x64(True):
        images = jnp.asarray(normal(2, 17, 14, 1), float)
        stem = jnp.asarray(normal(7, 7, 3, 8, seed=1), float)
        np.testing.assert_allclose(
            convolve(images, sum_kernels(stem)), convolve(replicate(images), stem), atol=1e-12
        )


@pytest.mark.parametrize("make", [average_kernels, repeat_kernels])
@pytest.mark.parametrize("bands", [1, 3, 6])
def test_equal_bands_give_the_response_to_gray(make, bands):
    gray = jnp.asarray(normal(1, 9, 9, 1))
    stem = jnp.asarray(normal(7, 7, 3, 8, seed=1))
    np.testing.assert_allclose(
        convolve(jnp.repeat(gray, bands, axis=-1), make(stem, bands)),
        convolve(replicate(gray), stem),
        atol=1e-4,
    )


def test_averaging_of_any_number_of_bands_gives_the_response_to_gray():
    stem = jnp.asarray(normal(7, 7, 3, 8))
    for bands in (2, 4, 13):
        np.testing.assert_allclose(
            average_kernels(stem, bands).sum(axis=2), stem.sum(axis=2), atol=1e-5
        )
        np.testing.assert_allclose(
            average_kernels(stem, bands), fold(luminance(bands), stem), atol=1e-6
        )


@pytest.mark.parametrize(
    ("bands", "expected"),
    [
        (1, [7]),
        (2, [1.5, 3]),
        (3, [1, 2, 4]),
        (4, [0.75, 1.5, 3, 0.75]),
        (5, [0.6, 1.2, 2.4, 0.6, 1.2]),
        (13, [3 / 13 * value for value in (1, 2, 4) * 4 + (1,)]),
    ],
)
def test_repeating_is_that_of_timm(bands, expected):
    # By hand from the rule: tile along the channels, cut to n, times 3 / n; n = 1 sums.
    kernel = jnp.broadcast_to(jnp.array([1.0, 2.0, 4.0])[:, None], (7, 7, 3, 2))
    found = repeat_kernels(kernel, bands)
    assert found.shape == (7, 7, bands, 2)
    np.testing.assert_allclose(found[3, 4, :, 1], expected, rtol=1e-6)


@settings(max_examples=10, derandomize=True)
@given(
    bands=st.sampled_from([1, 2, 13]),
    padding=st.integers(0, 3),
    size=st.sampled_from([(7, 9), (8, 8)]),
    seed=st.integers(0, 99),
)
def test_folding_is_exact_borders_included(bands, padding, size, seed):
    with jax.enable_x64(True):
        adapter = Adapter(bands)
        params = init(adapter, normal(1, 1, bands, 3, seed=seed), dtype=float)
        images = jnp.asarray(normal(2, *size, bands, seed=seed + 1), float)
        stem = jnp.asarray(normal(7, 7, 3, 4, seed=seed + 2), float)
        apart = convolve(apply(adapter, params, images), stem, padding)
        for kernel in (params, params["kernel"]):
            folded = fold(kernel, stem)
            assert folded.dtype == stem.dtype
            together = convolve(images, folded, padding)
            scale = np.abs(apart).max()
            np.testing.assert_allclose(together, apart, atol=1e-12 * max(1.0, scale))


def test_curves_do_not_fold():
    with pytest.raises(ValueError, match="'curves' is not linear and cannot be folded"):
        fold(init(Adapter(1, "curves")), jnp.ones((7, 7, 3, 4)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replicate(jnp.ones((1, 8, 8, 2))), r"must have shape \[batch, height, width, 1"),
        (
            lambda: sum_kernels(jnp.ones((7, 7, 1, 64))),
            r"\[height, width, 3, filters\], got \(7, 7, 1, 64\)$",
        ),
        (lambda: sum_kernels(jnp.ones((64, 3, 7, 7))), r"transpose\(2, 3, 1, 0\) converts"),
        (lambda: average_kernels(jnp.ones((7, 7, 3, 4)), 0), "an integer >= 1, got 0"),
        (lambda: repeat_kernels(jnp.ones((7, 7, 3, 4)), 2.0), r"an integer >= 1, got 2\.0"),
        (
            lambda: fold(jnp.ones((4, 3)), jnp.ones((7, 7, 3, 4))),
            r"must have shape \[1, 1, bands, 3\]",
        ),
        (
            lambda: fold(jnp.ones((1, 1, 4, 3)), jnp.ones((7, 7, 4, 4))),
            "stem_kernel must have shape",
        ),
        (lambda: fold({"scale": 1}, jnp.ones((7, 7, 3, 4))), "parameters kernel, got scale"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
