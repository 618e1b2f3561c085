"""Save weights for this package, torchvision and timm.

A network without its linear input adapter: the same function, in one convolution less.

Checkpoints into files that this package, torchvision and timm load strictly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.files import atomic_write, write_file
from flaxtransfer.models.adapters import fold
from flaxtransfer.paths import flatten, unflatten
from flaxtransfer.weights import pretrained
from flaxtransfer.weights.infer import differences, leaf_shapes
from flaxtransfer.weights.naming import key_map
from flaxtransfer.weights.naming.formats import table_for
from flaxtransfer.weights.pretrained import Pretrained
from flaxtransfer.weights.readers import safetensors_file

__all__ = ["fold_adapter", "save"]


def fold_adapter(checkpoint: Pretrained) -> Pretrained:
    """The checkpoint with its linear adapter multiplied into the stem's kernel.

    Use it before weights leave for a program that knows no adapters, such as torchvision, whose
    ``conv1`` then takes the n bands themselves. The images are normalized before the adapter, and
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


DTYPES = ("float32", "float16")


def save(path: str | os.PathLike[str], checkpoint: Pretrained, dtype: Any = np.float32) -> str:
    """Writes weights, config, preprocessing and class names into one `.safetensors` file.

    The names and axes are torchvision's, whatever the file they were read from, so that
    `torchvision.models.resnet50().load_state_dict(..., strict=True)` takes them; timm's for the
    networks that only timm has. Only an input adapter has no name there: `fold_adapter` makes a
    linear one a part of the stem before. The file appears whole or not at all, and the same
    checkpoint gives the same bytes.

    Args:
        path: where to; its folder has to exist. A file there is replaced.
        checkpoint: what to write; its arrays may be of numpy or jax.
        dtype: float32, or float16 for half the size.

    Returns:
        The sha256 of the file in hexadecimal.

    Raises:
        ValueError: another suffix or dtype, leaves that do not form the checkpoint's network, or
            numbers that are not finite in the dtype.
        FileNotFoundError: no such folder.

    >>> import tempfile
    >>> from flaxtransfer.models.config import ResNetConfig
    >>> from flaxtransfer.paths import unflatten
    >>> from flaxtransfer.weights.preprocessing import IMAGENET
    >>> tiny = ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2)
    >>> ones = unflatten({path: np.ones(s, np.float32) for path, s in leaf_shapes(tiny).items()})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     digest = save(f"{folder}/tiny.safetensors", Checkpoint(ones, tiny, IMAGENET))
    >>> len(digest)
    64
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are written as .safetensors, not as {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    try:
        kind = np.dtype(dtype).name
    except TypeError:
        kind = str(dtype)
    if kind not in DTYPES:
        raise ValueError(f"weights are written as {' or '.join(DTYPES)}, not as {kind}")

    leaves = {name: np.asarray(leaf) for name, leaf in flatten(checkpoint.variables).items()}
    problems = differences(leaves, leaf_shapes(checkpoint.config))
    if problems:
        raise ValueError(
            f"the leaves do not form {checkpoint.config.name}:\n  " + "\n  ".join(problems)
        )
    with np.errstate(over="ignore"):
        leaves = {name: leaf.astype(kind) for name, leaf in leaves.items()}
    broken = [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]
    if broken:
        raise ValueError(f"these leaves hold NaN or infinite numbers as {kind}: {broken}")
    data = safetensors_file.write_safetensors(
        key_map.to_keys(table_for(checkpoint.config), leaves), pretrained.write_header(checkpoint)
    )
    with atomic_write(path) as made:
        write_file(made, data)
    return hashlib.sha256(data).hexdigest()
