"""Where a network can be cut so that nothing below the cut ever changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from flaxtransfer.batchnorm import Norm, modules
from flaxtransfer.paths import flatten, segment_of
from flaxtransfer.types import Params, Variables

__all__ = ["lowest_moving", "prefix_digest"]


def lowest_moving(
    segments: Sequence[str], params: Params, moving: Iterable[str], norm: Norm
) -> str | None:
    """The first segment whose output changes in the course of training.

    A segment changes if a leaf of it is trainable, or if one of its BatchNorms uses batch
    statistics: then what an image becomes depends on the images beside it.

    Args:
      segments: names, from the input to the output.
      params: nested dict of parameters or their shapes.
      moving: paths of the trainable leaves.
      norm: the BatchNorm policy.

    Returns:
      Its name, where a cut spares all work below; None if that is the very first segment, or if
      nothing moves at all.

    >>> params = {"conv1": {"kernel": 0}, "bn1": {"scale": 0}, "fc": {"bias": 0}}
    >>> lowest_moving(("stem", "head"), params, ["fc/bias"], "running")
    'head'
    >>> lowest_moving(("stem", "head"), params, ["fc/bias"], frozenset({"bn1"})) is None
    True
    """
    of_batch = modules(params) if norm == "batch" else () if norm == "running" else norm
    changing = {segment_of(path) for path in moving} | {segment_of(f"{m}/mean") for m in of_batch}
    first = next((name for name in segments if name in changing), None)
    return None if first == segments[0] else first


def prefix_digest(variables: Variables, segments: Iterable[str]) -> str:
    """SHA-256 over the parameters and statistics of these segments, names and shapes included."""
    chosen, total = set(segments), hashlib.sha256()
    for path, leaf in sorted(flatten(dict(variables)).items()):
        if segment_of(path.split("/", 1)[1]) in chosen:
            array = np.ascontiguousarray(leaf)
            total.update(repr((path, array.shape, array.dtype.str)).encode())
            total.update(array.tobytes())
    return total.hexdigest()
