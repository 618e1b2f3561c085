"""A linear probe on the network as it is, put in place of its head."""

from __future__ import annotations

from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from flaxtransfer.features.extraction import pooled_features
from flaxtransfer.features.solved import solved_head
from flaxtransfer.models import Model
from flaxtransfer.optimizers import merge
from flaxtransfer.training.feed import Batch
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["probed_head"]


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
