"""The error of a head by number of labels: the law, its limits, and what is said of more labels."""

import numpy as np
import pytest

from flaxtransfer.analysis.profile import LearningCurve, _law, learning_curve
from flaxtransfer.features import cross_validate, stratified_folds

NONE = ((0.0, 0.0), (0.0, 0.0))


def curve(floor: float, slope: float, covariance=NONE) -> LearningCurve:
    sizes = (50, 100, 200, 400)
    errors = tuple(floor + slope / np.sqrt(n) for n in sizes)
    return LearningCurve(sizes, errors, (0.01, 0.01, 0.01, 0.0), floor, slope, covariance)


def test_a_law_without_noise_is_found():
    sizes = np.array([25, 50, 100, 200])
    floor, slope, _ = _law(sizes, 0.1 + 2 / np.sqrt(sizes), 200)
    assert (floor, slope) == (pytest.approx(0.1), pytest.approx(2.0))
    # Neither may be below 0: more labels do no harm, and no error is negative.
    floor, slope, _ = _law(sizes, 0.1 + 0.001 * np.sqrt(sizes), 200)
    assert slope == 0
    floor, slope, _ = _law(sizes, 2 / sizes**0.7, 200)
    assert floor == 0


def test_the_covariance_is_that_of_drawn_errors():
    """Binomial errors on all 400 labels at each size, drawn 4,000 times."""
    random = np.random.default_rng(0)
    sizes = np.array([50, 100, 200, 400])
    truth = 0.15 + 3 / np.sqrt(sizes)
    drawn = [_law(sizes, random.binomial(400, truth) / 400, 400)[:2] for _ in range(4000)]
    wanted = np.cov(np.array(drawn).T)
    _, _, covariance = _law(sizes, truth, 400)
    np.testing.assert_allclose(covariance, wanted, rtol=0.15)


def test_more_labels_by_the_law():
    found = curve(0.1, 2.0)
    assert found.error == pytest.approx(0.2)
    assert found.error_at(1600)[0] == pytest.approx(0.15)
    assert found.cost_of_half == pytest.approx(2 / np.sqrt(200) - 2 / np.sqrt(400))
    assert found.labels_for(0.05) == 1200
    assert found.labels_for(0.06) is None
    assert curve(0.1, 0.0).labels_for(0.01) is None
    assert found.fits
    assert "half the labels would cost 4.1 points" in str(found)
    low, high = found.error_at(800)[1:]
    assert low < found.error_at(800)[0] < high


def test_the_gain_of_more_labels_and_its_standard_error():
    """Of drawn errors, 4,000 times, beside the law's own 1.5 points per doubling."""
    random = np.random.default_rng(0)
    sizes = np.array([50, 100, 200, 400])
    truth = 0.15 + 3 / np.sqrt(sizes)
    drawn = np.array([_law(sizes, random.binomial(400, truth) / 400, 400)[1] for _ in range(4000)])
    spread = np.std(drawn / 20 - drawn / 28)
    gain, error = curve(0.15, 3.0, _law(sizes, truth, 400)[2]).gain(784)
    assert gain == pytest.approx(3 / 20 - 3 / 28)
    assert error == pytest.approx(np.hypot(spread, 0.015 * np.log2(784 / 400)), rel=0.05)


def test_what_is_not_said():
    found = curve(0.1, 2.0)
    for labels in (0, 1601):
        with pytest.raises(ValueError, match="labels must be from 1 to 4 times the 400 at hand"):
            found.error_at(labels)
    with pytest.raises(ValueError, match="gain must be > 0, got 0"):
        found.labels_for(0)
    bent = LearningCurve((50, 100, 200), (0.5, 0.5, 0.1), (0.01, 0.01, 0.0), 0.0, 4.0, NONE)
    assert not bent.fits
    assert "no law fits" in str(bent)
    with pytest.raises(ValueError, match="at least 6 examples of each class, got 5"):
        learning_curve(np.eye(10), np.arange(10) % 2)


def test_each_size_is_the_mean_over_parts_that_use_all_labels():
    random = np.random.default_rng(0)
    labels = np.arange(120) % 3
    features = random.normal(size=(120, 20)) + np.eye(20)[labels]
    found = learning_curve(features, labels, seed=3)
    assert found.sizes == (15, 30, 60, 120)
    part_of = stratified_folds(labels, 4, 3)
    errors = [
        1 - cross_validate(features[part_of == n], labels[part_of == n], seed=3).accuracy
        for n in range(4)
    ]
    assert found.errors[1] == pytest.approx(np.mean(errors))
    assert found.deviations[1] == pytest.approx(np.std(errors, ddof=1))
    assert found.errors[-1] == 1 - cross_validate(features, labels, seed=3).accuracy
    assert found.to_json()["sizes"] == [15, 30, 60, 120]
