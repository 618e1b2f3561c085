"""Moments of two domains: against numpy on all values together, and against their limits."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxtransfer.models.moments import (
    Moments,
    balancing_weights,
    displacement,
    effective_count,
    merge,
    mix,
    moments,
    source_share,
)

SEEDS = st.integers(0, 2**32 - 1)


def draw(random, count, channels=3):
    """Images [count, 2, 2, channels] with a mean and a deviation of their own."""
    return random.normal(3 * random.normal(), 1 + random.random(), (count, 2, 2, channels))


def assert_same(one, other, **tolerance):
    np.testing.assert_allclose(one.mean, other.mean, **tolerance)
    np.testing.assert_allclose(one.var, other.var, **tolerance)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), SEEDS)
def test_merged_moments_are_those_of_the_whole_sample(sizes, seed):
    """Against numpy's mean and variance of all values together, in any order of the parts."""
    random = np.random.default_rng(seed)
    parts = [draw(random, n) for n in sizes]
    whole = np.concatenate(parts)
    expected = Moments(whole.mean((0, 1, 2)), whole.var((0, 1, 2)), len(whole))
    for order in (parts, parts[::-1]):
        merged = moments(order[0])
        for part in order[1:]:
            merged = merge(merged, moments(part))
        assert_same(merged, expected, rtol=1e-9, atol=1e-12)
        assert merged.count == len(whole)


def test_the_mean_of_the_variances_is_another_number():
    """What a merge must not be: batches of 0, 1 and of 10, 11 have variance 1/4 each."""
    parts = [moments(np.array([[0.0], [1.0]])), moments(np.array([[10.0], [11.0]]))]
    assert merge(*parts).var == 25.25
    assert np.mean([part.var for part in parts]) == 0.25


@given(SEEDS, st.lists(st.integers(0, 4), min_size=5, max_size=5).filter(any))
def test_whole_weights_are_repetitions(seed, weights):
    values = draw(np.random.default_rng(seed), 5)
    repeated = np.repeat(values, weights, axis=0)
    found = moments(values, weights)
    expected = Moments(repeated.mean((0, 1, 2)), repeated.var((0, 1, 2)), sum(weights))
    assert_same(found, expected, rtol=1e-9, atol=1e-12)
    assert found.count == sum(weights)


def test_arrays_of_jax_stay_arrays_of_jax():
    values = draw(np.random.default_rng(0), 5).astype(np.float32)
    for weights in (None, np.arange(5.0, dtype=np.float32)):
        found = moments(jnp.asarray(values), None if weights is None else jnp.asarray(weights))
        assert isinstance(found.mean, jnp.ndarray)
        assert_same(found, moments(values, weights), rtol=1e-5)


@pytest.mark.parametrize("weights", [[1, -1, 1], [0, 0, 0], [1, 1], [1, math.nan, 1]])
def test_what_are_no_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        moments(np.zeros((3, 2)), weights)


@given(SEEDS, st.floats(0, 1))
def test_a_mixture_of_moments_is_that_of_the_pooled_values(seed, share):
    """Weighted pooling is its definition; without the last term it is a mean of variances."""
    random = np.random.default_rng(seed)
    source, target = draw(random, 4), draw(random, 6)
    weights = np.concatenate([np.full(4, share / 4), np.full(6, (1 - share) / 6)])
    pooled = moments(np.concatenate([source, target]), weights)
    parts = moments(source), moments(target)
    assert_same(mix(*parts, share), pooled, rtol=1e-9, atol=1e-9)
    linear = mix(*parts, share, "linear")
    np.testing.assert_allclose(linear.mean, pooled.mean, rtol=1e-9, atol=1e-9)
    expected = share * source.var((0, 1, 2)) + (1 - share) * target.var((0, 1, 2))
    np.testing.assert_allclose(linear.var, expected, rtol=1e-9)
    assert (linear.var <= pooled.var + 1e-9).all()


@pytest.mark.parametrize("kind", ["moments", "linear"])
@pytest.mark.parametrize(
    ("weight", "count", "limit"),
    [
        (None, 1, "target"),
        (0, 9, "target"),
        (math.inf, 9, "source"),
        (8, 10**12, "target"),
        (10**15, 9, "source"),
    ],
)
def test_the_limits_of_a_mixture(kind, weight, count, limit):
    random = np.random.default_rng(0)
    parts = {"source": moments(draw(random, 4)), "target": moments(draw(random, 6))}
    found = mix(parts["source"], parts["target"], source_share(weight, count), kind)
    assert_same(found, parts[limit], rtol=1e-9)


def test_shares_by_the_table():
    """N / (N + n) by hand: 16 pseudo-examples against 8 leave the source two thirds."""
    assert source_share(16, 8) == pytest.approx(2 / 3)
    for weight, count in ((-1, 8), (math.nan, 8), (8, 0)):
        with pytest.raises(ValueError, match="example"):
            source_share(weight, count)


def test_what_is_no_mixture():
    one = moments(np.ones((2, 1)))
    with pytest.raises(ValueError, match="'moments' or 'linear', got 'exact'"):
        mix(one, one, 0.5, "exact")
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        mix(one, one, 1.5)


def test_balanced_moments_are_those_of_the_source():
    """Two Gaussian classes whose densities are known: the weights undo a shift of the prior.

    The source's moments are analytic: mean 0 and variance 1 + 4 at equal shares.
    """
    random = np.random.default_rng(0)
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    labels = random.random(200_000) < q[1]
    x = random.normal(np.where(labels, 2.0, -2.0))
    posterior = 1 / (1 + np.exp(-4 * x))
    weights = balancing_weights(np.stack([1 - posterior, posterior], 1), p, q)
    assert weights.mean() == pytest.approx(1)
    found = moments(x[:, None], weights)
    assert abs(moments(x[:, None]).mean.item()) > 1.5
    assert found.mean.item() == pytest.approx(0, abs=0.03)
    assert found.var.item() == pytest.approx(5, rel=0.02)
    assert effective_count(weights) < 200_000 / 2


def test_weights_without_a_shift_are_one():
    posterior = np.random.default_rng(0).dirichlet(np.ones(3), 50)
    p = posterior.mean(0)
    np.testing.assert_allclose(balancing_weights(posterior, p, p), 1)


def test_one_example_of_an_absent_class_does_not_weigh_more_than_its_class():
    posterior = np.array([[1.0, 0.0]] * 99 + [[0.0, 1.0]])
    weights = balancing_weights(posterior, [0.5, 0.5], [1.0, 0.0])
    assert weights[-1] / weights.sum() == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match=r"got 0 for classes \[1\]"):
        balancing_weights(posterior, [1.0, 0.0], [0.5, 0.5])


def test_displacement_by_hand():
    """3 standard deviations of the mean and none of the width; a width of 1 that became 3."""
    source = Moments(np.array([0.0]), np.array([4.0]), 1)
    assert displacement(source, source) == 0
    assert displacement(source, Moments(np.array([6.0]), np.array([4.0]), 1)) == 3
    assert displacement(source, Moments(np.array([0.0]), np.array([36.0]), 1)) == 2
    dead = Moments(np.array([0.0]), np.array([0.0]), 1)
    assert math.isfinite(displacement(dead, source, epsilon=1e-5))
