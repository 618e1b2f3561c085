"""Features of two samples in few dimensions, chosen from both alike."""

import numpy as np

__all__ = ["joint_projection"]


def joint_projection(
    source: np.ndarray, target: np.ndarray, *, dimensions: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of the pooled features, in units of their overall spread.

    Tests on a thousand features see noise and little else. The axes come from source and target
    together: axes from the source alone would fit its examples better than the target's, and every
    test would find that.

    Args:
        source: `[n, D]`.
        target: `[m, D]`.
        dimensions: at most so many.

    Returns:
        `[n, d]` and `[m, d]`, float64; the mean square of all components together is d.

    >>> source, target = joint_projection(np.eye(3), np.zeros((2, 3)), dimensions=2)
    >>> source.shape, target.shape
    ((3, 2), (2, 2))
    """
    pooled = np.concatenate([source, target]).astype(np.float64)
    pooled = pooled - pooled.mean(0)
    if pooled.shape[1] > dimensions or pooled.shape[1] > len(pooled):
        left, values, _ = np.linalg.svd(pooled, full_matrices=False)
        pooled = left[:, :dimensions] * values[:dimensions]
    spread = np.sqrt(np.square(pooled).mean())
    pooled = pooled / spread if spread > 0 else pooled
    return pooled[: len(source)], pooled[len(source) :]
