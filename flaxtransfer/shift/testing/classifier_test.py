"""Can a classifier tell source from target? The classifier two-sample test, with its AUC."""

from functools import partial
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from flaxtransfer.shift.checks import as_features, same_width
from flaxtransfer.shift.duplicates import duplicate_notes
from flaxtransfer.shift.hypotheses import (
    HypothesisTest,
    detectable,
    enough_repetitions,
    permutation_p,
    untestable,
)

__all__ = ["classifier_test"]

_NAME = "classifier two-sample test"
_HYPOTHESIS = "no linear classifier tells source from target better than chance"
_EFFECT = "AUC"
_FEWEST = 10
_CHUNK = 20_000_000
"""Numbers of a matrix of permuted labels; 160 MB."""


def classifier_test(
    source_features: Any,
    target_features: Any,
    *,
    folds: int = 5,
    permutations: int = 499,
    seed: int = 0,
) -> HypothesisTest:
    """Whether a linear classifier that has not seen an example can tell where it is from.

    Its AUC is a size of shift that people can read: 0.5 is chance, 1 is two separate worlds. It
    sees what a linear classifier sees; a change of spread without a change of mean is for
    `mmd_test`.

    The effect is the AUC of logistic regression on folds that it was not fitted on. Scores of
    different folds depend on each other, and a binomial or rank-sum p-value of them all would not
    have its level. So p is by permutation, refits included, of the AUC of the classifier's first
    Newton step (regularised least squares, Fisher's discriminant): its refits are one matrix
    product for all permutations. Labels are permuted inside of folds; that is exact.

    Both are regularised as a ridge whose penalty is the number of features (after each is divided
    by its standard deviation): negligible where examples are many, and fit for more features than
    examples.

    Args:
        source_features: `[n, D]`, numpy or JAX.
        target_features: `[m, D]`.
        folds: stratified; fewer where a side has fewer than two examples for each.
        permutations: of the labels, each with its refits.
        seed: for folds and permutations.

    Returns:
        A test whose statistic is the mean over folds of the discriminant's AUC, and whose effect is
        that of logistic regression.

    Raises:
        ValueError: features of different width, with NaN, of no rows; fewer than 2 folds or 19
            permutations.

    >>> rng = np.random.default_rng(0)
    >>> test = classifier_test(rng.normal(size=(80, 3)), rng.normal(1, 1, size=(60, 3)))
    >>> test.p, round(test.effect, 1), test.effect_name
    (0.002, 0.9, 'AUC')

    References:
        D. Lopez-Paz, M. Oquab, "Revisiting classifier two-sample tests", 2017.
    """
    source = as_features(source_features, "source features")
    target = as_features(target_features, "target features")
    same_width(source, "source features", target, "target features")
    enough_repetitions(permutations, "permutations")
    if folds < 2:
        raise ValueError(f"folds={folds}: a classifier is tested on a fold it was not fitted on")
    counts = (len(source), len(target))
    notes = duplicate_notes(source, target)

    no = partial(untestable, _NAME, _HYPOTHESIS, effect_name=_EFFECT, counts=counts, notes=notes)

    if min(counts) < _FEWEST:
        return no(f"{counts[0]} and {counts[1]} rows; each side needs {_FEWEST}")
    pooled = np.concatenate([source, target])
    varies = np.ptp(pooled, axis=0) > 0
    if not varies.any():
        return no("all features are constant and equal on both sides")
    pooled = pooled[:, varies] - pooled[:, varies].mean(0)
    pooled /= pooled.std(0)

    rng = np.random.default_rng(seed)
    folds = min(folds, min(counts) // 2)
    fold = np.concatenate([rng.permutation(np.arange(count) % folds) for count in counts])
    is_target = np.repeat([0.0, 1.0], counts)
    members = [np.flatnonzero(fold == number) for number in range(folds)]

    observed = _discriminant_aucs(pooled, is_target[None], members)[0]
    chunk = max(1, _CHUNK // len(pooled))
    null = []
    for start in range(0, permutations, chunk):
        permuted = np.empty((min(chunk, permutations - start), len(pooled)))
        for rows in members:
            permuted[:, rows] = rng.permuted(
                np.broadcast_to(is_target[rows], (len(permuted), len(rows))), axis=1
            )
        null.append(_discriminant_aucs(pooled, permuted, members))
    aucs = np.concatenate(null)
    return HypothesisTest(
        name=_NAME,
        hypothesis=_HYPOTHESIS,
        statistic=float(observed),
        p=permutation_p(float(observed), aucs),
        effect=_logistic_auc(pooled, is_target, members),
        effect_name=_EFFECT,
        minimum_detectable=min(1.0, detectable(aucs)),
        counts=counts,
        assumptions=("examples are independent, within a side and between the sides",),
        notes=notes,
    )


def _discriminant_aucs(
    features: np.ndarray, is_target: np.ndarray, folds: list[np.ndarray]
) -> np.ndarray:
    """`[B]`, mean AUC over folds of a discriminant fitted to labels `[B, N]` on other folds."""
    rows, width = features.shape
    inner, total = features.T @ features, features.sum(0)
    products = [features[fold].T @ is_target[:, fold].T for fold in folds]
    product = np.sum(products, axis=0)
    positives = is_target.sum(1)
    aucs = np.zeros(len(is_target))
    for fold, own in zip(folds, products, strict=True):
        left, others = features[fold], rows - len(fold)
        mean = (total - left.sum(0)) / others
        share = (positives - is_target[:, fold].sum(1)) / others
        gram = inner - left.T @ left - others * np.outer(mean, mean)
        moment = product - own - others * np.outer(mean, share)
        weights = cho_solve(cho_factor(gram + width * np.eye(width)), moment)
        aucs += _auc((left @ weights).T, is_target[:, fold])
    return aucs / len(folds)


def _auc(scores: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Probability that a target scores higher than a source, for each row; ties count half."""
    positives, negatives = is_target.sum(1), (1 - is_target).sum(1)
    ranks = (rankdata(scores, axis=1) * is_target).sum(1)
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)


def _logistic_auc(features: np.ndarray, is_target: np.ndarray, folds: list[np.ndarray]) -> float:
    # At its start logistic regression has a quarter of the curvature of least squares.
    model = LogisticRegression(C=4 / features.shape[1], max_iter=1000)
    aucs = []
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(features)), fold)
        fitted = model.fit(features[rest], is_target[rest])
        scores = fitted.decision_function(features[fold])
        aucs.append(_auc(scores[None], is_target[None, fold])[0])
    return float(np.mean(aucs))
