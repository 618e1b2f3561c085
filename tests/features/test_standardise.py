"""Standardization, against scikit-learn's scaler."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import StandardScaler

from flaxtransfer.features import standardization


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_is_the_standard_scaler(offset, dtype):
    features = (np.random.default_rng(0).gamma(1.0, 3.0, (50, 7)) + offset).astype(dtype)
    fitted = standardization(features)
    peer = StandardScaler().fit(features.astype(np.float64))
    np.testing.assert_allclose(fitted.mean, peer.mean_, rtol=1e-12)
    np.testing.assert_allclose(fitted.scale, peer.scale_, rtol=1e-9)
    new = np.random.default_rng(1).normal(size=(9, 7)).astype(dtype)
    assert fitted(new).dtype == dtype
    np.testing.assert_allclose(fitted(new), peer.transform(new.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-30])
def test_a_constant_feature_becomes_zero_and_is_never_blown_up(value):
    features = np.column_stack([np.arange(30.0), np.full(30, value)])
    fitted = standardization(features)
    assert fitted.constant.tolist() == [1]
    assert fitted.scale[1] == 1
    np.testing.assert_allclose(fitted(features)[:, 1], 0, atol=1e-9)
    np.testing.assert_allclose(fitted([[0.0, value + 2]])[0, 1], 2)


@given(st.integers(0, 1000))
def test_an_undone_head_scores_the_same(seed):
    random = np.random.default_rng(seed)
    features = random.normal(size=(20, 5)) * random.gamma(1, 10, 5) + random.normal(size=5)
    features[:, 2] = 3
    kernel, bias = random.normal(size=(5, 4)), random.normal(size=4)
    fitted = standardization(features)
    raw_kernel, raw_bias = fitted.undo(kernel, bias)
    np.testing.assert_allclose(
        features @ raw_kernel + raw_bias, fitted(features) @ kernel + bias, atol=1e-6
    )


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (np.ones(3), r"must have shape .*, got \(3,\)"),
        (np.ones((0, 3)), r"must have shape .*, got \(0, 3\)"),
        ([[1.0, np.nan], [1.0, 2.0]], "1 of 2 examples"),
    ],
)
def test_what_cannot_be_measured_is_said(features, text):
    with pytest.raises(ValueError, match=text):
        standardization(features)


def test_new_features_have_the_same_width():
    with pytest.raises(ValueError, match=r"must have shape \[examples, 2\]"):
        standardization([[1.0, 2.0]])(np.ones((2, 3)))


def test_integers_come_out_as_float32():
    assert standardization([[1, 2], [3, 5]])(np.array([[2, 2]])).dtype == np.float32
