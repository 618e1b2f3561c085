"""BatchNorm moments: weighted mean and variance, merged, mixed, and measured in a network.

The first functions are arithmetic on arrays. ``apply_measuring`` runs a network and returns the
weighted moments of the inputs of its BatchNorms, which flax's BatchNorm does not expose. These are
the parts of BatchNorm adaptation (``flaxtransfer.adapt``) and recalibration.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables
from flaxtransfer.shift.checks import as_prior, as_probabilities

__all__ = [
    "Mixture",
    "Moments",
    "apply_measuring",
    "balancing_weights",
    "displacement",
    "effective_count",
    "merge",
    "mix",
    "moments",
    "positions",
    "source_share",
]


Mixture = Literal["moments", "linear"]
"""The variance of a mixture: that of the pooled values, or the mean of the two variances."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance per channel, and the number of examples.

    Args:
        mean: ``[channels]``.
        var: ``[channels]``, biased (divided by n), as a BatchNorm keeps it.
        count: number of examples, or the sum of their weights.
    """

    mean: Any
    var: Any
    count: Any


def moments(values: Any, weights: Any | None = None) -> Moments:
    """Weighted mean and variance per channel over examples and positions, in two passes.

    Weights give the moments of another population, for example one with balanced classes. numpy
    arrays are computed in float64. JAX arrays, including tracers, keep their device and dtype,
    because a network's activations are too large to copy to the host.

    Args:
        values: ``[n, ..., channels]``; all positions of an example have the same weight.
        weights: ``[n]``, >= 0, of the examples; by default 1.

    Raises:
        ValueError: another number of weights, or (numpy only) negative weights or a sum of 0.

    >>> found = moments(np.array([[1.0], [3.0], [9.0]]), weights=np.array([1, 1, 0]))
    >>> found.mean.item(), found.var.item(), found.count.item()
    (2.0, 1.0, 2.0)
    """
    if isinstance(values, np.ndarray):
        values = values.astype(np.float64)
        weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError("weights must be >= 0 and not all 0")
    elif weights is None:
        weights = values[(slice(None), *[0] * (values.ndim - 1))] * 0 + 1
    if weights.shape != (len(values),):
        raise ValueError(f"weights must have shape {(len(values),)}, got {weights.shape}")
    count = weights.sum()
    shares = (weights / count)[:, None]
    positions = tuple(range(1, values.ndim - 1))
    # Sums instead of a matrix product, which accelerators compute with fewer digits.
    mean = (shares * values.mean(positions)).sum(0)
    var = (shares * ((values - mean) ** 2).mean(positions)).sum(0)
    return Moments(mean, var, count)


def merge(first: Moments, second: Moments) -> Moments:
    """Merges the moments of two samples: exactly those of the pooled values.

    Use it to merge a stream batch by batch. The mean of the batches' variances, to which a running
    average converges, omits the variance between batches.

    References:
        T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances", 1979.

    >>> both = merge(Moments(np.array(1.0), np.array(0.0), 1), Moments(np.array(3.0), 0.0, 1))
    >>> both.mean.item(), both.var.item(), both.count
    (2.0, 1.0, 2)
    """
    count = first.count + second.count
    # Starting from the first sample: if the second is much smaller, little is added.
    return dataclasses.replace(mix(second, first, second.count / count), count=count)


def mix(source: Moments, target: Moments, share: Any, kind: Mixture = "moments") -> Moments:
    """The moments of a mixture of two populations.

    Args:
        source: weighted by ``share``.
        target: weighted by ``1 - share``.
        share: a, between 0 (only the target) and 1 (only the source).
        kind: "moments" is the variance of the mixture,
            ``a var_s + (1 - a) var_t + a (1 - a) (mean_s - mean_t)^2``. "linear" omits the last
            term, as Schneider et al. do: if the means are far apart, its variance is too small, and
            activations are too large.

    Returns:
        The mixture, with the count of both.

    Raises:
        ValueError: a share outside of 0 to 1, or another kind.

    References:
        S. Schneider, E. Rusak, L. Eck, O. Bringmann, W. Brendel, M. Bethge, "Improving robustness
        against common corruptions by covariate shift adaptation", 2020.

    >>> source, target = (Moments(np.array(m), np.array(1.0), 8) for m in (0.0, 4.0))
    >>> [mix(source, target, 0.5, kind).var.item() for kind in ("moments", "linear")]
    [5.0, 1.0]
    """
    if kind not in ("moments", "linear"):
        raise ValueError(f"kind must be 'moments' or 'linear', got {kind!r}")
    if isinstance(share, float | int) and not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    apart = source.mean - target.mean
    mean = target.mean + share * apart
    var = target.var + share * (source.var - target.var)
    if kind == "moments":
        var = var + share * (1 - share) * apart**2
    return Moments(mean, var, source.count + target.count)


def source_share(source_weight: float | None, count: float) -> float:
    """Weight of the source statistics: N / (N + n) (Schneider et al., 2020).

    Args:
        source_weight: N, the number of target examples that the source's statistics are worth;
            None is 0, only the target. Infinity keeps the source.
        count: n, the number of target examples.

    Raises:
        ValueError: a negative N, or no target examples.

    >>> [source_share(weight, 48) for weight in (None, 16, math.inf)]
    [0.0, 0.25, 1.0]
    """
    weight = 0.0 if source_weight is None else float(source_weight)
    if not weight >= 0:
        raise ValueError(f"source_weight must be >= 0 (examples), got {source_weight}")
    if not count > 0:
        raise ValueError(f"count must be > 0 (target examples), got {count}")
    return 1.0 if math.isinf(weight) else weight / (weight + count)


def balancing_weights(probabilities: Any, source: Any, target: Any) -> np.ndarray:
    """Importance weights of target examples that restore the class prior of the source.

    Under label shift, p_s(x) / p_t(x) is the posterior mean of p / q, because
    p_s(x) = sum of p_k p(x|k). With f the source's posterior, this is 1 / sum of f_k q_k / p_k:
    a weight is large only if every likely class has become rare, and an estimate of 0 is a divisor
    only for an example that belongs to that class with certainty.

    Args:
        probabilities: ``[n, K]``, calibrated, of a model with the source's prior.
        source: ``[K]``, p, positive.
        target: ``[K]``, q.

    Returns:
        ``[n]``, float64, with mean 1. Classes that are absent from the target stay absent: check
        ``effective_count`` and the prevalence itself.

    Raises:
        ValueError: arrays that do not fit each other, or a class with prior 0 in the source.

    >>> balancing_weights([[1, 0], [1, 0], [1, 0], [0, 1]], [0.5, 0.5], [0.75, 0.25]).round(3)
    array([0.667, 0.667, 0.667, 2.   ])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the Outputs of a Classifier to New a
        Priori Probabilities: A Simple Procedure", 2002 (the posterior behind the weights).
    """
    found = as_probabilities(probabilities, "probabilities")
    p = as_prior(source, "source", classes=found.shape[1])
    q = as_prior(target, "target", classes=found.shape[1])
    if not (p > 0).all():
        absent = np.flatnonzero(p == 0).tolist()
        raise ValueError(
            f"source must be > 0 for every class, got 0 for classes {absent}; leave them out"
        )
    density = found @ (q / p)
    # One example is at most its whole class.
    weights = 1 / np.maximum(density, 1 / (len(found) * p.max()))
    result: np.ndarray = weights / weights.mean()
    return result


def effective_count(weights: Any) -> float:
    """Kish's effective number of examples, (sum of w)^2 / sum of w^2.

    >>> effective_count([1, 1, 0, 0])
    2.0

    References:
        L. Kish, "Survey Sampling", 1965.
    """
    found = np.asarray(weights, np.float64)
    return float(found.sum() ** 2 / (found**2).sum())


def displacement(source: Moments, target: Moments, epsilon: float = 0.0) -> float:
    """Distance of a layer's statistics from the source's, in the source's standard deviations.

    Root mean square over channels of the Wasserstein distance between normal distributions with
    these moments: 0 for equal moments, 1 if all means differ by one standard deviation.

    Args:
        source: its standard deviation is the unit.
        target: the moments to compare.
        epsilon: of the normalization; limits the effect of dead channels with variance 0.

    >>> displacement(Moments(np.zeros(2), np.ones(2), 1), Moments(np.ones(2), np.ones(2), 1))
    1.0
    """
    unit = np.asarray(source.var, np.float64) + epsilon
    apart = np.asarray(source.mean, np.float64) - target.mean
    wider = np.sqrt(unit) - np.sqrt(np.asarray(target.var, np.float64) + epsilon)
    return float(np.sqrt(np.mean((apart**2 + wider**2) / unit)))


def apply_measuring(
    model: Model,
    variables: Variables,
    images: jax.Array,
    weights: jax.Array | None,
    chosen: frozenset[str],
    *,
    by_batch: bool = True,
    share: float | jax.Array | None = None,
    kind: Mixture = "moments",
    stop: str | None = None,
) -> tuple[jax.Array, dict[str, Moments]]:
    """Runs a network and measures the moments of the inputs of some BatchNorms.

    Args:
        model: the network.
        variables: its parameters and statistics.
        images: ``[batch, height, width, bands]``, floating and normalized.
        weights: ``[batch]``, weight of each image; None is 1.
        chosen: paths of the BatchNorms to measure.
        by_batch: whether the chosen BatchNorms normalize by the measured moments, which affects the
            inputs of deeper ones; otherwise all normalize by their running statistics.
        share: of the running statistics in a mixture with the measured moments, by which the chosen
            BatchNorms normalize; None uses only the measured moments.
        kind: of the mixture.
        stop: segment before which to stop.

    Returns:
        The output, and the moments of the batch per chosen path, in float32 or wider; ``count`` is
        the sum of the weights.

    >>> from flaxtransfer.models.config import ResNetConfig
    >>> model = Model(ResNetConfig(depths=(1, 1, 1, 1), width=8))
    >>> def mean_of_stem(variables, images):
    ...     _, found = apply_measuring(model, variables, images, None, frozenset({"bn1"}))
    ...     return found["bn1"].mean
    >>> images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    >>> jax.eval_shape(mean_of_stem, model.abstract(), images).shape
    (8,)
    """
    found: dict[str, Moments] = {}

    def measure(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path)
        if not isinstance(module, nn.BatchNorm) or path not in chosen:
            return next_fun(*args, **kwargs)
        x = args[0]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        found[path] = moments(wide, weights)
        if not by_batch:
            return next_fun(*args, **kwargs)
        held: Any = module.variables
        own = Moments(held["batch_stats"]["mean"], held["batch_stats"]["var"], 0)
        # Without a share, source statistics that are not finite must not enter the result.
        used = found[path] if share is None else mix(own, found[path], share, kind)
        scale = jax.lax.rsqrt(used.var + module.epsilon) * held["params"]["scale"]
        y = (wide - used.mean) * scale + held["params"]["bias"]
        return y.astype(x.dtype)

    norm: Any = chosen if by_batch else "running"
    with nn.intercept_methods(measure):
        output, _ = model.apply(variables, images, norm=norm, stop=stop)
    return output, found


def positions(model: Model, image_shape: Sequence[int]) -> dict[str, int]:
    """Positions per image and channel of each BatchNorm, in the order of execution.

    Args:
        model: the network.
        image_shape: ``(height, width, bands)``.

    >>> from flaxtransfer.models.config import ResNetConfig
    >>> model = Model(ResNetConfig(depths=(1, 1, 1, 1), width=8))
    >>> list(positions(model, (32, 32, 3)).items())[:2]
    [('bn1', 256), ('layer1/0/bn1', 64)]
    """
    found: dict[str, int] = {}

    def look(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            maps = args[0].shape
            found["/".join(context.module.path)] = maps[1] * maps[2]
        return next_fun(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)  # type: ignore[no-untyped-call]
    with nn.intercept_methods(look):
        jax.eval_shape(lambda v, x: model.apply(v, x, stop="pool")[0], model.abstract(), image)
    return found
