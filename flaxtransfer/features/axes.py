"""Principal axes of features by one eigendecomposition, of whichever products are fewer."""

from __future__ import annotations

import numpy as np
import scipy.linalg

__all__ = ["eigen", "left_axes"]

_NEGLIGIBLE = 1e-12
"""Share of the largest eigenvalue below which a direction is rounding, in float64."""


def left_axes(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values and left singular vectors, those without variance left out.

    With fewer examples than features they come out of the examples' products, which is exact: no
    head with an L2 penalty leaves the span of its examples. Squaring in float32 would lose all
    singular values below 3e-4 of the largest; float64 keeps those above 1e-6.

    Args:
      centred: float64 ``[examples, features]``.

    Returns:
      ``[rank]``, ascending, and ``[examples, rank]``.

    >>> values, left = left_axes(np.array([[3.0, 0.0], [-3.0, 0.0]]))
    >>> values.round(12).tolist(), np.abs(left).round(3).tolist()
    ([18.0], [[0.707], [0.707]])
    """
    count, width = centred.shape
    few = count <= width
    values, vectors = eigen(centred @ centred.T if few else centred.T @ centred)
    kept = values > _NEGLIGIBLE * max(values[-1], 0)
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if few else centred @ (vectors / np.sqrt(values))


def eigen(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, which is overwritten.

    Divide and conquer takes three quarters of the time of SciPy's default.
    """
    values, vectors = scipy.linalg.eigh(
        products, driver="evd", overwrite_a=True, check_finite=False
    )
    return values, vectors
