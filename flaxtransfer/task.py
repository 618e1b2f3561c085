"""Tasks: what a label is, and everything that follows from it.

A ``Task`` is a value with the functions that know what labels mean: their check, the loss, the
probabilities, the score of one example, and the metrics of a set. Training, validation, ranking of
checkpoints, prediction and reports ask it, so that no other file knows what a label is. It is saved
with the run and with the weights by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxtransfer.paths import shortened, suggest

__all__ = [
    "SINGLE_LABEL",
    "TASKS",
    "Loss",
    "SmoothedCrossEntropy",
    "Task",
    "cross_entropy",
    "mean_loss",
    "task_named",
]

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(outputs [batch, outputs], labels [batch, ...], key) -> losses [batch]``."""


def cross_entropy(logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Softmax cross-entropy in nats, one value per example.

    >>> import jax, jax.numpy as jnp
    >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """
    del key  # A deterministic loss; others may mix examples or drop outputs.
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """Cross-entropy with label smoothing: ``amount`` of the mass is spread over all classes.

    Args:
        amount: at least 0 and less than 1.

    Raises:
        ValueError: another amount.

    References:
        C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016.

    >>> import jax, jax.numpy as jnp
    >>> loss = SmoothedCrossEntropy(0.1)
    >>> float(loss(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """

    amount: float

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise ValueError(f"label smoothing must be in [0, 1), got {self.amount}")

    def __call__(self, logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        del key  # See `cross_entropy`.
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), self.amount)
        losses: jax.Array = optax.softmax_cross_entropy(logits, targets)
        return losses


@dataclass(frozen=True)
class Task:
    """What labels are, how outputs are judged, and what ranks two states of a network.

    Args:
        name: by which runs and weight files record it.
        check: ``(labels, outputs) -> labels``: the labels of a set as the loss takes them, for a
            network of so many outputs; a ``ValueError`` that lists what is wrong otherwise.
        loss: of each example in nats, where a phase does not bring its own.
        probabilities: float ``[examples, outputs]`` from outputs of that shape.
        score: of each example, ``[examples]``, from outputs and labels; numpy and jax alike. Its
            mean is the metric that ranks: checkpoints, phases and strategies are compared by it.
        ranking: the name of that mean.
        metrics: ``(outputs, labels) -> {name: value}``, the further means over a set.

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
        repr=False, default=lambda outputs, labels: {}
    )

    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, loss: Loss | None = None
    ) -> dict[str, float]:
        """The means over a set: the ranking metric first, the loss, then the task's others.

        Args:
            outputs: float ``[examples, outputs]``, of the network.
            labels: of the same examples.
            loss: that was trained; by default the task's.
        """
        return {
            self.ranking: float(np.mean(self.score(outputs, labels))),
            "loss": mean_loss(loss or self.loss, outputs, labels),
            **self.metrics(outputs, labels),
        }


def mean_loss(loss: Loss, outputs: np.ndarray, labels: np.ndarray) -> float:
    """The mean of a loss over a set, as training computes it, with a fixed key."""
    each = loss(jnp.asarray(outputs), jnp.asarray(labels), jax.random.key(0))
    return float(np.mean(np.asarray(each, np.float64)))


def _softmax(outputs: np.ndarray) -> np.ndarray:
    from scipy.special import softmax  # Here, so that masks and plans need no scipy.

    return np.asarray(softmax(outputs, axis=-1))


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


SINGLE_LABEL = Task(
    name="single_label",
    check=_check_classes,
    loss=cross_entropy,
    probabilities=_softmax,
    score=lambda outputs, labels: outputs.argmax(axis=-1) == labels,
    ranking="accuracy",
)
"""One class per image: softmax cross-entropy, ranked by accuracy."""

TASKS = {task.name: task for task in (SINGLE_LABEL,)}
"""The tasks by the names that files record."""


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
