"""BatchNorm statistics of target images, re-estimated through the whole network.

Unlabeled target images, as an array or as a feed, read any number of times.

BatchNorm statistics of target images, through the whole network: the pass, without guards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.data.loader import Batch
from flaxtransfer.models.model import Model
from flaxtransfer.models.moments import (
    Mixture,
    Moments,
    displacement,
    effective_count,
    mix,
    positions,
    source_share,
)
from flaxtransfer.paths import flatten
from flaxtransfer.training.evaluation import predict
from flaxtransfer.training.recalibration import measure_moments, with_statistics
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "LEAST_VALUES",
    "Images",
    "LayerStatistics",
    "Reader",
    "Reestimated",
    "TooFewValues",
    "interleave",
    "reader",
    "reestimate",
    "target_logits",
    "weighted",
]


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
        return lambda: map(_unlabeled, make())
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


def interleave(images: Images, batch_size: int) -> Images:
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


def _unlabeled(batch: Batch) -> Batch:
    count = len(batch["image"])
    weight = np.asarray(batch.get("weight", np.ones(count, np.float32)))
    return {"image": batch["image"], "label": np.zeros(count, np.int32), "weight": weight}


LEAST_VALUES = 32
"""With fewer values in a channel, its variance alone is off by a quarter and more."""

_SETTLED = 1e-4
"""Statistics that move by less, in standard deviations, move no prediction."""


class TooFewValues(ValueError):
    """A BatchNorm whose channels have too few values for statistics."""


@dataclass(frozen=True)
class LayerStatistics:
    """What the target's images are to one BatchNorm.

    Args:
      path: "layer4/0/bn1".
      values: effective number of values of each channel, images times positions.
      distance: of the target's statistics from the source's, root mean square over the channels of
        the Wasserstein distance between normals, in the source's standard deviations.
    """

    path: str
    values: float
    distance: float


@dataclass(frozen=True, eq=False)
class Reestimated:
    """New statistics, and where they come from.

    Args:
      batch_stats: the whole tree.
      layers: one for each chosen BatchNorm, from the input to the output.
      images: how many there were.
      effective_images: of them, by Kish's formula, where they were weighted.
      share: of the source in the mixture.
      passes: through the network.
      exact: whether the result does not depend on how images were put into batches: there was one
        batch, or passes went on until nothing moved.
    """

    batch_stats: Params
    layers: tuple[LayerStatistics, ...]
    images: int
    effective_images: float
    share: float
    passes: int
    exact: bool


def reestimate(
    model: Model,
    variables: Variables,
    read: Reader,
    preprocessing: Preprocessing,
    chosen: frozenset[str],
    *,
    weights: np.ndarray | None = None,
    source_weight: float | None = None,
    mixture: Mixture = "moments",
    passes: int = 1,
    mesh: Mesh | None = None,
) -> Reestimated:
    """Statistics of the chosen BatchNorms on these images, mixed with those of the source.

    In the first pass every chosen BatchNorm normalizes by the batch at hand, mixed with the
    source, so that deeper ones see what they will see; batches are merged as parts of one sample.
    With one batch that is exact. With several, deeper layers saw each batch normalized by itself.
    A further pass normalizes all images by what the pass before has found, which makes at least
    one more layer exact, counted from the input; what comes after the exact ones may get worse
    before it gets better. When nothing moves any more, the result depends neither on the batches
    nor on their order.

    Args:
      model: the network.
      variables: the source's.
      read: target images.
      preprocessing: that belongs to the weights.
      chosen: paths of the BatchNorms.
      weights: ``[images]``, how much each image counts.
      source_weight: N of ``source_share``.
      mixture: what a mixture is, see ``mix``.
      passes: at most so many.
      mesh: devices; by default all of them.

    Raises:
      ValueError: no image; ``TooFewValues``: fewer than 32 values in a channel of one of the
        BatchNorms.
    """
    counts = [(batch["image"].shape, int((batch["weight"] > 0).sum())) for batch in read()]
    counts = [(shape, real) for shape, real in counts if real]
    images = sum(real for _, real in counts)
    if not images:
        raise ValueError("there are no target images to adapt to")
    if weights is not None and len(weights) != images:
        raise ValueError(f"{len(weights)} weights are given for {images} images")
    effective = float(images) if weights is None else effective_count(weights)
    values = positions(model, counts[0][0][1:])
    _enough({path: effective * values[path] for path in values if path in chosen}, effective)
    share = source_share(source_weight, effective)
    feed = read if weights is None else weighted(read, weights)

    source = _held(variables, chosen)
    current, target, done, settled = variables, source, 0, len(counts) == 1
    while done < max(passes, 1) and not (done and settled):
        target = measure_moments(
            model,
            current,
            feed(),
            preprocessing,
            chosen,
            by_batch=not done,
            share=share,
            kind=mixture,
            mesh=mesh,
        )
        before = _held(current, chosen)
        mixed = {path: mix(source[path], target[path], share, mixture) for path in target}
        stats = with_statistics(variables["batch_stats"], mixed if share else target)
        current = {**variables, "batch_stats": stats}
        done += 1
        moved = max(displacement(before[p], one, model.config.epsilon) for p, one in mixed.items())
        settled = settled or (done > 1 and moved < _SETTLED)
    layers = tuple(
        LayerStatistics(
            path,
            effective * values[path],
            displacement(source[path], target[path], model.config.epsilon),
        )
        for path in values
        if path in chosen
    )
    return Reestimated(current["batch_stats"], layers, images, effective, share, done, settled)


def _held(variables: Variables, chosen: frozenset[str]) -> dict[str, Moments]:
    flat = {p: np.asarray(v, np.float64) for p, v in flatten(variables["batch_stats"]).items()}
    return {path: Moments(flat[f"{path}/mean"], flat[f"{path}/var"], 0) for path in chosen}


def _enough(values: dict[str, float], images: float) -> None:
    least = min(values, key=lambda path: values[path])
    if values[least] < LEAST_VALUES:
        each = values[least] / images
        raise TooFewValues(
            f"{images:.3g} target images give {values[least]:.3g} values to a channel of {least}; "
            f"its statistics need {LEAST_VALUES}: adapt to {-(-LEAST_VALUES // each):.0f} images "
            "or more, or leave this BatchNorm as it is"
        )
