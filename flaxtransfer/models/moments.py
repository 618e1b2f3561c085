"""BatchNorm moments: weighted, merged, mixed, and measured while a network runs.

Means and variances of two domains: how to merge them, mix them, weight them, tell them apart.

The arithmetic behind BatchNorm adaptation. It knows no network: moments are those of whatever
arrays are given. ``flaxtransfer.adapt`` runs it through a network.

What goes into each BatchNorm: weighted moments, measured while the network runs.

A BatchNorm of flax gives its running average after an update, over examples that all count the
same. Here each one tells the moments themselves, of examples that count as much as they are given,
and may normalize by them mixed with the statistics it has.
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
from flaxtransfer.shift.checks import as_prior, as_probabilities
from flaxtransfer.types import Variables

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
"""Which variance a mixture has: that of the pooled values, or the mean of the two variances."""


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance of each channel, and how much they rest on.

    Args:
        mean: `[channels]`.
        var: `[channels]`, biased (divided by n), as a BatchNorm keeps it.
        count: examples behind them, or the sum of their weights.
    """

    mean: Any
    var: Any
    count: Any


def moments(values: Any, weights: Any | None = None) -> Moments:
    """Mean and variance of each channel over examples and positions, in two passes.

    With weights they are those of another population: of one with the classes in balance, say.
    numpy arrays are computed in float64. Arrays of JAX stay where and what they are, tracers too,
    because a network's activations are too large to be brought to the host.

    Args:
        values: `[n, ..., channels]`; positions of one example weigh the same.
        weights: `[n]`, not negative, of the examples; by default 1.

    Raises:
        ValueError: weights of another number, or (of numpy) negative ones or a sum of 0.

    >>> found = moments(np.array([[1.0], [3.0], [9.0]]), weights=np.array([1, 1, 0]))
    >>> found.mean.item(), found.var.item(), found.count.item()
    (2.0, 1.0, 2.0)
    """
    if isinstance(values, np.ndarray):
        values = values.astype(np.float64)
        weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError("weights are 0 or more, and not all of them 0")
    elif weights is None:
        weights = values[(slice(None), *[0] * (values.ndim - 1))] * 0 + 1
    if weights.shape != (len(values),):
        raise ValueError(f"weights have shape {weights.shape}, and there are {len(values)} rows")
    count = weights.sum()
    shares = (weights / count)[:, None]
    positions = tuple(range(1, values.ndim - 1))
    # Sums and no matrix product, which accelerators round to fewer digits.
    mean = (shares * values.mean(positions)).sum(0)
    var = (shares * ((values - mean) ** 2).mean(positions)).sum(0)
    return Moments(mean, var, count)


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of two samples together, as if their values had never been apart.

    A stream is merged batch by batch. The mean of the batches' variances, which a running average
    tends to, leaves out the variance between batches.

    References:
        T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances", 1979.

    >>> both = merge(Moments(np.array(1.0), np.array(0.0), 1), Moments(np.array(3.0), 0.0, 1))
    >>> both.mean.item(), both.var.item(), both.count
    (2.0, 1.0, 2)
    """
    count = first.count + second.count
    # From the second's side: where it is much the smaller one, little is added to the first.
    return dataclasses.replace(mix(second, first, second.count / count), count=count)


def mix(source: Moments, target: Moments, share: Any, kind: Mixture = "moments") -> Moments:
    """The moments of a mixture of two populations.

    Args:
        source: with this share of the mixture.
        target: with the rest of it.
        share: a, between 0 (the target alone) and 1 (the source alone).
        kind: "moments" is the variance of the mixture,
            ``a var_s + (1 - a) var_t + a (1 - a) (mean_s - mean_t)^2``. "linear" leaves the last
            term out, as Schneider et al. do: where the means are far apart, its variance is too
            small, and activations come out too large.

    Returns:
        The mixture, with the count of both.

    Raises:
        ValueError: a share outside of 0 .. 1, another kind.

    References:
        S. Schneider, E. Rusak, L. Eck, O. Bringmann, W. Brendel, M. Bethge, "Improving robustness
        against common corruptions by covariate shift adaptation", 2020.

    >>> source, target = (Moments(np.array(m), np.array(1.0), 8) for m in (0.0, 4.0))
    >>> [mix(source, target, 0.5, kind).var.item() for kind in ("moments", "linear")]
    [5.0, 1.0]
    """
    if kind not in ("moments", "linear"):
        raise ValueError(f"a mixture is 'moments' or 'linear', not {kind!r}")
    if isinstance(share, float | int) and not 0 <= share <= 1:
        raise ValueError(f"a share lies between 0 and 1, not {share}")
    apart = source.mean - target.mean
    mean = target.mean + share * apart
    var = target.var + share * (source.var - target.var)
    if kind == "moments":
        var = var + share * (1 - share) * apart**2
    return Moments(mean, var, source.count + target.count)


def source_share(source_weight: float | None, count: float) -> float:
    """Schneider's N / (N + n).

    Args:
        source_weight: N, how many target examples the source's statistics are worth; None is 0:
            the target alone. Infinity keeps the source.
        count: n, examples of the target.

    Raises:
        ValueError: a negative N, or no target example.

    >>> [source_share(weight, 48) for weight in (None, 16, math.inf)]
    [0.0, 0.25, 1.0]
    """
    weight = 0.0 if source_weight is None else float(source_weight)
    if not weight >= 0:
        raise ValueError(f"source_weight is a number of examples, 0 or more, not {source_weight}")
    if not count > 0:
        raise ValueError(f"there are {count} target examples; statistics need at least one")
    return 1.0 if math.isinf(weight) else weight / (weight + count)


def balancing_weights(probabilities: Any, source: Any, target: Any) -> np.ndarray:
    """Weights that give target examples the class shares of the source.

    Under label shift p_s(x) / p_t(x) is the posterior mean of p / q, because
    p_s(x) = sum of p_k p(x|k). With f the source's posterior that is 1 / sum of f_k q_k / p_k:
    a weight is large only where every likely class has become rare, and no estimate of 0 is
    divided by unless an example is of that class beyond doubt.

    Args:
        probabilities: `[n, K]`, calibrated, of a model with the source's prior.
        source: `[K]`, p, positive.
        target: `[K]`, q.

    Returns:
        `[n]`, float64, of mean 1. Classes that are absent from the target stay absent: look at
        `effective_count`, and at the prevalence itself.

    Raises:
        ValueError: arrays that do not fit, a class of prior 0 at the source.

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
        raise ValueError(f"classes {absent} have prior 0 at the source: leave them out")
    density = found @ (q / p)
    # One example is at most all that there is of its class.
    weights = 1 / np.maximum(density, 1 / (len(found) * p.max()))
    return weights / weights.mean()


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
    """How far a layer's statistics are from the source's, in the source's standard deviations.

    Root mean square over channels of the Wasserstein distance between normal distributions of
    these moments: 0 where nothing has moved, 1 where means differ by one standard deviation.

    Args:
        source: the unit is its deviation.
        target: what is compared.
        epsilon: of the normalization; keeps dead channels, of variance 0, out of the figure.

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
    """Runs the network and measures what goes into some of its BatchNorms.

    Args:
      model: the network.
      variables: its parameters and statistics.
      images: ``[batch, height, width, bands]``, floating and normalized.
      weights: ``[batch]``, how much each image counts; None is 1.
      chosen: paths of the BatchNorms.
      by_batch: whether the chosen ones normalize by what they measure, which is what a deeper one
        then sees; otherwise all normalize by the statistics that they have.
      share: of the statistics that a BatchNorm has, where it normalizes by a mixture of them with
        what it measures; None is what it measures alone.
      kind: of that mixture.
      stop: segment before which to stop.

    Returns:
      The output, and for each chosen path the moments of the batch, float32 at least; ``count`` is
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
        # Without a share, statistics of a source that are not finite must not spoil the mixture.
        used = found[path] if share is None else mix(own, found[path], share, kind)
        scale = jax.lax.rsqrt(used.var + module.epsilon) * held["params"]["scale"]
        y = (wide - used.mean) * scale + held["params"]["bias"]
        return y.astype(x.dtype)

    norm: Any = chosen if by_batch else "running"
    with nn.intercept_methods(measure):
        output, _ = model.apply(variables, images, norm=norm, stop=stop)
    return output, found


def positions(model: Model, image_shape: Sequence[int]) -> dict[str, int]:
    """Values that one image gives each channel of each BatchNorm, in the order of their running.

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

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(lambda v, x: model.apply(v, x, stop="pool")[0], model.abstract(), image)
    return found
