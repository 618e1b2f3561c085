"""Passes over a data set: evaluate, predict, probe the head, recalibrate BatchNorm.

Every example counts once, and padding never. Statistics of BatchNorm are measured exactly, whatever
the batches were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.batchnorm import policy
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch
from flaxtransfer.distributed import arrays_from_first, from_first, several, total
from flaxtransfer.features.inputs import pooled_features
from flaxtransfer.features.sweep import (
    LinearProbe,
    fit_label_probes,
    fit_linear_probe,
    fit_target_probe,
)
from flaxtransfer.losses import Loss
from flaxtransfer.masks import Mask, everything
from flaxtransfer.models.model import Model
from flaxtransfer.models.moments import Mixture, Moments, apply_measuring
from flaxtransfer.models.moments import merge as merge_moments
from flaxtransfer.paths import Params, Variables, flatten, merge, suggest, unflatten
from flaxtransfer.sharding import make_mesh, map_batches, place_replicated
from flaxtransfer.task import MULTI_LABEL, SINGLE_LABEL, Task
from flaxtransfer.training.step import forward_with_features
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = [
    "Evaluation",
    "Predictions",
    "evaluate",
    "init_head_from_probe",
    "measure_moments",
    "predict",
    "recalibrate",
    "with_statistics",
    "without_padding",
]


def _turned(images: Any, turns: int, mirrored: bool) -> Any:
    turned = jax.numpy.rot90(images, turns, axes=(1, 2))
    return turned[:, :, ::-1] if mirrored else turned


TestTime = Literal["none", "flip", "dihedral"]

VIEWS: dict[TestTime, tuple[Callable[[Any], Any], ...]] = {
    "none": (lambda images: images,),
    "flip": (lambda images: images, lambda images: images[:, :, ::-1]),
    "dihedral": tuple(
        partial(_turned, turns=turns, mirrored=mirrored)
        for mirrored in (False, True)
        for turns in range(4)
    ),
}
"""Views of images ``[batch, side, side, channels]``: as they are, also mirrored, or in all eight
positions of a square. They are for labels that these do not change."""


@dataclass(frozen=True)
class Evaluation:
    """Means over the examples of a set.

    Args:
        metrics: by name, the metric that ranks first, ``loss`` among them: the loss that was
            trained, in nats.
        examples: how many there were.

    >>> Evaluation({"accuracy": 0.5, "loss": 0.7}, 4).accuracy
    0.5
    """

    metrics: Mapping[str, float]
    examples: int

    @property
    def loss(self) -> float:
        """Mean loss in nats."""
        return self.metrics["loss"]

    @property
    def accuracy(self) -> float:
        """Fraction of examples whose largest logit is the label's, for tasks that have it."""
        return self.metrics["accuracy"]

    def to_json(self) -> dict[str, float | int]:
        """Plain numbers for a metrics file."""
        return {**self.metrics, "examples": self.examples}


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the network said about each example, in the order of the batches.

    Args:
        logits: float32 ``[examples, classes]``.
        labels: int ``[examples]``, or float ``[examples, outputs]``; see ``task``.
        features: float32 ``[examples, channels]``, what the head saw; None where nobody asked.
        task: what the labels mean.
    """

    logits: np.ndarray
    labels: np.ndarray
    features: np.ndarray | None = None
    task: Task = field(default=SINGLE_LABEL, kw_only=True)

    @property
    def scores(self) -> np.ndarray:
        """The task's score of each example ``[examples]``: whether it is right, for classes."""
        return np.asarray(self.task.score(self.logits, self.task.targets(self.labels)))

    def evaluation(self, loss: Loss | None = None) -> Evaluation:
        """The means over all examples.

        Args:
            loss: that was trained; by default the task's own.
        """
        return Evaluation(self.task.evaluate(self.logits, self.labels, loss), len(self.labels))


def predict(
    network: Classifier,
    batches: Iterable[Batch],
    mesh: Mesh | None = None,
    *,
    start: str | None = None,
    features: bool = False,
    tta: TestTime = "none",
) -> Predictions:
    """Runs the network over all batches, with running statistics, leaving out padding.

    Args:
        network: from ``ft.transfer``, or made of a model and its weights.
        batches: ``image`` uint8 ``[batch, height, width, channels]``, ``label``, and ``weight`` 0
            where an example is padding.
        mesh: devices; by default all of them.
        start: the segment that ``image`` enters, where it holds activations instead of pixels.
        features: keep what the head saw, too.
        tta: the views of each image whose probabilities are averaged; see ``VIEWS``.

    Raises:
        ValueError: no example at all, an unknown ``tta``, or views of activations.
    """
    mesh = mesh or make_mesh()
    run = forward_averaged(network.on(mesh), tta, start)
    variables = place_replicated(network.variables, mesh)
    logits, labels, seen = [], [], []
    for (output, before_head), batch in map_batches(
        lambda images: run(variables, images), batches, mesh
    ):
        logits.append(output)
        labels.append(batch["label"])
        if features:
            seen.append(before_head)
    if not sum(map(len, labels)):
        raise ValueError("there is nothing to evaluate: the set has no examples")
    return Predictions(
        np.concatenate(logits),
        np.concatenate(labels),
        np.concatenate(seen) if features else None,
        task=network.task,
    )


def forward_averaged(
    network: Classifier, tta: TestTime = "none", start: str | None = None
) -> Callable[[Variables, Any], tuple[jax.Array, jax.Array]]:
    """``forward_with_features``, averaged over views of each image (test-time augmentation).

    Probabilities are averaged, and of a regression values. Of a mean probability p the output is
    log p, and log p / (1 - p) of several labels, so that it can be used as any other.

    Args:
        network: whose task says what outputs are.
        tta: name of the views.
        start: see ``predict``.

    Raises:
        ValueError: an unknown name, or views of activations.
    """
    if tta not in VIEWS:
        raise ValueError(f"tta must be one of {', '.join(VIEWS)}, got {tta!r}{suggest(tta, VIEWS)}")
    if start is not None and tta != "none":
        raise ValueError(f"tta must be none for batches of activations, got {tta!r}")
    run = forward_with_features(network.model, network.preprocessing, start)
    if tta == "none":
        return run

    def seen(variables: Variables, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = [run(variables, view(images)) for view in VIEWS[tta]]
        logits, features = (jax.numpy.stack(each) for each in zip(*found, strict=True))
        return mean_output(logits, network.task.name), features.mean(0)

    return seen


@partial(jax.jit, static_argnums=1)
def mean_output(outputs: jax.Array, task: str) -> jax.Array:
    """The output of the mean probability, from outputs ``[views, examples, outputs]``.

    >>> mean_output(jax.numpy.array([[[0.0, 100.0]], [[100.0, 0.0]]]), "single_label").round(3)
    Array([[-0.693, -0.693]], dtype=float32)
    """
    if task == SINGLE_LABEL.name:
        return _log_mean(jax.nn.log_softmax(outputs))
    if task == MULTI_LABEL.name:
        positive, negative = jax.nn.log_sigmoid(outputs), jax.nn.log_sigmoid(-outputs)
        return _log_mean(positive) - _log_mean(negative)
    return outputs.mean(0)


def _log_mean(logarithms: jax.Array) -> jax.Array:
    total: jax.Array = jax.nn.logsumexp(logarithms, axis=0)
    return total - math.log(len(logarithms))


def evaluate(
    network: Classifier,
    batches: Iterable[Batch],
    mesh: Mesh | None = None,
    *,
    start: str | None = None,
    loss: Loss | None = None,
    tta: TestTime = "none",
) -> Evaluation:
    """The task's metrics and the loss of the network on ``batches``.

    Args:
        network, batches, mesh, start, tta: as for ``predict``.
        loss: that was trained; by default the task's.
    """
    return predict(network, batches, mesh, start=start, tta=tta).evaluation(loss)


def init_head_from_probe(
    network: Classifier,
    batches: Iterable[Batch],
    mesh: Mesh | None = None,
    *,
    kind: Literal["logistic", "ridge"] = "logistic",
    groups: Sequence[Any] | None = None,
) -> tuple[Params, str]:
    """The parameters with the head that is optimal on the features as they are.

    Args:
        network, batches, mesh: as for ``pooled_features``.
        kind: of probe, see ``fit_linear_probe``.
        groups: ``[examples]``, in the order of the batches, each held out as a whole.

    Returns:
        All parameters, in which the head's kernel and bias are new; and how they were found.

    Raises:
        ValueError: a class without examples, features that are not finite.
    """
    pooled = pooled_features(network, batches, mesh)
    return head_from_features(network, *pooled, kind=kind, groups=lambda: groups)


def head_from_features(
    network: Classifier,
    features: np.ndarray,
    labels: np.ndarray,
    *,
    kind: Literal["logistic", "ridge"] = "logistic",
    groups: Callable[[], Sequence[Any] | None] | None = None,
) -> tuple[Params, str]:
    """The same where it is known what the head sees; see ``pooled_features``."""
    text = ""

    def solved() -> dict[str, np.ndarray]:
        nonlocal text
        head = _solved(network, features, labels, kind, None if groups is None else groups())
        text = head.text
        return {"kernel": np.asarray(head.kernel), "bias": np.asarray(head.bias)}

    # Another machine could find other last digits.
    found = arrays_from_first(solved)
    text = from_first(lambda: text)
    old = network.params[network.model.layout.head]
    new = {name: jax.numpy.asarray(value, old[name].dtype) for name, value in found.items()}
    return merge(network.params, {network.model.layout.head: new}), text


def _solved(
    network: Classifier,
    features: np.ndarray,
    labels: np.ndarray,
    kind: Literal["logistic", "ridge"],
    groups: Sequence[Any] | None,
) -> LinearProbe:
    """The head of the network's task; a regression's is ridge, whatever kind is asked for."""
    task = network.task
    if task.standardizes:
        fitted = task.fitted(labels)
        targets = np.asarray(fitted.targets(labels), np.float64)
        return fit_target_probe(features, targets, groups=groups)
    if labels.ndim == 2:
        return fit_label_probes(features, labels, network.class_names, kind=kind, groups=groups)
    classes = network.model.config.classes
    return fit_linear_probe(features, labels, classes, kind=kind, groups=groups)


def recalibrate(
    network: Classifier,
    batches: Iterable[Batch],
    where: Mask | str | None = None,
    mesh: Mesh | None = None,
) -> Params:
    """The running statistics that these images give, for some BatchNorms or for all.

    Use it after the weights were changed otherwise than by training (averaged, interpolated), or
    before a network with frozen statistics meets images unlike those of its pre-training. Labels
    are not needed. In the pass each of the chosen BatchNorms normalizes by its batch, as in
    training, so that a layer's statistics are those of the inputs it will see; the others use what
    they have. Means and variances of the batches are merged as parts of one sample. (The mean of
    the variances, which a running average tends to, leaves out the variance between batches.)
    ``flaxtransfer.adapt.adapt_batch_norm`` does it for images of another domain, with guards.

    Args:
        network: whose statistics are measured; not changed.
        batches: ``image`` uint8 ``[batch, height, width, channels]``, ``weight`` 0 where an example
            is padding, which is left out. Small batches make noisy inputs for the deeper layers.
        where: the BatchNorms, as a mask over parameters; by default all.
        mesh: devices; by default all of them.

    Returns:
        The whole tree of statistics; those not chosen are the arrays that came in. Variances are
        biased (divided by n), as flax's own.

    Raises:
        ValueError: no image, or a mask that touches no BatchNorm.

    References:
        P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
        2018 (the pass after averaging).
    """
    chosen = policy(network.params, everything() if where is None else where)
    if not chosen:
        raise ValueError(f"{where!r} touches no BatchNorm, so there is nothing to recalibrate")
    found = measure_moments(network, batches, chosen, mesh=mesh)
    return with_statistics(network.variables["batch_stats"], found)


def measure_moments(
    network: Classifier,
    batches: Iterable[Batch],
    chosen: frozenset[str],
    *,
    by_batch: bool = True,
    share: float = 0.0,
    kind: Mixture = "moments",
    mesh: Mesh | None = None,
) -> dict[str, Moments]:
    """Moments of what goes into some BatchNorms, over all images together.

    Args:
        network: whose inputs to BatchNorms are measured; not changed.
        batches: ``image`` uint8, and ``weight``: how much each example counts, 0 for padding.
        chosen: paths of the BatchNorms.
        by_batch: whether the chosen ones normalize by the batch at hand, mixed with what they have
            by ``share`` and ``kind``, or by what they have alone.
        share: of the statistics that they have.
        kind: of that mixture.
        mesh: devices; by default all of them.

    Returns:
        For each path, float64 moments; batches are merged as parts of one sample.

    Raises:
        ValueError: no image.
    """
    mesh = mesh or make_mesh()
    of_batch = _of_batch(network.model.on(mesh), network.preprocessing, chosen, by_batch, kind)
    placed = place_replicated(network.variables, mesh)
    merged: dict[str, Moments] | None = None
    for output, _ in map_batches(
        lambda images, weights: of_batch(placed, images, weights, share or None),
        without_padding(batches),
        mesh,
        inputs=("image", "weight"),
        per_example=False,
    ):
        found = {
            path: Moments(*(np.asarray(value, np.float64) for value in values))
            for path, values in output.items()
        }
        both = (
            found
            if merged is None
            else {p: merge_moments(merged[p], one) for p, one in found.items()}
        )
        merged = both
    if merged is None:
        raise ValueError("there are no images to measure BatchNorm statistics on")
    return merged


@lru_cache(maxsize=8)
def _of_batch(
    model: Model,
    preprocessing: Preprocessing,
    chosen: frozenset[str],
    by_batch: bool,
    kind: Mixture,
) -> Callable[..., dict[str, Any]]:
    @jax.jit
    def moments(
        variables: Variables, images: jax.Array, weights: jax.Array, share: jax.Array | None
    ) -> dict[str, Any]:
        normal = normalize(images, preprocessing.mean, preprocessing.std)
        _, found = apply_measuring(
            model,
            variables,
            normal,
            weights,
            chosen,
            by_batch=by_batch,
            share=share,
            kind=kind,
            stop="pool",
        )
        return {path: (one.mean, one.var, one.count) for path, one in found.items()}

    return moments


def with_statistics(batch_stats: Mapping[str, Any], found: Mapping[str, Moments]) -> Params:
    """The tree of statistics with these moments in the place of those it has.

    >>> stats = {"first": {"mean": np.zeros(1), "var": np.ones(1)}, "last": {"mean": np.zeros(1)}}
    >>> with_statistics(stats, {"first": Moments(np.full(1, 0.5), np.full(1, 2.0), 8)})
    {'first': {'mean': array([0.5]), 'var': array([2.])}, 'last': {'mean': array([0.])}}
    """
    new = {}
    for path, before in flatten(batch_stats).items():
        module, _, name = path.rpartition("/")
        if module in found:
            before = np.asarray(getattr(found[module], name)).astype(before.dtype)
        new[path] = before
    return unflatten(new)


def without_padding(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Images and weights; a short last batch joins the one before, for it would be noisy alone.

    In a run over several processes padding stays, with weight 0: one process may have more of it
    than another, and all need batches of one size. What is short is decided on all rows.
    """
    held: Batch | None = None
    examples = 0
    for batch in batches:
        images = np.asarray(batch["image"])
        weights = np.asarray(batch.get("weight", np.ones(len(images))), np.float32)
        there = weights > 0
        count = total(int(there.sum()))
        part: Batch
        if several():
            part = {"image": images, "weight": weights}
            part |= {"index": np.asarray(batch["index"])} if "index" in batch else {}
        else:
            part = {"image": images[there], "weight": weights[there]}
        if held is None:
            held, examples = part, count
        elif count < examples:
            held = {name: np.concatenate([held[name], part[name]]) for name in held}
            examples += count
        else:
            yield held
            held, examples = part, count
    if held is not None and examples:
        yield held
