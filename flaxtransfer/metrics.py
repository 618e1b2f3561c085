"""Metrics of a whole set: one table by task, intervals by the bootstrap, and a report.

A metric is a function of predictions and labels: probabilities ``[examples, classes]`` and int
``[examples]`` for single_label, probabilities and float ``[examples, labels]`` for multi_label,
values and float ``[examples, targets]`` for regression. Missing labels are NaN and left out.
scikit-learn computes them, on the set and on each sample of the bootstrap. Ours are the calibration
error, which it has not; accuracy, a mean of what comparisons count; and two areas, for their speed.

References:
    B. Efron, R. Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile intervals). C. Guo
    et al., "On Calibration of Modern Neural Networks", 2017 (expected calibration error).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.paths import suggest

__all__ = [
    "ACCURACY",
    "METRICS",
    "Draws",
    "Metric",
    "Skill",
    "compared",
    "interval",
    "metric_named",
    "report",
    "resampled",
    "shown",
]

_BINS = 15
"""Of the calibration error, as in the paper."""


@dataclass(frozen=True)
class Metric:
    """A metric of a set.

    Args:
        name: in tables, files and options.
        of: ``(predictions, labels) -> value``; NaN where the labels do not define it.
        larger_is_better: whether validation looks for the largest value.
        is_share: whether it is printed in percent.
    """

    name: str
    of: Callable[[np.ndarray, np.ndarray], float]
    larger_is_better: bool = True
    is_share: bool = True

    def standing(self, value: float) -> float:
        """The value, turned so that larger is better."""
        return value if self.larger_is_better else -value


@dataclass(frozen=True)
class Draws:
    """A metric that is no mean over examples, on a set and on fixed bootstrap samples of it.

    Two states on the same set are compared by the samples, which are the same for both.

    Args:
        value: on the set; larger is better.
        samples: on each sample; may be none.
        examples: of the set.
    """

    value: float
    samples: tuple[float, ...]
    examples: int


# --- one class per image ---


def _by_sklearn(name: str, truth: np.ndarray, said: np.ndarray, **options: Any) -> Any:
    """A function of ``sklearn.metrics``, imported here, so that help and plans need none of it.

    It would warn of what is not defined, which NaN says here, and refuse the outputs of a network
    that diverged, whose metrics are NaN.
    """
    import sklearn.metrics

    with warnings.catch_warnings(), sklearn.config_context(assume_finite=True):
        warnings.simplefilter("ignore")
        return getattr(sklearn.metrics, name)(truth, said, **options)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(predictions.argmax(axis=1) == labels))


def _balanced_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    said, present = predictions.argmax(axis=1), np.unique(labels)
    return float(_by_sklearn("recall_score", labels, said, labels=present, average="macro"))


def _top_5(predictions: np.ndarray, labels: np.ndarray) -> float:
    every = np.arange(predictions.shape[1])
    if len(every) <= 5:  # scikit-learn refuses two.
        return 1.0
    return float(_by_sklearn("top_k_accuracy_score", labels, predictions, k=5, labels=every))


def _macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float(_by_sklearn("f1_score", labels, predictions.argmax(axis=1), average="macro"))


def _quadratic_kappa(predictions: np.ndarray, labels: np.ndarray) -> float:
    said, every = predictions.argmax(axis=1), np.arange(predictions.shape[1])
    found = _by_sklearn("cohen_kappa_score", labels, said, labels=every, weights="quadratic")
    return float(found)


def _brier_of_classes(predictions: np.ndarray, labels: np.ndarray) -> float:
    every = np.arange(predictions.shape[1])
    wanted = np.asarray(labels[:, None] == every, np.float64)
    return _brier(np.asarray(predictions, np.float64), wanted) * len(every)


def _brier(chance: np.ndarray, truth: np.ndarray) -> float:
    return float(_by_sklearn("mean_squared_error", truth, chance))


def _log_loss_of_classes(predictions: np.ndarray, labels: np.ndarray) -> float:
    own = np.take_along_axis(predictions, labels[:, None], axis=1)[:, 0].astype(np.float64)
    return _log_loss(own, np.ones(len(own)))


def _log_loss(chance: np.ndarray, truth: np.ndarray) -> float:
    """Of float64, in which scikit-learn bounds the loss of an example at 36 nats."""
    return float(_by_sklearn("log_loss", truth, chance, labels=[0, 1]))


def _calibration_of_classes(predictions: np.ndarray, labels: np.ndarray) -> float:
    return _calibration(predictions.max(axis=1), predictions.argmax(axis=1) == labels)


def _calibration(confidences: np.ndarray, hits: np.ndarray) -> float:
    """Mean gap between confidence and hits over bins of equal width, weighted by examples."""
    bins = np.minimum((confidences * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, hits, _BINS) - np.bincount(bins, confidences, _BINS)
    return float(np.abs(gaps).sum() / len(confidences))


# --- several labels per image; classes one against the rest come here, too ---

# The two areas are ours, because each validation draws the one that ranks 200 times for each label.
# With 1,000 images and 10 classes scikit-learn takes 2.5 s for the draws of ROC AUC and 1.2 s for
# those of average precision, 12 and 8 times as long as this.


def _per_label(name: str, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``average_precision`` or ``roc_auc`` of each label; NaN where only one value is known."""
    of = {"average_precision": _average_precision, "roc_auc": _roc_auc}[name]
    found = np.full(predictions.shape[1], np.nan)
    for k in range(predictions.shape[1]):
        # One class after the other: all of them as columns would need examples x classes numbers.
        column = labels == k if labels.ndim == 1 else labels[:, k]
        known = ~np.isnan(column)
        truth = column[known] > 0.5
        if truth.any() and not truth.all():
            found[k] = of(truth, predictions[known, k])
    return found


def _roc_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs of a positive and a negative in the right order, ties by half."""
    from scipy.stats import rankdata  # Here, so that masks and plans need no scipy.

    positives = int(truth.sum())
    above = rankdata(scores)[truth].sum() - positives * (positives + 1) / 2
    return float(above / (positives * (len(truth) - positives)))


def _average_precision(truth: np.ndarray, scores: np.ndarray) -> float:
    """The mean precision at each positive, equal scores being one threshold."""
    order = np.argsort(-scores, kind="stable")
    hits, ordered = np.cumsum(truth[order]), scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    gained = np.diff(hits[last], prepend=0) / hits[-1]
    return float((gained * hits[last] / (last + 1)).sum())


def _macro(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def of(predictions: np.ndarray, labels: np.ndarray) -> float:
        found = _per_label(name, predictions, labels)
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    return of


def _micro(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def of(predictions: np.ndarray, labels: np.ndarray) -> float:
        return float(_per_label(name, predictions.reshape(-1, 1), labels.reshape(-1, 1))[0])

    return of


def _known(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(labels)
    return np.asarray(predictions, np.float64)[known], labels[known]


def _label_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean over examples of the share of known labels that are right."""
    known = ~np.isnan(labels)
    count = known.sum(axis=1)
    shares = np.repeat(1 / np.maximum(count, 1), count)
    truth, said = labels[known] > 0.5, predictions[known] > 0.5
    return float(_by_sklearn("accuracy_score", truth, said, sample_weight=shares))


def _as_classes(predictions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of every known label: its place, counted from 1, or 0 for "not it"."""
    known, place = ~np.isnan(labels), np.arange(1, labels.shape[1] + 1)
    return ((labels > 0.5) * place)[known], ((predictions > 0.5) * place)[known]


def _f1_of_labels(predictions: np.ndarray, labels: np.ndarray) -> float:
    truth, said = _as_classes(predictions, labels)
    there = np.setdiff1d(truth, [0])  # Without a positive the F1 score is not defined.
    if not len(there):
        return float("nan")
    return float(_by_sklearn("f1_score", truth, said, labels=there, average="macro"))


def _of_known(
    of: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda predictions, labels: of(*_known(predictions, labels))


# --- numbers ---


def _over_targets(
    of: Callable[[np.ndarray, np.ndarray], float],
) -> Callable[[np.ndarray, np.ndarray], float]:
    """The mean over targets; NaN for one without two different known values."""

    def mean(predictions: np.ndarray, labels: np.ndarray) -> float:
        found = [
            of(*_known(predictions[:, k], labels[:, k].astype(np.float64)))
            for k in range(labels.shape[1])
        ]
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    return mean


def _r2(predicted: np.ndarray, truth: np.ndarray) -> float:
    if len(truth) < 2 or truth.min() == truth.max():
        return float("nan")
    return float(_by_sklearn("r2_score", truth, predicted))


def _error(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def of(predicted: np.ndarray, truth: np.ndarray) -> float:
        return float(_by_sklearn(name, truth, predicted)) if len(truth) else float("nan")

    return _over_targets(of)


def _table(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS: dict[str, dict[str, Metric]] = {
    "single_label": _table(
        Metric("accuracy", _accuracy),
        Metric("balanced_accuracy", _balanced_accuracy),
        Metric("top_5_accuracy", _top_5),
        Metric("macro_f1", _macro_f1),
        Metric("quadratic_kappa", _quadratic_kappa, is_share=False),
        Metric("roc_auc", _macro("roc_auc")),
        Metric("average_precision", _macro("average_precision")),
        Metric("brier", _brier_of_classes, larger_is_better=False, is_share=False),
        Metric("log_loss", _log_loss_of_classes, larger_is_better=False, is_share=False),
        Metric("calibration_error", _calibration_of_classes, larger_is_better=False),
    ),
    "multi_label": _table(
        Metric("average_precision", _macro("average_precision")),
        Metric("roc_auc", _macro("roc_auc")),
        Metric("micro_average_precision", _micro("average_precision")),
        Metric("micro_roc_auc", _micro("roc_auc")),
        Metric("label_accuracy", _label_accuracy),
        Metric("macro_f1", _f1_of_labels),
        Metric("brier", _of_known(_brier), larger_is_better=False, is_share=False),
        Metric("log_loss", _of_known(_log_loss), larger_is_better=False, is_share=False),
        Metric("calibration_error", _of_known(_calibration), larger_is_better=False),
    ),
    "regression": _table(
        Metric("r2", _over_targets(_r2), is_share=False),
        Metric("mae", _error("mean_absolute_error"), larger_is_better=False, is_share=False),
        Metric("rmse", _error("root_mean_squared_error"), larger_is_better=False, is_share=False),
    ),
}
"""The metrics of each task by name; the first is what validation ranks by unless told otherwise.

Macro is the mean over classes, labels or targets; micro pools all of them. Averages leave out what
the labels do not define: a class or label with one value alone."""


def metric_named(task: str, name: str) -> Metric:
    """The metric of a task with that name.

    Raises:
        ValueError: there is none; the text lists those that exist.

    >>> metric_named("regression", "mae").larger_is_better
    False
    """
    known = METRICS.get(task, {})
    if name not in known:
        raise ValueError(
            f"metric must be one of {', '.join(known) or 'none'} for the task {task}, got "
            f"{name!r}{suggest(str(name), known)}"
        )
    return known[name]


def shown(name: str, value: float | None) -> str:
    """A metric's value for a person: shares in percent, other numbers with three digits.

    >>> shown("accuracy", 0.5), shown("mae", 12.3456), shown("r2", None)
    ('50.0 %', '12.3', '-')
    """
    if value is None or np.isnan(value):
        return "-"
    found = [table[name] for table in METRICS.values() if name in table]
    return f"{value:.3g}" if found and not found[0].is_share else f"{100 * value:.1f} %"


def resampled(
    of: Callable[[np.ndarray, np.ndarray], float],
    predictions: np.ndarray,
    labels: np.ndarray,
    samples: int,
    *,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """A metric on bootstrap samples of the examples, float64 ``[samples]``.

    Args:
        of: the metric.
        predictions, labels: of the set. Integer labels are classes, which are drawn one by one, so
            that each sample has as many examples of a class as the set.
        samples: how many; sample n is the same for equal labels, groups and seed.
        seed: of the samples.
        groups: int ``[examples]``; examples of a group (a patient, a scene) are drawn together.
    """
    random = np.random.default_rng(seed)
    if groups is not None:
        _, group_of = np.unique(groups, return_inverse=True)
        members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of)))
        parts = [np.arange(len(members) - 1)]
    else:
        strata = labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)
        parts = [np.flatnonzero(strata == each) for each in np.unique(strata)]
    found = np.empty(samples)
    for n in range(samples):
        drawn = np.concatenate([part[random.integers(0, len(part), len(part))] for part in parts])
        if groups is not None:
            drawn = np.concatenate([members[group] for group in drawn])
        found[n] = of(predictions[drawn], labels[drawn])
    return found


def compared(first: np.ndarray | Draws, second: np.ndarray | Draws) -> tuple[float, float]:
    """By how much the first of two predictors is better on the same set, and the standard error.

    Args:
        first, second: bool ``[examples]``, what was right; or draws on the same samples.

    References:
        Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or
        Percentages", 1947.

    >>> compared(np.array([True, True, True, False]), np.array([True, False, False, False]))
    (0.5, 0.3535533905932738)
    >>> gain, error = compared(Draws(0.75, (0.75, 0.5), 9), Draws(0.5, (0.25, 0.5), 9))
    >>> gain, round(error, 4)
    (0.25, 0.3536)
    """
    if isinstance(first, Draws) and isinstance(second, Draws):
        apart = np.array(first.samples) - np.array(second.samples)
        apart = apart[~np.isnan(apart)]
        error = float(apart.std(ddof=1)) if len(apart) > 1 else float("inf")
        return first.value - second.value, error
    ours, theirs = np.asarray(first, bool), np.asarray(second, bool)
    won, lost = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return (won - lost) / len(ours), float(np.sqrt(won + lost)) / len(ours)


_SAMPLES = 100
"""Bootstrap samples of a skill: its standard error is then known to 7 %."""


@dataclass(frozen=True)
class Skill:
    """A metric on a scale where 1 is perfect, so that thresholds in points mean something.

    A metric of which larger is better is its own skill. That of an error is the share of it that is
    gone, compared with the best guess that looks at no image. A point is a hundredth.

    Args:
        metric: a row of ``METRICS``.
        guess: the value of the metric for that guess.

    >>> labels = np.array([[1.0], [2.0], [3.0]])
    >>> skill = Skill.of(METRICS["regression"]["mae"], labels)
    >>> skill(labels + 0.5, labels), skill.text(0.25, 0.01)
    (0.25, '25.0 ± 1.0 % below a guess')
    """

    metric: Metric
    guess: float = 0.0

    @classmethod
    def of(cls, metric: Metric, labels: np.ndarray) -> Skill:
        """The skill on data with these labels: classes, 0 and 1, or values."""
        if labels.ndim == 1:
            shares = np.bincount(labels) / len(labels)
            constant = np.tile(shares, (len(labels), 1))
        else:
            constant = np.tile(np.nanmean(labels, axis=0), (len(labels), 1))
        return cls(metric, metric.of(constant, labels))

    def __call__(self, predictions: np.ndarray, labels: np.ndarray) -> float:
        """The skill of predictions (see the module) on a set."""
        value = self.metric.of(predictions, labels)
        return value if self.metric.larger_is_better else 1 - value / max(self.guess, 1e-12)

    @property
    def of_guess(self) -> float:
        """Of the best guess that looks at no image."""
        return self.guess if self.metric.larger_is_better else 0.0

    @property
    def name(self) -> str:
        """The metric in words."""
        plain = self.metric.name.replace("_", " ")
        return plain.upper() if plain in ("r2", "mae", "rmse") else plain

    @property
    def point(self) -> str:
        """What a point is."""
        if not self.metric.larger_is_better:
            return f"a hundredth of the {self.name} of a guess that looks at no image"
        return f"a hundredth of {self.name}"

    def text(self, value: float, error: float | None = None) -> str:
        """A skill for a person, with its standard error."""
        scale, digits, unit = 100.0, 1, " %"
        if not self.metric.larger_is_better:
            unit = " % below a guess"
        elif not self.metric.is_share:
            scale, digits, unit = 1.0, 3, ""
        more = "" if error is None else f" ± {scale * error:.{digits}f}"
        return f"{scale * value:.{digits}f}{more}{unit}"

    def judged(
        self, predictions: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
    ) -> np.ndarray | Draws:
        """What ``compared`` takes: what was right for accuracy, else draws of the skill.

        Args:
            predictions, labels: of a set.
            groups: ``[examples]``, which are drawn together.
        """
        if self.metric.name == "accuracy":
            right: np.ndarray = predictions.argmax(axis=1) == labels
            return right
        drawn = resampled(self, predictions, labels, _SAMPLES, groups=groups)
        return Draws(self(predictions, labels), tuple(drawn.tolist()), len(labels))


ACCURACY = Skill(METRICS["single_label"]["accuracy"])
"""Of one class per image, by which advice judges it whatever validation ranks by."""


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """The percentile interval of bootstrap draws; None where fewer than half are defined."""
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < len(draws) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


_INTERVALS = {
    "single_label": ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "calibration_error"),
    "multi_label": ("average_precision", "roc_auc", "label_accuracy", "macro_f1"),
    "regression": ("r2", "mae", "rmse"),
}
"""What a report has intervals of, besides the metric that ranks."""

_MOST_ROWS = 50
"""Classes, labels or targets that a report lists one by one."""


def report(
    task: str,
    predictions: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    ranking: str = "",
    groups: np.ndarray | None = None,
    samples: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of a set, intervals by the bootstrap, and a row for each output, as plain JSON.

    Args:
        task: name of the task.
        predictions: probabilities or values, ``[examples, outputs]``.
        labels: of the same examples.
        names: of the outputs.
        ranking: the metric that ranked, which then has an interval, too.
        groups: int ``[examples]``; see ``resampled``.
        samples: of the bootstrap.
        seed: of the samples.

    Returns:
        "metrics" by name (None where the labels do not define one), "intervals" of 95 %, "outputs"
        (precision, recall, F1, ROC AUC, average precision and how many; or errors of a target), and
        for classes the "confusion" matrix, rows being labels. More than 50 outputs are not listed,
        and "left_out" says so.

    >>> found = report("regression", np.array([[1.0], [2.0]]), np.array([[1.0], [3.0]]), ["mm"])
    >>> found["metrics"]["mae"], found["outputs"]["mm"]["examples"]
    (0.5, 2)
    """
    table = METRICS[task]
    values = {name: _plain(metric.of(predictions, labels)) for name, metric in table.items()}
    intervals = {}
    for name in dict.fromkeys([*filter(None, [ranking]), *_INTERVALS[task]]):
        drawn = resampled(table[name].of, predictions, labels, samples, groups=groups, seed=seed)
        found = interval(drawn)
        intervals[name] = None if found is None else [round(bound, 6) for bound in found]
    drawn_by = (
        "groups" if groups is not None else "images of each class" if labels.ndim == 1 else ""
    )
    whole: dict[str, Any] = {
        "metrics": values,
        "intervals": intervals,
        "intervals_by": f"bootstrap of {drawn_by or 'images'}, {samples} samples, 95 %",
    }
    if len(names) > _MOST_ROWS:
        return whole | {"left_out": f"the {len(names)} outputs one by one"}
    of = _target_rows if task == "regression" else _label_rows
    whole["outputs"] = of(predictions, labels, names)
    if task == "single_label":
        said, every = predictions.argmax(axis=1), np.arange(len(names))
        found = _by_sklearn("confusion_matrix", labels, said, labels=every)
        whole["confusion"] = found.tolist()
    return whole


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _label_rows(
    predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """Precision, recall, F1, ROC AUC and average precision of each class or label."""
    if labels.ndim == 1:
        truth, said, first = labels, predictions.argmax(axis=1), 0
    else:
        (truth, said), first = _as_classes(predictions, labels), 1
    every = np.arange(first, first + len(names))
    *shares, positives = _by_sklearn(
        "precision_recall_fscore_support", truth, said, labels=every, zero_division=np.nan
    )
    areas = [_per_label(name, predictions, labels) for name in ("roc_auc", "average_precision")]
    known = np.broadcast_to(~np.isnan(labels.reshape(len(labels), -1)), predictions.shape)
    found = [*shares, *areas, positives, known.sum(axis=0)]
    fields = ("precision", "recall", "f1", "roc_auc", "average_precision", "positives", "examples")
    return {
        name: {
            field: int(values[k]) if values.dtype.kind == "i" else _plain(values[k])
            for field, values in zip(fields, found, strict=True)
        }
        for k, name in enumerate(names)
    }


def _target_rows(
    predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """Errors of each target, in its units."""
    return {
        name: {
            metric: _plain(each.of(predictions[:, k : k + 1], labels[:, k : k + 1]))
            for metric, each in METRICS["regression"].items()
        }
        | {"examples": int((~np.isnan(labels[:, k])).sum())}
        for k, name in enumerate(names)
    }
