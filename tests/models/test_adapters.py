"""Adapters and kernels for bands: numpy, scipy and analytic cases; folding against convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.test_util import check_grads

from flaxtransfer.models.adapters import Adapter, apply, fold, init
from flaxtransfer.models.band_components import RGB_CORRELATION, least_squares
from flaxtransfer.models.band_kernels import (
    average_kernels,
    by_wavelength,
    luminance,
    repeat_kernels,
    replicate,
    sum_kernels,
)

SENTINEL_2 = {
    "B1": 443, "B2": 490, "B3": 560, "B4": 665, "B5": 705, "B6": 740, "B7": 783, "B8": 842,
    "B8A": 865, "B9": 945, "B10": 1375, "B11": 1610, "B12": 2190,
}  # fmt: skip


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


def sample(covariance, count=500, seed=0):
    """Patches whose mean is 0 and whose covariance is exactly this one."""
    x = np.random.default_rng(seed).standard_normal((count, len(covariance)))
    x, _ = np.linalg.qr(x - x.mean(axis=0))
    return x * count**0.5 @ np.linalg.cholesky(covariance).T


def random_covariance(bands, seed=0):
    factor = np.random.default_rng(seed).standard_normal((bands, bands))
    return factor @ factor.T / bands + 0.05 * np.eye(bands)


# The adapter


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
        ({"bands": 0}, "bands must be a whole number, 1 or more, not 0"),
        ({"bands": -2}, "not -2"),
        ({"bands": 1.0}, r"not 1\.0"),
        ({"bands": True}, "not True"),
        ({"bands": 1, "kind": "curve"}, "not 'curve'; did you mean 'curves'"),
        ({"bands": 1, "knots": 1}, "knots must be a whole number, 2 or more, not 1"),
        ({"bands": 1, "span": (1, -1)}, r"the lower one first, not \(1, -1\)"),
        ({"bands": 1, "span": (0, float("nan"))}, "span must be"),
        ({"bands": 1, "span": 2}, "span must be two numbers"),
        ({"bands": 1, "span": "ab"}, "span must be two numbers"),
        ({"bands": 0, "kind": "x", "knots": 0}, "bands must .*knots must .*kind must"),
    ],
)
def test_what_is_no_adapter_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        Adapter(**fields)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 8, 8, 3), r"takes \[batch, height, width, 4\]; these would be for Adapter\(bands=3\)"),
        ((8, 8, 4), r"a batch by images\[None\]"),
    ],
)
def test_images_of_other_bands_are_refused(shape, text):
    with pytest.raises(ValueError, match=text):
        apply(Adapter(4), init(Adapter(4)), jnp.zeros(shape))


def test_images_of_integers_are_refused():
    with pytest.raises(TypeError, match="uint8; an adapter takes normalised floats"):
        apply(Adapter(1), init(Adapter(1)), jnp.zeros((1, 2, 2, 1), jnp.uint8))


def test_parameters_of_another_adapter_are_refused():
    images = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(ValueError, match=r"kernel has shape \(1, 1, 3, 3\), the adapter's is"):
        apply(Adapter(4), init(Adapter(3)), images)
    with pytest.raises(ValueError, match="'curves' adapter has the parameters curves, kernel, not"):
        apply(Adapter(4, "curves"), init(Adapter(4)), images)
    with pytest.raises(ValueError, match=r"curves have shape \(4, 5, 3\).*\(4, 9, 3\)"):
        apply(Adapter(4, "curves"), init(Adapter(4, "curves", 5)), images)


def test_a_kernel_of_other_bands_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 3\), the adapter's is \(1, 1, 4, 3\): one c"):
        init(Adapter(4), by_wavelength([490, 560, 665]))
    with pytest.raises(ValueError, match="not finite"):
        init(Adapter(1), np.full((1, 1, 1, 3), np.nan))


# Where it starts


@pytest.mark.parametrize("bands", [1, 3, 13])
def test_luminance_is_the_mean(bands):
    images = normal(1, 4, 4, bands)
    seen = apply(Adapter(bands), init(Adapter(bands)), jnp.asarray(images))
    np.testing.assert_allclose(seen, np.repeat(images.mean(-1, keepdims=True), 3, -1), atol=1e-6)


def test_sentinel_2_keeps_its_colours():
    names = np.array(list(SENTINEL_2))
    kernel = by_wavelength(list(SENTINEL_2.values()))[0, 0]
    assert names[kernel.argmax(axis=0)].tolist() == ["B4", "B3", "B2"]
    assert (kernel.max(axis=0) > 0.5).all()
    np.testing.assert_allclose(kernel.sum(axis=0), 1, rtol=1e-12)
    # B7 and longer waves, seven bands, share a tenth.
    np.testing.assert_allclose(kernel[6:], 0.1 / 7)


def test_weights_are_gaussian():
    # scipy's density is the peer.
    centres = np.array([450.0, 520.0, 600.0, 700.0])
    expected = scipy.stats.norm.pdf(centres[:, None], [660, 560, 490], 40)
    kernel = by_wavelength(centres, width_nm=40)[0, 0]
    np.testing.assert_allclose(kernel, expected / expected.sum(axis=0), rtol=1e-10)


@settings(max_examples=50, derandomize=True)
@given(
    centres=st.lists(st.floats(200, 15000), min_size=1, max_size=20),
    invisible=st.floats(0, 0.9),
    width=st.floats(1, 500),
    data=st.data(),
)
def test_weights_are_shares_and_follow_their_bands(centres, invisible, width, data):
    order = data.draw(st.permutations(range(len(centres))))
    options = {"invisible": invisible, "width_nm": width}
    kernel = by_wavelength(centres, **options)
    assert kernel.shape == (1, 1, len(centres), 3)
    assert (kernel >= 0).all()
    np.testing.assert_allclose(kernel.sum(axis=2), 1, rtol=1e-9)
    moved = by_wavelength([centres[i] for i in order], **options)
    np.testing.assert_allclose(moved, kernel[:, :, list(order)], atol=1e-12)


def test_bands_without_visible_light_are_averaged():
    assert (by_wavelength([1375, 1610]) == luminance(2)).all()


def test_visible_bands_alone_have_everything():
    assert by_wavelength([665])[0, 0].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([],), r"shape \(0,\), wanted \[bands\]"),
        ((560,), r"shape \(\), wanted"),
        (([560, -1],), "positive numbers of nm"),
        (([560, float("nan")],), "positive numbers of nm"),
        (([0.49, 0.56, 0.665],), "0.49 nm is no light; from µm multiply by 1000"),
    ],
)
def test_wavelengths_that_are_none(arguments, text):
    with pytest.raises(ValueError, match=text):
        by_wavelength(*arguments)


@pytest.mark.parametrize("option", [{"width_nm": 0}, {"invisible": 1}, {"invisible": -0.1}])
def test_options_out_of_range(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is .*wanted"):
        by_wavelength([560], **option)


def test_the_correlation_of_photographs():
    # The first three digits follow by hand from the published eigenvalues and eigenvectors.
    np.testing.assert_allclose(np.diag(RGB_CORRELATION), 1)
    np.testing.assert_allclose(RGB_CORRELATION[[0, 0, 1], [1, 2, 2]], [0.895, 0.771, 0.902], 1e-3)


@pytest.mark.parametrize("bands", [3, 4, 13])
@pytest.mark.parametrize("towards", [False, True])
def test_channels_have_the_covariance_of_rgb(bands, towards):
    patches = sample(random_covariance(bands))
    kernel = normal(1, 1, bands, 3) if towards else None
    channels = patches @ least_squares(patches, towards=kernel)[0, 0]
    np.testing.assert_allclose(channels.mean(axis=0), 0, atol=1e-10)
    np.testing.assert_allclose(np.cov(channels.T, ddof=0), RGB_CORRELATION, atol=1e-9)


@pytest.mark.parametrize("towards", [None, np.eye(3)[None, None]])
def test_bands_that_are_rgb_already_stay(towards):
    kernel = least_squares(sample(RGB_CORRELATION), towards=towards)
    np.testing.assert_allclose(kernel[0, 0], np.eye(3), atol=1e-8)


def test_one_band_is_scaled_to_variance_one():
    patches = sample(np.array([[0.25]]))
    np.testing.assert_allclose(least_squares(patches)[0, 0], [[2, 2, 2]], rtol=1e-9)


@pytest.mark.parametrize("bands", [2, 5])
def test_two_components_give_variances_of_one_and_the_nearest_covariance(bands):
    # Eckart and Young by numpy: the leading two components, scaled back to the diagonal.
    mix = np.random.default_rng(1).standard_normal((2, bands))
    patches = sample(random_covariance(2)) @ mix
    channels = patches @ least_squares(patches)[0, 0]
    values, vectors = np.linalg.eigh(RGB_CORRELATION)
    nearest = vectors[:, 1:] * values[1:] @ vectors[:, 1:].T
    deviation = np.sqrt(np.diag(nearest))
    np.testing.assert_allclose(
        np.cov(channels.T, ddof=0), nearest / np.outer(deviation, deviation), atol=1e-9
    )


def test_the_rotation_is_that_of_procrustes():
    # scipy is the peer: both in the basis of whitened main components, for bands of full rank.
    patches = sample(random_covariance(3))
    towards = normal(1, 1, 3, 3).astype(float)
    kernel = least_squares(patches, towards=towards)[0, 0]
    values, vectors = np.linalg.eigh(np.cov(patches.T, ddof=0))
    white = patches @ vectors / np.sqrt(values)
    colours, axes = np.linalg.eigh(RGB_CORRELATION)
    unwhiten = (axes * np.sqrt(colours)).T
    # Minimises ‖white Q unwhiten - patches towards‖; the norm of the first term is fixed.
    rotation, _ = scipy.linalg.orthogonal_procrustes(
        np.eye(3), white.T @ (patches @ towards[0, 0]) @ unwhiten.T
    )
    np.testing.assert_allclose(patches @ kernel, white @ rotation @ unwhiten, atol=1e-8)
    for seed in range(20):
        other, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
        near, far = patches @ kernel, white @ other @ unwhiten
        wanted = patches @ towards[0, 0]
        assert ((near - wanted) ** 2).sum() <= ((far - wanted) ** 2).sum()


def test_rounding_noise_is_not_whitened():
    # A third band of rounding noise: whitened, its weights would be about a thousand.
    patches = sample(np.diag([1.0, 0.5, 1e-6]))
    assert np.abs(least_squares(patches)[0, 0, 2]).max() < 1e-6


@pytest.mark.parametrize(
    ("patches", "text"),
    [
        (np.zeros((4, 4, 2)), r"wanted \[patches, bands\]; images become pixels by"),
        (np.ones((39, 4)), "39 patches are too few for 4 bands; wanted 40 or more"),
        (np.ones((0, 2)), "0 patches are too few"),
        (
            np.where(np.arange(200).reshape(100, 2) == 7, np.nan, 0.0),
            r"not finite in the bands \[1\]",
        ),
        (np.zeros((100, 2)), "all alike"),
        (np.full((100, 2), 3.0), "all alike"),
        (sample(np.eye(2)) + np.array([0, 3]), r"not centred.*means \{1: 3\.0\}"),
    ],
)
def test_patches_that_do_not_do(patches, text):
    with pytest.raises(ValueError, match=text):
        least_squares(patches)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rgb_covariance": np.eye(2)}, "must be 3 × 3"),
        ({"rgb_covariance": np.full((3, 3), np.nan)}, "must be 3 × 3 finite"),
        ({"rgb_covariance": np.triu(np.ones((3, 3)))}, "symmetric and positive definite"),
        ({"rgb_covariance": np.ones((3, 3)) - 2 * np.eye(3)}, "symmetric and positive definite"),
        ({"rgb_covariance": np.eye(3)}, "2 independent components.*must correlate positively"),
        ({"towards": np.ones((1, 1, 3, 3))}, r"for these patches it is \(1, 1, 2, 3\)"),
    ],
)
def test_statistics_that_do_not_do(options, text):
    with pytest.raises(ValueError, match=text):
        least_squares(sample(np.eye(2)), **options)


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
    with pytest.raises(ValueError, match="'curves' is not linear and folds into no kernel"):
        fold(init(Adapter(1, "curves")), jnp.ones((7, 7, 3, 4)))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: replicate(jnp.ones((1, 8, 8, 2))), r"replication takes \[batch, height, width, 1"),
        (lambda: sum_kernels(jnp.ones((7, 7, 1, 64))), r"wanted \[height, width, 3, filters\]$"),
        (lambda: sum_kernels(jnp.ones((64, 3, 7, 7))), r"by transpose\(2, 3, 1, 0\)"),
        (lambda: average_kernels(jnp.ones((7, 7, 3, 4)), 0), "1 or more, not 0"),
        (lambda: repeat_kernels(jnp.ones((7, 7, 3, 4)), 2.0), r"whole number, 1 or more, not 2\.0"),
        (lambda: fold(jnp.ones((4, 3)), jnp.ones((7, 7, 3, 4))), r"wanted \[1, 1, bands, 3\]"),
        (lambda: fold(jnp.ones((1, 1, 4, 3)), jnp.ones((7, 7, 4, 4))), "stem's kernel has shape"),
        (lambda: fold({"scale": 1}, jnp.ones((7, 7, 3, 4))), "parameters kernel, not scale"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
