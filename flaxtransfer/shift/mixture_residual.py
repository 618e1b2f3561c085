"""How far a target is from the best mixture of the source's classes, and how far chance goes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.shift.kernel import gaussian_kernel
from flaxtransfer.shift.resampled_likelihood import maximise_resampled

__all__ = ["ClassKernel", "class_kernel", "residual", "simulated_residuals"]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassKernel:
    """Source examples, what a kernel says of them, and what it says of their classes.

    Args:
        features: `[n, D]` float32, in bandwidths.
        labels: `[n]`.
        probabilities: `[n, K]`, calibrated.
        kernel: `[n, n]` float32.
        sizes: `[K]`, examples of each class.
        means: `[K, K]`, of the kernel between classes, each example with itself included.
    """

    features: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    kernel: jax.Array
    sizes: np.ndarray
    means: np.ndarray

    @property
    def spread(self) -> np.ndarray:
        """`[K]`, variance of a class in the kernel's space, were the examples all there is."""
        return np.where(self.sizes > 0, 1 - np.diag(self.means), 0.0)


def class_kernel(
    features: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> ClassKernel:
    """The kernel of source examples, and its means between classes."""
    classes = probabilities.shape[1]
    sizes = np.bincount(labels, minlength=classes)
    members = (labels[:, None] == np.arange(classes)) / np.maximum(sizes, 1)
    kernel = gaussian_kernel(features, features)
    means = np.asarray(_between(members.astype(np.float32), kernel), np.float64)
    return ClassKernel(features, labels, probabilities, kernel, sizes, means)


def residual(source: ClassKernel, target: np.ndarray, shares: np.ndarray) -> float:
    """Squared MMD between a target and the source's classes mixed by `shares`, without bias.

    The square of the distance between two means is larger than that of what they estimate, by
    the variance of either; it is subtracted, from the examples' own unbiased variances.

    Args:
        source: of the source.
        target: `[m, D]` float32, in the same bandwidths.
        shares: `[K]`.
    """
    weights = (shares / np.maximum(source.sizes, 1))[source.labels].astype(np.float32)
    rest = len(target)
    across = gaussian_kernel(source.features, target)
    inside = float(shares @ source.means @ shares)
    target_mean = float(gaussian_kernel(target, target).mean())
    square = inside - 2 * float(weights @ np.asarray(across.mean(1))) + target_mean
    several = np.maximum(source.sizes - 1, 1)
    noise = float((shares**2 * source.spread / several).sum()) + (1 - target_mean) / (rest - 1)
    return square - noise


def simulated_residuals(
    source: ClassKernel,
    shares: np.ndarray,
    count: int,
    simulations: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Residuals of targets that are mixtures of the source's classes, with everything re-estimated.

    Each simulation draws a source of the same size and a target, both with replacement from the
    source's examples, the target's classes as common as `shares` say. The prior is estimated on
    the one, prevalence on the other. All of them are vectors of weights on the same examples: one
    matrix product with the kernel is the whole of it.

    Args:
        source: of the source.
        shares: `[K]`, of the target's classes; 0 where the source has no example.
        count: m, rows of the target.
        simulations: B.
        rng: for the draws.

    Returns:
        `[B]`.
    """
    rows, classes = source.probabilities.shape
    chances = (shares / np.maximum(source.sizes, 1))[source.labels]
    drawn = rng.integers(rows, size=(simulations, rows))
    targets = rng.choice(rows, size=(simulations, count), p=chances / chances.sum())
    priors = np.stack([source.probabilities[chosen].mean(0) for chosen in drawn])
    estimates, _ = maximise_resampled(source.probabilities, targets, priors)
    sizes = np.stack([np.bincount(source.labels[chosen], minlength=classes) for chosen in drawn])
    # A class that was not drawn leaves its share to the others.
    estimates = np.where(sizes > 0, estimates, 0.0)
    estimates /= estimates.sum(1, keepdims=True)
    each = estimates / np.maximum(sizes, 1)
    weights = np.empty((simulations, rows), np.float32)
    for number, (chosen, target) in enumerate(zip(drawn, targets, strict=True)):
        weights[number] = (
            np.bincount(chosen, minlength=rows) * each[number][source.labels]
            - np.bincount(target, minlength=rows) / count
        )
    squares = np.asarray(_squares(weights, source.kernel), np.float64)
    target_mean = float(shares @ source.means @ shares)
    return squares - (estimates * each) @ source.spread - (1 - target_mean) / count


@jax.jit
def _between(members: Any, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(
        jnp.matmul(members.T, kernel, precision="highest"), members, precision="highest"
    )


@jax.jit
def _squares(weights: Any, kernel: jax.Array) -> jax.Array:
    return (jnp.matmul(weights, kernel, precision="highest") * weights).sum(1)
