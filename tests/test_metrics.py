"""Metrics of a set are scikit-learn's, and their intervals cover."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as peer

from flaxtransfer.metrics import METRICS, interval, metric_named, report, resampled, shown
from flaxtransfer.task import MULTI_LABEL, REGRESSION, SINGLE_LABEL

RANDOM = np.random.default_rng(0)
CLASSES = np.r_[np.arange(4), RANDOM.integers(0, 4, 96)]
SOFT = RANDOM.dirichlet(np.ones(4), 100)
LABELS = RANDOM.integers(0, 2, (100, 3)).astype(np.float32)
CHANCES = RANDOM.uniform(size=(100, 3))
VALUES = RANDOM.normal(size=(100, 2))
TARGETS = VALUES + RANDOM.normal(size=(100, 2))
HARD = SOFT.argmax(1)
ONE_HOT = np.eye(4)[CLASSES]

SINGLE = {
    "accuracy": peer.accuracy_score(CLASSES, HARD),
    "balanced_accuracy": peer.balanced_accuracy_score(CLASSES, HARD),
    "macro_f1": peer.f1_score(CLASSES, HARD, average="macro"),
    "quadratic_kappa": peer.cohen_kappa_score(CLASSES, HARD, weights="quadratic"),
    "roc_auc": peer.roc_auc_score(CLASSES, SOFT, multi_class="ovr", average="macro"),
    "average_precision": peer.average_precision_score(ONE_HOT, SOFT, average="macro"),
    "brier": np.square(SOFT - ONE_HOT).sum(1).mean(),
    "log_loss": peer.log_loss(CLASSES, SOFT),
}
MULTI = {
    "average_precision": peer.average_precision_score(LABELS, CHANCES, average="macro"),
    "micro_average_precision": peer.average_precision_score(LABELS, CHANCES, average="micro"),
    "roc_auc": peer.roc_auc_score(LABELS, CHANCES, average="macro"),
    "micro_roc_auc": peer.roc_auc_score(LABELS, CHANCES, average="micro"),
    "label_accuracy": 1 - peer.hamming_loss(LABELS, CHANCES > 0.5),
    "macro_f1": peer.f1_score(LABELS, CHANCES > 0.5, average="macro"),
    "brier": np.mean([peer.brier_score_loss(LABELS[:, k], CHANCES[:, k]) for k in range(3)]),
    "log_loss": np.mean([peer.log_loss(LABELS[:, k], CHANCES[:, k]) for k in range(3)]),
}
NUMBERS = {
    "r2": peer.r2_score(TARGETS, VALUES),
    "mae": peer.mean_absolute_error(TARGETS, VALUES),
    "rmse": peer.root_mean_squared_error(TARGETS, VALUES, multioutput=[0.5, 0.5]),
}


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "expected"),
    [
        ("single_label", SOFT, CLASSES, SINGLE),
        ("multi_label", CHANCES, LABELS, MULTI),
        ("regression", VALUES, TARGETS, NUMBERS),
    ],
)
def test_metrics_are_scikit_learns(task, predictions, labels, expected):
    found = {name: METRICS[task][name].of(predictions, labels) for name in expected}
    assert found == pytest.approx(expected, rel=1e-6)
    assert set(METRICS[task]) - set(expected) <= {"calibration_error", "top_5_accuracy"}


def test_top_5_is_scikit_learns():
    soft, classes = RANDOM.dirichlet(np.ones(9), 50), RANDOM.integers(0, 9, 50)
    expected = peer.top_k_accuracy_score(classes, soft, k=5, labels=np.arange(9))
    assert METRICS["single_label"]["top_5_accuracy"].of(soft, classes) == expected


def test_calibration_error_by_hand():
    """Two bins: 0.6 said and 1 of 2 right, 0.9 said and 2 of 2 right: (0.1 + 0.1) / 2."""
    soft = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.1, 0.9]])
    found = METRICS["single_label"]["calibration_error"].of(soft, np.array([0, 1, 0, 1]))
    assert found == pytest.approx(0.1)


def test_metrics_of_three_images_by_hand():
    """Three classes, of which the last has no image: 0 is found in 1 of 2, and 2 is said once."""
    soft = np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.0, 1.0, 0.0]], np.float32)
    found = {
        name: each.of(soft, np.array([0, 0, 1])) for name, each in METRICS["single_label"].items()
    }
    assert found == pytest.approx(
        {
            "accuracy": 2 / 3,
            "balanced_accuracy": 3 / 4,
            "top_5_accuracy": 1,
            "macro_f1": (2 / 3 + 1 + 0) / 3,
            # The mistake costs 4. By chance (shares 2/3 and 1/3 of three answers) one costs
            # 2/3 + 4 * 2/3 as class 0, and 1/3 + 1/3 as class 1: 4, too.
            "quadratic_kappa": 0,
            "roc_auc": 1,
            "average_precision": 1,
            "brier": (3 / 8 + 7 / 8) / 3,
            "log_loss": (np.log(2) + np.log(4)) / 3,
            "calibration_error": 0,
        },
        abs=1e-9,
    )


def test_what_scikit_learn_warns_of_or_refuses():
    """Classes of one image or none, two classes for five guesses, networks that diverged."""
    many = METRICS["single_label"]["macro_f1"].of(np.eye(30), np.arange(30))
    assert many == 1
    lost = np.full((4, 2), np.nan)
    for name, each in METRICS["regression"].items():
        assert np.isnan(each.of(lost, VALUES[:4])), name
    assert np.isnan(METRICS["multi_label"]["log_loss"].of(lost, LABELS[:4, :2]))
    assert METRICS["single_label"]["top_5_accuracy"].of(np.eye(2), np.array([1, 0])) == 1
    rows = report("single_label", np.eye(3)[[0, 2, 2]], np.array([0, 0, 2]), "abc", samples=2)
    assert rows["outputs"]["b"] == {
        "precision": None, "recall": None, "f1": None, "roc_auc": None,
        "average_precision": None, "positives": 0, "examples": 3,
    }  # fmt: skip
    assert rows["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert rows["outputs"]["c"]["precision"] == 0.5


def test_rows_of_labels_leave_out_what_is_not_known():
    hidden = LABELS.copy()
    hidden[40:, 1] = np.nan
    rows = report("multi_label", CHANCES, hidden, "abc", samples=2)["outputs"]
    for k, size in enumerate((100, 40, 100)):
        truth, said = LABELS[:size, k], CHANCES[:size, k] > 0.5
        precision, recall, f1, _ = peer.precision_recall_fscore_support(
            truth, said, average="binary"
        )
        assert rows["abc"[k]] == {
            "precision": precision, "recall": recall, "f1": f1,
            "roc_auc": pytest.approx(peer.roc_auc_score(truth, CHANCES[:size, k])),
            "average_precision": pytest.approx(
                peer.average_precision_score(truth, CHANCES[:size, k])
            ),
            "positives": truth.sum(), "examples": size,
        }  # fmt: skip


@pytest.mark.parametrize("name", MULTI)
def test_missing_labels_are_left_out(name):
    """A label that is known for one part counts there as in a set of that part alone."""
    hidden = LABELS.copy()
    hidden[40:, 1] = np.nan
    found = METRICS["multi_label"][name].of(CHANCES, hidden)
    if "micro" in name or name in ("brier", "log_loss"):
        known = ~np.isnan(hidden)
        single = METRICS["multi_label"][name]
        expected = single.of(CHANCES[known][:, None], hidden[known][:, None])
    elif name == "label_accuracy":
        right = (CHANCES > 0.5) == (LABELS > 0.5)
        expected = np.r_[right[:40].mean(1), right[40:, ::2].mean(1)].mean()
    else:
        rows = (slice(100), slice(40), slice(100))
        of = METRICS["multi_label"][name].of
        parts = [of(CHANCES[r, k : k + 1], LABELS[r, k : k + 1]) for k, r in enumerate(rows)]
        expected = np.mean(parts)
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_labels_do_not_define_is_nan_or_left_out():
    constant = LABELS.copy()
    constant[:, 0] = 1
    of = METRICS["multi_label"]["roc_auc"].of
    assert of(CHANCES, constant) == pytest.approx(of(CHANCES[:, 1:], LABELS[:, 1:]))
    assert np.isnan(of(CHANCES, np.ones((100, 3))))
    assert np.isnan(METRICS["regression"]["r2"].of(VALUES, np.ones((100, 2))))
    assert np.isnan(
        METRICS["single_label"]["quadratic_kappa"].of(np.eye(2)[[0, 0]], np.zeros(2, int))
    )


def test_an_interval_covers_the_mean_of_a_normal_as_theory_says():
    """The percentile interval of a mean of 400 is mean +- 1.96 sd / 20, to the draw of 2,000."""
    values = np.random.default_rng(1).normal(size=(400, 1))
    drawn = resampled(lambda p, _: float(p.mean()), values, values, 2000)
    low, high = interval(drawn)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )


def test_samples_are_stratified_by_class_and_by_group():
    counts = resampled(lambda _, y: float((y == 1).sum()), SOFT, CLASSES, 20)
    assert set(counts) == {float((CLASSES == 1).sum())}
    groups = np.arange(100) // 10
    whole = resampled(
        lambda p, _: float((np.unique(p[:, 0], return_counts=True)[1] % 1 == 0).all()),
        groups[:, None].astype(float),
        CLASSES,
        5,
        groups=groups,
    )
    assert whole.all()
    sizes = resampled(
        lambda p, _: float(min(np.unique(p, return_counts=True)[1] % 10)),
        groups.astype(float),
        CLASSES,
        20,
        groups=groups,
    )
    assert set(sizes) == {0.0}


def test_groups_widen_the_interval():
    """Ten equal examples of each group are one example: the interval is sqrt(10) times as wide."""
    values = np.repeat(np.random.default_rng(2).normal(size=(40, 1)), 10, axis=0)
    groups = np.repeat(np.arange(40), 10)
    widths = []
    for of in (None, groups):
        low, high = interval(
            resampled(lambda p, _: float(p.mean()), values, values, 1000, groups=of)
        )
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(np.sqrt(10), rel=0.15)


def test_a_metric_ranks_where_it_is_asked_for():
    task = SINGLE_LABEL.ranked_by("balanced_accuracy")
    logits = np.log(SOFT).astype(np.float32)
    found = task.evaluate(logits, CLASSES)
    assert list(found) == ["balanced_accuracy", "loss", "accuracy"]
    assert found["balanced_accuracy"] == pytest.approx(SINGLE["balanced_accuracy"])
    assert SINGLE_LABEL.ranked_by("accuracy") is SINGLE_LABEL
    assert task.ranked_by("accuracy").evaluate(logits, CLASSES) == SINGLE_LABEL.evaluate(
        logits, CLASSES
    )
    assert REGRESSION.ranked_by("mae").standing(2.0) == -2.0
    assert MULTI_LABEL.ranked_by("roc_auc").ranking == "roc_auc"
    with pytest.raises(
        ValueError, match=r"metric must be one of r2, mae, rmse .* got 'mea'; did you"
    ):
        metric_named("regression", "mea")


def test_values_are_shown_in_their_form():
    assert shown("accuracy", 0.5) == "50.0 %"
    assert shown("mae", 0.5) == "0.5"
    assert shown("r2", float("nan")) == "-"
