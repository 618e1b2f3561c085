"""The kernel two-sample test against closed forms, by enumeration, and on what cannot be tested."""

import itertools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from flaxtransfer.shift.checks import shared_rows
from flaxtransfer.shift.two_sample import gaussian_kernel, median_bandwidth, mmd_test, rescaled


def samples(n=40, m=30, d=3, step=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + step


def by_definition(source, target, bandwidth):
    """Gretton et al. 2012, equation 3, in float64 and with no trick."""

    def kernel(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2) / (2 * bandwidth**2))

    n, m = len(source), len(target)
    inside, other = kernel(source, source), kernel(target, target)
    return (
        (inside.sum() - n) / (n * (n - 1))
        + (other.sum() - m) / (m * (m - 1))
        - 2 * kernel(source, target).mean()
    )


@pytest.mark.parametrize(("offset", "unit"), [(0.0, 1.0), (1e4, 1.0), (1e4, 1e-6), (0.0, 1e6)])
def test_the_statistic_is_the_unbiased_one_whatever_offset_and_unit(offset, unit):
    source, target = samples(step=0.5)
    wanted = by_definition(source, target, 1.5)
    found = mmd_test(
        (source + offset) * unit, (target + offset) * unit, bandwidth=1.5 * unit, permutations=19
    )
    assert found.statistic == pytest.approx(wanted, abs=1e-6)
    assert found.effect == found.statistic


@pytest.mark.parametrize(("spread", "step"), [(1.0, 0.0), (2.0, 0.3)])
def test_it_estimates_the_closed_form_between_gaussians(spread, step):
    # E k(x, y) of Gaussians of variance a and b, apart by delta, in closed form.
    dimensions, width, delta = 4, 2.0, step * np.sqrt(4)

    def expected(a, b, apart):
        total = width**2 + a + b
        return (width**2 / total) ** (dimensions / 2) * np.exp(-(apart**2) / (2 * total))

    truth = (
        expected(1, 1, 0) + expected(spread**2, spread**2, 0) - 2 * expected(1, spread**2, delta)
    )
    rng = np.random.default_rng(1)
    found = [
        mmd_test(
            rng.normal(size=(200, dimensions)),
            spread * rng.normal(size=(200, dimensions)) + step,
            bandwidth=width,
            permutations=19,
        ).effect
        for _ in range(30)
    ]
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / np.sqrt(len(found)))


def test_p_is_what_enumerating_all_labelings_gives():
    source, target = samples(5, 5, 2, step=0.8)
    pooled = np.concatenate([source, target])
    width = median_bandwidth(pooled)
    observed = by_definition(source, target, width)
    every = []
    for chosen in itertools.combinations(range(10), 5):
        rest = np.setdiff1d(np.arange(10), chosen)
        every.append(by_definition(pooled[list(chosen)], pooled[rest], width))
    exact = np.mean(np.array(every) >= observed - 1e-9)
    found = mmd_test(source, target, permutations=19_999)
    # Labelings that repeat the observed one, and their mirror images, count as ties in float32.
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 20_000))


def test_labelings_that_are_as_good_tie_in_single_precision():
    # Features that are 0 or 1: the statistic depends on how many ones the source has, and p is
    # hypergeometric.
    source, target = np.repeat([0.0, 1.0], [5, 1])[:, None], np.repeat([0.0, 1.0], [3, 6])[:, None]
    ones = np.arange(7)
    chance = hypergeom.pmf(ones, 15, 7, 6)
    values = [
        by_definition(
            np.repeat([0.0, 1.0], [6 - k, k])[:, None],
            np.repeat([0.0, 1.0], [2 + k, 7 - k])[:, None],
            1.0,
        )
        for k in ones
    ]
    exact = chance[np.array(values) >= values[1] - 1e-9].sum()
    found = mmd_test(source, target, bandwidth=1.0, permutations=9999)
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 10_000))


def test_blocks_agree_with_a_mean_over_blocks_and_find_what_there_is():
    source, target = samples(400, 300, step=0.4)
    whole = mmd_test(source, target, permutations=199)
    parts = mmd_test(source, target, permutations=199, block=100)
    assert parts.rejected()
    assert whole.rejected()
    assert parts.effect == pytest.approx(whole.effect, rel=0.5)
    assert parts.notes == (
        "in blocks of 50 source and 50 target rows, 300 of 400 and 300 of 300 rows",
    )
    assert not mmd_test(*samples(400, 300, seed=3), permutations=199, block=100).rejected()


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ((1000, 20), "blocks of 180 source and 20 target rows, 180 of 1000 and 20 of 20 rows"),
        ((95, 110), "blocks of 95 source and 105 target rows, 95 of 95 and 105 of 110 rows"),
    ],
)
def test_a_small_side_is_not_cut_without_need(counts, text):
    assert text in mmd_test(*samples(*counts), permutations=19, block=200).notes[0]


def test_it_sees_spread_and_correlation_as_well():
    rng = np.random.default_rng(0)
    source = rng.normal(size=(300, 2))
    assert mmd_test(source, 1.5 * rng.normal(size=(200, 2)), permutations=199).rejected()
    turned = rng.normal(size=(200, 2)) @ np.linalg.cholesky([[1, 0.8], [0.8, 1]]).T
    assert mmd_test(source, turned, permutations=199).rejected()


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (np.ones((9, 2)), np.ones((9, 2)), "constant and equal"),
        (np.zeros((9, 2)), np.eye(4, 2), "9 and 4 rows; each side needs >= 5"),
    ],
)
def test_what_cannot_be_tested_says_why(source, target, reason):
    found = mmd_test(source, target)
    assert found.p is None
    assert reason in found.not_testable
    assert not found.rejected()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"permutations": 10}, "permutations must be >= 19, got 10"),
        ({"bandwidth": 0.0}, "bandwidth must be > 0 or None .*, got 0.0"),
        ({"bandwidth": float("nan")}, "bandwidth must be > 0 .*, got nan"),
        ({"block": 8}, "block must be >= 20 rows, got 8"),
    ],
)
def test_what_is_no_setting(arguments, text):
    with pytest.raises(ValueError, match=text):
        mmd_test(*samples(), **arguments)


def test_other_features_and_jax_arrays():
    with pytest.raises(ValueError, match="same number of columns, got 3 and 2"):
        mmd_test(np.ones((9, 3)), np.ones((9, 2)))
    source, target = samples()
    again = mmd_test(jnp.asarray(source), jnp.asarray(target), permutations=99)
    assert again.p == mmd_test(source, target, permutations=99).p


def test_examples_on_both_sides_are_noticed():
    source, target = samples()
    target[:4] = source[10:14]
    assert shared_rows(source, target) == 4
    assert shared_rows(np.array([[-0.0, 1.0]]), np.array([[0.0, 1.0]])) == 1
    assert (
        "4 of 30 target rows also occur exactly"
        in mmd_test(source, target, permutations=19).notes[0]
    )
    assert mmd_test(*samples(), permutations=19).notes == ()


@pytest.mark.parametrize("step", [0.1, 0.4])
def test_constant_sides_that_differ_are_apart(step):
    found = mmd_test(np.zeros((20, 2)), np.full((20, 2), step), permutations=199)
    assert found.p == 1 / 200


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 99))
def test_the_median_is_that_of_all_pairs_and_grows_with_the_unit(rows, width, seed):
    features = np.random.default_rng(seed).normal(size=(rows, width))
    first, second = np.triu_indices(rows, 1)
    wanted = np.median(np.linalg.norm(features[first] - features[second], axis=1))
    assert median_bandwidth(features) == pytest.approx(wanted)
    assert median_bandwidth(7 * features) == pytest.approx(7 * wanted)


def test_the_median_of_many_rows_and_of_few_that_differ():
    features = np.random.default_rng(0).normal(size=(3000, 8))
    wanted = np.median(np.linalg.norm(features[:1500] - features[1500:], axis=1))
    assert median_bandwidth(features) == pytest.approx(wanted, rel=0.02)
    rare = np.zeros((50, 1))
    rare[0] = 3.0
    assert median_bandwidth(rare) == 3.0
    rarest = np.zeros((100_000, 1))
    rarest[0] = 1.0
    # The root of twice the variance is the root mean square distance of two examples.
    assert median_bandwidth(rarest) == pytest.approx(np.sqrt(2e-5), rel=1e-4)


def test_the_kernel_is_stable_far_from_the_origin():
    features = np.random.default_rng(0).normal(size=(20, 64)) + 1e5
    exact = np.exp(-((features[:, None] - features[None]) ** 2).sum(2) / (2 * 9.0**2))
    scaled = rescaled(features, 9.0)
    np.testing.assert_allclose(gaussian_kernel(scaled, scaled), exact, atol=2e-6)


@pytest.mark.slow
def test_a_hundred_thousand_rows_need_no_quadratic_memory():
    source, target = samples(50_000, 50_000, 16, step=0.05)
    tracemalloc.start()
    found = mmd_test(source, target, permutations=199)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.rejected()
    assert "in blocks of 2000 source and 2000 target rows, 50000 of 50000" in found.notes[0]
    # Of numpy; what JAX holds are a few matrices of one block. 100,000 squared float32 are 40 GB.
    assert peak < 500e6
