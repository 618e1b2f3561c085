"""BatchNorm statistics measured in one pass over images: exact, whatever the batches were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.batchnorm import policy
from flaxtransfer.data.loader import Batch
from flaxtransfer.masks import Mask, everything
from flaxtransfer.models.model import Model
from flaxtransfer.models.moments import Mixture, Moments, apply_measuring, merge
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = ["measure_moments", "recalibrate", "with_statistics", "without_padding"]


def recalibrate(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
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
      model: the network.
      variables: its parameters and statistics; not changed.
      batches: ``image`` uint8 [batch, height, width, channels], ``weight`` 0 where an example is
        padding; padding is left out. Small batches make noisy inputs for the deeper layers.
      preprocessing: that belongs to the weights.
      where: the BatchNorms, as a mask over parameters; by default all.
      mesh: devices; by default all of them.

    Returns:
      The whole tree of statistics; those not chosen are the arrays that came in. Variances are
      biased (divided by n), as flax's own.

    Raises:
      ValueError: no image, or a mask that touches no BatchNorm.

    References:
      P. Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018
      (the pass after averaging).
    """
    chosen = policy(variables["params"], everything() if where is None else where)
    if not chosen:
        raise ValueError(f"{where!r} touches no BatchNorm, so there is nothing to recalibrate")
    found = measure_moments(model, variables, batches, preprocessing, chosen, mesh=mesh)
    return with_statistics(variables["batch_stats"], found)


def measure_moments(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    chosen: frozenset[str],
    *,
    by_batch: bool = True,
    share: float = 0.0,
    kind: Mixture = "moments",
    mesh: Mesh | None = None,
) -> dict[str, Moments]:
    """Moments of what goes into some BatchNorms, over all images together.

    Args:
      model: the network.
      variables: its parameters and statistics; not changed.
      batches: ``image`` uint8, and ``weight``: how much each example counts, 0 for padding.
      preprocessing: that belongs to the weights.
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
    of_batch = _of_batch(model, preprocessing, chosen, by_batch, kind)
    placed = place_replicated(variables, mesh)
    merged: dict[str, Moments] | None = None
    for batch in without_padding(batches):
        whole = len(batch[0]) % len(mesh.local_devices) == 0
        arrived = place_batch(batch, mesh) if whole else place_replicated(batch, mesh)
        found = {
            path: Moments(*(np.asarray(value, np.float64) for value in values))
            for path, values in jax.device_get(of_batch(placed, *arrived, share or None)).items()
        }
        both = found if merged is None else {p: merge(merged[p], one) for p, one in found.items()}
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

    >>> stats = {"bn1": {"mean": np.zeros(1), "var": np.ones(1)}, "bn2": {"mean": np.zeros(1)}}
    >>> with_statistics(stats, {"bn1": Moments(np.full(1, 0.5), np.full(1, 2.0), 8)})
    {'bn1': {'mean': array([0.5]), 'var': array([2.])}, 'bn2': {'mean': array([0.])}}
    """
    new = {}
    for path, before in flatten(batch_stats).items():
        module, _, name = path.rpartition("/")
        if module in found:
            before = np.asarray(getattr(found[module], name)).astype(before.dtype)
        new[path] = before
    return unflatten(new)


def without_padding(batches: Iterable[Batch]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and weights; a short last batch joins the one before, for it would be noisy alone."""
    held: tuple[np.ndarray, np.ndarray] | None = None
    for batch in batches:
        images = np.asarray(batch["image"])
        weights = np.asarray(batch.get("weight", np.ones(len(images))), np.float32)
        part = (images[weights > 0], weights[weights > 0])
        if held is None:
            held = part
        elif len(part[0]) < len(held[0]):
            held = (np.concatenate([held[0], part[0]]), np.concatenate([held[1], part[1]]))
        else:
            yield held
            held = part
    if held is not None and len(held[0]):
        yield held
