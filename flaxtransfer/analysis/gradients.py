"""How strongly the data pull at each part of a network, relative to the size of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from flaxtransfer.data.normalisation import normalise
from flaxtransfer.masks import Mask, selected
from flaxtransfer.models import Model
from flaxtransfer.paths import flatten
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["mean_gradient", "relative_gradient_norms"]


def mean_gradient(
    model: Model,
    variables: Variables,
    batches: Iterable[Mapping[str, Any]],
    preprocessing: Preprocessing,
) -> Params:
    """The gradient of the mean cross-entropy over all examples, with running statistics.

    Args:
      model: the network.
      variables: its parameters and statistics.
      batches: ``image`` uint8 [batch, height, width, channels], ``label`` int [batch], and
        ``weight`` 0 where an example is padding.
      preprocessing: that belongs to the weights.

    Returns:
      A tree like the parameters.

    Raises:
      ValueError: no example at all.
    """

    @jax.jit
    def of_batch(params: Params, images: Any, labels: Any, weights: Any) -> Params:
        def total(params: Params) -> jax.Array:
            inputs = normalise(images, preprocessing.mean, preprocessing.std)
            logits, _ = model.apply({**variables, "params": params}, inputs, norm="running")
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return (losses * weights).sum()

        return jax.grad(total)(params)

    gradient, count = None, 0.0
    for batch in batches:
        weights = np.asarray(batch.get("weight", np.ones(len(batch["label"]))), np.float32)
        one = of_batch(variables["params"], batch["image"], batch["label"], weights)
        gradient = one if gradient is None else jax.tree.map(jax.numpy.add, gradient, one)
        count += float(weights.sum())
    if gradient is None or not count:
        raise ValueError("there are no examples to take a gradient on")
    return jax.tree.map(lambda leaf: leaf / count, gradient)


def relative_gradient_norms(
    params: Params, gradient: Params, parts: Mapping[str, Mask]
) -> dict[str, float]:
    """Norm of the gradient over norm of the weights, for each part.

    A part with a large ratio is where the pre-trained weights fit the new data least. Below a head
    that is zero all gradients are zero: measure with a head that fits (``Phase.probe``,
    ``training.probing.probed_head``).

    Args:
      params: nested dict of weights.
      gradient: of the loss, a tree like them.
      parts: masks by name; a part without leaves is left out.

    Raises:
      ValueError: trees that differ, no part with leaves, weights of a part that are all zero, a
        gradient that is zero everywhere or not finite.

    References:
      Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.

    >>> from flaxtransfer.masks import glob
    >>> params = {"a": {"kernel": np.array([3.0, 4.0])}, "b": {"kernel": np.array([1.0])}}
    >>> gradient = {"a": {"kernel": np.array([0.0, 1.0])}, "b": {"kernel": np.array([1.0])}}
    >>> relative_gradient_norms(params, gradient, {"a": glob("a/**"), "b": glob("b/**")})
    {'a': 0.2, 'b': 1.0}
    """
    weights, pulls = flatten(params), flatten(gradient)
    if set(weights) != set(pulls):
        differing = sorted(set(weights) ^ set(pulls))
        raise ValueError(f"weights and gradient are of different trees: {', '.join(differing)}")
    found = {}
    for name, mask in parts.items():
        paths = selected(mask, params, allow_empty=True)
        if not paths:
            continue
        size = _norm([weights[path] for path in paths])
        if not size:
            raise ValueError(f"the weights of {name} are all zero: nothing to compare with")
        found[name] = _norm([pulls[path] for path in paths]) / size
    if not found:
        raise ValueError(f"the parts {', '.join(parts)} have no leaf of this network")
    if not all(map(np.isfinite, found.values())):
        raise ValueError(f"the gradient is not finite: {found}")
    if not any(found.values()):
        raise ValueError("the gradient is zero everywhere; is the head zero? Fit it first")
    return found


def _norm(leaves: list[Any]) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in leaves)))
