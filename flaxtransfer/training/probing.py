"""A linear probe on the network as it is, put in place of its head."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.features.solved import solved_head
from flaxtransfer.models import Model
from flaxtransfer.optimizers import merge
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.training.feed import Batch
from flaxtransfer.training.step import forward
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["pooled_features", "probed_head"]


def pooled_features(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What the head sees of each image, with running statistics.

    Args:
      model: the network.
      variables: its parameters and statistics.
      batches: ``image`` uint8, ``label``, and ``weight`` 0 where an example is padding.
      preprocessing: that belongs to the weights.
      mesh: devices; by default all of them.

    Returns:
      Float32 [examples, features] and int [examples], in the order of the batches.

    Raises:
      ValueError: no example at all.
    """
    mesh = mesh or make_mesh()
    run = forward(model, preprocessing, None, "head")
    placed = place_replicated(variables, mesh)
    features, labels = [], []
    for batch in batches:
        output = np.asarray(run(placed, place_batch(batch["image"], mesh)), np.float32)
        label = np.asarray(batch["label"])
        keep = np.asarray(batch.get("weight", np.ones(len(label)))) > 0
        features.append(output[keep])
        labels.append(label[keep])
    if not sum(map(len, labels)):
        raise ValueError("there are no examples to take features of")
    return np.concatenate(features), np.concatenate(labels)


def probed_head(
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
    head = solved_head(features, labels, model.config.classes)
    old = variables["params"]["fc"]
    new = {
        name: jax.numpy.asarray(value, old[name].dtype)
        for name, value in (("kernel", head.kernel), ("bias", head.bias))
    }
    return merge(variables["params"], {"fc": new}), head.text
