"""What goes into each BatchNorm: weighted moments, measured while the network runs.

A BatchNorm of flax gives its running average after an update, over examples that all count the
same. Here each one tells the moments themselves, of examples that count as much as they are given,
and may normalise by them mixed with the statistics it has.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxtransfer.models.model import Model
from flaxtransfer.shift.batch_statistics import Mixture, Moments, mix, moments
from flaxtransfer.types import Variables

__all__ = ["apply_measuring", "positions"]


def apply_measuring(
    model: Model,
    variables: Variables,
    images: jax.Array,
    weights: jax.Array | None,
    chosen: frozenset[str],
    *,
    by_batch: bool = True,
    share: float | jax.Array | None = None,
    kind: Mixture = "moments",
    stop: str | None = None,
) -> tuple[jax.Array, dict[str, Moments]]:
    """Runs the network and measures what goes into some of its BatchNorms.

    Args:
      model: the network.
      variables: its parameters and statistics.
      images: ``[batch, height, width, bands]``, floating and normalised.
      weights: ``[batch]``, how much each image counts; None is 1.
      chosen: paths of the BatchNorms.
      by_batch: whether the chosen ones normalise by what they measure, which is what a deeper one
        then sees; otherwise all normalise by the statistics that they have.
      share: of the statistics that a BatchNorm has, where it normalises by a mixture of them with
        what it measures; None is what it measures alone.
      kind: of that mixture.
      stop: segment before which to stop.

    Returns:
      The output, and for each chosen path the moments of the batch, float32 at least; ``count`` is
      the sum of the weights.

    >>> from flaxtransfer.architectures import ResNetConfig
    >>> model = Model(ResNetConfig(depths=(1, 1, 1, 1), width=8))
    >>> def mean_of_stem(variables, images):
    ...     _, found = apply_measuring(model, variables, images, None, frozenset({"bn1"}))
    ...     return found["bn1"].mean
    >>> images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    >>> jax.eval_shape(mean_of_stem, model.abstract(), images).shape
    (8,)
    """
    found: dict[str, Moments] = {}

    def measure(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        path = "/".join(module.path)
        if not isinstance(module, nn.BatchNorm) or path not in chosen:
            return next_fun(*args, **kwargs)
        x = args[0]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        found[path] = moments(wide, weights)
        if not by_batch:
            return next_fun(*args, **kwargs)
        held: Any = module.variables
        own = Moments(held["batch_stats"]["mean"], held["batch_stats"]["var"], 0)
        # Without a share, statistics of a source that are not finite must not spoil the mixture.
        used = found[path] if share is None else mix(own, found[path], share, kind)
        scale = jax.lax.rsqrt(used.var + module.epsilon) * held["params"]["scale"]
        y = (wide - used.mean) * scale + held["params"]["bias"]
        return y.astype(x.dtype)

    norm: Any = chosen if by_batch else "running"
    with nn.intercept_methods(measure):
        output, _ = model.apply(variables, images, norm=norm, stop=stop)
    return output, found


def positions(model: Model, image_shape: Sequence[int]) -> dict[str, int]:
    """Values that one image gives each channel of each BatchNorm, in the order of their running.

    Args:
      model: the network.
      image_shape: ``(height, width, bands)``.

    >>> from flaxtransfer.architectures import ResNetConfig
    >>> model = Model(ResNetConfig(depths=(1, 1, 1, 1), width=8))
    >>> list(positions(model, (32, 32, 3)).items())[:2]
    [('bn1', 256), ('layer1/0/bn1', 64)]
    """
    found: dict[str, int] = {}

    def look(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            maps = args[0].shape
            found["/".join(context.module.path)] = maps[1] * maps[2]
        return next_fun(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(look):
        jax.eval_shape(lambda v, x: model.apply(v, x, stop="pool")[0], model.abstract(), image)
    return found
