"""Rewrite a network without features that other frameworks lack; checks and metadata of exports."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.models.layers import standardize
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights.pretrained import Pretrained, fold_adapter

__all__ = [
    "USUAL_EPSILON",
    "canonicalize",
    "check_file",
    "check_folder",
    "export_metadata",
    "with_own_standardization",
]


USUAL_EPSILON = 1e-5
"""Epsilon of the norms in torch, timm and transformers."""


def canonicalize(
    checkpoint: Pretrained, *, exporting: str, epsilon: float = USUAL_EPSILON
) -> Pretrained:
    """Rewrites a network in the usual form: the same function.

    It then has no input adapter, the usual epsilon, and a stem pool that is padded with -inf where
    an activation precedes the pool.

    Args:
        checkpoint: the network.
        exporting: name of the layout, for the error text.
        epsilon: of its norms.

    Raises:
        ValueError: an adapter with tone curves, or GroupNorms with another epsilon.
    """
    try:
        checkpoint = fold_adapter(checkpoint)
    except ValueError as error:
        raise ValueError(f"{exporting}: {error}; ONNX and StableHLO support curves") from error
    config = checkpoint.config
    if config.stem_pool == "zero-padded" and not config.preactivation:
        note = "the stem's pool is padded with -inf, which after a ReLU is the same as with 0"
        checkpoint = dataclasses.replace(
            checkpoint,
            config=dataclasses.replace(config, stem_pool="max"),
            notes=(*checkpoint.notes, note),
        )
    more = checkpoint.config.epsilon - epsilon
    if more == 0:
        return checkpoint
    flat = flatten(checkpoint.variables)
    if checkpoint.config.norm == "group":
        raise ValueError(
            f"epsilon must be {epsilon} for {exporting} in a GroupNorm, which has no running "
            f"variances to absorb it, got {checkpoint.config.epsilon}; use --to onnx or stablehlo"
        )
    shifted = {}
    for path in [path for path in flat if path.endswith("/var")]:
        variance = np.asarray(flat[path], np.float64)
        # A norm only depends on var + epsilon, and on the scale where that would be negative.
        low = variance + more < 0
        shifted[path] = np.where(low, variance, variance + more).astype(np.float32)
        if low.any():
            scale = path.replace("batch_stats/", "params/").removesuffix("var") + "scale"
            factor = np.sqrt((variance + epsilon) / (variance + checkpoint.config.epsilon))
            shifted[scale] = np.where(low, flat[scale] * factor, flat[scale]).astype(np.float32)
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **shifted}),
        config=dataclasses.replace(checkpoint.config, epsilon=epsilon),
        sha256="",
        notes=(
            *checkpoint.notes,
            f"running variances were changed by {more:+.3g} to absorb the epsilon",
        ),
    )


def with_own_standardization(checkpoint: Pretrained, epsilon: float) -> Pretrained:
    """Standardizes the filters in advance, for a program with another epsilon: the same function.

    The variance of standardized filters is large compared with either epsilon.
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
        notes=(*checkpoint.notes, f"filters were standardized in advance with epsilon {own}"),
    )


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    return {"params": {}, "batch_stats": {}, **unflatten(flat)}


def check_file(target: Path) -> None:
    """Checks that a file can be written at ``target``.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: there is a folder with this name.
    """
    _check_parent(target)
    if target.is_dir():
        raise ValueError(f"target must be a file, got the folder {target}")


def check_folder(target: Path, names: Collection[str]) -> None:
    """Checks that a folder with files of these names can be written at ``target``.

    Raises:
        FileNotFoundError: the parent folder does not exist.
        ValueError: ``target`` is a file, or a folder with other files.
    """
    _check_parent(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"target must be a folder, got the file {target}")
    there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if foreign := sorted(there.difference(names)):
        raise ValueError(
            f"the folder {target} holds other files ({', '.join(foreign[:5])}); nothing was "
            "written: name a new folder, or an earlier export, which is replaced"
        )


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} for {target.name} does not exist")


def export_metadata(checkpoint: Pretrained, layout: str) -> dict[str, str]:
    """Metadata of an export: text by name.

    Args:
        checkpoint: the exported network.
        layout: axes of the input, such as "[batch, bands, height, width]".
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
