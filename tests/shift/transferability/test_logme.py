"""LogME is a log-density of a multivariate normal, at its maximum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from flaxtransfer.analysis.transferability import log_evidence, logme


def fixture(rows, columns, strength):
    i, j = np.arange(1.0, rows + 1)[:, None], np.arange(1.0, columns + 1)
    labels = np.arange(rows) % 3
    noise = np.sin(7 * np.sin(i * 1.9 + 0.3) * j + i * j * j * 0.11)
    return noise + strength * np.cos(j * (labels[:, None] + 1) * 1.1), labels


def density(features, targets, alpha, beta):
    covariance = np.eye(len(features)) / beta + features @ features.T / alpha
    return multivariate_normal.logpdf(targets, np.zeros(len(features)), covariance)


@pytest.mark.parametrize(
    ("case", "expected"),
    [((24, 60, 0.15), -0.8613937780194685), ((48, 5, 0.5), -0.806973540109858)],
)
def test_numbers_of_the_transfer_learning_library(case, expected):
    """tllib.ranking.logme.log_maximum_evidence(features, labels), but for 5000 iterations, not 11.

    Its updates of alpha and beta stop within 1 % of the maximum; ours is the maximum.
    """
    assert logme(*fixture(*case)).value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20), (50, 2048), (200, 3)])
def test_it_is_the_density_of_the_labels(shape):
    random = np.random.default_rng(0)
    labels = np.arange(shape[0]) % 4
    centers = 2 * random.normal(size=(4, shape[1])) / np.sqrt(shape[1])
    features = random.normal(size=shape) + centers[labels]
    one_hot = np.eye(4)[labels]
    found = log_evidence(features, one_hot)
    # Beyond, the covariance is too ill-conditioned for the density that is compared with.
    conditioned = found.alpha > 1e-5 * found.beta * np.linalg.norm(features, 2) ** 2
    assert conditioned.sum() >= 2
    for k in np.flatnonzero(conditioned):
        expected = density(features, one_hot[:, k], found.alpha[k], found.beta[k])
        assert found.log_evidence[k] == pytest.approx(expected, abs=1e-8)
    score = logme(features, labels, permutations=19)
    assert score.value == pytest.approx(found.log_evidence.mean() / shape[0], rel=1e-12)
    assert score.effective_parameters == pytest.approx(found.effective_parameters.sum())


def test_features_that_fit_any_labels_have_the_evidence_without_noise():
    """As noise vanishes, targets are Gaussian with covariance F F' / alpha."""
    random = np.random.default_rng(0)
    target = np.arange(20) % 2 * 1.0
    features = random.normal(size=(20, 300)) + 3 * target[:, None]
    product = features @ features.T
    alpha = 20 / (target @ np.linalg.solve(product, target))
    expected = multivariate_normal.logpdf(target, np.zeros(20), product / alpha)
    found = log_evidence(features, target)
    assert found.log_evidence[0] == pytest.approx(expected, abs=1e-5)
    assert found.alpha[0] == pytest.approx(alpha, rel=1e-5)
    assert found.effective_parameters[0] == pytest.approx(20, abs=1e-4)
    assert found.bounded.all()


@pytest.mark.parametrize(("rows", "columns"), [(30, 8), (8, 30)])
def test_no_other_alpha_and_beta_are_better(rows, columns):
    features, labels = fixture(rows, columns, 0.5)
    target = np.eye(3)[labels][:, 0]
    found = log_evidence(features, target)
    best = found.log_evidence[0]
    for log_alpha in np.arange(-6, 12, 1.0):
        for log_beta in np.arange(-4, 6, 0.5):
            other = density(features, target, np.exp(log_alpha), np.exp(log_beta))
            assert other <= best + 1e-9


@settings(max_examples=40)
@given(st.integers(0, 2**16), st.integers(5, 12), st.integers(1, 20))
def test_it_is_a_fixed_point_of_mackay(seed, rows, columns):
    """Gamma = sum s / (s + alpha / beta), alpha = gamma / |m|^2, beta = (N - gamma) / |error|^2."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, columns))
    target = features @ random.normal(size=columns) + random.normal(size=rows)
    found = log_evidence(features, target)
    alpha, beta = found.alpha[0], found.beta[0]
    largest = np.linalg.norm(features, 2) ** 2
    gamma = found.effective_parameters[0]
    assert 0 <= gamma <= min(rows, columns) + 1e-9
    if not 1e-8 < alpha / beta / largest < 1e6:
        return  # At either end of what is looked at, there is no point at which the slope is 0.
    precision = alpha * np.eye(columns) + beta * features.T @ features
    mean = beta * np.linalg.solve(precision, features.T @ target)
    assert gamma == pytest.approx(columns - alpha * np.trace(np.linalg.inv(precision)), rel=1e-6)
    assert gamma / (mean @ mean) == pytest.approx(alpha, rel=1e-5)
    error = ((target - features @ mean) ** 2).sum()
    assert (rows - gamma) / error == pytest.approx(beta, rel=1e-5)


def test_what_is_known_without_computing():
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 5))
    target = features @ [1.0, -2, 0.5, 0, 1] + random.normal(size=400) / 3
    found = log_evidence(features, np.stack([target, random.normal(size=400)], 1))
    assert found.beta[0] == pytest.approx(9, rel=0.2)
    assert found.effective_parameters[0] == pytest.approx(5, abs=0.05)
    assert found.effective_parameters[1] < 3
    assert (found.examples, found.features) == (400, 5)


def test_columns_of_0_change_nothing_where_the_usual_formula_goes_astray():
    """Weights that no example sees have their prior, whatever alpha is."""
    features, labels = fixture(20, 6, 0.5)
    wide = np.c_[features, np.zeros((20, 500))]
    assert logme(wide, labels).value == pytest.approx(logme(features, labels).value, rel=1e-12)


def test_labels_that_are_given_away_have_no_bounded_evidence_and_say_so():
    labels = np.arange(30) % 3
    found = logme(np.eye(3)[labels], labels)
    assert "features determine 3 classes without error" in found.notes[-1]
    assert np.isfinite(found.value)
    assert found.p == 1 / 200


def test_permutations_are_each_what_logme_says_of_them(monkeypatch):
    """However many problems are solved at once."""
    from flaxtransfer.analysis import transferability as module

    features, labels = fixture(24, 10, 0.3)
    at_once = logme(features, labels, permutations=19)
    monkeypatch.setattr(module, "_CHUNK", 1)
    one_by_one = logme(features, labels, permutations=19)
    assert one_by_one.null_mean == pytest.approx(at_once.null_mean, rel=1e-12)
    orders = list(module.random_permutations(24, 19, 0))
    single = [logme(features, labels[order], permutations=19).value for order in orders]
    assert np.mean(single) == pytest.approx(at_once.null_mean, rel=1e-12)
    assert np.std(single, ddof=1) == pytest.approx(at_once.null_sd, rel=1e-9)


@pytest.mark.parametrize(
    ("features", "targets", "text"),
    [
        (np.ones((5, 2)), np.ones(4), "same number of rows, at least 2, got 5 and 4"),
        (np.zeros((5, 2)), np.ones(5), "features must not be all 0"),
        (np.ones((5, 2)), np.c_[np.ones(5), np.zeros(5)], "a column of targets is all 0"),
        (np.ones((5, 2)), np.full(5, np.nan), "targets must be finite, got 5 of 5 rows with NaN"),
    ],
)
def test_regressions_that_there_are_not(features, targets, text):
    with pytest.raises(ValueError, match=text):
        log_evidence(features, targets)
