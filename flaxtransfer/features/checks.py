"""Input validation and standardization for the feature-space classifiers.

The checks of features and labels that all heads share, and ``standardization``, which scales
features to mean 0 and standard deviation 1 and can be undone on a fitted head.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

__all__ = [
    "Standardization",
    "blas_threads",
    "checked_examples",
    "checked_features",
    "class_labels",
    "singleton_classes",
    "standardization",
]


_SMALL = 2e9
"""Multiplications, examples x features x the smaller of both, that one thread does in 0.1 s."""


def blas_threads(matrix: np.ndarray) -> AbstractContextManager[Any]:
    """One BLAS thread while heads are solved on a small matrix, all of them on a large one.

    The threads of a product wait for each other, and where another program has the core of one of
    them, they wait for that program: 10 to 50 times as long, measured on two cores that were shared
    (experiments/results/whole_job.md).

    Args:
        matrix: ``[examples, features]``.

    >>> with blas_threads(np.ones((3, 2))):
    ...     (np.ones((2, 3)) @ np.ones((3, 2))).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    small = matrix.size * min(matrix.shape) <= _SMALL
    return threadpool_limits(1, "blas") if small else nullcontext()


def checked_examples(
    features: Any, labels: Any, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Checks features and labels for fitting a classifier.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1, of at least two classes.
        classes: number of classes; default: the largest label plus 1.

    Returns:
        Features in float64, labels, and the number of classes.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, labels out of range, one
            class.
        TypeError: labels that are not integers.

    >>> checked_examples([[0.0], [1.0]], [0, 1])[2]
    2
    """
    label = class_labels(labels)
    matrix = np.asarray(features, np.float64)
    if matrix.ndim != 2 or label.shape != matrix.shape[:1] or not matrix.size:
        raise ValueError(
            "features and labels must have shapes [examples, features] and [examples], got "
            f"{matrix.shape} and {label.shape}"
        )
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"features must be finite; {wrong} of {len(matrix)} examples have others")
    number = int(label.max()) + 1 if classes is None else classes
    if label.min() < 0 or label.max() >= number:
        raise ValueError(
            f"labels must be in 0 .. {number - 1} ({number} classes), got {label.min()} .. "
            f"{label.max()}"
        )
    if (label == label[0]).all():
        raise ValueError(f"there must be at least 2 classes, got only class {label[0]}")
    return matrix, label, number


def class_labels(labels: Any) -> np.ndarray:
    """Labels as an array of integers.

    Raises:
        TypeError: labels that are not integers.
    """
    label = np.asarray(labels)
    if label.size and not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {label.dtype}")
    return label


def checked_features(features: Any, width: int, dtype: Any = np.float64) -> np.ndarray:
    """Checks features for a fitted head with ``width`` features.

    Returns:
        The features in ``dtype``.

    Raises:
        ValueError: another number of features.
    """
    matrix = np.asarray(features, dtype)
    if matrix.ndim != 2 or matrix.shape[1] != width:
        raise ValueError(f"features must have shape [examples, {width}], got {matrix.shape}")
    return matrix


def singleton_classes(label: np.ndarray) -> list[int]:
    """Classes with a single example, which cannot be both held out and learned from.

    >>> singleton_classes(np.array([0, 0, 3, 1]))
    [1, 3]
    """
    classes, counts = np.unique(label, return_counts=True)
    return [int(each) for each in classes[counts == 1]]


@dataclass(frozen=True)
class Standardization:
    """Mean and scale of each feature, measured on training examples; callable.

    Args:
        mean: float64 ``[features]``.
        scale: float64 ``[features]``, above 0; 1 for constant features.
        constant: indices of the constant features, int64, ascending.
    """

    mean: np.ndarray
    scale: np.ndarray
    constant: np.ndarray

    def __call__(self, features: Any) -> np.ndarray:
        """Standardizes features ``[examples, features]``.

        Computed in float64 and returned in the dtype of ``features``, float32 for integers.

        Raises:
            ValueError: another number of features.
        """
        matrix = checked_features(features, len(self.mean), dtype=None)
        dtype = matrix.dtype if np.issubdtype(matrix.dtype, np.floating) else np.float32
        scaled: np.ndarray = ((matrix - self.mean) / self.scale).astype(dtype)
        return scaled

    def undo(self, kernel: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
        """Converts a linear head on standardized features to one on the original features.

        Use it to put a head that was fitted on standardized features onto a network.

        Args:
            kernel: ``[features, classes]``.
            bias: ``[classes]``.

        Returns:
            Kernel and bias, float64.

        >>> fitted = standardization([[0.0, 5.0], [2.0, 5.0]])
        >>> kernel, bias = fitted.undo(np.array([[2.0], [0.0]]), np.array([0.5]))
        >>> (np.array([[3.0, 5.0]]) @ kernel + bias).item()
        4.5
        """
        kernel = np.asarray(kernel, np.float64) / self.scale[:, None]
        return kernel, np.asarray(bias, np.float64) - self.mean @ kernel


def standardization(features: Any) -> Standardization:
    """Standardization: mean and standard deviation of each feature, in float64.

    Measure it on training examples only and apply it to all. The standard deviation is that of the
    examples (divided by n), as in scikit-learn's ``StandardScaler``. A feature that is constant to
    rounding has scale 1: it becomes 0, and a different value on new examples is not blown up.

    Args:
        features: ``[examples, features]``, finite.

    Raises:
        ValueError: another shape, no examples, or values that are not finite.

    >>> fitted = standardization([[0.0, 5.0], [2.0, 5.0]])
    >>> fitted([[3.0, 5.0]]).tolist(), fitted.constant.tolist()
    ([[2.0, 0.0]], [1])
    """
    matrix = np.asarray(features)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"features must have shape [examples, features], got {matrix.shape}")
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"features must be finite; {wrong} of {len(matrix)} examples have others")
    mean = matrix.mean(axis=0, dtype=np.float64)
    deviation = np.sqrt(np.square(matrix - mean).mean(axis=0))
    # The mean is rounded, too: a constant of 0.1 does not have a deviation of exactly 0.
    constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    return Standardization(mean, np.where(constant, 1.0, deviation), np.flatnonzero(constant))
