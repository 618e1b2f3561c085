"""How far a target is from the best mixture of the source's classes, and how far chance goes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.shift.prevalence.resampled_likelihood import maximise_resampled
from flaxtransfer.shift.testing.kernel import gaussian_kernel

__all__ = ["ClassKernel", "class_kernel", "residual", "simulated_residuals"]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassKernel:
    """Source examples, what a kernel says of them, and what it says of their classes.

    Args:
        features: `[n, D]` float32, in bandwidths.
        labels: `[n]`.
        probabilities: `[n, K]`, calibrated.
        kernel: `[n, n]` float32, with a diagonal that leaves no variance to an example with itself.
        sizes: `[K]`, examples of each class.
        means: `[K, K]`, of the kernel between different examples of two classes.
    """

    features: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    kernel: jax.Array
    sizes: np.ndarray
    means: np.ndarray


def class_kernel(
    features: np.ndarray, labels: np.ndarray, probabilities: np.ndarray
) -> ClassKernel:
    """The kernel of source examples, and its means between classes.

    An example is as similar to itself as can be, and two different ones of many dimensions hardly
    at all. A bootstrap draws the same example twice, a population does not: with ones on the
    diagonal, simulated discrepancies would scatter more than real ones (by 60 % at 600 examples of
    512 dimensions). The diagonal here is what the rest of the class makes it: 0 once the class's
    means are subtracted.

    Args:
        features: `[n, D]` float32, in bandwidths.
        labels: `[n]`.
        probabilities: `[n, K]`.
    """
    classes = probabilities.shape[1]
    sizes = np.bincount(labels, minlength=classes)
    members = ((labels[:, None] == np.arange(classes)) / np.maximum(sizes, 1)).astype(np.float32)
    kernel, means = _without_diagonal(features, members, sizes)
    return ClassKernel(
        features, labels, probabilities, kernel, sizes, np.asarray(means, np.float64)
    )


def residual(source: ClassKernel, target: np.ndarray, shares: np.ndarray) -> float:
    """Squared MMD between a target and the source's classes mixed by `shares`, without bias.

    Only pairs of different examples count, so that chance alone adds nothing on average.

    Args:
        source: of the source.
        target: `[m, D]` float32, in the same bandwidths.
        shares: `[K]`.
    """
    weights = (shares / np.maximum(source.sizes, 1))[source.labels]
    across = np.asarray(gaussian_kernel(source.features, target).mean(1), np.float64)
    rest = len(target)
    inside = (rest * float(gaussian_kernel(target, target).mean()) - 1) / (rest - 1)
    return float(shares @ source.means @ shares - 2 * weights @ across + inside)


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
    # A target is drawn from all classes at once, and what lies between them is variance too.
    between = float(shares @ np.diag(source.means) - shares @ source.means @ shares)
    return squares - between / count


@jax.jit
def _without_diagonal(features: Any, members: Any, sizes: Any) -> tuple[jax.Array, jax.Array]:
    kernel = gaussian_kernel(features, features)
    own = members > 0
    others = jnp.maximum(sizes - 1, 1)
    # Mean over the rest of its class, for each example, and over the pairs of each class.
    total = jnp.matmul(kernel, own.astype(jnp.float32), precision="highest")
    rest = jnp.where(own, (total - 1) / others, 0).sum(1)
    pairs = members.T @ rest
    alone = (own * (sizes == 1)).any(1)
    diagonal = jnp.where(alone, 1.0, 2 * rest - own @ pairs)
    kernel = jnp.where(jnp.eye(len(kernel), dtype=bool), diagonal[:, None], kernel)
    means = jnp.matmul(members.T, kernel, precision="highest")
    return kernel, jnp.matmul(means, members, precision="highest")


@jax.jit
def _squares(weights: Any, kernel: jax.Array) -> jax.Array:
    return (jnp.matmul(weights, kernel, precision="highest") * weights).sum(1)
