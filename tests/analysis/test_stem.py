"""The share of a filter that survives: analytic filters, numpy's convolution-free definition."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxtransfer.analysis import stem_report
from flaxtransfer.models.adapters import fold
from flaxtransfer.models.band_init import by_wavelength, luminance, sum_kernels

rng = np.random.default_rng(0)


def filters(*colors, size=5):
    """One filter for each color ``[3]``: a random pattern in that color."""
    pattern = rng.standard_normal((size, size, 1, len(colors)))
    return pattern * np.array(colors, float).T


def energies(kernel):
    return np.square(np.asarray(kernel, np.float64)).sum(axis=(0, 1, 2))


@pytest.mark.parametrize(
    ("color", "share"),
    [
        ((1, 1, 1), 1),
        ((-2, -2, -2), 1),
        ((1, 0, 0), 1 / 3),
        ((0, 0, -7), 1 / 3),
        ((1, 1, 0), 2 / 3),
        ((1, -1, 0), 0),
        ((-1, 2, -1), 0),
        ((2, -1, 0), 1 / 15),
    ],
)
def test_filters_of_one_color(color, share):
    # Analytic: (r + g + b)² / 3 (r² + g² + b²).
    assert stem_report(filters(color)).shares[0] == pytest.approx(share, abs=1e-12)


def test_a_filter_is_gray_only_if_it_is_at_every_pixel():
    # Red at one pixel, blue at another: the sum of all is the same as of a gray one.
    kernel = np.zeros((1, 3, 3, 2))
    kernel[0, [0, 1, 2], [0, 1, 2], 0] = 1
    kernel[0, 1, :, 1] = 1
    shares = stem_report(kernel).shares
    assert shares == {0: pytest.approx(1 / 3), 1: pytest.approx(1)}


def test_the_definition_on_random_filters():
    kernel = rng.standard_normal((7, 7, 3, 16)).astype(np.float32)
    expected = energies(sum_kernels(kernel)) / (3 * energies(kernel))
    report = stem_report(jnp.asarray(kernel))
    np.testing.assert_allclose(list(report.shares.values()), expected, rtol=1e-5)
    parts = energies(kernel) / energies(kernel).sum()
    np.testing.assert_allclose(list(report.energies.values()), parts, rtol=1e-6)
    assert report.surviving == pytest.approx((expected * parts).sum(), rel=1e-5)
    assert report.median == pytest.approx(np.median(expected), rel=1e-5)


def test_random_filters_have_a_third_on_average():
    # Analytic: the expected part of an isotropic vector on one of three axes.
    shares = stem_report(rng.standard_normal((7, 7, 3, 500))).shares.values()
    assert np.mean(list(shares)) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("bands", [1, 2, 3, 13])
def test_luminance_of_any_number_of_bands_is_replication(bands):
    kernel = rng.standard_normal((3, 3, 3, 8))
    shares = stem_report(kernel, luminance(bands)).shares
    assert shares == pytest.approx(stem_report(kernel).shares, rel=1e-10)


def test_bands_that_are_rgb_lose_nothing():
    kernel = rng.standard_normal((3, 3, 3, 8))
    identity = np.eye(3)[None, None]
    assert list(stem_report(kernel, identity).shares.values()) == pytest.approx([1] * 8)


def test_color_bands_wake_opponent_filters():
    kernel = filters((1, -1, 0), (0, 1, -1), (1, 1, 1))
    gray = stem_report(kernel)
    assert gray.opponent == (0, 1)
    color = stem_report(kernel, by_wavelength([490, 560, 665]))
    assert color.opponent == ()
    assert min(color.shares.values()) > 0.5


def test_the_share_is_the_energy_of_the_folded_stem():
    kernel = rng.standard_normal((3, 3, 3, 8)).astype(np.float32)
    adapter = rng.standard_normal((1, 1, 4, 3)).astype(np.float32)
    gain = np.linalg.svd(adapter[0, 0])[1][0] ** 2
    expected = energies(fold(adapter, kernel)) / (gain * energies(kernel))
    report = stem_report(kernel, adapter)
    np.testing.assert_allclose(list(report.shares.values()), expected, rtol=1e-4)
    assert (report.bands, report.adapted) == (4, True)


@settings(max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    bands=st.integers(1, 6),
    gain=st.floats(1e-6, 1e6),
    strength=st.floats(1e-6, 1e6),
)
def test_shares_are_shares_and_no_gain_matters(seed, bands, gain, strength):
    random = np.random.default_rng(seed)
    kernel = random.standard_normal((3, 3, 3, 4))
    adapter = random.standard_normal((1, 1, bands, 3))
    report = stem_report(kernel, adapter)
    assert all(0 <= share <= 1 for share in report.shares.values())
    assert sum(report.energies.values()) == pytest.approx(1)
    again = stem_report(-strength * kernel, gain * adapter)
    assert again.shares == pytest.approx(report.shares, rel=1e-9)


def test_dead_filters_are_apart():
    kernel = filters((1, 1, 1), (0, 0, 0), (1, -1, 0), (1e-4, 1e-4, 1e-4), (1, 0, 0))
    report = stem_report(kernel)
    assert report.dead == (1, 3)
    assert list(report.shares) == [0, 2, 4]
    assert report.opponent == (2,)
    assert report.median == pytest.approx(1 / 3)
    assert "2 dead" in report.summary()


def test_a_stem_of_dead_filters_only():
    report = stem_report(np.zeros((7, 7, 3, 4)))
    assert (report.dead, report.median, report.surviving) == ((0, 1, 2, 3), None, None)
    assert report.summary() == "all 4 filters of the stem are dead"
    assert "dead" in str(report)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["median"] is None


def test_summary_table_and_json():
    kernel = filters((1, 1, 1), (1, -1, 0), (0, 1, -1), (1, 0, 0), (0, 0, 0))
    report = stem_report(kernel)
    summary = report.summary()
    assert summary.startswith("2 of 4 filters are opponent (less than 5% survives replication)")
    assert "median share 0.17" in summary
    assert summary.endswith("1 dead")
    printed = str(report)
    assert "opponent" in printed
    assert "achromatic" in printed
    assert "1, 2" in printed
    loaded = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert loaded["filters"] == 5
    assert loaded["opponent"] == [1, 2]
    assert loaded["dead"] == [4]
    assert loaded["shares"]["0"] == pytest.approx(1)
    assert loaded["adapted"] is False
    assert "an adapter of 2 bands" in stem_report(kernel, luminance(2)).summary()


def test_every_filter_is_in_one_row():
    kernel = np.concatenate([rng.standard_normal((2, 2, 3, 63)), np.ones((2, 2, 3, 1))], axis=-1)
    report = stem_report(kernel)
    assert report.shares[63] == 1
    table = report.__rich__().renderables[0]
    assert sum(map(int, table.columns[1].cells)) == 64


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((np.ones((7, 7, 1, 64)),), ValueError, r"must have shape .*, got \(7, 7, 1, 64\)"),
        ((np.ones((64, 3, 7, 7)),), ValueError, r"transpose\(2, 3, 1, 0\)"),
        ((np.ones((7, 7, 3, 0)),), ValueError, r"got \(7, 7, 3, 0\)"),
        ((np.full((3, 3, 3, 1), np.nan),), ValueError, "stem's kernel must be finite"),
        (
            ({"kernel": 0},),
            TypeError,
            r"must be an array.*kernel of the first convolution, got a dict",
        ),
        (
            (np.ones((3, 3, 3, 2)), np.ones((4, 3))),
            ValueError,
            r"must have shape \[1, 1, bands, 3\], got \(4, 3\)",
        ),
        (
            (np.ones((3, 3, 3, 2)), np.ones((1, 1, 3, 4))),
            ValueError,
            r"must have shape \[1, 1, bands, 3\]",
        ),
        ((np.ones((3, 3, 3, 2)), np.zeros((1, 1, 4, 3))), ValueError, "all zeros"),
        (
            (np.ones((3, 3, 3, 2)), np.full((1, 1, 1, 3), np.inf)),
            ValueError,
            "adapter's kernel must",
        ),
    ],
)
def test_what_is_no_stem_is_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        stem_report(*arguments)
