"""Files of flax.serialization and folders of orbax.

Files of `flax.serialization`: msgpack of nested dictionaries of arrays.

Folders that orbax wrote: a tree of arrays by path, of anybody's program or of a run of ours.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from flaxtransfer.weights.readers import archives

__all__ = ["MODEL", "read_flax", "read_orbax"]


_ARRAY = 1
"""The kind of extension under which flax packs an array: its shape, dtype and bytes."""

_DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool")


def read_flax(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Arrays by their path ("params/classifier/1/bias"), no metadata and no notes.

    Raises:
        ValueError: bytes that are no complete file, or hold other things than arrays.

    >>> packed = msgpack.packb([[2], "float32", bytes(8)])
    >>> read(msgpack.packb({"params": {"bias": msgpack.ExtType(1, packed)}}))[0]
    {'params/bias': array([0., 0.], dtype=float32)}
    """
    try:
        content = msgpack.unpackb(data, ext_hook=_array, raw=False)
    except Exception as error:
        # What msgpack raises for a damaged file depends on the byte that is wrong.
        raise ValueError(f"no complete msgpack of arrays: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__} and no arrays by name")
    arrays: dict[str, np.ndarray] = {}
    _collect(content, "", arrays)
    return arrays, {}, []


def _collect(part: Mapping[Any, Any], path: str, arrays: dict[str, np.ndarray]) -> None:
    for name, value in part.items():
        below = f"{path}{name}"
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"it has the key {name!r} where names are expected")
        if isinstance(value, Mapping):
            _collect(value, f"{below}/", arrays)
        elif isinstance(value, np.ndarray):
            arrays[below] = value
        else:
            raise ValueError(f"{below} holds a {type(value).__name__}, and weights are arrays")


def _array(kind: int, data: bytes) -> np.ndarray:
    if kind != _ARRAY:
        raise ValueError(f"it holds an extension of kind {kind}, and arrays are of kind {_ARRAY}")
    packed = msgpack.unpackb(data, raw=False)
    if not isinstance(packed, list) or len(packed) != 3:
        raise ValueError("it holds an array that is not shape, dtype and bytes")
    shape, name, content = packed
    if name not in _DTYPES or not isinstance(content, bytes):
        raise ValueError(f"it holds an array of {name!r}, and weights are numbers")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"it holds an array of shape {shape!r}")
    dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"an array of {name}{shape} has {len(content):,} bytes")
    return np.frombuffer(content, dtype).reshape(shape)


MODEL = "model of the run"
"""Metadata under which a step of a run says what network it trains, as JSON."""


def read_orbax(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]] | None:
    """Arrays, metadata and notes of a folder; None for one that orbax did not write.

    Raises:
        ValueError: a folder that is damaged, holds links or several trees, or whose arrays would
            unfold to far more than it holds.
    """
    # Orbax takes a second to be imported, and whoever loads a file has no use for it.
    if not any(path.is_file() for path in folder.glob("_METADATA")) and not any(
        path.is_file() for depth in ("*", "[0-9]*/*") for path in folder.glob(f"{depth}/_METADATA")
    ):
        return None
    from flaxtransfer.checkpoint.step_files import read_any_arrays

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found = read_any_arrays(folder, most=archives.most(size) // 4)
    notes = ["a folder of orbax"]
    if not found.checked:
        notes = ["a folder of orbax, which keeps no checksums: damage to numbers would not show"]
    return found.by_path, _of_run(folder), notes


def _of_run(folder: Path) -> dict[str, str]:
    """What the run says of itself, where the folder is a step of one."""
    path = folder.absolute().parent.parent / "config.json"
    if folder.absolute().parent.name != "checkpoints" or not path.is_file():
        return {}
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {MODEL: json.dumps(model)}
