"""What every head asks of features and labels, and says where it does not get it."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["class_labels", "examples", "matching", "singles"]


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
    """Classes with one example, from which nothing can be held out and still be learnt.

    >>> singles(np.array([0, 0, 3, 1]))
    [1, 3]
    """
    names, counts = np.unique(label, return_counts=True)
    return [int(name) for name in names[counts == 1]]
