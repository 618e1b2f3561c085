"""What other programs do not know, brought into a form that they do."""

import dataclasses

import numpy as np

from flaxtransfer.folding import fold_adapter
from flaxtransfer.models.layers import standardise
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import Checkpoint

__all__ = ["USUAL_EPSILON", "plainly", "with_own_standardisation"]

USUAL_EPSILON = 1e-5
"""Of the norms of torch, timm and transformers."""


def plainly(checkpoint: Checkpoint, *, exporting: str) -> Checkpoint:
    """The same function without an input adapter, and with the usual epsilon in its norms.

    Args:
        checkpoint: any.
        exporting: the layout, for the error text.

    Raises:
        ValueError: an adapter with tone curves, or an epsilon that no variance can make up for.
    """
    try:
        checkpoint = fold_adapter(checkpoint)
    except ValueError as error:
        raise ValueError(f"{exporting}: {error}; ONNX and StableHLO hold curves too") from error
    more = checkpoint.config.epsilon - USUAL_EPSILON
    if more == 0:
        return checkpoint
    flat = flatten(checkpoint.variables)
    variances = {path: leaf for path, leaf in flat.items() if path.endswith("/var")}
    if checkpoint.config.norm == "group" or any(
        (leaf + more < 0).any() for leaf in variances.values()
    ):
        raise ValueError(
            f"{exporting} has norms with an epsilon of {USUAL_EPSILON}, and the network's is "
            f"{checkpoint.config.epsilon}, which no running variance can make up for; ONNX and "
            "StableHLO hold it as it is"
        )
    # var + epsilon is all that a norm sees of either.
    shifted = {
        path: (np.asarray(leaf, np.float64) + more).astype(np.float32)
        for path, leaf in variances.items()
    }
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **shifted}),
        config=dataclasses.replace(checkpoint.config, epsilon=USUAL_EPSILON),
        sha256="",
        notes=(*checkpoint.notes, f"running variances were raised by {more:.3g} for an epsilon"),
    )


def with_own_standardisation(checkpoint: Checkpoint, epsilon: float) -> Checkpoint:
    """The same function where standardisation adds another epsilon to variances.

    Filters that are standardised already are large against either.
    """
    own = checkpoint.config.standardised
    if own is None or own == epsilon:
        return checkpoint
    flat = flatten(checkpoint.variables)
    done = {
        path: np.asarray(standardise(leaf, own))
        for path, leaf in flat.items()
        if path.endswith("kernel") and np.ndim(leaf) == 4
    }
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **done}),
        config=dataclasses.replace(checkpoint.config, standardised=epsilon),
        sha256="",
        notes=(*checkpoint.notes, f"filters were standardised with {own} for another epsilon"),
    )


def _nested(flat: dict) -> dict:
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}
