"""The door to estimates of prevalence: what it lets in, what it says, what it refuses."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import power_divergence

from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.checks import as_probability_rows
from flaxtransfer.shift.confusion import joint_confusion, regularized_weights, solve_confusion
from flaxtransfer.shift.likelihood import maximize_likelihood
from flaxtransfer.shift.prevalence import METHODS, Prevalence, estimate_prevalence
from flaxtransfer.shift.uncertainty import Sample, confusion_replicates, weakest_direction


def draw(prevalence, count, seed, separation=2.0):
    """Exact posteriors, relative to equal classes, of Gaussians at the corners of a simplex."""
    random = np.random.default_rng(seed)
    classes = len(prevalence)
    labels = random.choice(classes, size=count, p=prevalence)
    inputs = separation * np.eye(classes)[labels] + random.normal(size=(count, classes))
    return softmax(separation * inputs, axis=1), labels


def source_of(probabilities, labels):
    classes = probabilities.shape[1]
    return Calibration("none", np.ones(classes), np.zeros(classes), probabilities, labels)


def twins(probabilities):
    """The last two classes are indistinguishable."""
    first = probabilities[:, :1]
    return np.concatenate([first, (1 - first) / 2, (1 - first) / 2], 1)


SHARES = [0.6, 0.3, 0.1]
SOURCE = source_of(*draw(np.full(3, 1 / 3), 500, 0))
TARGET, LABELS = draw(SHARES, 800, 1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_shares_and_an_interval_around_them(method):
    found = estimate_prevalence(TARGET, SOURCE, method=method, replicates=200)
    np.testing.assert_allclose(found.estimate, SHARES, atol=0.06)
    assert (found.low <= SHARES).all()
    assert (found.high >= SHARES).all()
    assert (found.low <= found.estimate).all()
    assert (found.estimate <= found.high).all()
    assert found.estimate.sum() == pytest.approx(1, abs=1e-12)
    assert found.counts == (500, 800)
    assert (found.gap is not None) == (method in ("maximum_likelihood", "map"))


@pytest.mark.parametrize("method", ["maximum_likelihood", "bbse_soft", "bbse_hard", "rlls"])
def test_a_target_that_is_the_source_has_its_prevalence(method):
    # Labels whose frequency is the mean prediction, as a bias-corrected calibration's is.
    validation = np.array([[0.8, 0.2], [0.2, 0.8]] * 50)
    source = source_of(validation, np.array([0, 1, 0, 1, 0, 1, 0, 1, 1, 0] * 10))
    found = estimate_prevalence(validation, source, method=method, interval=None)
    np.testing.assert_allclose(found.estimate, [0.5, 0.5], atol=1e-12)
    assert np.isnan(found.low).all()


def test_numbers_of_jax_and_of_half_precision_do():
    whole = estimate_prevalence(TARGET, SOURCE)
    np.testing.assert_allclose(
        estimate_prevalence(jnp.array(TARGET), SOURCE).estimate, whole.estimate, atol=1e-5
    )
    half = estimate_prevalence(jnp.array(TARGET, jnp.float16), SOURCE)
    np.testing.assert_allclose(half.estimate, whole.estimate, atol=0.01)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"method": "em"}, "method must be one of maximum_likelihood, map, .*, got 'em'"),
        ({"interval": "exact"}, "must be one of auto, asymptotic, bootstrap, None, got 'exact'"),
        (
            {"method": "rlls", "interval": "asymptotic"},
            "interval of rlls must be one of auto, bootstrap, None, got 'asymptotic'",
        ),
        ({"level": 95}, "level must be between 0 and 1, got 95"),
        ({"tolerance": 0.0}, "tolerance must be >= 1e-12, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance must be >= 1e-12, got nan"),
        ({"replicates": 5}, "replicates must be >= 20, got 5"),
        ({"method": "map", "concentration": 0.5}, "each >= 1, got 0.5"),
        ({"method": "map", "concentration": [1.0, 2.0]}, "a number or 3 numbers"),
        ({"method": "rlls", "regularization": -1}, "regularization must be >= 0, got -1"),
        ({"method": "bbse_soft", "labeled": ([0], [0])}, "labeled must be None with bbse_soft"),
        ({"labeled": ([0, 0], [1, 1])}, "labeled rows must be different"),
        ({"labeled": ([800], [1])}, "labeled rows must be within 0 .. 799, got 1 outside"),
        ({"labeled": ([5], [3])}, "labels of the target must be within 0 .. 2, got 1 outside"),
        ({"labeled": ([5, 6], [1])}, r"labels of the target must have shape \[2\], got \[1\]"),
        ({"labeled": (np.arange(800), LABELS)}, "must have unlabeled rows .*, got none"),
        ({"probabilities": TARGET[:, :2]}, "must sum to 1 per row"),
        ({"probabilities": np.full((9, 4), 0.25)}, "same number of columns, got 4 and 3"),
        ({"probabilities": np.log(TARGET)}, "are they logits"),
        ({"probabilities": TARGET * np.nan}, "rows with NaN or infinite"),
        ({"probabilities": TARGET[:0]}, "must have shape"),
        (
            {"source": source_of(TARGET[:1], LABELS[:1])},
            "must have >= 2 validation examples, got 1",
        ),
    ],
)
def test_what_cannot_be_asked(changed, text):
    given = {"probabilities": TARGET, "source": SOURCE} | changed
    with pytest.raises(ValueError, match=text):
        estimate_prevalence(given.pop("probabilities"), given.pop("source"), **given)


def test_single_precision_is_neither_copied_nor_changed():
    large = np.tile(TARGET.astype(np.float32), (500, 1))
    assert as_probability_rows(large, "p") is large
    tracemalloc.start()
    estimate_prevalence(large, SOURCE, interval=None)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The blocks in hand are all there is besides: some at 100,000 numbers, one of 800,000.
    assert most < 3 * 800_000 * 8
    late = large.copy()
    late[-1, 0] = np.nan
    with pytest.raises(
        ValueError, match=r"target probabilities\[\d+:400000\] must be .*, got 1 of"
    ):
        estimate_prevalence(late, SOURCE, interval=None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["prior everywhere", "twins", "one row", "noise"])
def test_what_is_not_identifiable_is_said(method, case):
    validation, target = SOURCE.probabilities, TARGET
    labels = SOURCE.labels
    if case == "prior everywhere":
        validation, target = np.tile([0.2, 0.3, 0.5], (90, 1)), np.tile([0.2, 0.3, 0.5], (50, 1))
        labels = np.repeat([0, 1, 2], 30)
    elif case == "twins":
        validation, target = twins(validation), twins(target)
    elif case == "one row":
        target = TARGET[:1]
    else:
        random = np.random.default_rng(0)
        validation = np.array([0.2, 0.3, 0.5]) + 1e-4 * random.normal(size=(500, 3))
        target = np.array([0.2, 0.3, 0.5]) + 1e-4 * random.normal(size=(300, 3))
        validation /= validation.sum(1, keepdims=True)
        target /= target.sum(1, keepdims=True)
    if case == "one row" and method not in ("maximum_likelihood", "map"):
        # A confusion matrix cannot see that one prediction is no mean; the intervals are wide.
        return
    found = estimate_prevalence(target, source_of(validation, labels), method=method)
    assert not found.identifiable
    assert found.reason
    assert np.isnan(found.low).all()
    assert "NOT IDENTIFIABLE" in str(found)
    if case == "twins":
        assert found.confused == (1, 2)
        assert found.estimate[0] == pytest.approx(0.6, abs=0.1)


def test_labels_determine_what_a_model_cannot():
    source = source_of(twins(SOURCE.probabilities), SOURCE.labels)
    target = twins(TARGET)
    found = estimate_prevalence(target, source, labeled=(np.arange(200), LABELS[:200]))
    assert found.identifiable
    np.testing.assert_allclose(found.estimate, SHARES, atol=0.08)
    wide = found.high - found.low
    narrow = estimate_prevalence(target, source, labeled=(np.arange(600), LABELS[:600]))
    assert ((narrow.high - narrow.low) < wide).all()


def test_labeled_rows_count_once():
    found = estimate_prevalence(TARGET, SOURCE, labeled=(np.arange(50), LABELS[:50]))
    counts = np.bincount(LABELS[:50], minlength=3).astype(float)
    other = maximize_likelihood(TARGET[50:], SOURCE.prior, counts=counts)
    np.testing.assert_allclose(found.estimate, other.estimate, atol=1e-5)


def test_a_prior_draws_towards_equal_shares_and_vanishes_at_one():
    estimates = [
        estimate_prevalence(TARGET[:60], SOURCE, method="map", concentration=a).estimate
        for a in (1.0, 2.0, 1000.0)
    ]
    plain = estimate_prevalence(TARGET[:60], SOURCE).estimate
    np.testing.assert_allclose(estimates[0], plain, atol=1e-6)
    apart = [np.abs(estimate - 1 / 3).sum() for estimate in estimates]
    assert apart[0] > apart[1] > apart[2]
    # With one of each added to certain rows it is arithmetic: (count + 1) / (m + K).
    labels = np.arange(30) % 3
    certain = source_of(np.eye(3)[labels], labels)
    found = estimate_prevalence(np.eye(3)[[0, 0, 1]], certain, method="map")
    np.testing.assert_allclose(found.estimate, [3 / 6, 2 / 6, 1 / 6], atol=1e-9)
    assert found.notes == ("the intervals include the pseudo-examples of the prior",)
    bare = estimate_prevalence(np.eye(3)[[0, 0, 1]], certain, method="map", interval=None)
    assert bare.notes == ()


def test_the_likelihood_ratio_of_certain_rows_is_that_of_counts():
    # Twice the sum of n log(n / expected), the G statistic.
    labels = np.arange(30) % 3
    certain = source_of(np.eye(3)[labels], labels)
    counts = np.array([50, 30, 10])
    found = estimate_prevalence(np.eye(3)[np.repeat([0, 1, 2], counts)], certain)
    assert found.likelihood_ratio == pytest.approx(power_divergence(counts, lambda_=0).statistic)


def test_distance_and_diversity_of_shares_by_hand():
    found = Prevalence(
        "by hand",
        np.array([0.5, 0.5, 0]),
        np.full(3, np.nan),
        np.full(3, np.nan),
        0.95,
        np.array([0.2, 0.5, 0.3]),
        (9, 9),
    )
    assert found.total_variation == pytest.approx(0.3)
    assert found.effective_classes == pytest.approx(2)


def test_a_few_rows_of_a_large_target_determine_it():
    # Two rows of three are the prior, and of every sixth row of the target none is another.
    flat = np.tile([0.5, 0.5], (9000, 1))
    flat[1::3] = np.eye(2)[np.arange(3000) % 4 // 3]
    source = source_of(np.eye(2)[np.arange(100) % 2], np.arange(100) % 2)
    found = estimate_prevalence(flat, source)
    assert found.identifiable
    np.testing.assert_allclose(found.estimate, [0.75, 0.25], atol=1e-3)
    assert not estimate_prevalence(flat[::3], source).identifiable


def test_a_class_that_the_source_never_has_is_left_out_and_said():
    validation = np.insert(SOURCE.probabilities, 1, 0.0, axis=1)
    source = source_of(validation, np.array([0, 2, 3])[SOURCE.labels])
    target = np.insert(TARGET, 1, 0.0, axis=1)
    target[0] = [0, 1, 0, 0]
    found = estimate_prevalence(target, source)
    other = estimate_prevalence(TARGET[1:], SOURCE)
    np.testing.assert_allclose(np.delete(found.estimate, 1), other.estimate, atol=1e-6)
    np.testing.assert_allclose(np.delete(found.high, 1), other.high, atol=1e-3)
    assert (found.estimate[1], found.low[1], found.high[1]) == (0, 0, 0)
    assert "classes [1] have probability 0 throughout the validation" in found.notes[0]
    assert "and all of it in 1 rows" in found.notes[0]
    assert "have no validation label" in found.notes[1]


def test_a_confusion_matrix_with_a_hole_is_not_identifiable():
    absent = source_of(SOURCE.probabilities, np.minimum(SOURCE.labels, 1))
    found = estimate_prevalence(TARGET, absent, method="bbse_soft")
    assert found.reason == "classes [2] have no validation label, so no confusion rates"
    never = np.tile([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1]], (60, 1))
    found = estimate_prevalence(TARGET, source_of(never, np.arange(120) % 3), method="bbse_hard")
    assert found.reason == "classes [2] are never predicted on the validation"
    assert found.condition == np.inf


# Rows that predict class i for class j as often as the matrix says, by hand: q = (.5, .3, .2) gives
# predictions (.8 * .5 + .1 * .3 + .1 * .2, ...) = (.45, .33, .22).
RATES = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.2], [0.1, 0.1, 0.7]])


@pytest.mark.parametrize("hard", [False, True])
def test_three_classes_by_hand(hard):
    labels = np.repeat([0, 1, 2], 10)
    often = np.rint(10 * RATES).astype(int)
    predicted = np.concatenate([np.repeat([0, 1, 2], often[:, k]) for k in range(3)])
    target = np.repeat([0, 1, 2], [45, 33, 22])
    found = solve_confusion(np.eye(3)[target], np.eye(3)[predicted], labels, hard=hard)
    np.testing.assert_allclose(found.matrix, RATES / 3, atol=1e-12)
    np.testing.assert_allclose(found.raw, [0.5, 0.3, 0.2], atol=1e-12)
    np.testing.assert_allclose(found.estimate, [0.5, 0.3, 0.2], atol=1e-12)
    assert found.confused == (1, 2)
    # Not the transposed system, which has another solution.
    assert np.abs(np.linalg.solve(RATES.T, [0.45, 0.33, 0.22]) - found.raw).max() > 0.01


@pytest.mark.parametrize("hard", [False, True])
def test_the_weakest_direction_of_two_classes_by_hand(hard):
    # q = (f - b) / (a - b) with a, b the rates of predicting the first class; f, a and b are means.
    predicted = np.repeat([0, 1, 0, 1], [40, 10, 10, 40])
    target = np.repeat([0, 1], [104, 56])
    found = solve_confusion(
        np.eye(2)[target], np.eye(2)[predicted], np.repeat([0, 1], 50), hard=hard
    )
    a, b, f = 0.8, 0.2, 0.65
    q = (f - b) / (a - b)
    variance = f * (1 - f) / 160 + (q**2 * a * (1 - a) + (1 - q) ** 2 * b * (1 - b)) / 50
    # Of a direction of length 1: what one share gains the other loses.
    assert found.largest_error == pytest.approx(np.sqrt(2 * variance) / (a - b))


def test_counts_drawn_again_vary_as_shares_of_the_rows_do():
    drawn = confusion_replicates(TARGET, SOURCE, 4000, np.random.default_rng(0), hard=True)
    for values, rows in zip(drawn, (500, 800), strict=True):
        chances = values.mean(0)
        np.testing.assert_allclose(
            values.std(0), np.sqrt(chances * (1 - chances) / rows), rtol=0.06
        )


def test_negative_raw_shares_are_shown_and_not_used():
    source = source_of(np.array([[0.8, 0.2], [0.2, 0.8]] * 50), np.arange(100) % 2)
    target = np.tile([[0.9, 0.1], [0.95, 0.05]], (50, 1))
    found = estimate_prevalence(target, source, method="bbse_soft")
    # By hand: .8 q + .2 (1 - q) = .925.
    np.testing.assert_allclose(found.raw, [0.725 / 0.6, 1 - 0.725 / 0.6], atol=1e-12)
    np.testing.assert_allclose(found.estimate, [1, 0], atol=1e-9)
    assert "negative for 1 classes, such as -0.208 for class 1" in found.notes[0]
    # Singular values of ((.4, .1), (.1, .4)): .5 and .3.
    assert found.smallest_singular_value == pytest.approx(0.3)
    assert found.condition == pytest.approx(5 / 3)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9])
def test_a_difference_of_any_size_gives_weights_in_proportion(size):
    # |C t - d| + s |t| is homogeneous; a model that tells nothing has a matrix of rank 1 nearly.
    matrix = np.outer([0.3, 0.18, 0.34, 0.18], [0.28, 0.22, 0.28, 0.22])
    matrix += 1e-8 * np.random.default_rng(0).normal(size=(4, 4))
    difference = np.array([0.1, -0.15, 0.14, -0.09])
    whole = regularized_weights(matrix, difference, 0.0155) - 1
    part = regularized_weights(matrix, size * difference, 0.0155) - 1
    np.testing.assert_allclose(part / size, whole, rtol=1e-4, atol=1e-6)


def test_regularized_weights_end_at_the_black_box_and_at_one():
    matrix = joint_confusion(SOURCE.probabilities, SOURCE.labels)
    difference = TARGET.mean(0) - SOURCE.probabilities.mean(0)
    raw = np.linalg.solve(matrix, TARGET.mean(0))
    none = regularized_weights(matrix, difference, 0.0)
    np.testing.assert_allclose(none, raw, atol=1e-9)
    np.testing.assert_allclose(regularized_weights(matrix, difference, 1e-6), none, atol=1e-9)
    np.testing.assert_array_equal(regularized_weights(matrix, difference, 10.0), np.ones(3))
    sizes = [
        np.linalg.norm(regularized_weights(matrix, difference, strength) - 1)
        for strength in (0.0, *np.linspace(0.1, 0.35, 26), 10)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(np.round(sizes, 6))) >= 4


# cvxpy 1.9.3, Clarabel with tolerances of 1e-11: minimize norm(C t - d) + s norm(t) over t >= -1.
@pytest.mark.parametrize(
    ("difference", "strength", "cvxpy"),
    [
        ([0.25, -0.15, -0.1], 0.15, [2.21942446, 0.48920863, 0.0971223]),
        ([0.25, -0.15, -0.1], 0.2, [1.55515343, 0.69153698, 0.83477136]),
        ([0.35, -0.25, -0.1], 0.05, [2.62633878, 0.0, 0.10417594]),
        ([0.35, -0.25, -0.1], 0.15, [2.57568447, 0.0, 0.1787422]),
    ],
)
def test_regularized_weights_are_cvxpys(difference, strength, cvxpy):
    matrix = np.array([[0.3, 0.05, 0.1], [0.02, 0.2, 0.08], [0.05, 0.05, 0.15]])
    found = regularized_weights(matrix, np.array(difference), strength)
    np.testing.assert_allclose(found, cvxpy, atol=1e-6)


def test_an_estimate_prints_as_a_table():
    text = str(estimate_prevalence(TARGET, SOURCE))
    assert "prevalence by maximum likelihood: 800 target and 500 validation examples" in text
    assert "95% interval" in text
    assert len(text.splitlines()) == 6
    classes = 40
    labels = np.arange(400) % classes
    many = source_of(0.5 * np.eye(classes)[labels] + 0.5 / classes, labels)
    assert "and 20 smaller ones" in str(estimate_prevalence(many.probabilities, many))


def test_labels_alone_have_the_standard_error_of_a_share():
    # Rows say nothing, 80 labels do: sqrt(q (1 - q) / 80), along a direction of length 1.
    source = source_of(np.full((20, 2), 0.5), np.arange(20) % 2)
    labeled = np.array([60.0, 20.0])
    sample = Sample(np.full((100, 2), 0.5), source, labeled, np.zeros(2))
    maximum = maximize_likelihood(
        sample.probabilities, source.prior, counts=labeled, tolerance=1e-10
    )
    error, direction = weakest_direction(sample, maximum)
    assert error == pytest.approx(np.sqrt(2 * 0.75 * 0.25 / 80), rel=1e-4)
    np.testing.assert_allclose(np.abs(direction), np.sqrt(0.5))
