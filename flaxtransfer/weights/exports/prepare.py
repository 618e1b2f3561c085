"""Prepare a network for export: canonical form, metadata, output checks.

What other programs do not know, brought into a form that they do.

Where an export may go.

What travels with an exported network: what its input is and what its outputs mean.
"""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np

from flaxtransfer.models.layers import standardize
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.saving import fold_adapter

__all__ = [
    "USUAL_EPSILON",
    "canonicalize",
    "check_file",
    "check_folder",
    "export_metadata",
    "with_own_standardization",
]


USUAL_EPSILON = 1e-5
"""Of the norms of torch, timm and transformers."""


def canonicalize(checkpoint: Pretrained, *, exporting: str) -> Pretrained:
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


def with_own_standardization(checkpoint: Pretrained, epsilon: float) -> Pretrained:
    """The same function where standardization adds another epsilon to variances.

    Filters that are standardized already are large against either.
    """
    own = checkpoint.config.standardized
    if own is None or own == epsilon:
        return checkpoint
    flat = flatten(checkpoint.variables)
    done = {
        path: np.asarray(standardize(leaf, own))
        for path, leaf in flat.items()
        if path.endswith("kernel") and np.ndim(leaf) == 4
    }
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **done}),
        config=dataclasses.replace(checkpoint.config, standardized=epsilon),
        sha256="",
        notes=(*checkpoint.notes, f"filters were standardized with {own} for another epsilon"),
    )


def _nested(flat: dict) -> dict:
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}


def check_file(target: Path) -> None:
    """Raises unless a file may be written there, before any work is done.

    Raises:
        FileNotFoundError: there is no folder to write into.
        ValueError: there is a folder of that name.
    """
    _check_parent(target)
    if target.is_dir():
        raise ValueError(f"{target} is a folder, and a file is to be written")


def check_folder(target: Path, names: Collection[str]) -> None:
    """Raises unless a folder with files of these names may be written there.

    Raises:
        FileNotFoundError: there is no folder to write into.
        ValueError: a file, or a folder that holds other things.
    """
    _check_parent(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, and a folder is to be written")
    there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if foreign := sorted(there.difference(names)):
        raise ValueError(
            f"the folder {target} holds other files ({', '.join(foreign[:5])}); nothing was "
            "written: name a new folder, or an earlier export, which is replaced"
        )


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")


def export_metadata(checkpoint: Pretrained, layout: str) -> dict[str, str]:
    """Text by name.

    Args:
        checkpoint: that is exported.
        layout: of the axes of the input, "[batch, bands, height, width]".
    """
    return {
        "input": f"float32 {layout}, normalized as preprocessing says",
        "output": "logits [batch, classes]",
        "preprocessing": json.dumps(checkpoint.preprocessing.to_json()),
        "class_names": json.dumps(checkpoint.class_names),
        "architecture": checkpoint.config.name,
        "config": json.dumps(checkpoint.config.to_json()),
        "weights_sha256": checkpoint.sha256,
        "source": checkpoint.source,
    }
