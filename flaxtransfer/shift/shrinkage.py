"""How far a covariance has to be pulled towards a sphere to be of use, in closed form."""

import numpy as np

__all__ = ["shrinkage"]


def shrinkage(centred: np.ndarray, features: int | None = None) -> tuple[float, float]:
    """Intensity and variance of Ledoit and Wolf: cov = (1 - intensity) S + intensity * variance I.

    S is ``centred.T @ centred / n``. With fewer examples than features S has no inverse, and its
    large eigenvalues are too large, its small ones too small; this is the pull towards their mean
    that has the least expected squared error. It is for covariances that are used as a whole, and
    not for single entries.

    Args:
        centred: ``[n, r]``, columns of mean 0; coordinates in any orthonormal basis of the span.
        features: how many there are, r included; r where None. Those outside of the span are 0.

    Returns:
        The intensity, between 0 and 1, and the mean variance of all features; 0 and 0 where all
        rows are equal.

    >>> shrinkage(np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    (0.0, 0.5)

    References:
        O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance
        matrices", 2004.
    """
    count, width = centred.shape
    features = width if features is None else features
    squares = np.einsum("ij,ij->i", centred, centred)
    trace = float(squares.sum()) / count
    # The same norm from whichever of the two products is smaller.
    product = centred @ centred.T if count < width else centred.T @ centred
    norm = float(np.einsum("ij,ij->", product, product)) / count**2
    from_sphere = norm - trace**2 / features
    error = (float(squares @ squares) / count - norm) / count
    # Rounding, of a covariance that is a sphere already, or of rows that are all of one length.
    tiny = 1e-14 * norm
    if from_sphere <= tiny or error <= tiny:
        return 0.0, trace / features
    return min(1.0, error / from_sphere), trace / features
