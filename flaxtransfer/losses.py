"""Losses of the tasks, as values: cross-entropy, binary cross-entropy, squared error, Huber.

A loss is a function of outputs, labels and a key that gives one number per example. Those here are
frozen dataclasses: two equal ones are one loss, and a plan file can hold them. What they need of
the training set (how frequent each class is) is bound once, by ``bound``, before the first step.

A label that is NaN is missing. It is left out of the sum and of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxtransfer.paths import listing, suggest

__all__ = [
    "LOSSES",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Huber",
    "Loss",
    "SquaredError",
    "bound",
    "cross_entropy",
    "settings_of",
]

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(outputs [batch, outputs], labels [batch, ...], key) -> losses [batch]``."""

Weights = Literal["balanced"] | Mapping[str, float] | tuple[tuple[str, float], ...]
"""One weight per name, or "balanced": from the training set."""

_BOUND = {"bound": True}
"""Marks a field that `bound` fills in: no setting of a plan."""


class _Shown:
    """Prints the settings that are not their defaults: tables and run folders keep that text."""

    def __repr__(self) -> str:
        settings = (f"{name}={value!r}" for name, value in settings_of(self).items())
        return f"{type(self).__name__}({', '.join(settings)})"


def cross_entropy(logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Softmax cross-entropy in nats, one value per example.

    >>> import jax, jax.numpy as jnp
    >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """
    del key  # A deterministic loss; others may mix examples or drop outputs.
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses


@dataclass(frozen=True, repr=False)
class CrossEntropy(_Shown):
    """Softmax cross-entropy in nats, with what helps where classes are unequally frequent.

    Use ``class_weights="balanced"`` or ``logit_adjustment=1.0`` where rare classes count as much as
    frequent ones; both aim at balanced accuracy. Probabilities are then those of classes of equal
    frequency, and no longer calibrated for the training set.

    Args:
        label_smoothing: share of the mass that is spread over all classes, in [0, 1).
        class_weights: factor of each class by its name (1 where none is named), or "balanced":
            examples / (classes * examples of the class), as in scikit-learn. The mean over a batch
            is divided by the examples, not by the weights.
        focal: exponent of the factor ``(1 - p)``, p being the probability of the label; 0 for none.
        logit_adjustment: factor of the log frequency of each class, which is added to the logits in
            training alone; 1 makes the loss consistent for balanced accuracy, 0 is none.

    Raises:
        ValueError: numbers out of range.

    References:
        C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016 (label
        smoothing). T.-Y. Lin et al., "Focal Loss for Dense Object Detection", 2017. A. K. Menon et
        al., "Long-tail Learning via Logit Adjustment", 2021.

    >>> import jax, jax.numpy as jnp
    >>> loss = CrossEntropy(label_smoothing=0.1)
    >>> float(loss(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """

    label_smoothing: float = 0.0
    class_weights: Weights | None = None
    focal: float = 0.0
    logit_adjustment: float = 0.0
    weights: tuple[float, ...] = field(default=(), metadata=_BOUND)
    log_frequencies: tuple[float, ...] = field(default=(), metadata=_BOUND)

    task = "single_label"

    def __post_init__(self) -> None:
        _check(self, ("focal", "logit_adjustment"))
        object.__setattr__(self, "class_weights", _pairs(self.class_weights, "class_weights"))

    def bind(self, names: Sequence[str], labels: np.ndarray) -> CrossEntropy:
        """The loss for these classes, int ``[examples]`` being the labels of the training set."""
        counts = np.bincount(labels, minlength=len(names))
        if self.class_weights == "balanced" or self.logit_adjustment:
            _check_counts("class", names, counts)
        balanced = len(labels) / (len(counts) * np.maximum(counts, 1))
        weights = _by_name(self.class_weights, "class_weights", names, balanced)
        adjusted = np.log(counts / len(labels)) if self.logit_adjustment else ()
        return replace(self, weights=weights, log_frequencies=tuple(map(float, adjusted)))

    def __call__(self, logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        _check_bound(self, self.class_weights, self.weights)
        _check_bound(self, self.logit_adjustment, self.log_frequencies)
        if self.logit_adjustment:
            logits = logits + self.logit_adjustment * jnp.asarray(self.log_frequencies)
        if self.weights or self.label_smoothing:
            targets = jax.nn.one_hot(labels, logits.shape[-1])
            if self.label_smoothing:
                targets = optax.smooth_labels(targets, self.label_smoothing)
            if self.weights:
                targets = targets * jnp.asarray(self.weights)
            losses: jax.Array = optax.softmax_cross_entropy(logits, targets)
        else:
            losses = cross_entropy(logits, labels, key)
        if self.focal:
            losses = losses * _unsure(-cross_entropy(logits, labels, key), self.focal)
        return losses


@dataclass(frozen=True, repr=False)
class BinaryCrossEntropy(_Shown):
    """Binary cross-entropy of independent labels in nats: the mean over the known ones.

    Args:
        label_smoothing: share that both values of a label share evenly, in [0, 1).
        positive_weights: factor of the positive examples of a label by its name (1 where none is
            named), or "balanced": negatives / positives among the known.
        focal: exponent of the factor ``(1 - p)``, p being the probability of the value; 0 for none.

    Raises:
        ValueError: numbers out of range.

    References:
        See ``CrossEntropy``.

    >>> import jax, jax.numpy as jnp
    >>> labels = jnp.array([[1.0, 0.0, jnp.nan]])
    >>> loss = BinaryCrossEntropy()(jnp.zeros((1, 3)), labels, jax.random.key(0))
    >>> float(loss[0]).__round__(4)
    0.6931
    """

    label_smoothing: float = 0.0
    positive_weights: Weights | None = None
    focal: float = 0.0
    weights: tuple[float, ...] = field(default=(), metadata=_BOUND)

    task = "multi_label"

    def __post_init__(self) -> None:
        _check(self, ("focal",))
        pairs = _pairs(self.positive_weights, "positive_weights")
        object.__setattr__(self, "positive_weights", pairs)

    def bind(self, names: Sequence[str], labels: np.ndarray) -> BinaryCrossEntropy:
        """The loss for these labels, float ``[examples, labels]`` being the training set's."""
        positives, negatives = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
        if self.positive_weights == "balanced":
            _check_counts("label", names, positives, "positive ")
        balanced = negatives / np.maximum(positives, 1)
        found = _by_name(self.positive_weights, "positive_weights", names, balanced)
        return replace(self, weights=found)

    def __call__(self, logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        _check_bound(self, self.positive_weights, self.weights)
        known = ~jnp.isnan(labels)
        # What is missing is 0 in all that follows: NaN would pass through a mask's gradient.
        hard = jnp.where(known, labels, 0)
        soft = hard * (1 - self.label_smoothing) + self.label_smoothing / 2
        positive, negative = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        factor = jnp.asarray(self.weights) if self.weights else 1.0
        losses = -(factor * soft * positive + (1 - soft) * negative)
        if self.focal:
            losses = losses * _unsure(jnp.where(hard > 0.5, positive, negative), self.focal)
        return _mean_over(known, losses)


@dataclass(frozen=True, repr=False)
class SquaredError(_Shown):
    """Half the squared error in standard deviations of each target: the mean over the known ones.

    >>> import jax, jax.numpy as jnp
    >>> SquaredError()(jnp.array([[3.0, 1.0]]), jnp.array([[1.0, jnp.nan]]), None).tolist()
    [2.0]
    """

    task = "regression"

    def __call__(self, outputs: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        known = ~jnp.isnan(labels)
        error = jnp.where(known, outputs - jnp.where(known, labels, 0), 0)
        return _mean_over(known, jnp.square(error) / 2)


@dataclass(frozen=True, repr=False)
class Huber(_Shown):
    """Huber's loss: squared within ``delta`` standard deviations of a target, linear beyond.

    Use it where some labels are far off: they then pull no harder than those at ``delta``.

    Args:
        delta: above 0, in standard deviations of the target on the training set.

    Raises:
        ValueError: another delta.

    References:
        P. J. Huber, "Robust Estimation of a Location Parameter", 1964.

    >>> import jax, jax.numpy as jnp
    >>> Huber(1.0)(jnp.array([[3.0]]), jnp.array([[1.0]]), None).tolist()
    [1.5]
    """

    delta: float = 1.0

    task = "regression"

    def __post_init__(self) -> None:
        if not _is_number(self.delta) or not self.delta > 0:
            raise ValueError(f"delta must be > 0, got {self.delta!r}")

    def __call__(self, outputs: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        known = ~jnp.isnan(labels)
        error = jnp.where(known, outputs - jnp.where(known, labels, 0), 0)
        return _mean_over(known, optax.huber_loss(error, delta=self.delta))


LOSSES: dict[str, Any] = {
    "cross_entropy": CrossEntropy,
    "binary_cross_entropy": BinaryCrossEntropy,
    "squared_error": SquaredError,
    "huber": Huber,
}
"""The losses by the names that plan files give them."""


def settings_of(loss: Any) -> dict[str, Any]:
    """The settings of a loss that are not their defaults, as plain values by name.

    >>> settings_of(CrossEntropy(label_smoothing=0.1, class_weights={"rare": 9.0}))
    {'label_smoothing': 0.1, 'class_weights': {'rare': 9.0}}
    """
    found = {
        of.name: getattr(loss, of.name)
        for of in fields(loss)
        if not of.metadata.get("bound") and getattr(loss, of.name) != of.default
    }
    return {name: dict(v) if isinstance(v, tuple) else v for name, v in found.items()}


def bound(loss: Any, task: str, names: Sequence[str], labels: np.ndarray | None) -> Any:
    """The loss with what it needs of the training set.

    Args:
        loss: any; a function of one's own is returned as it is.
        task: name of the task that is trained.
        names: of the classes, labels or targets, in the order of the outputs.
        labels: of the training examples; None where the feed cannot tell.

    Raises:
        ValueError: a loss of another task, a name that no class has, a class without examples that
            would need some, or no labels where they are needed.
    """
    if getattr(loss, "task", task) != task:
        fitting = [name for name, each in LOSSES.items() if each.task == task]
        raise ValueError(
            f"loss must be one for the task {task} ({', '.join(fitting)}), got {loss!r}"
        )
    if not hasattr(loss, "bind"):
        return loss
    asked = [getattr(loss, name, None) for name in ("class_weights", "positive_weights")]
    if not any(asked) and not getattr(loss, "logit_adjustment", 0):
        return loss
    if labels is None:
        raise ValueError(
            f"{loss!r} needs the labels of the training set, which these batches do not show; make "
            "them with ft.loaders"
        )
    return loss.bind(tuple(names), labels)


def _mean_over(known: jax.Array, losses: jax.Array) -> jax.Array:
    total = jnp.where(known, losses, 0).sum(axis=-1)
    mean: jax.Array = total / jnp.maximum(known.sum(axis=-1), 1)
    return mean


def _unsure(log_probability: jax.Array, exponent: float) -> jax.Array:
    """``(1 - p) ** exponent``; the floor keeps the gradient finite where p is 1."""
    factor: jax.Array = jnp.maximum(-jnp.expm1(log_probability), 1e-12) ** exponent
    return factor


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(loss: Any, not_negative: Iterable[str]) -> None:
    problems = []
    if not _is_number(loss.label_smoothing) or not 0 <= loss.label_smoothing < 1:
        problems.append(f"label_smoothing must be in [0, 1), got {loss.label_smoothing!r}")
    for name in not_negative:
        value = getattr(loss, name)
        if not _is_number(value) or not 0 <= value < np.inf:
            problems.append(f"{name} must be >= 0, got {value!r}")
    if problems:
        raise ValueError("; ".join(problems))


def _pairs(weights: Any, name: str) -> Any:
    """Weights as a value that can be compared and hashed."""
    if weights is None or weights == "balanced":
        return weights
    try:
        pairs = tuple((str(key), value) for key, value in dict(weights).items())
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be 'balanced' or numbers by name, got {weights!r}") from None
    wrong = [f"{key} {value!r}" for key, value in pairs if not _is_number(value) or not value > 0]
    if wrong or not pairs:
        raise ValueError(f"{name} must be numbers > 0 by name, got {listing(wrong) or 'none'}")
    return tuple((key, float(value)) for key, value in pairs)


def _by_name(
    given: Any, setting: str, names: Sequence[str], balanced: np.ndarray
) -> tuple[float, ...]:
    if given is None:
        return ()
    if given == "balanced":
        return tuple(map(float, balanced))
    unknown = [f"{name!r}{suggest(name, names)}" for name, _ in given if name not in names]
    if unknown:
        raise ValueError(
            f"{setting} must name {listing(map(repr, names))}, got {', '.join(unknown)}"
        )
    by_name = dict(given)
    return tuple(by_name.get(name, 1.0) for name in names)


def _check_counts(what: str, names: Sequence[str], counts: np.ndarray, kind: str = "") -> None:
    empty = [repr(name) for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"every {what} must have a {kind}training example to be weighted by its frequency, got "
            f"none of {listing(empty)}; give weights by name"
        )


def _check_bound(loss: Any, asked: Any, found: tuple[float, ...]) -> None:
    if asked and not found:
        raise ValueError(f"{loss!r} must be bound to the training set first, as ft.fit does")
