"""Unlabelled target images, as an array or as a feed, read any number of times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.models import Model
from flaxtransfer.training.evaluation import predict
from flaxtransfer.training.feed import Batch
from flaxtransfer.types import Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["Images", "Reader", "dealt", "reader", "target_logits", "weighted"]

Images = np.ndarray | Callable[[], Iterable[Batch]]
"""uint8 ``[images, height, width, bands]`` as the network takes them, or a function that yields
batches of them from the first one on, such as ``feed.validation``; labels are not looked at."""

Reader = Callable[[], Iterator[Batch]]
"""Yields ``image``, ``label`` of zeros and ``weight``, 0 for padding, from the first batch on."""


def reader(images: Images, batch_size: int) -> Reader:
    """Batches of the images, as often as they are wanted.

    Args:
      images: see ``Images``.
      batch_size: of an array's batches; those of a function are what they are.

    Raises:
      TypeError: neither an array of uint8 nor a function.
      ValueError: an array of another rank or without images, a batch size below 1.

    >>> [len(batch["image"]) for batch in reader(np.zeros((5, 8, 8, 3), np.uint8), 4)()]
    [4, 4]
    """
    if callable(images):
        make = images
        return lambda: map(_unlabelled, make())
    if not hasattr(images, "dtype") or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(
            f"images are an array of uint8 or a function that yields batches, not {kind}"
        )
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"images have shape {images.shape}, wanted [images, height, width, bands], one or more"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more, not {batch_size}")
    array = np.asarray(images)
    devices = jax.local_device_count()
    # Not larger than need be, and whole on every device.
    size = min(batch_size, len(array))
    size = -(-size // devices) * devices

    def batches() -> Iterator[Batch]:
        for first in range(0, len(array), size):
            part = array[first : first + size]
            padding = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            yield {
                "image": np.concatenate([part, padding]),
                "label": np.zeros(size, np.int32),
                "weight": (np.arange(size) < len(part)).astype(np.float32),
            }

    return batches


def dealt(images: Images, batch_size: int) -> Images:
    """An array's images dealt out like cards, so that every batch has some from everywhere.

    Files come sorted by class, and batches of one class have statistics of one class. What fits
    into one batch, and a feed, stays as it is.

    >>> dealt(np.arange(6), 3).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    if callable(images) or not hasattr(images, "__len__") or len(images) <= batch_size:
        return images
    hands = -(-len(images) // max(batch_size, 1))
    return images[np.concatenate([np.arange(n, len(images), hands) for n in range(hands)])]


def weighted(read: Reader, weights: np.ndarray) -> Reader:
    """The same images, which count as much as these weights, in their order, say."""

    def batches() -> Iterator[Batch]:
        first = 0
        for batch in read():
            real = np.flatnonzero(batch["weight"] > 0)
            own = np.zeros(len(batch["weight"]), np.float32)
            own[real] = weights[first : first + len(real)]
            first += len(real)
            yield {**batch, "weight": own}

    return batches


def target_logits(
    model: Model,
    variables: Variables,
    read: Reader,
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Float32 logits ``[images, classes]`` with running statistics, in the images' order.

    Raises:
      ValueError: no image.
    """
    return predict(model, variables, read(), preprocessing, mesh).logits


def _unlabelled(batch: Batch) -> Batch:
    count = len(batch["image"])
    weight = np.asarray(batch.get("weight", np.ones(count, np.float32)))
    return {"image": batch["image"], "label": np.zeros(count, np.int32), "weight": weight}
