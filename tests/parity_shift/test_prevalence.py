"""Prevalence against quapy, abstention and cvxpy on the same arrays."""

import warnings

import cvxpy
import numpy as np
import pytest
from scipy.special import softmax

from flaxtransfer.shift.confusion import (
    joint_confusion,
    mean_prediction,
    regularization_radius,
    regularized_weights,
    solve_confusion,
)
from flaxtransfer.shift.likelihood import maximize_likelihood

with warnings.catch_warnings():
    # abstention imports scipy.misc, and quapy what it finds.
    warnings.simplefilter("ignore")
    from abstention.label_shift import (
        BBSEImbalanceAdapter,
        EMImbalanceAdapter,
        RLLSImbalanceAdapter,
    )
    from quapy.method.aggregative import ACC, EMQ

pytestmark = pytest.mark.parity_shift

CASES = [(3, 2.0, 0), (5, 1.5, 1), (10, 2.5, 2)]


def problem(classes, separation, seed):
    """Exact posteriors of Gaussian classes: validation, labels, target of other prevalence."""
    random = np.random.default_rng(seed)
    centers = separation * random.normal(size=(classes, 6)) / 2
    prior, shares = random.dirichlet(np.full(classes, 5)), random.dirichlet(np.full(classes, 2))

    def draw(prevalence, count):
        labels = random.choice(classes, size=count, p=prevalence)
        inputs = centers[labels] + random.normal(size=(count, 6))
        scores = inputs @ centers.T - np.square(centers).sum(1) / 2 + np.log(prior)
        return softmax(scores, axis=1), labels

    validation, labels = draw(prior, 900)
    target, _ = draw(shares, 700)
    return validation, labels, target


@pytest.mark.parametrize("case", CASES)
def test_maximum_likelihood_is_quapys(case, monkeypatch):
    validation, _, target = problem(*case)
    monkeypatch.setattr(EMQ, "MAX_ITER", 100_000)
    theirs, _ = EMQ.EM(validation.mean(0), target, epsilon=1e-12)
    ours = maximize_likelihood(target, validation.mean(0), tolerance=1e-10)
    assert ours.gap <= 1e-10
    np.testing.assert_allclose(ours.estimate, theirs, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_maximum_likelihood_is_abstentions_without_a_factory(case):
    validation, _, target = problem(*case)
    adapter = EMImbalanceAdapter(max_iterations=20_000, tolerance=1e-12)
    theirs = adapter(tofit_initial_posterior_probs=target, valid_posterior_probs=validation)
    ours = maximize_likelihood(target, validation.mean(0), tolerance=1e-10)
    np.testing.assert_allclose(ours.estimate, theirs.multipliers * validation.mean(0), atol=1e-6)


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_raw_black_box_is_abstentions_and_quapys(case, hard):
    validation, labels, target = problem(*case)
    found = solve_confusion(target, validation, labels, hard=hard)
    one_hot = np.eye(case[0])[labels]
    theirs = BBSEImbalanceAdapter(soft=not hard)(one_hot, target, validation)
    # Abstention sets negative weights to zero and leaves the others as they are.
    np.testing.assert_allclose(
        np.maximum(found.raw, 0), theirs.multipliers * found.frequency, atol=1e-9
    )
    adjusted = ACC.solve_adjustment(
        found.matrix / found.frequency, found.predicted, "inversion", "exact-raise"
    )
    np.testing.assert_allclose(found.raw, adjusted, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_black_box_on_the_simplex_is_cvxpys(case):
    validation, labels, target = problem(*case)
    found = solve_confusion(target[:40], validation, labels)
    conditional = found.matrix / found.frequency
    shares = cvxpy.Variable(case[0])
    goal = cvxpy.sum_squares(conditional @ shares - found.predicted)
    solve(cvxpy.Problem(cvxpy.Minimize(goal), [shares >= 0, cvxpy.sum(shares) == 1]))
    np.testing.assert_allclose(found.estimate, shares.value, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_regularized_weights_are_cvxpys(case, hard, alpha):
    validation, labels, target = problem(*case)
    matrix = joint_confusion(validation, labels, hard=hard)
    difference = mean_prediction(target, hard=hard) - mean_prediction(validation, hard=hard)
    strength = alpha * regularization_radius(case[0], len(labels))
    change = cvxpy.Variable(case[0])
    # quapy's and abstention's problem. The solver's tolerance is absolute: a thousandfold goal lets
    # it go on where ten classes make the minimum flat, and it would stop 1.5e-5 before it.
    goal = cvxpy.norm(matrix @ change - difference) + strength * cvxpy.norm(change)
    solve(cvxpy.Problem(cvxpy.Minimize(1000 * goal), [change >= -1]))
    found = regularized_weights(matrix, difference, strength)

    def loss(weights):
        apart = np.linalg.norm(matrix @ (weights - 1) - difference)
        return apart + strength * np.linalg.norm(weights - 1)

    assert loss(found) <= loss(1 + change.value) + 1e-12
    np.testing.assert_allclose(found, 1 + change.value, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_regularized_weights_are_abstentions(case):
    validation, labels, target = problem(*case)
    one_hot = np.eye(case[0])[labels]
    with warnings.catch_warnings():
        # It multiplies matrices by "*".
        warnings.simplefilter("ignore")
        theirs = RLLSImbalanceAdapter(soft=True, alpha=0.01)(one_hot, target, validation)
    matrix = joint_confusion(validation, labels)
    difference = target.mean(0) - validation.mean(0)
    strength = 0.01 * regularization_radius(case[0], len(labels))
    # As near as its solver's own tolerance.
    np.testing.assert_allclose(
        regularized_weights(matrix, difference, strength), theirs.multipliers, atol=1e-4
    )


def solve(given):
    with warnings.catch_warnings():
        # "May be inaccurate": it could not prove the last of eleven digits.
        warnings.simplefilter("ignore")
        given.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
