"""Tasks: what a label is, and everything that follows from it.

A ``Task`` is a value with the functions that know what labels mean: their check, the loss, the
probabilities, the score of one example, and the metrics of a set. Training, validation, ranking of
checkpoints, prediction and reports ask it, so that no other file knows what a label is. It is saved
with the run and with the weights by its name; a regression also with the mean and scale of its
targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.losses import BinaryCrossEntropy, Loss, SquaredError, cross_entropy
from flaxtransfer.metrics import METRICS, Draws, Metric, metric_named, resampled
from flaxtransfer.paths import listing, shortened, suggest

__all__ = [
    "MULTI_LABEL",
    "REGRESSION",
    "SINGLE_LABEL",
    "TASKS",
    "Task",
    "Units",
    "for_classes",
    "mean_loss",
    "task_named",
]


@dataclass(frozen=True)
class Units:
    """Mean and scale of each target on the training set; called, it undoes the standardization.

    Args:
        mean: of each target, in its units.
        scale: standard deviation of each target, above 0.

    >>> Units((10.0,), (2.0,))(np.array([[-1.0], [0.5]])).tolist()
    [[8.0], [11.0]]
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        mean, scale = tuple(map(float, self.mean)), tuple(map(float, self.scale))
        if len(mean) != len(scale) or not np.isfinite([*mean, *scale]).all() or min(scale) <= 0:
            raise ValueError(
                "units must be one finite mean and one scale above 0 per target, got "
                f"{len(mean)} and {listing(map(str, scale))}"
            )
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "scale", scale)

    @classmethod
    def of(cls, labels: np.ndarray) -> Units:
        """Mean and standard deviation of the known values; a constant target has scale 1.

        Args:
            labels: float ``[examples, targets]``, NaN where a value is missing.

        Raises:
            ValueError: a target without a known value.
        """
        values = np.asarray(labels, np.float64)
        known = ~np.isnan(values)
        if empty := np.flatnonzero(~known.any(axis=0)).tolist():
            raise ValueError(
                f"every target must have a known training value, got none for target {empty}"
            )
        count = known.sum(axis=0)
        mean = np.where(known, values, 0).sum(axis=0) / count
        deviation = np.sqrt(np.where(known, np.square(values - mean), 0).sum(axis=0) / count)
        constant = deviation <= 10 * np.finfo(np.float32).eps * np.abs(mean)
        return cls(tuple(mean), tuple(np.where(constant, 1.0, deviation)))

    def __call__(self, outputs: np.ndarray) -> np.ndarray:
        """Values in the units of the targets, float64."""
        values: np.ndarray = np.asarray(outputs, np.float64) * self.scale + np.array(self.mean)
        return values

    def standardized(self, labels: Any) -> Any:
        """Labels in standard deviations from the mean; numpy and jax alike."""
        xp = jnp if isinstance(labels, jax.Array) else np
        values = xp.asarray(labels, labels.dtype if labels.dtype.kind == "f" else np.float32)
        return (values - xp.asarray(self.mean, values.dtype)) / xp.asarray(self.scale, values.dtype)


@dataclass(frozen=True)
class Task:
    """What labels are, how outputs are judged, and what ranks two states of a network.

    Args:
        name: by which runs and weight files record it.
        check: ``(labels, outputs) -> labels``: the labels of a set as the loss takes them, for a
            network of so many outputs; a ``ValueError`` that lists what is wrong otherwise.
        loss: of each example, where a phase does not bring its own.
        probabilities: float ``[examples, outputs]`` from outputs of that shape; for a regression,
            the values in the units of the targets.
        score: of each example, ``[examples]``, from outputs and ``targets``; numpy and jax alike.
            Training logs its mean. Where ``rank`` is None, that mean also ranks: checkpoints,
            phases and strategies are compared by it.
        ranking: the name of the metric that ranks.
        metrics: ``(probabilities, labels) -> {name: value}``, the further metrics of a set.
        rank: the metric that ranks, where it is no mean over examples.
        scored: the name of the score's mean, where it is not ``ranking``.
        standardizes: whether labels are standardized on the training set.
        units: the mean and scale by which they are, once known.

    >>> import numpy as np
    >>> SINGLE_LABEL.score(np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 0])).tolist()
    [True, False]
    """

    name: str
    check: Callable[[Any, int], np.ndarray] = field(repr=False)
    loss: Loss = field(repr=False)
    probabilities: Callable[[np.ndarray], np.ndarray] = field(repr=False)
    score: Callable[[Any, Any], Any] = field(repr=False)
    ranking: str = field(repr=False)
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float]] = field(
        repr=False, default=lambda probabilities, labels: {}
    )
    rank: Metric | None = field(repr=False, default=None)
    scored: str = field(repr=False, default="")
    standardizes: bool = field(repr=False, default=False)
    units: Units | None = None

    @property
    def score_name(self) -> str:
        """What the mean of ``score`` is called."""
        return self.scored or self.ranking

    def targets(self, labels: Any) -> Any:
        """The labels as loss and score take them: standardized, for a regression."""
        return labels if self.units is None else self.units.standardized(labels)

    def fitted(self, labels: np.ndarray) -> Task:
        """The task with mean and scale of these training labels, where it needs them.

        A task that has its units keeps them: the head of its network speaks in them.
        """
        if not self.standardizes or self.units is not None:
            return self
        return self.with_units(Units.of(labels))

    def with_units(self, units: Units | None) -> Task:
        """The task with this mean and scale."""
        return self if units is None else replace(self, units=units, probabilities=units)

    def ranked_by(self, name: str) -> Task:
        """The task whose validations are ranked by another metric; see ``metrics.METRICS``.

        Raises:
            ValueError: the task has no such metric; the text lists those that it has.

        >>> SINGLE_LABEL.ranked_by("balanced_accuracy").ranking
        'balanced_accuracy'
        """
        if name == self.ranking:
            return self
        metric = metric_named(self.name, name)
        plain = name == self.score_name and not self.standardizes
        return replace(self, ranking=name, scored=self.score_name, rank=None if plain else metric)

    def standing(self, value: float) -> float:
        """The value of the ranking metric, turned so that larger is better."""
        return value if self.rank is None else self.rank.standing(value)

    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, loss: Loss | None = None
    ) -> dict[str, float]:
        """The metrics of a set: the one that ranks first, the loss, then the task's others.

        Args:
            outputs: float ``[examples, outputs]``, of the network.
            labels: of the same examples, in their units.
            loss: that was trained; by default the task's.
        """
        targets, probabilities = self.targets(labels), self.probabilities(outputs)
        found = {}
        if self.rank is not None:
            found[self.ranking] = self.rank.of(probabilities, labels)
        if self.score_name not in found:
            found[self.score_name] = float(np.mean(self.score(outputs, targets)))
        return {
            self.ranking: found[self.ranking],
            "loss": mean_loss(loss or self.loss, outputs, targets),
            **{name: value for name, value in found.items() if name != self.ranking},
            **self.metrics(probabilities, labels),
        }

    def evidence(
        self, outputs: np.ndarray, labels: np.ndarray, samples: int = 0
    ) -> np.ndarray | Draws:
        """What two states are compared by: bool ``[examples]``, or draws of the ranking metric.

        Args:
            outputs: float ``[examples, outputs]``, of the network.
            labels: of the same examples.
            samples: bootstrap samples, where the metric is no mean of truths.
        """
        scores = np.asarray(self.score(outputs, self.targets(labels)))
        if self.rank is None and scores.dtype == bool:
            return scores
        if self.rank is None:
            drawn = resampled(lambda each, _: float(each.mean()), scores, labels, samples)
            return Draws(float(scores.mean()), tuple(drawn.tolist()), len(scores))
        probabilities, rank = self.probabilities(outputs), self.rank
        drawn = resampled(rank.of, probabilities, labels, samples)
        value = rank.standing(rank.of(probabilities, labels))
        return Draws(value, tuple(rank.standing(one) for one in drawn.tolist()), len(labels))

    def check_rankable(self, labels: np.ndarray, outputs: int) -> None:
        """Refuses validation labels that do not define the metric that ranks.

        Raises:
            ValueError: see above.
        """
        if self.rank is None or not len(labels):
            return
        guess = np.full((len(labels), outputs), 1 / outputs)
        if np.isnan(self.rank.of(guess, labels)):
            raise ValueError(
                f"validation labels must define the metric that ranks, {self.ranking}, got "
                f"{len(labels)} examples of one value; validate on more of them, or rank by "
                "another metric"
            )


def mean_loss(loss: Loss, outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean of a loss over a set, as training computes it, with a fixed key."""
    each = loss(jnp.asarray(outputs), jnp.asarray(labels), jax.random.key(0))
    return float(np.mean(np.asarray(each, np.float64)))


def for_classes(task: Task, what: str) -> None:
    """Refuses a task that is not one class per image, for what has a meaning for classes alone.

    Args:
        task: of a network.
        what: begins the sentence, such as "a confusion matrix".

    Raises:
        ValueError: the task has no classes, of which each image has one.

    >>> for_classes(SINGLE_LABEL, "label shift")
    """
    if task.name != SINGLE_LABEL.name:
        raise ValueError(
            f"{what} must have one class per image (task {SINGLE_LABEL.name}), got the task "
            f"{task.name}, for which it has no meaning or is not done"
        )


def _softmax(outputs: np.ndarray) -> np.ndarray:
    from scipy.special import softmax  # Here, so that masks and plans need no scipy.

    return np.asarray(softmax(outputs, axis=-1))


def _sigmoid(outputs: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return np.asarray(expit(outputs))


def _as_they_are(outputs: np.ndarray) -> np.ndarray:
    return outputs


def _right_class(outputs: Any, labels: Any) -> Any:
    return outputs.argmax(axis=-1) == labels


def _right_labels(outputs: Any, labels: Any) -> Any:
    """The share of an example's known labels that are right."""
    known = labels == labels
    right = ((outputs > 0) == (labels > 0.5)) & known
    return right.sum(axis=-1) / known.sum(axis=-1).clip(1)


def _explained(outputs: Any, labels: Any) -> Any:
    """1 - squared error in standard deviations of the training set, where its mean is R2."""
    xp = jnp if isinstance(outputs, jax.Array) else np
    known = labels == labels
    squares = xp.where(known, xp.square(outputs - xp.where(known, labels, 0)), 0)
    return 1 - squares.sum(axis=-1) / known.sum(axis=-1).clip(1)


def _check_classes(labels: Any, outputs: int) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [examples] for the task {SINGLE_LABEL.name!r}, got "
            f"{found.dtype} of shape {found.shape}"
        )
    wrong = np.unique(found[(found < 0) | (found >= outputs)])
    if len(wrong):
        shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"labels must be 0 .. {outputs - 1} for a network of {outputs} classes, got {shown}"
        )
    return found


def _matrix(labels: Any, outputs: int, name: str) -> np.ndarray:
    found = np.asarray(labels)
    if found.ndim != 2 or found.shape[1] != outputs or found.dtype.kind not in "fiub":
        raise ValueError(
            f"labels must be numbers [examples, {outputs}] for the task {name!r}, got "
            f"{found.dtype} of shape {found.shape}"
        )
    found = found.astype(np.float32)
    unknown = np.flatnonzero(np.isnan(found).all(axis=1))
    if len(unknown):
        raise ValueError(
            f"every example must have a known label, got none for {len(unknown)}, at "
            f"{listing(map(str, unknown), most=5)}; leave them out"
        )
    return found


def _check_labels(labels: Any, outputs: int) -> np.ndarray:
    found = _matrix(labels, outputs, MULTI_LABEL.name)
    wrong = np.unique(found[~np.isnan(found) & (found != 0) & (found != 1)])
    if len(wrong):
        raise ValueError(
            f"labels must be 0, 1 or NaN for the task {MULTI_LABEL.name!r}, got "
            f"{listing(map(str, wrong), most=5)}"
        )
    return found


def _check_values(labels: Any, outputs: int) -> np.ndarray:
    found = _matrix(labels, outputs, REGRESSION.name)
    if np.isinf(found).any():
        raise ValueError(
            f"labels must be finite or NaN for the task {REGRESSION.name!r}, got "
            f"{int(np.isinf(found).sum())} infinite values"
        )
    return found


def _errors(values: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
    return {name: METRICS["regression"][name].of(values, labels) for name in ("mae", "rmse")}


SINGLE_LABEL = Task(
    name="single_label",
    check=_check_classes,
    loss=cross_entropy,
    probabilities=_softmax,
    score=_right_class,
    ranking="accuracy",
)
"""One class per image: softmax cross-entropy, ranked by accuracy."""

MULTI_LABEL = Task(
    name="multi_label",
    check=_check_labels,
    loss=BinaryCrossEntropy(),
    probabilities=_sigmoid,
    score=_right_labels,
    ranking="average_precision",
    rank=METRICS["multi_label"]["average_precision"],
    scored="label_accuracy",
)
"""Any of several labels per image, each by itself: sigmoids, ranked by macro average precision.

Labels are float32 ``[examples, labels]``: 0, 1, or NaN where nobody knows."""

REGRESSION = Task(
    name="regression",
    check=_check_values,
    loss=SquaredError(),
    probabilities=_as_they_are,
    score=_explained,
    ranking="r2",
    metrics=_errors,
    rank=METRICS["regression"]["r2"],
    scored="explained",
    standardizes=True,
)
"""One or several numbers per image: squared error in standard deviations, ranked by R2.

Labels are float32 ``[examples, targets]``, NaN where nobody knows. ``fit`` standardizes them on the
training set; predictions and errors are in the units of the labels. Training logs "explained": the
share of the training set's variance that is gone."""

TASKS = {task.name: task for task in (SINGLE_LABEL, MULTI_LABEL, REGRESSION)}
"""The tasks by the names that files record."""


OUTPUTS = {"single_label": "classes", "multi_label": "labels", "regression": "targets"}
"""What the outputs of a task are called."""


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: there is none; the text lists those that exist.

    >>> task_named("single_label") is SINGLE_LABEL
    True
    """
    if not isinstance(name, str) or name not in TASKS:
        got = shortened(repr(name), 100)
        raise ValueError(
            f"task must be one of {', '.join(TASKS)}, got {got}{suggest(str(name), TASKS)}"
        )
    return TASKS[name]
