"""Gradient norms and diagonal Fisher information per part of a network.

Use ``relative_gradient_norms`` to see which parts fit new data least (surgical fine-tuning), and
``curvature_by_part`` to see how sensitive the predictions are to each part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.classifier import Classifier
from flaxtransfer.masks import Mask, selected
from flaxtransfer.paths import Params, flatten, listing
from flaxtransfer.sharding import make_mesh, map_batches, place_replicated
from flaxtransfer.weights.preprocessing import normalize

__all__ = [
    "Curvature",
    "PartCurvature",
    "curvature_by_part",
    "fisher_diagonal",
    "mean_gradient",
    "relative_gradient_norms",
]


def relative_gradient_norms(
    params: Params, gradient: Params, parts: Mapping[str, Mask]
) -> dict[str, float]:
    """Relative gradient norm: norm of the gradient over norm of the weights, per part.

    The pre-trained weights of a part with a large ratio fit the new data least. Below a head of
    zeros all gradients are zero: first fit the head (``Phase.probe``, ``init_head_from_probe``).

    Args:
        params: nested dict of weights.
        gradient: of the loss, a tree like ``params``.
        parts: masks by name; parts without leaves are left out.

    Raises:
        ValueError: different trees, no part with leaves, weights of a part that are all zero, or a
            gradient that is zero everywhere or not finite.

    References:
        Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.

    >>> from flaxtransfer.masks import glob
    >>> params = {"a": {"kernel": np.array([3.0, 4.0])}, "b": {"kernel": np.array([1.0])}}
    >>> gradient = {"a": {"kernel": np.array([0.0, 1.0])}, "b": {"kernel": np.array([1.0])}}
    >>> relative_gradient_norms(params, gradient, {"a": glob("a/**"), "b": glob("b/**")})
    {'a': 0.2, 'b': 1.0}
    """
    weights, gradients = flatten(params), flatten(gradient)
    if set(weights) != set(gradients):
        differing = sorted(set(weights) ^ set(gradients))
        raise ValueError(f"params and gradient are different trees: {listing(differing)}")
    found = {}
    for name, mask in parts.items():
        paths = selected(mask, params, allow_empty=True)
        if not paths:
            continue
        size = _norm([weights[path] for path in paths])
        if not size:
            raise ValueError(f"the weights of {name} are all zero, so that the ratio is undefined")
        found[name] = _norm([gradients[path] for path in paths]) / size
    if not found:
        raise ValueError(f"the parts {', '.join(parts)} have no leaf of this network")
    if not all(map(np.isfinite, found.values())):
        raise ValueError(f"the gradient must be finite, got norms {found}")
    if not any(found.values()):
        raise ValueError("the gradient is zero everywhere; is the head zero? Fit it first")
    return found


def mean_gradient(
    network: Classifier, batches: Iterable[Mapping[str, Any]], mesh: Mesh | None = None
) -> Params:
    """Gradient of the task's mean loss over all examples, with running statistics.

    Args:
        network: with its weights, preprocessing and task.
        batches: ``image`` uint8 ``[batch, height, width, channels]``, ``label`` int ``[batch]``,
            and ``weight`` 0 for padding.
        mesh: devices; by default all of them.

    Returns:
        A tree like the parameters.

    Raises:
        ValueError: no examples.
    """
    mesh = mesh or make_mesh()
    variables = place_replicated(network.variables, mesh)
    mean, std = network.preprocessing.mean, network.preprocessing.std
    model = network.model.on(mesh)

    @jax.jit
    def of_batch(params: Params, images: Any, labels: Any, weights: Any) -> Params:
        def total(params: Params) -> jax.Array:
            inputs = normalize(images, mean, std)
            logits, _ = model.apply({**variables, "params": params}, inputs, norm="running")
            targets = network.task.targets(labels)
            losses = network.task.loss(logits, targets, jax.random.key(0))
            return jnp.sum(losses * weights)

        gradient: Params = jax.grad(total)(params)
        return gradient

    gradient, count = None, 0.0
    for one, batch in map_batches(
        lambda *arrays: of_batch(variables["params"], *arrays),
        batches,
        mesh,
        inputs=("image", "label", "weight"),
        per_example=False,
    ):
        gradient = one if gradient is None else jax.tree.map(jnp.add, gradient, one)
        count += float(batch["weight"].sum())
    if gradient is None or not count:
        raise ValueError("a gradient needs examples; there are no examples")
    averaged: Params = jax.tree.map(lambda leaf: leaf / count, gradient)
    return averaged


Labels = Literal["sampled", "all"]

_CHUNK = 8
"""Examples whose gradients are held at once; each is a copy of the parameters."""


def fisher_diagonal(
    logits: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    labels: Labels = "sampled",
    seed: int = 0,
    chunk: int = _CHUNK,
) -> tuple[Any, int]:
    """Diagonal of the Fisher information of a classifier, averaged over examples.

    It is ``E_x E_y~p(y|x) [(d log p(y|x) / d params) ** 2]``, with labels from the predictions of
    the network (the "true Fisher"). With the labels of the data (the "empirical Fisher") it would
    not be a curvature: that grows where the network is wrong, and vanishes where it fits.

    Args:
        logits: function of the parameters and inputs ``[examples, ...]`` to logits ``[examples,
            classes]``; examples must not depend on each other: BatchNorm uses running statistics.
        params: any pytree of floating arrays; the leaves that are differentiated.
        batches: inputs ``[examples, ...]``, without padding.
        labels: "sampled" draws one label per example by importance sampling, unbiased, with one
            backward pass per example; "all" sums over all classes by their probability, which is
            exact, with one backward pass per class.
        seed: of the sampled labels.
        chunk: examples whose gradients are held at the same time.

    Returns:
        A tree like ``params`` with the same dtypes, and the number of examples.

    Raises:
        ValueError: unknown ``labels``, no examples, a chunk below 1, a result that is not finite.

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
        raise ValueError(f"labels must be 'sampled' or 'all', got {labels!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1 examples, got {chunk}")
    run = jax.jit(partial(_chunk_sum, logits, labels))
    total, count = jax.tree.map(jnp.zeros_like, params), 0
    for number, batch in enumerate(batches):
        inputs = np.asarray(batch)
        for start in range(0, len(inputs), chunk):
            part = inputs[start : start + chunk]
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), start)
            # Padded to one shape, so that there is one program; padding has weight 0.
            missing = chunk - len(part)
            padded = np.concatenate([part, np.repeat(part[:1], missing, axis=0)])
            weight = (np.arange(chunk) < len(part)).astype(np.float32)
            total = jax.tree.map(jnp.add, total, run(params, padded, weight, key))
        count += len(inputs)
    if not count:
        raise ValueError("curvature needs examples; there are no examples")
    mean = jax.tree.map(lambda leaf: leaf / count, total)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(mean)):
        raise ValueError(
            "the curvature must be finite, got NaN or infinity: the network overflows on these "
            "examples"
        )
    return mean, count


@dataclass(frozen=True)
class PartCurvature:
    """Curvature of one part of a network.

    Args:
        name: of the part.
        parameters: number of measured parameters.
        mean: of the Fisher diagonal over the parameters.
        median: of the Fisher diagonal over the parameters.
        share: fraction of the trace over all parts.
    """

    name: str
    parameters: int
    mean: float
    median: float
    share: float


@dataclass(frozen=True)
class Curvature:
    """Fisher diagonal, summarized by part; it prints as a table.

    Args:
        parts: in the given order.
        examples: number of examples averaged over.
    """

    parts: tuple[PartCurvature, ...]
    examples: int

    def means(self) -> dict[str, float]:
        """Mean of each part, as the recipes take it."""
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
    """Summarizes a Fisher diagonal by part.

    Args:
        fisher: nested dict, from ``fisher_diagonal``.
        parts: masks by name; parts without leaves are left out.
        examples: number of examples averaged over.
        where: use these leaves only, such as ``kernels()``.

    Raises:
        ValueError: no leaf is left.
    """
    flat = flatten(fisher)
    counted = set(flat) if where is None else selected(where, fisher)
    values = {
        name: [np.ravel(flat[p]) for p in selected(m, fisher, allow_empty=True) if p in counted]
        for name, m in parts.items()
    }
    joined = {name: np.concatenate(leaves) for name, leaves in values.items() if leaves}
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


def _norm(leaves: list[Any]) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in leaves)))


def _chunk_sum(
    logits: Callable[[Any, Any], jax.Array],
    labels: Labels,
    params: Any,
    inputs: jax.Array,
    weight: jax.Array,
    key: jax.Array,
) -> Any:
    """Sum of the squared gradients over a chunk of examples."""

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
        del key  # nothing is drawn
        probs = jnp.exp(log_probs(params, example))
        rows = jax.jacrev(lambda p: log_probs(p, example))(params)
        return jax.tree.map(lambda leaf: jnp.tensordot(probs, jnp.square(leaf), 1), rows)

    one = of_sample if labels == "sampled" else of_all
    squares = jax.vmap(one)(inputs, jax.random.split(key, len(inputs)))
    return jax.tree.map(lambda leaf: jnp.tensordot(weight.astype(leaf.dtype), leaf, 1), squares)


def _draw(key: jax.Array, log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Importance sampling of a label: the label and its weight.

    For a confident network, nearly all of the expectation comes from labels that it nearly never
    predicts: sampling by probability would miss them, and the result would be too small by orders
    of magnitude on nearly every draw. Labels are sampled by probability times the squared gradient
    at the logits, ``|onehot - p| ** 2``.
    """
    probs = jnp.exp(log_probs)
    squared = jnp.square(jnp.eye(len(probs), dtype=probs.dtype) - probs).sum(axis=1)
    # The smallest number keeps a label possible where all gradients are rounded to 0.
    logits = log_probs + jnp.log(squared + np.finfo(probs.dtype).tiny)
    label = jax.random.categorical(key, logits)
    return label, jnp.exp(jax.nn.logsumexp(logits) - logits[label] + log_probs[label])
