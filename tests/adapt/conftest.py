"""The network of this folder's tests, made once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import flaxtransfer as ft
from flaxtransfer.adapt.statistics import image_reader, predict_logits
from flaxtransfer.models import lax_conv
from flaxtransfer.shift.calibration import calibrate
from tests.support.gratings import CONFIG, PREPROCESSING, Trained, draw


@pytest.fixture(scope="session")
def trained() -> Trained:
    # Compiled in a fraction of the time of the convolutions that are fast on CPUs.
    model = ft.Model(CONFIG, convolution=lax_conv)
    variables = jax.device_get(model.init(jax.random.key(0)))
    images, labels = draw((1 / 3, 1 / 3, 1 / 3), 240, 0)
    batches = [{"image": images, "label": labels}]
    variables = {
        **variables,
        "batch_stats": ft.training.recalibrate(
            ft.Classifier(model, variables, PREPROCESSING), batches
        ),
    }
    features, _ = ft.features.pooled_features(
        ft.Classifier(model, variables, PREPROCESSING), batches
    )
    head = LogisticRegression(C=10.0, max_iter=1000).fit(features, labels)
    fc = {"kernel": np.float32(head.coef_.T), "bias": np.float32(head.intercept_)}
    variables = {**variables, "params": {**variables["params"], "fc": fc}}
    held, known = draw((1 / 3, 1 / 3, 1 / 3), 240, 1)
    logits = predict_logits(ft.Classifier(model, variables, PREPROCESSING), image_reader(held, 240))
    return Trained(model, variables, calibrate(logits, known), images)
