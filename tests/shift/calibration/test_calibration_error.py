"""Scores by scikit-learn, errors by hand, by simulation and by the coverage of their intervals."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from flaxtransfer.shift.calibration_metrics import (
    ReliabilityBin,
    brier_score,
    calibration_error,
    debiased_errors,
    error_interval,
    expected_error,
    negative_log_likelihood,
)


def predicted(count, temperature, seed):
    """Probabilities, the true ones, and labels drawn from these."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (count, 5))
    true = softmax(logits, axis=1)
    labels = (true.cumsum(1) < random.random((count, 1))).sum(1).clip(max=4)
    return softmax(logits / temperature, axis=1), true, labels


def diagram(*rows):
    return [ReliabilityBin(n, confidence, right / n, 0, 1, 0, 1) for n, confidence, right in rows]


def test_scores_by_scikit_learn():
    probabilities, _, labels = predicted(200, 0.7, 0)
    nll = negative_log_likelihood(probabilities, labels)
    assert nll == pytest.approx(log_loss(labels, probabilities), abs=1e-12)
    by_definition = ((probabilities - np.eye(5)[labels]) ** 2).sum(1).mean()
    assert brier_score(probabilities, labels) == pytest.approx(by_definition, abs=1e-12)


def test_scores_of_scikit_learn_in_figures():
    # log_loss and brier_score_loss(scale_by_half=False) of scikit-learn 1.9.1.
    i = np.arange(300)
    labels = (i * i + i // 7) % 4
    logits = 2.5 * np.sin(1.3 * i[:, None] + 2.1 * np.arange(4) ** 2)
    logits[i, labels] += 1.5 + np.cos(i)
    logits[:, 1] += 0.8
    probabilities = softmax(logits, axis=1)
    found = calibration_error(probabilities, labels, replicates=50)
    assert found.nll == pytest.approx(1.3498971770688204, abs=1e-12)
    assert found.brier == pytest.approx(0.6153962843988214, abs=1e-12)


@pytest.mark.parametrize(
    ("probabilities", "nll", "brier"),
    [([[1.0, 0.0]], 0.0, 0.0), ([[0.0, 1.0]], np.inf, 2.0), ([[0.5, 0.5]], np.log(2), 0.5)],
)
def test_scores_at_the_ends(probabilities, nll, brier):
    assert negative_log_likelihood(probabilities, [0]) == nll
    assert brier_score(probabilities, [0]) == brier


def test_errors_by_hand():
    bins = diagram((20, 0.75, 10), (60, 0.9, 60))
    assert expected_error(bins) == pytest.approx((20 * 0.25 + 60 * 0.1) / 80)
    mean, root = debiased_errors(bins)
    # The second bin has no spread; the first loses 0.5 * 0.5 / 19 of its square.
    assert root == pytest.approx(np.sqrt((0.25**2 - 0.25 / 19) / 4 + 0.1**2 * 3 / 4))
    random = np.random.default_rng(0)
    drawn = np.abs(random.normal(0.25, np.sqrt(0.25 / 20), 400_000)).mean()
    assert mean == pytest.approx(2 * expected_error(bins) - drawn / 4 - 0.075, abs=2e-4)


def test_one_example_does_not_show_its_noise():
    found = calibration_error([[0.7, 0.3]], [0])
    assert (found.debiased, found.root_mean_square) == (None, None)
    assert found.expected == pytest.approx(0.3)
    assert (found.low, found.high > 0.6) == (0, True)
    assert "not known" in str(found)


def test_no_observed_error_is_no_proof():
    found = calibration_error([[0.9, 0.1]] * 50, [0] * 45 + [1] * 5)
    assert found.expected == pytest.approx(0, abs=1e-12)
    assert found.low == 0
    # 45 right of 50 are not surprising under probabilities 0.9 +- 0.1 or so.
    assert 0.08 < found.high < 0.2
    assert "1 of 15 bins" in found.notes[0]


def test_an_error_below_that_of_calibrated_models_has_an_upper_end():
    # Ten bins without any error are a chance of 1e-10 or so, and no proof: a true error as large as
    # what sampling makes of 0 lies in the interval.
    bins = diagram(*[(100, 0.75, 75)] * 10)
    noise = np.sqrt(0.75 * 0.25 / 100) * np.sqrt(2 / np.pi)
    low, high = error_interval(bins)
    assert low == 0
    assert noise / 2 < high < 2 * noise


def test_the_bias_of_the_error_is_taken_off():
    draws = [predicted(1000, 0.8, seed) for seed in range(30)]
    found, true = [], []
    for probabilities, chances, labels in draws:
        found.append(calibration_error(probabilities, labels, replicates=1))
        # Too sure in every bin, so that the error is the difference of the means.
        true.append((probabilities.max(1) - chances.max(1)).mean())
    debiased = np.mean([each.debiased for each in found]) - np.mean(true)
    plain = np.mean([each.expected for each in found]) - np.mean(true)
    assert abs(debiased) < 0.004 < 0.008 < plain


def test_an_overconfident_model_is_one():
    probabilities, _, labels = predicted(2000, 0.5, 1)
    found = calibration_error(probabilities, labels)
    assert found.confidence > found.accuracy + 0.1
    assert 0.1 < found.low < found.debiased < found.high < 0.22
    assert len(found.bins) == 15
    assert not found.notes
    numbers = json.loads(json.dumps(dataclasses.asdict(found)))
    assert numbers["bins"][0]["count"] == found.bins[0].count
    assert "2000 example(s)" in str(found)


def test_the_same_seed_gives_the_same_interval():
    probabilities, _, labels = predicted(300, 0.8, 2)
    first, again, other = (
        calibration_error(probabilities, labels, seed=seed, replicates=200) for seed in (0, 0, 1)
    )
    assert first == again
    assert first.low != other.low or first.high != other.high


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.8, 0.5, 2.0])
@pytest.mark.parametrize("count", [100, 1000])
def test_intervals_cover_the_error(count, temperature):
    covered, above = 0, 0
    for seed in range(120):
        probabilities, true, labels = predicted(count, temperature, seed)
        found = calibration_error(probabilities, labels, replicates=200, seed=seed)
        chances = true[np.arange(count), probabilities.argmax(1)]
        confidences = probabilities.max(1)
        error = 0.0
        for each in found.bins:
            inside = (confidences >= each.smallest) & (confidences <= each.largest)
            error += abs((confidences - chances)[inside].sum()) / count
        covered += found.low <= error + 1e-12 and error <= found.high
        above += found.low > error + 1e-12
    # Of 120 intervals of 95 %, 107 at least with a probability of 0.99; one side misses 2.5 %, and
    # 9 at most with the same.
    assert covered >= 107
    assert above <= 9


def test_intervals_of_every_level_are_nested():
    bins = diagram((40, 0.7, 24), (40, 0.8, 30), (40, 0.95, 39))
    ends = [error_interval(bins, level=level) for level in (0.5, 0.8, 0.95, 0.99)]
    lows, highs = zip(*ends, strict=True)
    assert list(lows) == sorted(lows, reverse=True)
    assert list(highs) == sorted(highs)
