"""Rewrite a network without features that other frameworks lack; checks and metadata of exports."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.models.layers import standardize
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.task import Units
from flaxtransfer.weights.pretrained import Pretrained, fold_adapter

__all__ = [
    "OUTPUTS",
    "USUAL_EPSILON",
    "canonicalize",
    "check_file",
    "check_folder",
    "export_metadata",
    "in_units",
    "with_own_standardization",
    "without_stem_bias",
]


OUTPUTS = {
    "single_label": "logits [batch, classes]",
    "multi_label": "logits [batch, labels]; the sigmoid of each is its probability",
    "regression": "values [batch, targets] in the units of the targets",
}
"""What an exported network computes, by its task."""

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
        ValueError: an adapter with tone curves.
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
        return _with_larger_filters(checkpoint, epsilon)
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


def in_units(checkpoint: Pretrained) -> Pretrained:
    """Folds mean and scale of a regression's targets into the head, for other programs.

    The network then gives values in the units of the targets; others are returned unchanged.
    """
    units = checkpoint.task.units
    if units is None:
        return checkpoint
    flat = flatten(checkpoint.variables)
    kernel = np.asarray(flat["params/fc/kernel"], np.float64) * units.scale
    bias = np.asarray(flat["params/fc/bias"], np.float64) * units.scale + units.mean
    folded = {"params/fc/kernel": np.float32(kernel), "params/fc/bias": np.float32(bias)}
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **folded}),
        task=checkpoint.task.with_units(Units((0.0,) * len(units.mean), (1.0,) * len(units.mean))),
        sha256="",
        notes=(
            *checkpoint.notes,
            "mean and scale of the targets were folded into the head: outputs are in their units",
        ),
    )


def _with_larger_filters(checkpoint: Pretrained, epsilon: float) -> Pretrained:
    """Multiplies all filters, after which GroupNorms with another epsilon are the same function.

    Every convolution ends in a norm, alone or as a part of the residual stream, and a norm with
    epsilon of its input is one with factor^2 epsilon of factor times its input.
    """
    checkpoint = with_own_standardization(checkpoint, None)
    factor = (epsilon / checkpoint.config.epsilon) ** 0.5
    flat = flatten(checkpoint.variables)
    larger = {
        path: (np.asarray(leaf, np.float64) * factor).astype(np.float32)
        for path, leaf in flat.items()
        if _is_filter(path, leaf) or path == "params/conv1/bias"
    }
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **larger}),
        config=dataclasses.replace(checkpoint.config, epsilon=epsilon),
        sha256="",
        notes=(
            *checkpoint.notes,
            f"filters were multiplied by {factor:.4g} for GroupNorms with epsilon {epsilon}",
        ),
    )


def _is_filter(path: str, leaf: Any) -> bool:
    """Whether a leaf is the kernel of a convolution, not one of channel attention."""
    return path.endswith("/kernel") and np.ndim(leaf) == 4 and "/se/" not in path


def with_own_standardization(checkpoint: Pretrained, epsilon: float | None) -> Pretrained:
    """Standardizes the filters in advance, for a program with another epsilon: the same function.

    The variance of standardized filters is large compared with either epsilon. None is a program
    without weight standardization, which then does not standardize in training either.
    """
    own = checkpoint.config.standardized
    if own is None or own == epsilon:
        return checkpoint
    flat = flatten(checkpoint.variables)
    done = {
        path: np.asarray(standardize(leaf, own))
        for path, leaf in flat.items()
        if _is_filter(path, leaf)
    }
    lost = ", and are not in further training" if epsilon is None else ""
    return dataclasses.replace(
        checkpoint,
        variables=_nested({**flat, **done}),
        config=dataclasses.replace(checkpoint.config, standardized=epsilon),
        sha256="",
        notes=(
            *checkpoint.notes,
            f"filters were standardized in advance with epsilon {own}{lost}",
        ),
    )


def without_stem_bias(checkpoint: Pretrained) -> Pretrained:
    """Subtracts the stem's bias from the running means of the norms that see it.

    A pool that is padded with -inf passes the bias on, and so do blocks without a convolution in
    their shortcut. GroupNorms have no running means, zeros around a pool have no bias, and where no
    such convolution follows, the bias reaches the head: such networks are returned unchanged.
    """
    config = checkpoint.config
    if not config.stem_bias or config.norm == "group" or config.stem_pool != "max":
        return checkpoint
    blocks = [(s, b) for s, depth in enumerate(config.depths, 1) for b in range(depth)]
    if not any(config.has_shortcut(stage, block) for stage, block in blocks):
        return checkpoint
    flat = flatten(checkpoint.variables)
    bias = np.asarray(flat.pop("params/conv1/bias"), np.float64)
    for stage, block in blocks:
        mean = f"batch_stats/layer{stage}/{block}/bn1/mean"
        flat[mean] = (np.asarray(flat[mean], np.float64) - bias).astype(np.float32)
        if config.has_shortcut(stage, block):
            break
    return dataclasses.replace(
        checkpoint,
        variables=_nested(flat),
        config=dataclasses.replace(config, stem_bias=False),
        sha256="",
        notes=(*checkpoint.notes, "the stem's bias was folded into running means"),
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
        "output": OUTPUTS[checkpoint.task.name],
        "task": checkpoint.task.name,
        "preprocessing": json.dumps(checkpoint.preprocessing.to_json()),
        "class_names": json.dumps(checkpoint.class_names),
        "architecture": checkpoint.config.name,
        "config": json.dumps(checkpoint.config.to_json()),
        "weights_sha256": checkpoint.sha256,
        "source": checkpoint.source,
    }
