"""The classifier two-sample test against scikit-learn, an analytic AUC, and plain refits."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from flaxtransfer.shift.two_sample import _auc, _discriminant_aucs, _logistic_auc, classifier_test


def samples(n=60, m=40, d=4, step=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) + step


def test_refits_by_products_are_refits():
    # Ridge of scikit-learn with an intercept, fitted again for every fold and labeling.
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 6)) + 3.0
    labels = rng.permuted(np.tile(np.repeat([0.0, 1.0], [30, 20]), (3, 1)), axis=1)
    folds = [np.arange(50)[number::5] for number in range(5)]
    wanted = []
    for row in labels:
        aucs = []
        for fold in folds:
            rest = np.setdiff1d(np.arange(50), fold)
            model = Ridge(alpha=6.0).fit(features[rest], row[rest])
            aucs.append(roc_auc_score(row[fold], model.predict(features[fold])))
        wanted.append(np.mean(aucs))
    np.testing.assert_allclose(_discriminant_aucs(features, labels, folds), wanted, atol=1e-12)


def test_the_auc_is_mann_whitneys_with_ties():
    scores = np.array([[0.1, 0.5, 0.5, 0.9, 0.2]])
    is_target = np.array([[0.0, 1.0, 0.0, 1.0, 0.0]])
    wanted = mannwhitneyu([0.5, 0.9], [0.1, 0.5, 0.2]).statistic / 6
    assert _auc(scores, is_target)[0] == pytest.approx(wanted)


def test_the_effect_is_the_auc_of_gaussians_apart():
    # Best AUC of two Gaussians at distance d is Phi(d / sqrt 2).
    found = classifier_test(*samples(3000, 2000, step=0.5), permutations=19)
    assert found.effect == pytest.approx(norm.cdf(0.5 * 2 / np.sqrt(2)), abs=0.02)
    assert found.statistic == pytest.approx(found.effect, abs=0.005)
    # Fisher's discriminant is the same classifier where covariances are equal.
    source, target = samples(3000, 2000, step=0.5)
    model = LinearDiscriminantAnalysis().fit(
        np.concatenate([source, target]), np.repeat([0, 1], [3000, 2000])
    )
    fresh = samples(3000, 2000, step=0.5, seed=9)
    scores = model.decision_function(np.concatenate(fresh))
    assert roc_auc_score(np.repeat([0, 1], [3000, 2000]), scores) == pytest.approx(
        found.effect, abs=0.03
    )


@pytest.mark.parametrize(
    ("case", "rejected"),
    [
        ({}, False),
        ({"step": 0.8}, True),
        ({"d": 200}, False),
        ({"d": 200, "step": 0.4}, True),
        ({"n": 10, "m": 10, "step": 3.0}, True),
        ({"n": 500, "m": 12}, False),
    ],
)
def test_what_it_finds(case, rejected):
    found = classifier_test(*samples(**case), permutations=199)
    assert found.rejected() == rejected
    assert 0.5 < found.minimum_detectable <= 1
    assert found.rejected() == classifier_test(*samples(**case), permutations=199).rejected()


def test_units_offsets_and_constant_columns_do_not_matter():
    source, target = samples(step=0.3)
    first = classifier_test(source, target, permutations=99)
    units = np.array([1e-3, 1.0, 50.0, 1e4])
    widened = [
        np.concatenate([sample * units + 5, np.ones((len(sample), 1))], 1)
        for sample in (source, target)
    ]
    again = classifier_test(*widened, permutations=99)
    assert again.p == first.p
    assert again.effect == pytest.approx(first.effect, abs=0.01)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        (np.ones((20, 2)), np.ones((20, 2)), "constant and equal"),
        (np.zeros((9, 2)), np.eye(40, 2), "9 and 40 rows; each side needs >= 10"),
    ],
)
def test_what_cannot_be_tested(source, target, reason):
    assert reason in classifier_test(source, target).not_testable


def test_settings_and_shared_rows():
    source, target = samples()
    with pytest.raises(ValueError, match="folds must be >= 2, got 1"):
        classifier_test(source, target, folds=1)
    with pytest.raises(ValueError, match="permutations must be >= 19, got 5"):
        classifier_test(source, target, permutations=5)
    assert "40 of 40" in classifier_test(source, source[:40], permutations=19).notes[0]


def test_logistic_regression_is_regularized_as_its_first_step_is():
    # With nearly as many features as examples it is the penalty that decides.
    is_target, folds = np.repeat([0.0, 1.0], 40), [np.arange(80)[number::5] for number in range(5)]
    for seed in range(3):
        pooled = np.concatenate(samples(40, 40, 60, step=0.3, seed=seed))
        pooled = (pooled - pooled.mean(0)) / pooled.std(0)
        (first,) = _discriminant_aucs(pooled, is_target[None], folds)
        assert _logistic_auc(pooled, is_target, folds) == pytest.approx(first, abs=0.002)


def test_a_fold_has_two_examples_of_either_side():
    few = samples(10, 30, step=0.5)
    assert classifier_test(*few, folds=9, permutations=19) == classifier_test(
        *few, folds=5, permutations=19
    )
