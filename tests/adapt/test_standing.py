"""How a network stands on images without labels: which of two is to be preferred, and when none."""

import numpy as np
import pytest
from scipy.stats import binom

from flaxtransfer.adapt.scores import (
    UnlabeledScores,
    accuracy_change_z,
    conflicting_class_shares,
    exceeds_shift,
    single_class,
    unreliable_predictions,
)
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.shift.prevalence import Prevalence

SOURCE = Calibration(  # 8 of 10 are right
    "none", np.ones(2), np.zeros(2), np.tile([0.9, 0.1], (10, 1)), np.repeat([0, 1], [8, 2])
)


def prevalence(first, **more):
    nothing = np.full(2, np.nan)
    shares = np.array([first, 1 - first])
    return Prevalence("known", shares, nothing, nothing, 0.95, np.full(2, 0.5), (9, 9), **more)


def stands(confident, first=0.5):
    """On as many images; of the first class in this share."""
    confident = np.asarray(confident, bool)
    return UnlabeledScores(np.full((len(confident), 2), 0.5), confident, prevalence(first))


@pytest.mark.parametrize(("rose", "fell"), [(9, 1), (1, 4), (12, 0), (0, 0), (5, 5)])
def test_support_is_mcnemars_of_those_that_crossed_the_threshold(rose, fell):
    before = stands(np.repeat([False, True, True, False], [rose, fell, 30, 20]))
    after = stands(np.repeat([True, False, True, False], [rose, fell, 30, 20]))
    many = rose + fell
    scale = binom.std(many, 0.5) if many else 1.0
    assert accuracy_change_z(before, after) == pytest.approx((rose - many / 2) / scale)
    assert accuracy_change_z(after, before) == -accuracy_change_z(before, after)


@pytest.mark.parametrize(("sure", "little"), [(61, False), (59, True)])
def test_three_quarters_of_the_sources_accuracy_are_ground_to_stand_on(sure, little):
    after = stands(np.arange(100) < sure)
    assert bool(unreliable_predictions(after, SOURCE)) == little
    assert (
        "59 % on the target, against 80 % on the source" in unreliable_predictions(after, SOURCE)
        or not little
    )


@pytest.mark.parametrize(
    ("first", "sure", "contradicts"),
    [
        (0.74, 70, False),  # they agree, nearly
        (0.8, 70, True),
        (0.8, 72, True),  # 2 of 2 that crossed the threshold are 1.4 deviations
        (0.8, 75, False),  # 5 of 5 are 2.2: clearly surer, and nearly as sure as at the source
        (0.8, 40, False),  # clearly less sure: refused for that
    ],
)
def test_networks_that_contradict_each_other(first, sure, contradicts):
    before, after = stands(np.arange(100) < 70, first=0.5), stands(np.arange(100) < sure, first)
    found = conflicting_class_shares(before, after, SOURCE)
    assert bool(found) == contradicts


@pytest.mark.parametrize(
    ("first", "distant", "single"),
    [(0.75, False, False), (0.76, True, False), (0.85, True, False), (0.87, True, True)],
)
def test_shares_that_are_far_and_those_of_one_class(first, distant, single):
    """exp(entropy) of 0.85 and 0.15 is 1.53, of 0.87 and 0.13 it is 1.47."""
    shares = prevalence(first)
    assert (bool(exceeds_shift(shares)), bool(single_class(shares))) == (distant, single)
    unknown = prevalence(first, identifiable=False, reason="all rows are the same")
    assert (exceeds_shift(unknown), single_class(unknown)) == ("", "")
