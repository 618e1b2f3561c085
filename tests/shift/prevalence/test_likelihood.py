"""Maximum likelihood of prevalence against arithmetic, a bisection, and QuaPy's numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import softmax

from flaxtransfer.shift.likelihood import information, likelihood_pass, maximize_likelihood
from flaxtransfer.shift.optimize import nonnegative_quadratic, simplex_least_squares

# python -c "import numpy as np; from quapy.method.aggregative import EMQ; EMQ.MAX_ITER = 10**6;
# P = np.array([[(i * j + i * i) % 11 + 1 for j in (1, 3, 4)] for i in range(1, 15)], float);
# P /= P.sum(1, keepdims=True); print(EMQ.EM(np.array([.3, .3, .4]), P, epsilon=1e-14)[0])"
# quapy 0.2.3
QUAPY = [0.037352794, 0.962647206, 0.0]


def draw(count, classes, separation, seed):
    """Exact posteriors of Gaussian classes on a shifted target, and the prior."""
    random = np.random.default_rng(seed)
    prior = random.dirichlet(np.full(classes, 2.0))
    shares = random.dirichlet(np.full(classes, 1.0))
    centers = separation * random.normal(size=(classes, 5))
    labels = random.choice(classes, size=count, p=shares)
    inputs = centers[labels] + random.normal(size=(count, 5))
    scores = inputs @ centers.T - np.square(centers).sum(1) / 2 + np.log(prior)
    return softmax(scores, axis=1), prior


def test_certain_posteriors_give_the_histogram_at_once():
    found = maximize_likelihood(np.eye(3)[[0, 0, 1, 2, 2, 2]], np.array([0.2, 0.5, 0.3]))
    np.testing.assert_allclose(found.estimate, [2 / 6, 1 / 6, 3 / 6], atol=1e-15)
    assert (found.passes, found.gap) == (2, pytest.approx(0, abs=1e-15))


def test_the_source_has_its_own_prior_at_once():
    probabilities, _ = draw(200, 4, 1.0, 0)
    found = maximize_likelihood(probabilities, probabilities.mean(0))
    np.testing.assert_allclose(found.estimate, probabilities.mean(0), atol=1e-15)
    assert found.passes == 1
    assert found.log_likelihood == 0


def test_two_classes_are_a_bisection_of_the_score():
    probabilities, prior = draw(500, 2, 0.4, 3)
    ratios = probabilities / prior

    def score(share):
        return ((ratios[:, 0] - ratios[:, 1]) / (ratios @ [share, 1 - share])).sum()

    found = maximize_likelihood(probabilities, prior, tolerance=1e-10)
    assert found.estimate[0] == pytest.approx(brentq(score, 1e-9, 1 - 1e-9, xtol=1e-14), abs=1e-8)


def test_the_maximum_is_quapys():
    numbers = [[(i * j + i * i) % 11 + 1 for j in (1, 3, 4)] for i in range(1, 15)]
    probabilities = np.array(numbers, float)
    probabilities /= probabilities.sum(1, keepdims=True)
    found = maximize_likelihood(probabilities, np.array([0.3, 0.3, 0.4]), tolerance=1e-10)
    np.testing.assert_allclose(found.estimate, QUAPY, atol=1e-7)


@pytest.mark.parametrize("separation", [0.05, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("classes", [3, 20, 60])
def test_a_dozen_passes_are_enough_and_the_certificate_bounds_what_is_left(classes, separation):
    probabilities, prior = draw(400, classes, separation, classes)
    best = maximize_likelihood(probabilities, prior, tolerance=1e-10)
    assert best.gap <= 1e-10
    assert best.passes <= 14
    before = 0.0
    for passes in range(1, best.passes):
        early = maximize_likelihood(probabilities, prior, max_passes=passes)
        left = best.log_likelihood - early.log_likelihood
        assert -1e-12 <= left <= early.gap + 1e-12
        assert early.log_likelihood >= before - 1e-12
        before = early.log_likelihood


def test_weak_classifiers_are_where_the_usual_rule_stops_early():
    probabilities, prior = draw(400, 4, 0.1, 9)
    q, moved = prior, 1.0
    while moved > 1e-4:
        slopes = likelihood_pass(probabilities, q / prior)[1] / prior / 400
        q, moved = q * slopes, float(np.abs(q * slopes - q).mean())
    best = maximize_likelihood(probabilities, prior, tolerance=1e-10)
    assert np.abs(q - best.estimate).sum() > 0.03
    assert best.gap <= 1e-10


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.permutations(range(5)))
def test_the_order_of_classes_and_the_scale_of_rows_do_not_matter(seed, order):
    probabilities, prior = draw(60, 5, 0.8, seed)
    scale = np.random.default_rng(seed).uniform(0.1, 9, size=(60, 1))
    found = maximize_likelihood(probabilities, prior, tolerance=1e-10)
    other = maximize_likelihood(
        (probabilities * scale)[:, order], prior[list(order)], tolerance=1e-10
    )
    ratios = found.estimate / prior
    there = np.zeros(5)
    there[list(order)] = other.estimate / prior[list(order)]
    # The densities are unique, and the shares too where the posteriors are independent.
    np.testing.assert_allclose(probabilities @ ratios, probabilities @ there, rtol=1e-4)


def test_weights_are_rows_and_counts_are_labels():
    probabilities, prior = draw(50, 3, 0.7, 2)
    weights = np.random.default_rng(0).integers(0, 4, 50)
    whole = maximize_likelihood(np.repeat(probabilities, weights, axis=0), prior, tolerance=1e-10)
    same = maximize_likelihood(probabilities, prior, weights=weights.astype(float), tolerance=1e-10)
    np.testing.assert_allclose(same.estimate, whole.estimate, atol=1e-6)
    # A label is a row that is certain.
    counts = np.array([2.0, 0.0, 5.0])
    rows = np.concatenate([probabilities, np.eye(3)[[0, 0, 2, 2, 2, 2, 2]]])
    whole = maximize_likelihood(rows, prior, tolerance=1e-10)
    same = maximize_likelihood(probabilities, prior, counts=counts, tolerance=1e-10)
    np.testing.assert_allclose(same.estimate, whole.estimate, atol=1e-6)


def test_single_precision_loses_nothing_but_its_rounding():
    probabilities, prior = draw(3000, 10, 0.5, 4)
    single = maximize_likelihood(probabilities.astype(np.float32), prior, tolerance=1e-10)
    assert single.gap <= 1e-10
    np.testing.assert_allclose(
        single.estimate,
        maximize_likelihood(probabilities, prior, tolerance=1e-10).estimate,
        atol=1e-5,
    )


def test_a_class_without_prior_plays_no_part():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.8, 0.0]])
    found = maximize_likelihood(probabilities, np.array([0.5, 0.5, 0.0]), tolerance=1e-10)
    other = maximize_likelihood(probabilities[:, :2], np.array([0.5, 0.5]), tolerance=1e-10)
    np.testing.assert_allclose(found.estimate, [*other.estimate, 0], atol=1e-9)


def test_information_times_shares_is_the_slope():
    probabilities, prior = draw(300, 6, 0.6, 5)
    q = np.random.default_rng(1).dirichlet(np.ones(6))
    matrix = information(probabilities, q / prior, prior)
    slopes = likelihood_pass(probabilities, q / prior)[1] / prior / 300
    np.testing.assert_allclose(matrix @ q, slopes, rtol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
def test_a_nonnegative_quadratic_is_at_its_minimum(seed, count, rank):
    random = np.random.default_rng(seed)
    root = random.normal(size=(rank, count)) * 10.0 ** random.uniform(-3, 3, size=count)
    matrix, vector = root.T @ root, root.T @ random.normal(size=rank)
    x = nonnegative_quadratic(matrix, vector)
    # With unit diagonals: slopes are zero where x is positive, and not negative elsewhere.
    scale = 1 / np.sqrt(np.diag(matrix))
    slope = (matrix @ x - vector) * scale
    assert (x >= 0).all()
    assert slope.min() >= -1e-5
    assert np.abs(slope[x > 0]).max(initial=0) <= 1e-5


@given(st.integers(0, 10_000), st.integers(2, 7))
def test_shares_on_the_simplex_are_no_worse_than_any_others(seed, classes):
    random = np.random.default_rng(seed)
    matrix = random.dirichlet(np.ones(classes), size=classes).T
    vector = random.dirichlet(np.ones(classes))
    found = simplex_least_squares(matrix, vector)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(1, abs=1e-12)
    least = np.square(matrix @ found - vector).sum()
    for other in random.dirichlet(np.full(classes, 0.5), size=50):
        for step in (1e-3, 1.0):
            there = found + step * (other - found)
            assert least <= np.square(matrix @ there - vector).sum() + 1e-12
