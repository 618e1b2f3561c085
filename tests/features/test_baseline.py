"""Leave-one-out in closed form is leave-one-out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import NearestCentroid

from flaxtransfer.features.baseline import instant_baseline, nearest_mean_left_out


@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_nearest_mean_is_scikit_learns_fitted_without_each(seed, classes, width):
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.repeat(np.arange(classes), 2), random.integers(0, classes, 9)])
    features = random.normal(size=(len(labels), width))
    wanted = cross_val_predict(NearestCentroid(), features, labels, cv=LeaveOneOut())
    np.testing.assert_array_equal(nearest_mean_left_out(features, labels), wanted)


def test_it_reads_in_one_line():
    labels = np.array([0, 0, 0, 1, 1])
    features = np.eye(5)[:, :3] + 9 * labels[:, None]
    found = instant_baseline(features, labels)
    assert str(found) == (
        "heads on the frozen features of 5 training images, each left out once: ridge 100.0 %, "
        "nearest class mean 100.0 % (largest class 60.0 %)"
    )


@pytest.mark.parametrize(
    ("features", "labels", "text"),
    [
        (np.ones((5, 2)), np.zeros(5, int), "all examples are of class 0"),
        (np.ones((2, 2)), np.arange(2), "2 examples are too few"),
        (np.full((5, 2), np.nan), np.arange(5), "not finite"),
    ],
)
def test_what_has_no_baseline(features, labels, text):
    with pytest.raises(ValueError, match=text):
        instant_baseline(features, labels)
