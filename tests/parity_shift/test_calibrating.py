"""Calibration beside abstention on random validations, and scores beside scikit-learn."""

import warnings

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import brier_score_loss, log_loss

from flaxtransfer.shift.calibration import calibrate, logits_of
from flaxtransfer.shift.calibration_metrics import brier_score, negative_log_likelihood

with warnings.catch_warnings():
    # It imports scipy.misc, which is deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from abstention.calibration import TempScaling, VectorScaling

pytestmark = pytest.mark.parity_shift

# Asked for more, its line search gives up at the minimum.
PRECISE = {"options": {"ftol": 1e-13, "gtol": 1e-9, "maxiter": 20_000, "maxfun": 40_000}}
PEERS = {
    "temperature": TempScaling(lbfgs_kwargs=PRECISE),
    "bias_corrected": TempScaling(bias_positions="all", lbfgs_kwargs=PRECISE),
    "vector": VectorScaling(lbfgs_kwargs=PRECISE),
}


def validation(count, classes, seed):
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (count, classes))
    bias = random.normal(0, 0.7, classes)
    chances = softmax(0.7 * logits + bias, axis=1).cumsum(1)
    labels = (chances < random.random((count, 1))).sum(1).clip(max=classes - 1)
    return logits, labels


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize(("count", "classes"), [(200, 2), (500, 3), (2000, 10), (4000, 40)])
def test_probabilities_are_those_of_abstention(count, classes, method, record_property):
    worst, lower = 0.0, 0.0
    for seed in range(3):
        logits, labels = validation(count, classes, seed)
        one_hot = np.eye(classes)[labels]
        probabilities = softmax(logits, axis=1)
        theirs = PEERS[method](
            valid_preacts=probabilities, valid_labels=one_hot, posterior_supplied=True
        )(probabilities)
        found = calibrate(logits_of(probabilities), labels, method=method)
        assert found.method == method
        worst = max(worst, float(np.abs(found.probabilities - theirs).max()))
        losses = [negative_log_likelihood(each, labels) for each in (found.probabilities, theirs)]
        lower = max(lower, losses[0] - losses[1])
    record_property("difference", worst)
    print(f"{method} {count} x {classes}: largest difference {worst:.1e}, loss above {lower:.1e}")
    assert worst <= 1e-4
    assert lower <= 1e-12


def test_scores_are_those_of_scikit_learn():
    logits, labels = validation(1000, 7, 9)
    probabilities = softmax(logits, axis=1)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(
        log_loss(labels, probabilities), abs=1e-12
    )
    theirs = brier_score_loss(np.eye(7)[labels], probabilities, scale_by_half=False)
    assert brier_score(probabilities, labels) == pytest.approx(theirs, abs=1e-12)
