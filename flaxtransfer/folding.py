"""A network without its linear input adapter: the same function, in one convolution less."""

from __future__ import annotations

import dataclasses

import numpy as np

from flaxtransfer.models.adapters import fold
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import Checkpoint

__all__ = ["fold_adapter"]


def fold_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its linear adapter multiplied into the stem's kernel.

    Use it before weights leave for a program that knows no adapters, such as torchvision, whose
    ``conv1`` then takes the n bands themselves. The images are normalised before the adapter, and
    the adapter has no bias, so that the folded network is the same function up to rounding,
    borders included.

    Args:
      checkpoint: with or without an adapter; without one it is returned as it is.

    Returns:
      A checkpoint of the same network, whose stem takes the bands.

    Raises:
      ValueError: an adapter with tone curves, which is not linear.

    >>> from flaxtransfer.weights import load
    >>> plain = load("builtin")
    >>> fold_adapter(plain) is plain
    True
    """
    adapter = checkpoint.config.adapter
    if adapter is None:
        return checkpoint
    params = dict(checkpoint.variables["params"])
    own = params.pop("adapter")
    flat, first = flatten(params), checkpoint.config.first_kernel
    params = unflatten({**flat, first: np.asarray(fold(own, flat[first]))})
    return dataclasses.replace(
        checkpoint,
        variables={**checkpoint.variables, "params": params},
        config=dataclasses.replace(checkpoint.config, in_channels=adapter.bands, adapter=None),
        sha256="",
        notes=(*checkpoint.notes, f"a linear adapter of {adapter.bands} bands was folded in"),
    )
