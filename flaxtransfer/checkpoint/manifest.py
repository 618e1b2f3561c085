"""The manifest of a step: a pytree as named host arrays, with a checksum for each."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.types import PyTree

# Per leaf, JSON-able: {"shape": [...], "dtype": "...", "crc32": n}, with "key": the generator's
# name for typed keys; or {"python": "int" | "float" | "bool", "value": v} for Python numbers.
Manifest = dict[str, dict[str, Any]]

_PYTHON = (bool, int, float)
# Types of numbers that the array files underneath cannot hold.
_NOT_IN_ZARR = ("uint2", "uint4")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of any pytree by path: keys, field names and indices joined by ``/``.

    Raises:
      ValueError: two leaves have one path (a key that holds a ``/`` can do that).

    >>> named_leaves({"params": {"fc": {"bias": 1}}, "moments": [2, 3]})
    {'moments/0': 2, 'moments/1': 3, 'params/fc/bias': 1}
    """
    flat: dict[str, Any] = {}
    doubled: list[str] = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        doubled += [path] if path in flat else []
        flat[path] = leaf
    if doubled:
        raise ValueError(f"two leaves have the same path, rename one of them: {sorted(doubled)}")
    return flat


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's dtype, shape and bytes (in row-major order).

    It finds every flipped bit and every burst of up to 32 bits. It is no protection against
    somebody who changes an array on purpose.

    >>> checksum(np.zeros(3, np.float32)) == checksum(np.zeros(3, np.int32))
    False
    """
    header = zlib.crc32(f"{array.dtype.name}{array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), header)


def build_manifest(tree: PyTree) -> tuple[dict[str, np.ndarray], Manifest]:
    """Copies a pytree to the host and takes its inventory.

    The whole tree passes through the memory of this machine, also where its arrays are cut over
    many devices or processes (then every process must call, and every process gets all of it).

    Args:
      tree: any pytree whose leaves are arrays of jax or numpy (typed keys included), numpy
        scalars, or Python ints, floats and bools.

    Returns:
      The arrays by path (without those of zero size and without Python numbers, which the
      inventory holds), and the inventory.

    Raises:
      TypeError: leaves that are no numbers, all listed.
      ValueError: leaves whose memory was given away (donated), or that share a path.

    >>> arrays, inventory = take({"w": np.ones(2, np.float32), "epoch": 3})
    >>> inventory["epoch"], inventory["w"]["shape"]
    ({'python': 'int', 'value': 3}, [2])
    """
    leaves = named_leaves(tree)
    _refuse_unstorable(leaves)
    numbers = {path: leaf for path, leaf in leaves.items() if type(leaf) in _PYTHON}
    others = {path: leaf for path, leaf in leaves.items() if path not in numbers}
    data = {p: jax.random.key_data(x) if _is_key(x) else x for p, x in others.items()}
    # One call for all of them, so that the copies from the device overlap.
    host = jax.device_get({path: _addressable(leaf) for path, leaf in data.items()})
    inventory: Manifest = {
        path: {"python": type(leaf).__name__, "value": leaf} for path, leaf in numbers.items()
    }
    for path, leaf in others.items():
        array = host[path] = np.asarray(host[path])
        inventory[path] = {
            "shape": list(np.shape(leaf)),
            "dtype": str(leaf.dtype),
            "crc32": checksum(array),
        }
        if _is_key(leaf):
            inventory[path]["key"] = str(jax.random.key_impl(leaf))
    return {path: array for path, array in host.items() if array.size}, inventory


def differences(inventory: Mapping[str, Any], like: PyTree) -> list[str]:
    """What keeps the leaves of an inventory from filling ``like``: a line for each.

    Args:
      inventory: what was saved.
      like: a pytree of arrays or ``jax.ShapeDtypeStruct``; only paths, shapes and dtypes count.

    Returns:
      The differences in the order of the paths; empty when every leaf has its place.

    >>> differences(take({"w": np.ones(2)})[1], {"w": np.ones(3), "b": 0})
    ['asked for, not saved: b (Python int)', 'w: saved as float64[2], asked for as float64[3]']
    """
    asked = {path: _describe(leaf) for path, leaf in named_leaves(like).items()}
    saved = {path: _describe_entry(entry) for path, entry in inventory.items()}
    missing = [path for path in asked if path not in saved]
    unexpected = [path for path in saved if path not in asked]
    lines = []
    for path in sorted(missing):
        near = difflib.get_close_matches(path, unexpected, n=1, cutoff=0.7)
        hint = f"; saved there is {near[0]}" if near else ""
        lines.append(f"asked for, not saved: {path or '(root)'} ({asked[path]}){hint}")
    lines += [f"saved, not asked for: {p or '(root)'} ({saved[p]})" for p in sorted(unexpected)]
    lines += [
        f"{path or '(root)'}: saved as {saved[path]}, asked for as {asked[path]}"
        for path in sorted(asked)
        if path in saved and saved[path] != asked[path]
    ]
    return lines


def corrupted(inventory: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The paths of the arrays that are not what the inventory says, sorted.

    >>> arrays, inventory = take({"w": np.zeros(2), "b": np.zeros(1)})
    >>> corrupted(inventory, arrays | {"w": np.array([0.0, 1e-9])})
    ['w']
    """
    return sorted(
        path
        for path in stored(inventory)
        if path not in arrays or checksum(arrays[path]) != inventory[path]["crc32"]
    )


def stored(inventory: Mapping[str, Any]) -> list[str]:
    """The paths whose content is in the arrays and not in the inventory itself.

    >>> stored(take({"w": np.ones(2), "none": np.ones((0, 3)), "epoch": 3})[1])
    ['w']
    """
    return [p for p, e in inventory.items() if "shape" in e and 0 not in e["shape"]]


def rebuild(inventory: Mapping[str, Any], arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    """Puts saved leaves into the structure, types and shardings of ``like``.

    A leaf of ``like`` that names a sharding (a committed ``jax.Array``, or a ``ShapeDtypeStruct``
    with one) is placed there, whatever the sharding it was saved from; any other jax leaf is
    uncommitted, as a fresh array is. numpy stays numpy and Python numbers stay Python numbers.
    The result can share memory with ``arrays``. Requires that ``differences(inventory, like)`` is
    empty.

    >>> arrays, inventory = take({"w": np.ones(2), "epoch": 3})
    >>> rebuild(inventory, arrays, {"w": np.zeros(2), "epoch": 0})
    {'epoch': 3, 'w': array([1., 1.])}
    """
    filled = [
        _fill(inventory[path], arrays.get(path), leaf) for path, leaf in named_leaves(like).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), filled)


def _fill(entry: Mapping[str, Any], array: np.ndarray | None, like: Any) -> Any:
    if type(like) in _PYTHON:
        return type(like)(entry["value"])
    if array is None:
        shape = jax.eval_shape(jax.random.key_data, like).shape if _is_key(like) else like.shape
        array = np.zeros(shape, np.uint32 if _is_key(like) else like.dtype)
    if isinstance(like, np.generic):
        return array[()]
    if isinstance(like, np.ndarray):
        return array
    sharding = like.sharding if getattr(like, "committed", True) else None
    if _is_key(like):
        return _place_key(array, entry["key"], sharding)
    if getattr(like, "weak_type", False) and array.ndim == 0:
        # Weakly typed scalars promote differently: a resumed step must see the same type.
        weak = jnp.asarray(array.item())
        if weak.dtype == like.dtype:
            return weak if sharding is None else jax.device_put(weak, sharding)
    if sharding is None:
        return jnp.array(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _place_key(data: np.ndarray, impl: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.random.wrap_key_data(jnp.array(data), impl=impl)
    # Through jit, because device_put refuses typed keys on devices of other processes.
    wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=impl), out_shardings=sharding)
    return wrap(data)


def _addressable(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(leaf, tiled=True)


def _refuse_unstorable(leaves: Mapping[str, Any]) -> None:
    wrong = [f"{p or '(root)'}: {why}" for p, leaf in leaves.items() if (why := _refusal(leaf))]
    if wrong:
        raise TypeError(
            "only arrays and numbers can be saved in a tree (text and the like belong in meta):\n  "
            + "\n  ".join(wrong)
        )
    deleted = [p for p, x in leaves.items() if isinstance(x, jax.Array) and x.is_deleted()]
    if deleted:
        raise ValueError(
            "the memory of these leaves was given away (donated) to a compiled function; save the "
            f"tree that it returned instead: {deleted}"
        )


def _refusal(leaf: Any) -> str:
    if type(leaf) in _PYTHON or _is_key(leaf):
        return ""
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return f"is a {type(leaf).__name__}"
    number = jnp.issubdtype(leaf.dtype, np.number) or leaf.dtype == np.bool_
    return "" if number and leaf.dtype.name not in _NOT_IN_ZARR else f"is of type {leaf.dtype}"


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> str:
    if type(leaf) in _PYTHON:
        return f"Python {type(leaf).__name__}"
    if not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return _shape_text(str(leaf.dtype), np.shape(leaf))


def _describe_entry(entry: Mapping[str, Any]) -> str:
    if "python" in entry:
        return f"Python {entry['python']}"
    return _shape_text(entry["dtype"], entry["shape"])


def _shape_text(dtype: str, shape: Any) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"
