"""BatchNorm statistics measured in one pass over images: exact, whatever the batches were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.batchnorm import policy
from flaxtransfer.data.normalisation import normalise
from flaxtransfer.masks import Mask, everything
from flaxtransfer.models import Model
from flaxtransfer.models.layers import MOMENTUM
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.training.feed import Batch
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["merge_moments", "recalibrate"]


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
    are not needed. In the pass each of the chosen BatchNorms normalises by its batch, as in
    training, so that a layer's statistics are those of the inputs it will see; the others use what
    they have. Means and variances of the batches are merged as parts of one sample. (The mean of
    the variances, which a running average tends to, leaves out the variance between batches.)

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
      T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
      Computing Sample Variances", 1979. P. Izmailov et al., "Averaging Weights Leads to Wider
      Optima and Better Generalization", 2018 (the pass after averaging).
    """
    mesh = mesh or make_mesh()
    chosen = policy(variables["params"], everything() if where is None else where)
    if not chosen:
        raise ValueError(f"{where!r} touches no BatchNorm, so there is nothing to recalibrate")

    # From statistics of 0, one update leaves (1 - momentum) times those of the batch.
    before = flatten(variables["batch_stats"])
    measured = [path for path in before if path.rpartition("/")[0] in chosen]
    blank = unflatten({p: np.zeros_like(v) if p in measured else v for p, v in before.items()})

    @jax.jit
    def batch_statistics(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        normal = normalise(images, preprocessing.mean, preprocessing.std)
        _, updated = model.apply(variables, normal, norm=chosen, stop="pool")
        found = flatten(updated)
        return {path: found[path] / (1 - MOMENTUM) for path in measured}

    placed = place_replicated({"params": variables["params"], "batch_stats": blank}, mesh)
    count, merged = 0, None
    for images in _without_padding(batches):
        whole = len(images) % len(mesh.local_devices) == 0
        arrived = place_batch(images, mesh) if whole else place_replicated(images, mesh)
        found = jax.device_get(batch_statistics(placed, arrived))
        moments = {path: np.asarray(value, np.float64) for path, value in found.items()}
        merged = moments if merged is None else merge_moments(merged, count, moments, len(images))
        count += len(images)
    if merged is None:
        raise ValueError("there are no images to measure BatchNorm statistics on")
    new = {path: value.astype(before[path].dtype) for path, value in merged.items()}
    return unflatten({path: new.get(path, value) for path, value in before.items()})


def merge_moments(
    a: Mapping[str, Any], count_a: int, b: Mapping[str, Any], count_b: int
) -> dict[str, Any]:
    """Means and biased variances of two samples together.

    Args:
      a: ``{"<module>/mean": array, "<module>/var": array}`` of the first sample.
      count_a: its size.
      b: of the second, with the same paths.
      count_b: its size.

    References:
      Chan, Golub, LeVeque, as in ``recalibrate``.

    >>> one, two = {"bn/mean": 1.0, "bn/var": 0.0}, {"bn/mean": 3.0, "bn/var": 0.0}
    >>> merge_moments(one, 1, two, 1)
    {'bn/mean': 2.0, 'bn/var': 1.0}
    """
    share = count_b / (count_a + count_b)
    merged = {}
    for path in a:
        module, _, name = path.rpartition("/")
        merged[path] = a[path] + share * (b[path] - a[path])
        if name == "var":
            apart = b[f"{module}/mean"] - a[f"{module}/mean"]
            merged[path] = merged[path] + share * (1 - share) * apart**2
    return merged


def _without_padding(batches: Iterable[Batch]) -> Iterator[np.ndarray]:
    """The images; a short last batch joins the one before, whose statistics it would not reach."""
    held: np.ndarray | None = None
    for batch in batches:
        images = np.asarray(batch["image"])
        if "weight" in batch:
            images = images[np.asarray(batch["weight"]) > 0]
        if held is None:
            held = images
        elif len(images) < len(held):
            held = np.concatenate([held, images])
        else:
            yield held
            held = images
    if held is not None and len(held):
        yield held
