"""The minimum in a box: against corners found by hand, and dense against conjugate gradients."""

import numpy as np
import pytest

from flaxtransfer.shift import calibration
from flaxtransfer.shift.optimize import minimize

MATRIX = np.array([[2.0, 1.8], [1.8, 2.0]])


class Quadratic:
    """(x - c)' A (x - c) / 2, with its Hessian or with products alone."""

    def __init__(self, point, center, dense):
        self.gradient = MATRIX @ (point - center)
        self.value = float((point - center) @ self.gradient / 2)
        self.dense = dense

    def hessian(self):
        return MATRIX if self.dense else None

    def hessian_product(self, direction):
        return MATRIX @ direction

    def diagonal(self):
        return np.diag(MATRIX)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("center", "expected"),
    [
        ([0.5, 0.25], [0.5, 0.25]),
        # At x = 0 the slope of y ends where 2 (y - 0.5) = 1.8.
        ([-1.0, 0.5], [0.0, 0.0]),
        ([-1.0, 1.5], [0.0, 0.6]),
        ([5.0, 5.0], [1.0, 1.0]),
    ],
)
def test_the_minimum_in_the_unit_square(center, expected, dense):
    found = minimize(
        lambda point: Quadratic(point, np.array(center), dense),
        np.array([0.9, 0.1]),
        lower=np.zeros(2),
        upper=np.ones(2),
        units=np.ones(2),
    )
    np.testing.assert_allclose(found.point, expected, atol=1e-8)
    assert found.gradient_norm <= 1e-8


def test_a_function_that_falls_for_ever_still_has_a_long_step():
    class Falling:
        def __init__(self, point):
            self.value = float(np.exp(-point[0]))
            self.gradient = -np.exp(-point)

        def hessian(self):
            return np.diag(-self.gradient)

    bounds = np.full(1, np.inf)
    found = minimize(Falling, np.zeros(1), lower=-bounds, upper=bounds, units=np.ones(1))
    assert found.gradient_norm <= 1e-8
    assert found.step[0] == pytest.approx(1)


def test_what_is_not_reached_is_said():
    found = minimize(
        lambda point: Quadratic(point, np.array([-1.0, -1.0]), False),
        np.ones(2),
        lower=np.full(2, -np.inf),
        upper=np.full(2, np.inf),
        units=np.ones(2),
        max_iterations=0,
    )
    assert found.gradient_norm == pytest.approx(np.linalg.norm(MATRIX @ [2.0, 2.0]))


@pytest.mark.parametrize("form", ["temperature", "bias_corrected", "vector"])
@pytest.mark.parametrize("absent", [False, True])
def test_products_with_the_hessian_are_the_hessian(form, absent, monkeypatch):
    random = np.random.default_rng(0)
    labels = random.integers(4 if absent else 5, size=200)
    logits = random.normal(size=(200, 5))
    logits[np.arange(200), labels] += 1
    logits -= logits.mean(1, keepdims=True)
    likelihood = calibration._Likelihood(logits, labels, form)
    size = {"temperature": 1, "bias_corrected": 6, "vector": 10}[form]
    place = random.normal(0, 0.3, size)
    local = likelihood.at(place)
    dense = local.hessian()
    np.testing.assert_allclose(
        dense, [local.hessian_product(row) for row in np.eye(size)], atol=1e-14
    )
    # By differences: the gradient is that of the value, and the Hessian that of the gradient,
    # which pins the biases' sum besides.
    step = 1e-6
    ends = [
        (likelihood.at(place + step * row), likelihood.at(place - step * row))
        for row in np.eye(size)
    ]
    slopes = [(up.value - down.value) / (2 * step) for up, down in ends]
    np.testing.assert_allclose(local.gradient, slopes, atol=1e-8)
    curves = np.array([(up.gradient - down.gradient) / (2 * step) for up, down in ends])
    pinned = np.zeros((size, size))
    if form != "temperature":
        pinned[-5:, -5:] = 1 / 5
    np.testing.assert_allclose(dense, curves + pinned, atol=1e-8)

    found = calibration.fit_scaling(logits, labels, form)
    monkeypatch.setattr(calibration, "_DENSE_PARAMETERS", 0)
    by_products = calibration.fit_scaling(logits, labels, form)
    assert by_products.gradient_norm <= 1e-8
    np.testing.assert_allclose(by_products.scale, found.scale, atol=1e-5)
    np.testing.assert_allclose(by_products.bias, found.bias, atol=1e-5)
