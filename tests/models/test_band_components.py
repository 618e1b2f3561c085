"""Least squares on patches: channels with the covariance of RGB, by numpy and scipy."""

import numpy as np
import pytest
import scipy.linalg

from flaxtransfer.models.band_init import RGB_CORRELATION, least_squares


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sample(covariance, count=500, seed=0):
    """Patches whose mean is 0 and whose covariance is exactly this one."""
    x = np.random.default_rng(seed).standard_normal((count, len(covariance)))
    x, _ = np.linalg.qr(x - x.mean(axis=0))
    return x * count**0.5 @ np.linalg.cholesky(covariance).T


def random_covariance(bands, seed=0):
    factor = np.random.default_rng(seed).standard_normal((bands, bands))
    return factor @ factor.T / bands + 0.05 * np.eye(bands)


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
    colors, axes = np.linalg.eigh(RGB_CORRELATION)
    unwhiten = (axes * np.sqrt(colors)).T
    # Minimizes ‖white Q unwhiten - patches towards‖; the norm of the first term is fixed.
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
        (np.zeros((4, 4, 2)), r"shape \[patches, bands\], got \(4, 4, 2\); images.reshape"),
        (np.ones((39, 4)), "patches must number >= 40 for 4 bands, got 39"),
        (np.ones((0, 2)), "for 2 bands, got 0"),
        (
            np.where(np.arange(200).reshape(100, 2) == 7, np.nan, 0.0),
            r"must be finite.* in the bands \[1\]",
        ),
        (np.zeros((100, 2)), "must not be constant"),
        (np.full((100, 2), 3.0), "must not be constant"),
        (
            sample(np.eye(2)) + np.array([0, 3]),
            r"within half a standard deviation of 0, got means \{1: 3\.0\}",
        ),
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
        ({"rgb_covariance": np.eye(3)}, r"must be positive in all entries.*\(2 here\)"),
        ({"towards": np.ones((1, 1, 3, 3))}, r"must have shape \(1, 1, 2, 3\) for these patches"),
    ],
)
def test_statistics_that_do_not_do(options, text):
    with pytest.raises(ValueError, match=text):
        least_squares(sample(np.eye(2)), **options)
