"""Feature extraction: the global average pool of each segment's output, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.classifier import Classifier
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables, suggest
from flaxtransfer.sharding import make_mesh, map_batches, place_replicated
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = ["pooled_features", "segment_features"]


def segment_features(
    network: Classifier,
    batches: Iterable[Mapping[str, Any]],
    segments: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Global average pool of the output of each segment, with running statistics.

    Use it for heads on a frozen network, at any depth. The network runs once however many segments
    are asked for, and no further than the last of them.

    Args:
        network: from ``ft.transfer``, or made of a model and its weights.
        batches: ``image`` uint8 ``[batch, height, width, channels]``, ``label`` int ``[batch]``,
            and ``weight`` 0 where an example is padding, which is left out.
        segments: names, such as those of ``model.segments``; by default all before the pooling.
            "pool" is the same as the last stage.
        mesh: devices, over which each batch is cut; by default all of them.

    Returns:
        Float32 ``[examples, channels]`` by segment, from the input to the output, and the labels,
        int ``[examples]``, in the order of the batches.

    Raises:
        ValueError: no example at all, no segment, or one that does not exist or has no map; with
            those that do.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4))
    >>> batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "label": np.array([0, 1])}
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> found, labels = segment_features(network, [batch], ["pool"])
    >>> found["pool"].shape, labels.tolist()
    ((2, 32), [0, 1])
    """
    chosen = _chosen(network.model, segments)
    mesh = mesh or make_mesh()
    run = _pooled(network.model, network.preprocessing, chosen)
    placed = place_replicated(network.variables, mesh)
    found: list[tuple[np.ndarray, ...]] = []
    labels = []
    for maps, batch in map_batches(lambda images: run(placed, images), batches, mesh):
        found.append(maps)
        labels.append(batch["label"])
    if not sum(map(len, labels)):
        raise ValueError("there are no examples to take features of")
    features = map(np.concatenate, zip(*found, strict=True))
    return dict(zip(chosen, features, strict=True)), np.concatenate(labels)


def pooled_features(
    network: Classifier, batches: Iterable[Mapping[str, Any]], mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What the head sees of each image: ``segment_features`` of "pool", by itself.

    Returns:
        Float32 ``[examples, features]`` and int ``[examples]``, in the order of the batches.
    """
    features, labels = segment_features(network, batches, ("pool",), mesh)
    return features["pool"], labels


def _chosen(model: Model, segments: Sequence[str] | None) -> tuple[str, ...]:
    """The segments that were asked for, from the input to the output."""
    known = model.segments[: model.segments.index("pool") + 1]
    if segments is None:
        return known[:-1]
    if isinstance(segments, str):
        raise ValueError(f"segments are a sequence of names, such as ({segments!r},)")
    if unknown := [f"{name!r}{suggest(name, known)}" for name in segments if name not in known]:
        raise ValueError(
            f"no features of {', '.join(unknown)}; the segments that have are {', '.join(known)}"
        )
    if not segments:
        raise ValueError(f"no segment was asked for; there are {', '.join(known)}")
    return tuple(name for name in known if name in segments)


@lru_cache(maxsize=8)
def _pooled(
    model: Model, preprocessing: Preprocessing, chosen: tuple[str, ...]
) -> Callable[[Variables, jax.Array], tuple[jax.Array, ...]]:
    """Compiled: images [batch, height, width, channels] -> float32 features of each segment."""
    last = model.segments.index(chosen[-1]) + 2
    steps = list(itertools.pairwise(model.segments[:last]))

    @jax.jit
    def run(variables: Variables, images: jax.Array) -> tuple[jax.Array, ...]:
        x, found = normalize(images, preprocessing.mean, preprocessing.std), []
        for name, following in steps:
            x, _ = model.apply(variables, x, norm="running", start=name, stop=following)
            if name in chosen:
                pooled = x if x.ndim == 2 else x.mean((1, 2), dtype=jnp.float32)
                found.append(pooled.astype(jnp.float32))
        return tuple(found)

    return run
