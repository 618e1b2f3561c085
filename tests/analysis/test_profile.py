"""What a probe makes of the features of every depth."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss

from flaxtransfer.analysis.profile import greedy_depths, probe_profile
from flaxtransfer.features import cross_validate, standardization, stratified_folds
from flaxtransfer.task import MULTI_LABEL
from tests.support.peers import logistic_regression


def telling(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(60) % 3
    features = {
        "stem": random.normal(size=(60, 4)),
        "layer1": random.normal(size=(60, 5)) + 3 * np.eye(5)[labels],
    }
    return features, labels


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_probe_for_each(kind):
    features, labels = telling()
    profile = probe_profile(features, labels, kind=kind)
    assert [probe.segment for probe in profile.probes] == ["stem", "layer1"]
    assert profile.best.segment == "layer1"
    assert profile.best.loss < profile.probes[0].loss
    assert profile.probes[0].skill < 0.6
    assert profile.guess == pytest.approx(1 / 3)
    lines = str(profile).splitlines()
    assert lines[2].split()[:2] == ["layer1", "5"]
    assert lines[3].startswith(f"{kind} on 60 examples, each held out once; largest class 33.3 %")


def test_ridge_is_by_folds():
    features, labels = telling()
    probe = probe_profile(features, labels).best
    found = cross_validate(standardization(features["layer1"])(features["layer1"]), labels)
    assert (probe.skill, probe.strength) == (found.accuracy, found.strength)
    assert (probe.standard_error, probe.loss) == (found.standard_error, found.loss)


def test_labels_without_relation_to_the_features_are_at_chance():
    """Leave-one-out is 10 points below it."""
    found = []
    for seed in range(50):
        random = np.random.default_rng(seed)
        labels = random.permutation(np.arange(60) % 4)
        found.append(probe_profile({"stem": random.normal(size=(60, 40))}, labels).best.skill)
    assert abs(np.mean(found) - 0.25) < 0.02


def test_logistic_regression_is_scikit_learns_by_folds():
    features, labels = telling()
    probe = probe_profile(features, labels, kind="logistic").best
    scaled = standardization(features["layer1"])(features["layer1"])
    folds, losses = stratified_folds(labels, 5), []
    for fold in range(5):
        fit = logistic_regression(scaled[folds != fold], labels[folds != fold], 1 / probe.strength)
        losses.append(log_loss(labels[folds == fold], fit.predict_proba(scaled[folds == fold])))
    assert probe.loss == pytest.approx(np.mean(losses), rel=5e-3)


def test_rare_and_absent_classes_are_said():
    features, labels = telling()
    labels[labels == 2] = 4
    labels[0] = 2
    ridge = probe_profile(features, labels, classes=6)
    assert ridge.notes == (
        "2 of 6 classes have no example.",
        "1 classes have one example, which counts as wrong.",
    )
    logistic = probe_profile({"stem": features["stem"]}, labels, kind="logistic", classes=6)
    assert logistic.notes[-1] == "1 classes have one example, which is never held out."


@pytest.mark.parametrize(
    ("features", "labels", "text"),
    [
        (
            {"stem": np.full((9, 2), np.nan)},
            np.arange(9) % 2,
            r"the features of stem cannot be probed: .*must be finite",
        ),
        ({"stem": np.eye(3)}, np.arange(3), "every class has one example"),
        ({"stem": np.eye(3)}, np.zeros(3, int), "at least 2 classes, got only class 0"),
        ({}, np.arange(3), "must have at least one segment"),
    ],
)
def test_what_cannot_be_probed(features, labels, text):
    with pytest.raises(ValueError, match=text):
        probe_profile(features, labels)


def test_other_kinds():
    with pytest.raises(ValueError, match="kind must be 'ridge' or 'logistic', got 'svm'"):
        probe_profile({}, [], kind="svm")


def apart(count: int = 200, seed: int = 0):
    """Four classes: one bit of the label in each of two segments, none in the third."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    noise = dict(zip(("stem", "layer1", "layer2"), random.normal(size=(3, count, 5)), strict=True))
    noise["stem"][:, 0] += 6 * (labels % 2)
    noise["layer2"][:, 0] += 6 * (labels // 2)
    return noise, labels


def test_depths_are_added_that_know_what_the_others_do_not():
    """By construction: each of two depths says one of two bits, and the third says nothing."""
    features, labels = apart()
    found = greedy_depths(features, labels)
    assert sorted(found.segments) == ["layer2", "stem"]
    added, left_out = found.tried
    # One bit alone is right for half of the classes, and at random up to two thirds.
    assert added.skill > 0.9
    assert added.gain > max(0.25, 5 * added.error)
    assert left_out.segment == "layer1"
    assert left_out.gain <= left_out.error
    assert str(found).splitlines()[-2:] == [
        f"layer1 beside {', '.join(found.segments)}: {100 * left_out.gain:+.1f} ± "
        f"{100 * left_out.error:.1f} points to {100 * left_out.skill:.1f} % (threshold: 1 standard "
        "error): left out",
        f"the head reads {', '.join(found.segments)}",
    ]
    # The same bits as two labels, whose skill is that of the metric that ranks them.
    both = np.stack([labels % 2, labels // 2], axis=1).astype(np.float32)
    several = greedy_depths(features, both, task=MULTI_LABEL, first="stem")
    assert several.segments == ("stem", "layer2")
    assert several.tried[0].skill > 0.95
    # With all of it in one depth, no other is added.
    features["layer1"][:, :4] += 6 * np.eye(4)[labels]
    assert greedy_depths(features, labels).segments == ("layer1",)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"features": {}}, "features must have at least one segment"),
        ({"first": "layer9"}, "first must be one of stem, layer1, layer2, got 'layer9'; did you"),
        ({"labels": np.zeros(200, int)}, "the features of stem cannot be probed"),
    ],
)
def test_depths_that_cannot_be_compared(change, text):
    features, labels = apart()
    with pytest.raises(ValueError, match=text):
        greedy_depths(**{"features": features, "labels": labels} | change)
