"""Accuracy without labels: thresholds by hand, the identity of recalls, and what each note says."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from flaxtransfer.shift.accuracy import (
    AccuracyEstimate,
    ThresholdedConfidence,
    accuracy_without_labels,
    class_recall,
    negative_entropy,
    prevalence_weighted_recall,
)
from flaxtransfer.shift.calibration import Calibration, calibrate
from flaxtransfer.shift.prevalence import Prevalence

CONFIDENCE, ENTROPY = "ATC, maximum confidence", "ATC, negative entropy"
RECALL, DIFFERENCE = "prevalence-weighted recall", "difference of confidences"
MEANS = np.array([[1.5, 0.0, 0.3], [0.0, 1.5, -0.4], [-1.0, -0.6, 1.2]])


def drawn(count, shares, seed=0):
    """Logits of the true probabilities (at equal shares) of Gaussian classes, and labels."""
    random = np.random.default_rng(seed)
    labels = random.choice(3, count, p=shares)
    images = MEANS[labels] + random.normal(size=(count, 3))
    return images @ MEANS.T - (MEANS**2).sum(1) / 2, labels


def source_of(probabilities, labels, method="temperature"):
    classes = np.shape(probabilities)[1]
    return Calibration(
        method, np.ones(classes), np.zeros(classes), np.asarray(probabilities), np.asarray(labels)
    )


def prevalence_of(shares, half=np.nan, **more):
    shares = np.asarray(shares, float)
    even = np.full(len(shares), 1 / len(shares))
    return Prevalence("known", shares, shares - half, shares + half, 0.95, even, (9, 9), **more)


@pytest.mark.parametrize(
    ("scores", "right", "target", "threshold", "expected"),
    [
        # One error of four: between the two smallest scores.
        ([0.5, 0.6, 0.8, 0.9], [1, 0, 1, 1], [0.54, 0.56, 0.9], (0.55, 1.0), 2 / 3),
        # No error: the smallest score, itself right.
        ([0.6, 0.5, 0.8], [1, 1, 1], [0.4, 0.5, 0.9], (0.5, 1.0), 2 / 3),
        # Errors alone: the largest score, itself wrong.
        ([0.6, 0.5, 0.8], [0, 0, 0], [0.7, 0.8, 0.9], (0.8, 0.0), 1 / 3),
        # Two errors, and four scores at the threshold: one of these four is an error.
        ([0.3, 0.7, 0.7, 0.7, 0.7], [0, 0, 1, 1, 1], [0.7, 0.2], (0.7, 0.75), 0.375),
        # All alike: the source's accuracy.
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 0], [1.0, 1.0], (1.0, 0.75), 0.75),
        ([-0.1], [1], [-0.2, -0.1], (-0.1, 1.0), 0.5),
    ],
)
def test_thresholds_by_hand(scores, right, target, threshold, expected):
    found = ThresholdedConfidence(np.array(scores), np.array(right), np.array(target))
    assert found.threshold() == pytest.approx(threshold)
    assert found.estimate() == pytest.approx(expected)


SCORES = st.lists(
    st.tuples(st.sampled_from([0.4, 0.5, 0.5 + 2**-53, 0.7, 1.0]), st.booleans()), min_size=1
)


@given(SCORES)
def test_a_source_that_is_its_own_target_has_its_accuracy(pairs):
    scores, right = (np.array(column) for column in zip(*pairs, strict=True))
    found = ThresholdedConfidence(scores, right, scores)
    assert found.estimate() == pytest.approx(right.mean(), abs=1e-12)


@given(SCORES, SCORES, st.data())
def test_weights_are_repetitions(pairs, others, data):
    scores, right = (np.array(column) for column in zip(*pairs, strict=True))
    target = np.array([score for score, _ in others])
    count = st.integers(0, 3)
    weights = np.array(data.draw(st.lists(count, min_size=len(scores), max_size=len(scores))))
    again = np.array(data.draw(st.lists(count, min_size=len(target), max_size=len(target))))
    weights[0] += 1
    again[0] += 1
    repeated = ThresholdedConfidence(
        np.repeat(scores, weights), np.repeat(right, weights), np.repeat(target, again)
    )
    weighted = ThresholdedConfidence(scores, right, target)
    assert weighted.estimate(weights, again) == pytest.approx(repeated.estimate(), abs=1e-12)


def test_the_entropy_has_one_rounding_for_all_orders():
    probabilities = softmax(np.random.default_rng(0).normal(size=(50, 7)), axis=1)
    found = negative_entropy(probabilities)
    np.testing.assert_array_equal(found, negative_entropy(probabilities[:, ::-1]))
    np.testing.assert_allclose(found, (probabilities * np.log(probabilities)).sum(1))
    assert negative_entropy(np.array([[0.0, 1.0]])).tolist() == [0]


def test_a_target_that_is_the_source_has_its_accuracy():
    logits, labels = drawn(400, [0.4, 0.3, 0.3])
    source = calibrate(logits, labels)
    shares = np.bincount(labels) / 400
    found = accuracy_without_labels(
        source, source.probabilities, prevalence_of(shares), replicates=50
    )
    for name in (CONFIDENCE, ENTROPY, DIFFERENCE, RECALL):
        assert found[name].value == pytest.approx(found.source_accuracy, abs=1e-12)
        assert found[name].low < found.source_accuracy < found[name].high
    assert found.notes == (
        "the prevalence has no intervals: the recall's interval treats it as known",
    )


def test_the_recalls_are_the_accuracy_under_label_shift():
    logits, labels = drawn(500, [0.3, 0.3, 0.4])
    source = calibrate(logits, labels)
    # Label shift without sampling: the validation examples themselves, each class repeated.
    times = np.array([5, 1, 2])[labels]
    shares = np.bincount(labels, times) / times.sum()
    predicted = source.probabilities.argmax(1)
    accuracy = (np.repeat(predicted, times) == np.repeat(labels, times)).mean()
    found = prevalence_weighted_recall(source, prevalence_of(shares), replicates=50)
    assert found.value == pytest.approx(accuracy, abs=1e-12)
    assert found.value != pytest.approx((predicted == labels).mean(), abs=1e-3)


def test_what_the_other_estimates_are():
    source = source_of([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]], [0, 1, 1, 1])
    target = [[0.95, 0.05], [0.35, 0.65]]
    found = accuracy_without_labels(source, target, replicates=20)
    assert found["average confidence"].value == pytest.approx(0.8)
    # 3 of 4 right at a mean confidence of 0.75.
    assert found[DIFFERENCE].value == pytest.approx(0.8)
    # The least sure of the source has 0.6, the next 0.7: 0.65 is at the threshold between them.
    assert found[CONFIDENCE].value == 1
    # And under it by entropy, for the threshold is midway between scores, whatever they are.
    assert found[ENTROPY].value == 0.5
    assert (found.lowest, found.highest) == (0.5, 1)
    with pytest.raises(KeyError, match=r"must be one of 'ATC, maximum confidence'.*, got 'ATC'"):
        found["ATC"]


def test_accuracies_stay_accuracies():
    source = source_of([[0.5, 0.5], [0.5, 0.5]], [0, 0])
    found = accuracy_without_labels(source, [[1.0, 0.0]], replicates=20)
    assert found[DIFFERENCE].value == 1


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 100))
def test_classes_have_no_order(order, seed):
    source = source_of(
        softmax(drawn(60, [0.2, 0.5, 0.3], seed)[0], 1), drawn(60, [0.2, 0.5, 0.3], seed)[1]
    )
    target = softmax(drawn(40, [0.6, 0.2, 0.2], seed + 1)[0], axis=1)
    shares = np.array([0.6, 0.3, 0.1])
    found = accuracy_without_labels(source, target, prevalence_of(shares), replicates=5)
    other = accuracy_without_labels(
        source_of(source.probabilities[:, order], np.argsort(order)[source.labels]),
        target[:, order],
        prevalence_of(shares[order]),
        replicates=5,
    )
    for mine, theirs in zip(found.estimates, other.estimates, strict=True):
        assert theirs.value == pytest.approx(mine.value, abs=1e-12)
        assert (theirs.low, theirs.high) == pytest.approx((mine.low, mine.high), abs=1e-12)


def test_a_class_without_validation_examples_has_no_recall():
    logits, labels = drawn(300, [0.5, 0.5, 0.0])
    source = calibrate(logits, labels)
    recall = class_recall(source)
    assert np.isnan(recall).tolist() == [False, False, True]
    found = accuracy_without_labels(source, source.probabilities, prevalence_of([0.5, 0.3, 0.2]))
    estimate = found[RECALL]
    assert estimate.value is None
    known = 0.5 * recall[0] + 0.3 * recall[1]
    assert f"between {known:.4f} and {known + 0.2:.4f}" in estimate.not_available
    assert estimate.low < known < known + 0.2 < estimate.high <= 1
    assert "1 class(es) have no validation example" in found.notes
    # Where the class does not occur, nothing is missing.
    assert prevalence_weighted_recall(source, prevalence_of([0.5, 0.5, 0.0])).value is not None


def test_the_interval_knows_the_prevalences():
    logits, labels = drawn(300, [0.3, 0.3, 0.4])
    source = calibrate(logits, labels)
    known = prevalence_weighted_recall(source, prevalence_of([0.2, 0.7, 0.1]))
    guessed = prevalence_weighted_recall(source, prevalence_of([0.2, 0.7, 0.1], half=0.3))
    assert guessed.value == known.value
    assert guessed.high - guessed.low > known.high - known.low


def test_two_shares_keep_their_spread():
    # Shares 0.5 +- 0.1 with recalls 1 and 0: the accuracy is the first share.
    source = source_of([[0.9, 0.1]] * 40, [0] * 20 + [1] * 20)
    found = prevalence_weighted_recall(source, prevalence_of([0.5, 0.5], half=0.1), replicates=1000)
    assert (found.low, found.high) == (pytest.approx(0.4, abs=0.015), pytest.approx(0.6, abs=0.015))


def test_what_is_not_identifiable_has_no_value():
    source = source_of([[0.5, 0.5]] * 4, [0, 1, 0, 1])
    unknown = prevalence_of([0.5, 0.5], identifiable=False, reason="no information")
    found = accuracy_without_labels(source, [[0.5, 0.5]], unknown, replicates=5)
    assert (found[RECALL].value, found[RECALL].low) == (None, None)
    assert "no information" in str(found)


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (
            source_of([[0.8, 0.2]] * 4, [0] * 4),
            [[0.7, 0.3]],
            "example is predicted correctly",
        ),
        (source_of([[0.8, 0.2]] * 4, [0, 1] * 2, "none"), [[0.7, 0.3]], "not calibrated"),
        (source_of([[0.8, 0.2]] * 4, [0, 1] * 2), [[0.7, 0.3]], "without a prevalence"),
    ],
)
def test_what_a_reader_has_to_know(source, target, text):
    found = accuracy_without_labels(source, target, replicates=5)
    assert any(text in note for note in found.notes)


def test_estimates_that_exclude_each_other_are_named():
    logits, labels = drawn(600, [0.4, 0.3, 0.3])
    source = calibrate(logits, labels)
    target = source.apply(logits / 20)
    found = accuracy_without_labels(source, target, prevalence_of([0.4, 0.3, 0.3]), replicates=100)
    assert f"{RECALL!r} differ by more than chance" in found.notes[-1]
    assert found.highest - found.lowest > 0.2


def test_the_average_confidence_excludes_no_other():
    # Sure of everything and right in 7 of 10: all the others say 0.7 of the same examples.
    source = source_of([[0.99, 0.01]] * 100, [0] * 70 + [1] * 30)
    found = accuracy_without_labels(source, source.probabilities, replicates=100)
    average = found["average confidence"]
    assert average.low > max(each.high for each in found.estimates if each is not average)
    assert not any("differ by more than chance" in note for note in found.notes)


def test_a_table_to_read_and_numbers_for_json():
    logits, labels = drawn(300, [0.4, 0.3, 0.3])
    source = calibrate(logits, labels)
    target = source.apply(drawn(200, [0.7, 0.2, 0.1], 1)[0])
    found = accuracy_without_labels(source, target, prevalence_of([0.7, 0.2, 0.1], 0.05))
    text = str(found)
    lines = text.splitlines()
    assert lines[0].startswith("accuracy without labels, 200 target example(s)")
    assert all(each.name in text and each.assumes in text for each in found.estimates)
    assert f"{found.lowest:.4f} to {found.highest:.4f}" in text
    assert json.loads(json.dumps(dataclasses.asdict(found)))["counts"] == [300, 200]
    again = accuracy_without_labels(source, target, prevalence_of([0.7, 0.2, 0.1], 0.05))
    assert again == found


@pytest.mark.parametrize(
    ("target", "shares", "more", "text"),
    [
        ([[0.2, 0.3, 0.5]], None, {}, "must have the same number of columns, got 2 and 3"),
        ([[2.0, 3.0]], None, {}, "must sum to 1 per row"),
        ([[0.5, 0.5]], [0.2, 0.3, 0.5], {}, "must have the source's 2 classes, got 3"),
        ([[0.5, 0.5]], None, {"replicates": 0}, "replicates must be a whole number >= 1, got 0"),
        ([[0.5, 0.5]], None, {"level": 95}, "level must be between 0 and 1, got 95"),
    ],
)
def test_what_has_no_answer(target, shares, more, text):
    source = source_of([[0.8, 0.2]] * 4, [0, 1] * 2)
    prevalence = None if shares is None else prevalence_of(shares)
    with pytest.raises(ValueError, match=text):
        accuracy_without_labels(source, target, prevalence, **more)


def test_an_estimate_without_a_value_says_why():
    with pytest.raises(ValueError, match="exactly one of value and not_available must be given"):
        AccuracyEstimate("ATC", None, None, None, "")


@pytest.mark.slow
def test_intervals_cover_the_accuracy_under_label_shift():
    even, shares = np.full(3, 1 / 3), np.array([0.6, 0.25, 0.15])
    many, truth = drawn(200_000, shares, 10_000)
    covered = {}
    for seed in range(100):
        logits, labels = drawn(500, even, seed)
        source = calibrate(logits, labels)
        counts = np.bincount(drawn(400, shares, seed + 500)[1], minlength=3) / 400
        half = 1.96 * np.sqrt(counts * (1 - counts) / 400)
        target = source.apply(drawn(400, shares, seed + 500)[0])
        found = accuracy_without_labels(
            source, target, prevalence_of(counts, half), replicates=100, seed=seed
        )
        accuracy = (source.apply(many).argmax(1) == truth).mean()
        for each in found.estimates:
            covered.setdefault(each.name, []).append(each.low <= accuracy <= each.high)
    # The recalls are right here, the others nearly so.
    assert np.mean(covered[RECALL]) >= 0.9
    assert np.mean(covered[CONFIDENCE]) >= 0.85
    assert np.mean(covered[DIFFERENCE]) >= 0.85
