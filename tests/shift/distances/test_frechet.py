"""The Frechet distance by its definition, and the same number however it is computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from flaxtransfer.analysis.distances import bures_wasserstein, frechet_distance, pooled_coordinates
from flaxtransfer.shift.two_sample import ledoit_wolf

I = np.arange(12.0)  # noqa: E741
SOURCE = np.stack([np.sin(I), np.cos(1.3 * I), 2 * np.sin(0.7 * I)], 1)
TARGET = np.stack([np.cos(I), np.sin(2.1 * I) + 0.5, I / 6], 1)[:9]


def draw(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def moments(x):
    return x.mean(0), np.cov(x.T)


def by_definition(mean_a, cov_a, mean_b, cov_b):
    root = sqrtm(cov_a)
    between = sqrtm(root @ cov_b @ root)
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * between.real)


def test_a_number_of_pot():
    """ot.gaussian.bures_wasserstein_distance(ms, mt, Cs, Ct), POT 0.9.7.post1."""
    found = bures_wasserstein(*moments(SOURCE), *moments(TARGET))
    assert found == pytest.approx(1.20964919603374, abs=1e-10)
    assert frechet_distance(SOURCE, TARGET).value == pytest.approx(found**2, abs=1e-10)


@pytest.mark.parametrize(
    ("cov_a", "cov_b", "expected"),
    [
        # Covariances that commute: the distance of their roots' eigenvalues.
        (np.diag([1.0, 4]), np.diag([9.0, 16]), np.sqrt(4 + 4)),
        (np.diag([0.0, 1]), np.diag([1.0, 0]), np.sqrt(2)),
        (np.zeros((2, 2)), np.eye(2), np.sqrt(2)),
        # Of rank 1, u u' and v v': |u|^2 + |v|^2 - 2 |u . v|.
        (np.outer([3, 4], [3, 4]), np.outer([4, 3], [4, 3]), np.sqrt(50 - 2 * 24)),
        (np.array([[2.0, 1], [1, 2]]), np.array([[2.0, 1], [1, 2]]), 0),
    ],
)
def test_cases_that_can_be_worked_out(cov_a, cov_b, expected):
    zero = np.zeros(2)
    assert bures_wasserstein(zero, cov_a, zero, cov_b) == pytest.approx(expected, abs=2e-7)
    moved = bures_wasserstein(zero, cov_a, [3, 4], cov_b)
    assert moved == pytest.approx(np.hypot(expected, 5), abs=1e-9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mean_b": [0.0] * 3}, r"means must both have shape \[D\], got \(2,\) and \(3,\)"),
        ({"mean_b": [0.0, np.nan]}, "means must be finite"),
        ({"cov_b": np.eye(3)}, r"cov_b must have shape \(2, 2\), as the means, got \(3, 3\)"),
        ({"cov_a": [[1, np.inf], [np.inf, 1]]}, "cov_a must be finite"),
        ({"cov_a": [[1, 0.5], [0, 1]]}, "cov_a must be symmetric"),
        ({"cov_b": [[1, 2], [2, 1]]}, "cov_b must have no negative eigenvalues, got -1"),
    ],
)
def test_what_is_no_gaussian(change, text):
    given = {"mean_a": [0.0, 0], "cov_a": np.eye(2), "mean_b": [0.0, 0], "cov_b": np.eye(2)}
    with pytest.raises(ValueError, match=text):
        bures_wasserstein(**given | change)


@pytest.mark.parametrize("shape", [(30, 20, 5), (6, 40, 8), (7, 9, 40), (5, 5, 9), (4, 30, 20)])
def test_few_examples_or_many_the_distance_is_that_of_the_covariances(shape):
    n, m, width = shape
    source, target = draw(n, width, 1), 2 * draw(m, width, 2) + 1
    found = frechet_distance(source, target, permutations=19)
    exact = bures_wasserstein(*moments(source), *moments(target)) ** 2
    assert found.value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("shape", [(30, 20, 5), (7, 9, 40)])
def test_shrunk_covariances_are_those_of_scikit_learn(shape):
    from sklearn.covariance import ledoit_wolf

    n, m, width = shape
    source, target = draw(n, width, 1), draw(m, width, 2) * np.linspace(0.2, 3, width)
    found = frechet_distance(source, target, shrinkage=True, permutations=19)
    exact = by_definition(
        source.mean(0), ledoit_wolf(source)[0], target.mean(0), ledoit_wolf(target)[0]
    )
    assert found.value == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("shape", [(40, 4), (9, 30)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_the_intensity_is_that_of_scikit_learn_in_any_basis(shape, scale):
    from sklearn.covariance import ledoit_wolf_shrinkage

    rows = scale * draw(*shape) * np.linspace(0.1, 2, shape[1])
    centered = rows - rows.mean(0)
    expected = ledoit_wolf_shrinkage(rows)
    assert 0 < expected < 1
    assert ledoit_wolf(centered)[0] == pytest.approx(expected, rel=1e-9)
    reduced = pooled_coordinates(rows)
    assert ledoit_wolf(reduced, shape[1]) == pytest.approx(ledoit_wolf(centered), rel=1e-9)


def test_no_intensity_where_there_is_nothing_to_shrink():
    assert ledoit_wolf(np.zeros((5, 3))) == (0.0, 0.0)


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.floats(0.1, 10))
def test_laws_of_a_distance(seed, scale):
    random = np.random.default_rng(seed)
    first, second, third = (random.normal(size=(6, 3)) * random.uniform(0, 2, 3) for _ in range(3))
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    one, other = moments(first), moments(second)
    there = bures_wasserstein(*one, *other)
    assert bures_wasserstein(*other, *one) == pytest.approx(there, rel=1e-9, abs=1e-7)
    assert bures_wasserstein(*one, *one) == pytest.approx(0, abs=1e-6)
    detour = bures_wasserstein(*one, *moments(third)) + bures_wasserstein(*moments(third), *other)
    assert there <= detour + 1e-7
    moved = [moments(scale * x @ turn + 5) for x in (first, second)]
    assert bures_wasserstein(*moved[0], *moved[1]) == pytest.approx(scale * there, rel=1e-7)


def test_two_samples_of_one_distribution_lie_far_apart_and_the_null_knows():
    """About 660 for 100 against 100 of 512 features; its null, and so its excess, do not care."""
    found = frechet_distance(draw(100, 512, 1), draw(100, 512, 2), permutations=19)
    assert 640 < found.value < 680
    assert abs(found.excess) < 10
    assert found.notes == (
        "100 examples of 512 features: their covariance does not have full rank",
    )


@pytest.mark.parametrize(("fewest", "short"), [(8, True), (9, False)])
def test_n_examples_have_a_covariance_of_rank_n_less_1(fewest, short):
    source = draw(fewest, 8, 1)
    assert (np.linalg.matrix_rank(np.cov(source.T)) < 8) == short
    found = frechet_distance(source, draw(30, 8, 2), permutations=19)
    assert (
        found.notes
        == ("8 examples of 8 features: their covariance does not have full rank",) * short
    )


def test_what_a_covariance_alone_shows():
    source, target = draw(60, 4, 1), draw(60, 4, 2) * [1, 1, 1, 3]
    assert frechet_distance(source, target).p == 1 / 200
