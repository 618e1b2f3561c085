"""Read files of ``flax.serialization`` (msgpack) and folders of orbax.

Both hold trees of arrays. The folder can come from any program, or be a step of one of our runs.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from flaxtransfer.files import read_json
from flaxtransfer.weights.readers import archives

__all__ = ["MODEL", "read_flax", "read_orbax"]


_ARRAY, _SCALAR = 1, 3
"""The msgpack extension types of arrays and of numpy's scalars in flax: shape, dtype, bytes."""

_DTYPES = (
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)


def read_flax(
    data: bytes | memoryview,
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of a flax file: arrays by path ("params/fc/bias"), no metadata, no notes.

    Numbers and text, such as the step of a train state, are passed over.

    Raises:
        ValueError: an incomplete or damaged file, or one that holds other things.

    >>> packed = msgpack.packb([[2], "float32", bytes(8)])
    >>> read_flax(msgpack.packb({"params": {"bias": msgpack.ExtType(1, packed)}}))[0]
    {'params/bias': array([0., 0.], dtype=float32)}
    """
    try:
        content = msgpack.unpackb(data, ext_hook=_array, raw=False)
    except Exception as error:
        # The exception of msgpack for a damaged file depends on the damaged byte.
        raise ValueError(f"incomplete or damaged msgpack file: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"it must hold arrays by name, got a {type(content).__name__}")
    arrays: dict[str, np.ndarray] = {}
    _collect(content, "", arrays)
    return arrays, {}, []


def _collect(part: Mapping[Any, Any], path: str, arrays: dict[str, np.ndarray]) -> None:
    for name, value in part.items():
        below = f"{path}{name}"
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"its keys must be names without '/', got {name!r}")
        if isinstance(value, Mapping):
            _collect(value, f"{below}/", arrays)
        elif isinstance(value, np.ndarray):
            arrays[below] = value
        elif value is not None and not isinstance(value, bool | int | float | str):
            raise ValueError(f"{below} must be an array, got a {type(value).__name__}")


def _array(kind: int, data: bytes) -> np.ndarray:
    if kind not in (_ARRAY, _SCALAR):
        raise ValueError(
            f"msgpack extensions must have type {_ARRAY} (arrays) or {_SCALAR} (scalars), "
            f"got {kind}"
        )
    packed = msgpack.unpackb(data, raw=False)
    if not isinstance(packed, list) or len(packed) != 3:
        raise ValueError("an array must consist of shape, dtype and bytes")
    shape, name, content = packed
    if name not in _DTYPES or not isinstance(content, bytes):
        raise ValueError(f"the dtype of an array must be numeric, got {name!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of an array must be integers >= 0, got {shape!r}")
    dtype = np.dtype(jnp.bfloat16 if name == "bfloat16" else name)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"the bytes of an array must fit {name}{shape}, got {len(content):,}")
    return np.frombuffer(content, dtype).reshape(shape)


_COLLECTIONS = ("params", "batch_stats")
"""Trees of one network that a program may have saved as items of their own."""

MODEL = "model of the run"
"""Key of the metadata with the network that a run trains, as JSON."""


def read_orbax(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]] | None:
    """Reads a folder of orbax: arrays, metadata and notes; None for other folders.

    Raises:
        ValueError: a folder that is damaged, holds links or several trees, or whose arrays would
            unpack to far more than it holds.
    """
    # Importing orbax takes a second, and files do not need it.
    if not any(path.is_file() for path in folder.glob("_METADATA")) and not any(
        path.is_file() for depth in ("*", "[0-9]*/*") for path in folder.glob(f"{depth}/_METADATA")
    ):
        return None
    from flaxtransfer.checkpoint.step_files import read_any_arrays

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    most = archives.most(size) // 4
    apart = [name for name in _COLLECTIONS if (folder / name / "_METADATA").is_file()]
    if apart == list(_COLLECTIONS):
        arrays = {
            f"{name}/{path}": array
            for name in apart
            for path, array in read_any_arrays(folder / name, most=most).by_path.items()
        }
        checked, others = False, sorted(each.parent.name for each in folder.glob("*/_METADATA"))
        left = [name for name in others if name not in apart]
    else:
        found = read_any_arrays(folder, most=most)
        arrays, checked, left = found.by_path, found.checked, []
    notes = ["a folder of orbax"]
    if not checked:
        notes = ["a folder of orbax without checksums: damage to numbers cannot be detected"]
    notes += [f"left out: {', '.join(left)}"] if left else []
    return arrays, _of_run(folder), notes


def _of_run(folder: Path) -> dict[str, str]:
    """The metadata of the run, if the folder is one of its steps."""
    path = folder.absolute().parent.parent / "config.json"
    if folder.absolute().parent.name != "checkpoints" or not path.is_file():
        return {}
    try:
        model = read_json(path)["model"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {MODEL: json.dumps(model)}
