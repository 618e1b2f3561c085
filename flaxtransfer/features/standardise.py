"""Features of mean 0 and standard deviation 1, as a value that can be applied and undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Standardisation", "standardisation"]


@dataclass(frozen=True)
class Standardisation:
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
        """The same linear head for features that were not standardised.

        Use it to put a head that was fitted on standardised features onto a network.

        Args:
          kernel: ``[features, classes]``.
          bias: ``[classes]``.

        Returns:
          Kernel and bias, float64.

        >>> fitted = standardisation([[0.0, 5.0], [2.0, 5.0]])
        >>> kernel, bias = fitted.undo(np.array([[2.0], [0.0]]), np.array([0.5]))
        >>> (np.array([[3.0, 5.0]]) @ kernel + bias).item()
        4.5
        """
        kernel = np.asarray(kernel, np.float64) / self.scale[:, None]
        return kernel, np.asarray(bias, np.float64) - self.mean @ kernel


def standardisation(features: Any) -> Standardisation:
    """Measures mean and standard deviation of each feature, in float64.

    Measure on training examples alone and apply to all. The deviation is that of the examples
    themselves (divided by n), as in scikit-learn's ``StandardScaler``. A feature that does not vary
    by more than rounding has scale 1: it becomes 0, and if it is something else on new examples,
    it is not blown up.

    Args:
      features: ``[examples, features]``, finite.

    Raises:
      ValueError: another shape, no examples, or values that are not finite.

    >>> fitted = standardisation([[0.0, 5.0], [2.0, 5.0]])
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
    return Standardisation(mean, np.where(constant, 1.0, deviation), np.flatnonzero(constant))
