"""Gradients and diagonal Fisher information of each part of a network.

How strongly the data pull at each part of a network, relative to the size of its weights.

How sharply the likelihood bends along each parameter: the diagonal of the Fisher information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxtransfer.masks import Mask, selected
from flaxtransfer.models.model import Model
from flaxtransfer.paths import flatten
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = [
    "Curvature",
    "PartCurvature",
    "curvature_by_part",
    "fisher_diagonal",
    "mean_gradient",
    "relative_gradient_norms",
]


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
            inputs = normalize(images, preprocessing.mean, preprocessing.std)
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
    ``training.probing.init_head_from_probe``).

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


Labels = Literal["sampled", "all"]

_CHUNK = 8
"""Examples whose gradients are held at once: so many copies of the parameters."""


def fisher_diagonal(
    logits: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    labels: Labels = "sampled",
    seed: int = 0,
    chunk: int = _CHUNK,
) -> tuple[Any, int]:
    """The diagonal of the Fisher information of a classifier, averaged over examples.

    ``E_x E_y~p(y|x) [(d log p(y|x) / d params) ** 2]``, with the labels drawn from the network's
    own predictions ("the true Fisher"). With the labels of the data in their place (the "empirical
    Fisher") it is not a curvature: it grows where the network is wrong, and vanishes where it fits.

    Args:
      logits: a function of the parameters and of inputs ``[examples, ...]`` to logits ``[examples,
        classes]``, each example's its own: BatchNorm on running statistics.
      params: any pytree of floating arrays; the leaves that are differentiated.
      batches: inputs ``[examples, ...]``, without padding.
      labels: "sampled" draws one label an example, by probability times squared gradient at the
        logits, and weights it back: unbiased, at one backward pass an example; "all" sums over
        all classes by their probability, which is exact and costs one a class.
      seed: of the labels that are drawn.
      chunk: examples whose gradients are held at the same time.

    Returns:
      A tree like ``params``, in its dtypes, and the number of examples.

    Raises:
      ValueError: another word for ``labels``, no examples, a chunk below 1, a result that is not
        finite.

    References:
      J. Martens, "New Insights and Perspectives on the Natural Gradient Method", 2020.
      F. Kunstner, L. Balles, P. Hennig, "Limitations of the Empirical Fisher Approximation for
      Natural Gradient Descent", 2019.

    >>> weights = {"w": jnp.zeros((3, 2))}
    >>> inputs = jnp.array([[1.0, 2.0, 0.0]])
    >>> fisher, _ = fisher_diagonal(lambda p, x: x @ p["w"], weights, [inputs], labels="all")
    >>> fisher["w"].tolist()  # x ** 2 * p * (1 - p)
    [[0.25, 0.25], [1.0, 1.0], [0.0, 0.0]]
    """
    if labels not in ("sampled", "all"):
        raise ValueError(f"labels are 'sampled' or 'all', not {labels!r}")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, wanted 1 or more examples")
    run = jax.jit(partial(_chunk_sum, logits, labels))
    total, count = jax.tree.map(jnp.zeros_like, params), 0
    for number, batch in enumerate(batches):
        inputs = np.asarray(batch)
        for start in range(0, len(inputs), chunk):
            part = inputs[start : start + chunk]
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), start)
            # Filled up to one shape, so that there is one program; what was filled in weighs 0.
            missing = chunk - len(part)
            padded = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
            weight = (np.arange(chunk) < len(part)).astype(np.float32)
            total = jax.tree.map(jnp.add, total, run(params, padded, weight, key))
        count += len(inputs)
    if not count:
        raise ValueError("there are no examples to measure curvature on")
    mean = jax.tree.map(lambda leaf: leaf / count, total)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(mean)):
        raise ValueError("the curvature is not finite: the network overflows on these examples")
    return mean, count


def _chunk_sum(
    logits: Callable[[Any, Any], jax.Array],
    labels: Labels,
    params: Any,
    inputs: jax.Array,
    weight: jax.Array,
    key: jax.Array,
) -> Any:
    """Sum over the examples of a chunk of the squared gradients."""

    def log_probs(params: Any, example: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(logits(params, example[None])[0])

    def of_sample(example: jax.Array, key: jax.Array) -> Any:
        def log_prob(params: Any) -> tuple[jax.Array, jax.Array]:
            found = log_probs(params, example)
            label, weight = _draw(key, jax.lax.stop_gradient(found))
            return found[label], weight

        gradient, weight = jax.grad(log_prob, has_aux=True)(params)
        return jax.tree.map(lambda leaf: weight.astype(leaf.dtype) * jnp.square(leaf), gradient)

    def of_all(example: jax.Array, key: jax.Array) -> Any:
        del key  # Nothing is drawn.
        probs = jnp.exp(log_probs(params, example))
        rows = jax.jacrev(lambda p: log_probs(p, example))(params)
        return jax.tree.map(lambda leaf: jnp.tensordot(probs, jnp.square(leaf), 1), rows)

    one = of_sample if labels == "sampled" else of_all
    squares = jax.vmap(one)(inputs, jax.random.split(key, len(inputs)))
    return jax.tree.map(lambda leaf: jnp.tensordot(weight.astype(leaf.dtype), leaf, 1), squares)


def _draw(key: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A label, and the weight that makes up for how it was drawn (importance sampling).

    A network that is sure of itself has nearly all of the expectation in labels that it nearly
    never predicts: drawn by their probability they are missed, and what is found is too small by
    orders of magnitude on nearly every draw. Drawn by probability times squared gradient at the
    logits, ``|onehot - p| ** 2``, they are not.
    """
    probs = jnp.exp(log_probs)
    pull = jnp.square(jnp.eye(len(probs), dtype=probs.dtype) - probs).sum(axis=1)
    # Without the smallest number, a pull that is rounded to 0 everywhere would leave no label.
    logits = log_probs + jnp.log(pull + jnp.finfo(probs.dtype).tiny)
    label = jax.random.categorical(key, logits)
    return label, jnp.exp(jax.nn.logsumexp(logits) - logits[label] + log_probs[label])


@dataclass(frozen=True)
class PartCurvature:
    """One part of a network.

    Args:
      name: of the part.
      parameters: how many of it were measured.
      mean: of the Fisher diagonal over them.
      median: likewise.
      share: of the trace over all parts.
    """

    name: str
    parameters: int
    mean: float
    median: float
    share: float


@dataclass(frozen=True)
class Curvature:
    """The Fisher diagonal, summed up by parts.

    Args:
      parts: in the order that was asked for.
      examples: it was averaged over.
    """

    parts: tuple[PartCurvature, ...]
    examples: int

    def means(self) -> dict[str, float]:
        """The mean of each part, as the recipes take it."""
        return {part.name: part.mean for part in self.parts}

    def __str__(self) -> str:
        lines = [f"{'part':<10} {'parameters':>11} {'mean':>9} {'median':>9} {'of trace':>9}"]
        lines += [
            f"{part.name:<10} {part.parameters:>11,} {part.mean:>9.2e} {part.median:>9.2e} "
            f"{100 * part.share:>7.1f} %"
            for part in self.parts
        ]
        return "\n".join([*lines, f"Fisher diagonal, mean over {self.examples} images"])


def curvature_by_part(
    fisher: Params, parts: Mapping[str, Mask], examples: int, where: Mask | str | None = None
) -> Curvature:
    """Sums a Fisher diagonal up.

    Args:
      fisher: nested dict, from ``fisher_diagonal``.
      parts: masks by name, as of ``strategies.parts.units``; a part without leaves is left out.
      examples: it was averaged over.
      where: only these leaves, such as ``kernels()``.

    Raises:
      ValueError: nothing is left.
    """
    flat = flatten(fisher)
    counted = set(flat) if where is None else selected(where, fisher)
    values = {
        name: [np.ravel(flat[p]) for p in selected(m, fisher, allow_empty=True) if p in counted]
        for name, m in parts.items()
    }
    joined = {name: np.concatenate(some) for name, some in values.items() if some}
    if not joined:
        raise ValueError(f"the parts {', '.join(parts)} have no leaf of this curvature")
    trace = sum(float(v.sum(dtype=np.float64)) for v in joined.values())
    rows = (
        PartCurvature(
            name,
            v.size,
            float(v.mean(dtype=np.float64)),
            float(np.median(v)),
            float(v.sum(dtype=np.float64)) / trace if trace else 0.0,
        )
        for name, v in joined.items()
    )
    return Curvature(tuple(rows), examples)
