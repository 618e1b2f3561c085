"""Calibration against abstention, first-order conditions, simulated truths, and where it gives in.

The peer's numbers are abstention 0.1.3.1's, `TempScaling(bias_positions="all")` and
`VectorScaling()` with `lbfgs_kwargs={"options": {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000}}`
on the logits of `sines`, less their rows' means; the probabilities of the first three rows.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from flaxtransfer.shift.calibration import Calibration, _Likelihood, calibrate, logits_of

METHODS = ("none", "temperature", "bias_corrected", "vector")
FITTED = METHODS[1:]


def sines():
    """300 examples of 4 classes, 56 % of them right, by a formula that any program can repeat."""
    i = np.arange(300)
    labels = (i * i + i // 7) % 4
    logits = 2.5 * np.sin(1.3 * i[:, None] + 2.1 * np.arange(4) ** 2)
    logits[i, labels] += 1.5 + np.cos(i)
    logits[:, 1] += 0.8
    return logits, labels


def simulated(count, scale, bias, seed=0):
    """Logits that become the probabilities of their labels by this scale and bias."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (count, len(bias)))
    chances = softmax(logits * scale + bias, axis=1).cumsum(1)
    return logits, (chances < random.random((count, 1))).sum(1).clip(max=len(bias) - 1)


def separated(count=120, classes=3):
    labels = np.arange(count) % classes
    logits = np.sin(np.arange(count * classes, dtype=float)).reshape(count, classes)
    logits[np.arange(count), labels] += 4
    return logits, labels


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "temperature",
            [
                [0.291825, 0.357154, 0.248597, 0.102424],
                [0.314238, 0.286763, 0.080483, 0.318516],
                [0.53383, 0.088582, 0.062241, 0.315348],
            ],
        ),
        (
            "bias_corrected",
            [
                [0.350825, 0.248593, 0.310121, 0.09046],
                [0.389948, 0.201779, 0.095152, 0.31312],
                [0.610225, 0.050864, 0.064096, 0.274815],
            ],
        ),
        (
            "vector",
            [
                [0.349774, 0.247234, 0.319863, 0.083129],
                [0.388643, 0.197813, 0.100078, 0.313466],
                [0.581004, 0.045784, 0.072705, 0.300507],
            ],
        ),
    ],
)
def test_probabilities_are_those_of_abstention(method, expected):
    found = calibrate(*sines(), method=method)
    assert (found.method, found.notes) == (method, ())
    np.testing.assert_allclose(found.probabilities[:3], expected, atol=2e-5)


@pytest.mark.parametrize("method", FITTED)
def test_the_first_order_conditions_hold(method):
    logits, labels = sines()
    found = calibrate(logits, labels, method=method)
    assert found.gradient_norm <= 1e-8
    centered = logits - logits.mean(1, keepdims=True)
    moments = found.probabilities - np.eye(4)[labels]
    assert abs((moments * centered).mean(0).sum()) <= 1e-7
    if method != "temperature":
        np.testing.assert_allclose(found.prior, np.bincount(labels) / 300, atol=1e-8)
        assert found.bias.sum() == pytest.approx(0, abs=1e-12)
    if method == "vector":
        np.testing.assert_allclose((moments * centered).mean(0), 0, atol=1e-7)
    if method != "vector":
        assert np.ptp(found.scale) == 0


def test_the_loss_falls_with_every_larger_map():
    logits, labels = sines()
    losses = [
        -np.log(calibrate(logits, labels, method=method).probabilities[np.arange(300), labels])
        for method in METHODS
    ]
    none, temperature, corrected, vector = (loss.mean() for loss in losses)
    assert none > temperature > corrected > vector


def test_a_known_scale_and_bias_are_found():
    bias = np.array([0.8, -0.5, 0.1, -0.4])
    found = calibrate(*simulated(40_000, 0.4, bias))
    # Four standard errors, which are 0.004 for the scale and 0.02 for a bias.
    assert found.scale[0] == pytest.approx(0.4, abs=0.016)
    np.testing.assert_allclose(found.bias, bias, atol=0.08)


def test_known_scales_of_each_class_are_found():
    scale, bias = np.array([0.3, 0.6, 1.0, 0.5]), np.array([0.8, -0.5, 0.1, -0.4])
    logits, labels = simulated(40_000, scale, bias)
    # The true map is one of raw logits; with rows of mean 0 it is the one that can be found.
    logits -= logits.mean(1, keepdims=True)
    random = np.random.default_rng(1)
    chances = softmax(logits * scale + bias, axis=1).cumsum(1)
    labels = (chances < random.random((len(logits), 1))).sum(1).clip(max=3)
    found = calibrate(logits, labels, method="vector")
    np.testing.assert_allclose(found.scale, scale, atol=0.06)
    np.testing.assert_allclose(found.bias, bias, atol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_number_added_to_a_row_changes_nothing(method):
    logits, labels = sines()
    found = calibrate(logits, labels, method=method)
    moved = logits + 100 * np.cos(np.arange(300))[:, None]
    again = calibrate(moved, labels, method=method)
    np.testing.assert_allclose(again.probabilities, found.probabilities, atol=1e-7)
    np.testing.assert_allclose(found.apply(moved), found.probabilities, atol=1e-12)
    np.testing.assert_allclose(found.apply(logits_of(softmax(logits, 1))), found.probabilities)


@pytest.mark.parametrize("size", [1e-2, 1e5])
def test_the_size_of_the_logits_does_not_matter(size):
    logits, labels = sines()
    for method in FITTED:
        found = calibrate(logits, labels, method=method)
        other = calibrate(logits * size, labels, method=method)
        assert other.gradient_norm <= 1e-8
        np.testing.assert_allclose(other.probabilities, found.probabilities, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(4)), st.sampled_from(METHODS))
def test_classes_have_no_order(order, method):
    logits, labels = sines()
    found = calibrate(logits, labels, method=method)
    other = calibrate(logits[:, order], np.argsort(order)[labels], method=method)
    np.testing.assert_allclose(other.probabilities, found.probabilities[:, order], atol=1e-7)
    np.testing.assert_allclose(other.bias, found.bias[order], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.sampled_from(FITTED),
)
def test_every_validation_has_a_map_or_a_note(classes, seed, signal, method):
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 60))
    labels = random.integers(classes, size=count)
    labels[:2] = 0, 1
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), labels] += signal
    found = calibrate(logits, labels, method=method)
    assert np.isfinite(found.probabilities).all()
    assert ((found.scale > 0) & (found.scale <= 1000)).all()
    assert found.gradient_norm is None or found.gradient_norm <= 1e-8
    assert found.gradient_norm is not None or "all" in found.notes[-1] or len(found.notes) > 1
    if found.method == method and count < 10 * classes:
        assert method == "temperature"


def test_two_classes_have_one_scale():
    logits, labels = simulated(200, 0.5, np.array([0.3, -0.3]))
    vector = calibrate(logits, labels, method="vector")
    assert vector.method == "vector"
    np.testing.assert_allclose(vector.probabilities, calibrate(logits, labels).probabilities)


def test_few_examples_have_a_temperature_alone():
    logits, labels = sines()
    found = calibrate(logits[:39], labels[:39])
    assert found.method == "temperature"
    assert not found.bias.any()
    assert "39 validation examples are fewer than 10 for each of 4 classes" in found.notes[0]
    assert calibrate(logits[:40], labels[:40]).method == "bias_corrected"


@pytest.mark.parametrize("method", FITTED)
def test_validation_without_an_error_is_as_sure_as_the_rule_of_succession(method):
    found = calibrate(*separated(), method=method)
    assert found.method == "temperature"
    assert found.probabilities.max(1).mean() == pytest.approx(121 / 122, abs=1e-9)
    assert found.gradient_norm is None
    assert "all 120 validation examples are predicted correctly" in found.notes[-1]


def test_the_scale_of_separated_classes_is_bounded():
    logits, labels = separated()
    found = calibrate(1e-6 * logits, labels, method="temperature")
    assert found.scale[0] == 1000


def test_classes_that_biases_separate_have_a_temperature():
    logits, labels = separated()
    logits[:, 0] += 5
    found = calibrate(logits, labels)
    assert found.method == "temperature"
    assert "separated without an error" in found.notes[0]
    assert found.gradient_norm <= 1e-8


def test_a_class_that_its_own_logit_separates_has_no_scale_of_its_own():
    logits, labels = sines()
    logits[:, 2] = np.where(labels == 2, 9, -9)
    found = calibrate(logits, labels, method="vector")
    assert found.method == "bias_corrected"
    assert "because a class is separated without an error" in found.notes[0]


@pytest.mark.parametrize("method", ["bias_corrected", "vector"])
def test_an_absent_class_keeps_a_finite_bias(method):
    logits, labels = sines()
    there = labels != 2
    found = calibrate(logits[there], labels[there], method=method)
    assert "no validation example of 1 class(es): 2" in found.notes[0]
    # The penalty 1e-3 / 2 * distance ** 2 leaves 1e-3 * distance of the mean probability.
    distance = found.bias[[0, 1, 3]].mean() - found.bias[2]
    assert found.prior[2] == pytest.approx(1e-3 * distance, rel=1e-4)
    assert 0 < found.prior[2] < 0.01
    frequency = np.bincount(labels[there]) / there.sum()
    np.testing.assert_allclose(
        (frequency - found.prior)[[0, 1, 3]], found.prior[2] / 3, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("method", FITTED)
def test_logits_that_point_away_have_a_scale_at_its_lower_bound(method):
    logits, labels = simulated(400, -0.7, np.zeros(3))
    found = calibrate(logits, labels, method=method)
    assert (found.scale > 0).all()
    assert found.scale.max() < 1e-5
    assert "lower bound" in found.notes[0]


def test_logits_that_are_all_but_nothing_have_a_scale_at_its_upper_bound():
    # The scale that was simulated is 1e5 times what a scale may be.
    logits, labels = simulated(400, 1.0, np.zeros(3))
    found = calibrate(1e-8 * logits, labels, method="temperature")
    np.testing.assert_array_equal(found.scale, 1000)
    assert found.notes == ("the scale is at its upper bound, 1000: are these logits?",)


@pytest.mark.parametrize("form", ["temperature", "bias_corrected", "vector"])
def test_curvature_is_the_change_of_the_gradient_and_its_products_are_it(form):
    # Class 3 has no example, and the penalty is part of the curvature.
    logits, labels = sines()
    likelihood = _Likelihood(logits - logits.mean(1, keepdims=True), labels % 3, form)
    point = {"temperature": [0.7], "bias_corrected": [0.7, 0.3, -0.1, 0.2, 0.5]}.get(
        form, [0.7, 0.6, 0.9, 0.8, 0.3, -0.1, 0.2, 0.5]
    )
    point = np.array(point)
    here, hessian = likelihood.at(point), likelihood.at(point).hessian()
    for direction in np.eye(len(point)):
        np.testing.assert_allclose(here.hessian_product(direction), hessian @ direction, atol=1e-12)
        ahead, behind = (likelihood.at(point + step * direction) for step in (1e-5, -1e-5))
        slope = (ahead.value - behind.value) / 2e-5
        assert here.gradient @ direction == pytest.approx(slope, abs=1e-8)
        # One number added to all biases changes no likelihood, and costs in the curvature alone.
        bias = likelihood.expand(direction)[1]
        added = likelihood.reduce(np.zeros(4), np.full(4, bias.mean()))
        change = (ahead.gradient - behind.gradient) / 2e-5
        np.testing.assert_allclose(hessian @ direction, change + added, atol=1e-7)


def test_logits_without_information_have_the_frequencies():
    _, labels = sines()
    found = calibrate(np.zeros((300, 4)), labels)
    np.testing.assert_allclose(found.probabilities[0], np.bincount(labels) / 300, atol=1e-8)


def test_none_leaves_probabilities_as_they_are():
    logits, labels = sines()
    found = calibrate(logits, labels, method="none")
    np.testing.assert_allclose(found.probabilities, softmax(logits, axis=1), atol=1e-14)
    assert found.gradient_norm is None
    assert calibrate(logits, np.zeros(300), method="none").notes


def test_probabilities_given_as_logits_are_noticed():
    logits, labels = sines()
    probabilities = softmax(logits, axis=1)
    assert "logits_of" in calibrate(probabilities, labels).notes[0]
    found = calibrate(logits_of(probabilities), labels)
    assert not found.notes
    np.testing.assert_allclose(found.probabilities, calibrate(logits, labels).probabilities)


def test_arrays_of_jax():
    logits, labels = sines()
    found = calibrate(jnp.asarray(logits), jnp.asarray(labels))
    assert found.probabilities.dtype == np.float64
    assert isinstance(found, Calibration)
    np.testing.assert_allclose(
        found.probabilities, calibrate(logits, labels).probabilities, atol=1e-5
    )


@pytest.mark.parametrize(
    ("logits", "labels", "method", "text"),
    [
        (
            [[1.0, 0.0]] * 3,
            [0, 0, 0],
            "temperature",
            "must have >= 2 classes, got 3 labels of class 0",
        ),
        ([[1.0, 0.0]] * 3, [0, 1, 2], "temperature", "within 0 .. 1, got 1 outside of it"),
        ([[1.0, -np.inf]] * 3, [0, 1, 0], "temperature", "NaN or infinite"),
        (
            [[1.0, 0.0]] * 3,
            [0, 1, 0],
            "isotonic",
            "must be one of 'none', .*, got 'isotonic'",
        ),
    ],
)
def test_what_cannot_be_calibrated(logits, labels, method, text):
    with pytest.raises(ValueError, match=text):
        calibrate(logits, labels, method=method)


def test_apply_wants_as_many_classes():
    with pytest.raises(ValueError, match="logits must have one column per class, 4, got 3"):
        calibrate(*sines()).apply(np.zeros((2, 3)))
