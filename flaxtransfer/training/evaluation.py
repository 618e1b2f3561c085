"""Evaluate and predict over every example of a set, and the linear probe of a head.

Accuracy and loss over every example of a set, each counted once.

A linear probe on the network as it is, put in place of its head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.data.loader import Batch
from flaxtransfer.features.extract import pooled_features
from flaxtransfer.features.sweep import fit_linear_probe
from flaxtransfer.models.model import Model
from flaxtransfer.optimizers import merge
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.training.step import forward_with_features
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["Evaluation", "Predictions", "evaluate", "init_head_from_probe", "predict"]


@dataclass(frozen=True)
class Evaluation:
    """Means over the examples of a set.

    Args:
      accuracy: share of examples whose largest logit is the label's.
      loss: mean negative log-likelihood in nats.
      examples: how many there were.
    """

    accuracy: float
    loss: float
    examples: int

    def to_json(self) -> dict[str, float | int]:
        """Plain numbers for a metrics file."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the network said about each example, in the order of the batches.

    Args:
      logits: float32 [examples, classes].
      labels: int [examples].
      features: float32 [examples, channels], what the head saw; None where nobody asked.
    """

    logits: np.ndarray
    labels: np.ndarray
    features: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """Bool [examples]: whether the largest logit is the label's."""
        return self.logits.argmax(axis=-1) == self.labels

    def evaluation(self) -> Evaluation:
        """The means over all examples."""
        logits = self.logits.astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        log_partition = np.log(np.exp(shifted).sum(axis=-1))
        losses = log_partition - shifted[np.arange(len(shifted)), self.labels]
        return Evaluation(float(self.correct.mean()), float(losses.mean()), len(losses))


def predict(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
    *,
    start: str | None = None,
    features: bool = False,
) -> Predictions:
    """Runs the network over all batches, with running statistics, leaving out padding.

    Args:
      model: the network.
      variables: its parameters and statistics.
      batches: ``image`` uint8, ``label``, and ``weight`` 0 where an example is padding.
      preprocessing: that belongs to the weights.
      mesh: devices; by default all of them.
      start: the segment that ``image`` enters, where it holds activations instead of pixels.
      features: keep what the head saw, too.

    Raises:
      ValueError: no example at all.
    """
    mesh = mesh or make_mesh()
    run = forward_with_features(model, preprocessing, start)
    variables = place_replicated(variables, mesh)
    logits, labels, seen = [], [], []
    for batch in batches:
        output, before_head = run(variables, place_batch(batch["image"], mesh))
        label = np.asarray(batch["label"])
        keep = np.asarray(batch.get("weight", np.ones(len(label)))) > 0
        logits.append(np.asarray(output)[keep])
        labels.append(label[keep])
        if features:
            seen.append(np.asarray(before_head)[keep])
    if not sum(map(len, labels)):
        raise ValueError("there is nothing to evaluate: the set has no examples")
    return Predictions(
        np.concatenate(logits), np.concatenate(labels), np.concatenate(seen) if features else None
    )


def evaluate(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
    *,
    start: str | None = None,
) -> Evaluation:
    """Accuracy and loss of the network on ``batches``; arguments as for ``predict``."""
    return predict(model, variables, batches, preprocessing, mesh, start=start).evaluation()


def init_head_from_probe(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
) -> tuple[Params, str]:
    """The parameters with the head that is optimal on the features as they are.

    Args:
      model, variables, batches, preprocessing, mesh: as for ``pooled_features``.

    Returns:
      All parameters, in which the head's kernel and bias are new; and how they were found.

    Raises:
      ValueError: a class without examples, features that are not finite.
    """
    features, labels = pooled_features(model, variables, batches, preprocessing, mesh)
    head = fit_linear_probe(features, labels, model.config.classes)
    old = variables["params"]["fc"]
    new = {
        name: jax.numpy.asarray(value, old[name].dtype)
        for name, value in (("kernel", head.kernel), ("bias", head.bias))
    }
    return merge(variables["params"], {"fc": new}), head.text
