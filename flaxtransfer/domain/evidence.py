"""What a network makes of images, as the arrays that the room of shifts takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flaxtransfer.models import Model
from flaxtransfer.training.evaluation import predict
from flaxtransfer.training.feed import Batch
from flaxtransfer.types import Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["Evidence", "evidence"]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Logits and features of the same examples, in their order.

    Args:
      logits: float32 [examples, classes].
      features: float32 [examples, channels], what the head sees.
      labels: int [examples]; not to be looked at where nobody said them.
    """

    logits: np.ndarray
    features: np.ndarray
    labels: np.ndarray


def evidence(
    model: Model, variables: Variables, batches: Iterable[Batch], preprocessing: Preprocessing
) -> Evidence:
    """Runs the network once over the batches, with running statistics.

    Raises:
      ValueError: no example at all.
    """
    found = predict(model, variables, batches, preprocessing, features=True)
    return Evidence(found.logits, np.asarray(found.features), found.labels)
