"""Input validation and standardization for the feature-space classifiers.

What every head asks of features and labels, and says where it does not get it.

Features of mean 0 and standard deviation 1, as a value that can be applied and undone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Standardization", "class_labels", "examples", "matching", "singles", "standardization"]


def examples(
    features: Any, labels: Any, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Features and labels that a classifier can be fitted to.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1, of two classes or more.
      classes: how many there are; by default as many as the labels say.

    Returns:
      Features in float64, labels, and the number of classes.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, labels out of range, one
        class.
      TypeError: labels that are no integers.

    >>> examples([[0.0], [1.0]], [0, 1])[2]
    2
    """
    label = class_labels(labels)
    matrix = np.asarray(features, np.float64)
    if matrix.ndim != 2 or label.shape != matrix.shape[:1] or not matrix.size:
        raise ValueError(
            f"features have shape {matrix.shape} and labels {label.shape}; wanted "
            "[examples, features] and [examples]"
        )
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"{wrong} of {len(matrix)} examples have features that are not finite")
    number = int(label.max()) + 1 if classes is None else classes
    if label.min() < 0 or label.max() >= number:
        raise ValueError(
            f"labels go from {label.min()} to {label.max()}; there are {number} classes"
        )
    if (label == label[0]).all():
        raise ValueError(f"all examples are of class {label[0]}; a classifier needs two or more")
    return matrix, label, number


def class_labels(labels: Any) -> np.ndarray:
    """Labels as an array of integers.

    Raises:
      TypeError: labels that are no integers.
    """
    label = np.asarray(labels)
    if label.size and not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"labels are {label.dtype}, wanted integers")
    return label


def matching(features: Any, width: int, dtype: Any = np.float64) -> np.ndarray:
    """Other examples for a head of ``width`` features, in ``dtype``.

    Raises:
      ValueError: another number of features.
    """
    matrix = np.asarray(features, dtype)
    if matrix.ndim != 2 or matrix.shape[1] != width:
        raise ValueError(f"features have shape {matrix.shape}, wanted [examples, {width}]")
    return matrix


def singles(label: np.ndarray) -> list[int]:
    """Classes with one example, from which nothing can be held out and still be learned.

    >>> singles(np.array([0, 0, 3, 1]))
    [1, 3]
    """
    names, counts = np.unique(label, return_counts=True)
    return [int(name) for name in names[counts == 1]]


@dataclass(frozen=True)
class Standardization:
    """A shift and a scale for each feature, as measured on training examples.

    Args:
      mean: float64 ``[features]``.
      scale: float64 ``[features]``, above 0; 1 for features that do not vary.
      constant: which do not vary, int64, ascending.
    """

    mean: np.ndarray
    scale: np.ndarray
    constant: np.ndarray

    def __call__(self, features: Any) -> np.ndarray:
        """Features ``[examples, features]`` in units of the training examples' deviation.

        Computed in float64 and returned in the dtype of ``features``, float32 for integers.

        Raises:
          ValueError: another number of features.
        """
        matrix = np.asarray(features)
        if matrix.ndim != 2 or matrix.shape[1] != len(self.mean):
            raise ValueError(
                f"features have shape {matrix.shape}, wanted [examples, {len(self.mean)}]"
            )
        dtype = matrix.dtype if np.issubdtype(matrix.dtype, np.floating) else np.float32
        return ((matrix - self.mean) / self.scale).astype(dtype)

    def undo(self, kernel: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
        """The same linear head for features that were not standardized.

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
    """Measures mean and standard deviation of each feature, in float64.

    Measure on training examples alone and apply to all. The deviation is that of the examples
    themselves (divided by n), as in scikit-learn's ``StandardScaler``. A feature that does not vary
    by more than rounding has scale 1: it becomes 0, and if it is something else on new examples,
    it is not blown up.

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
        raise ValueError(f"features have shape {matrix.shape}, wanted [examples, features]")
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"{wrong} of {len(matrix)} examples have features that are not finite")
    mean = matrix.mean(axis=0, dtype=np.float64)
    deviation = np.sqrt(np.square(matrix - mean).mean(axis=0))
    # The mean is rounded, too: a constant of 0.1 does not have a deviation of exactly 0.
    constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    return Standardization(mean, np.where(constant, 1.0, deviation), np.flatnonzero(constant))
