"""Re-estimation of BatchNorm statistics on target images.

``reestimate`` measures the statistics through the whole network, without guards; the public
functions are in ``adapt.batch_norm``. ``image_reader`` gives batches of unlabeled images, from an
array or a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch
from flaxtransfer.models.moments import (
    Mixture,
    Moments,
    displacement,
    effective_count,
    mix,
    positions,
    source_share,
)
from flaxtransfer.paths import Params, Variables, flatten
from flaxtransfer.training.evaluation import measure_moments, predict, with_statistics

__all__ = [
    "MIN_VALUES",
    "Images",
    "LayerStatistics",
    "Reader",
    "ReestimatedStatistics",
    "TooFewValues",
    "image_reader",
    "interleave",
    "predict_logits",
    "reestimate",
    "weighted_reader",
]


Images = np.ndarray | Callable[[], Iterable[Batch]]
"""uint8 ``[images, height, width, bands]`` of the size of the network's input, or a function that
returns an iterable of batches of them, such as ``loaders.validation``; labels are ignored."""

Reader = Callable[[], Iterator[Batch]]
"""Iterates over batches of ``image``, ``label`` (zeros) and ``weight`` (0 for padding)."""


def image_reader(images: Images, batch_size: int) -> Reader:
    """Batches of unlabeled images, which can be read any number of times.

    Args:
        images: see ``Images``.
        batch_size: of the batches of an array; a function makes its own batches.

    Raises:
        TypeError: neither an array of uint8 nor a function.
        ValueError: an array of another rank or without images, or a batch size below 1.

    >>> [len(batch["image"]) for batch in image_reader(np.zeros((5, 8, 8, 3), np.uint8), 4)()]
    [4, 4]
    """
    if callable(images):
        make = images
        return lambda: map(_unlabeled, make())
    if not hasattr(images, "dtype") or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(
            f"images must be an array of uint8 or a function that returns batches, got {kind}"
        )
    if images.ndim != 4 or not len(images):
        raise ValueError(
            "images must have shape [images, height, width, bands], one or more, got "
            f"{images.shape}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    array = np.asarray(images)
    devices = jax.local_device_count()
    # As small as possible, and a multiple of the number of devices.
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
    """Interleaves an array, so that every batch has images from all parts of it.

    Files often come sorted by class, and batches of one class have statistics of one class. An
    array that fits into one batch and a function are returned unchanged.

    >>> interleave(np.arange(6), 3).tolist()
    [0, 2, 4, 1, 3, 5]
    """
    if callable(images) or not hasattr(images, "__len__") or len(images) <= batch_size:
        return images
    batches = -(-len(images) // max(batch_size, 1))
    order = np.concatenate([np.arange(n, len(images), batches) for n in range(batches)])
    interleaved: np.ndarray = images[order]
    return interleaved


def weighted_reader(read: Reader, weights: np.ndarray) -> Reader:
    """The same batches with a weight per image, ``[images]`` in reading order."""

    def batches() -> Iterator[Batch]:
        first = 0
        for batch in read():
            real = np.flatnonzero(batch["weight"] > 0)
            own = np.zeros(len(batch["weight"]), np.float32)
            own[real] = weights[first : first + len(real)]
            first += len(real)
            yield {**batch, "weight": own}

    return batches


def _unlabeled(batch: Batch) -> Batch:
    count = len(batch["image"])
    weight = np.asarray(batch.get("weight", np.ones(count, np.float32)))
    return {"image": batch["image"], "label": np.zeros(count, np.int32), "weight": weight}


def predict_logits(
    network: Classifier,
    read: Reader,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Logits with running statistics, float32 ``[images, classes]`` in the order of the images.

    Args:
        network: with its weights and preprocessing.
        read: the images, from ``image_reader``.
        mesh: devices; default: all.

    Raises:
        ValueError: no images.
    """
    return predict(network, read(), mesh).logits


MIN_VALUES = 32
"""Values per channel; with fewer, the standard error of the variance is above a quarter."""

_CONVERGED = 1e-4
"""Change of the statistics, in standard deviations, below which predictions do not change."""


class TooFewValues(ValueError):
    """A BatchNorm has too few values per channel for statistics."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the target at one BatchNorm.

    Args:
        path: of the BatchNorm, as in the statistics.
        values: effective number of values of each channel, images times positions.
        distance: between the statistics of target and source: root mean square over the channels of
            the Wasserstein distance between normals, in standard deviations of the source.
    """

    path: str
    values: float
    distance: float


@dataclass(frozen=True, eq=False)
class ReestimatedStatistics:
    """Re-estimated BatchNorm statistics.

    Args:
        batch_stats: the whole tree.
        layers: one per chosen BatchNorm, from the input to the output.
        images: number of images.
        effective_images: effective sample size of the weighted images (Kish).
        share: weight of the source in the mixture, 0 .. 1.
        passes: number of passes through the network.
        exact: whether the result is independent of the batches: there was one batch, or the passes
            converged.
    """

    batch_stats: Params
    layers: tuple[LayerStatistics, ...]
    images: int
    effective_images: float
    share: float
    passes: int
    exact: bool


def reestimate(
    network: Classifier,
    read: Reader,
    chosen: frozenset[str],
    *,
    weights: np.ndarray | None = None,
    source_weight: float | None = None,
    mixture: Mixture = "moments",
    passes: int = 1,
    mesh: Mesh | None = None,
) -> ReestimatedStatistics:
    """Re-estimates the statistics of the chosen BatchNorms, mixed with those of the source.

    In the first pass every chosen BatchNorm normalizes by the current batch, mixed with the source,
    so that deeper ones get the inputs that they will get later; batches are merged as parts of one
    sample. With one batch that is exact. With several, deeper layers have seen each batch
    normalized by itself. Each further pass normalizes all images by the statistics of the previous
    pass, which makes at least one more layer exact, counted from the input; the layers after it may
    get worse before they get better. After convergence the result depends neither on the batches
    nor on their order.

    Args:
        network: of the source; not changed.
        read: target images, from ``image_reader``.
        chosen: paths of the BatchNorms.
        weights: ``[images]``, weight of each image.
        source_weight: N of ``source_share``.
        mixture: kind of mixture, see ``mix``.
        passes: at most.
        mesh: devices; default: all.

    Raises:
        ValueError: no images, or weights of another length.
        TooFewValues: fewer than 32 values per channel at one of the BatchNorms.
    """
    model, variables = network.model, network.variables
    counts = [(batch["image"].shape, int((batch["weight"] > 0).sum())) for batch in read()]
    counts = [(shape, real) for shape, real in counts if real]
    images = sum(real for _, real in counts)
    if not images:
        raise ValueError("there are no target images to adapt to")
    if weights is not None and len(weights) != images:
        raise ValueError(f"weights must be one per image ({images}), got {len(weights)}")
    effective = float(images) if weights is None else effective_count(weights)
    values = positions(model, counts[0][0][1:])
    _check_values({path: effective * values[path] for path in values if path in chosen}, effective)
    share = source_share(source_weight, effective)
    batches = read if weights is None else weighted_reader(read, weights)

    source = _running_moments(variables, chosen)
    current, target, done, exact = variables, source, 0, len(counts) == 1
    while done < max(passes, 1) and not (done and exact):
        target = measure_moments(
            network.with_variables(current),
            batches(),
            chosen,
            by_batch=not done,
            share=share,
            kind=mixture,
            mesh=mesh,
        )
        before = _running_moments(current, chosen)
        mixed = {path: mix(source[path], target[path], share, mixture) for path in target}
        stats = with_statistics(variables["batch_stats"], mixed if share else target)
        current = {**variables, "batch_stats": stats}
        done += 1
        moved = max(displacement(before[p], one, model.config.epsilon) for p, one in mixed.items())
        exact = exact or (done > 1 and moved < _CONVERGED)
    layers = tuple(
        LayerStatistics(
            path,
            effective * values[path],
            displacement(source[path], target[path], model.config.epsilon),
        )
        for path in values
        if path in chosen
    )
    return ReestimatedStatistics(
        current["batch_stats"], layers, images, effective, share, done, exact
    )


def _running_moments(variables: Variables, chosen: frozenset[str]) -> dict[str, Moments]:
    flat = {p: np.asarray(v, np.float64) for p, v in flatten(variables["batch_stats"]).items()}
    return {path: Moments(flat[f"{path}/mean"], flat[f"{path}/var"], 0) for path in chosen}


def _check_values(values: dict[str, float], images: float) -> None:
    least = min(values, key=lambda path: values[path])
    if values[least] < MIN_VALUES:
        each = values[least] / images
        raise TooFewValues(
            f"statistics must have at least {MIN_VALUES} values per channel; {images:.3g} target "
            f"images give {values[least]:.3g} at {least}: adapt to at least "
            f"{-(-MIN_VALUES // each):.0f} images, or leave out this BatchNorm"
        )
