"""Peers that several folders of tests compare with, at their optimum on any processor."""

import warnings

import numpy as np
import scipy.special
from sklearn.linear_model import LogisticRegression


def logistic_regression(features, labels, c: float, weights=None) -> LogisticRegression:
    """scikit-learn's, by Newton steps in float64, whose gradient is known to be small.

    The last steps change the loss by less than its last digit, and whether the line search still
    sees it fall depends on the processor. Its warnings of that are no matter: what it was to
    reach is asked of the result itself.
    """
    features = np.asarray(features, np.float64)
    fit = LogisticRegression(C=c, solver="newton-cg", tol=1e-10, max_iter=10_000)
    with warnings.catch_warnings():
        for text in ("The line search algorithm did not converge", "Line Search failed"):
            warnings.filterwarnings("ignore", text)
        fit.fit(features, labels, weights)
    assert largest_gradient(fit, features, labels, weights) <= 1e-9
    return fit


def largest_gradient(fit: LogisticRegression, features, labels, weights=None) -> float:
    """Of the mean loss and its share of the penalty, by coefficients and intercepts."""
    scores, wanted = fit.decision_function(features), labels[:, None] == fit.classes_
    if scores.ndim == 1:  # Two classes share one column, that of the second.
        missed = scipy.special.expit(scores)[:, None] - wanted[:, 1:]
    else:
        missed = scipy.special.softmax(scores, axis=1) - wanted
    missed = missed if weights is None else missed * weights[:, None]
    by_coefficient = features.T @ missed + fit.coef_.T / fit.C
    largest = max(np.abs(by_coefficient).max(), np.abs(missed.sum(axis=0)).max())
    return float(largest / len(labels))
