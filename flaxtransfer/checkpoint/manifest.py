"""The manifest of a step: named host arrays with checksums, and what damage means.

A pytree as named host arrays, with shape, dtype and checksum of each: built when a step is saved,
compared with the template when it is restored. A damaged step is skipped for an older one. A step
that cannot be read at the moment (permissions, memory, open files) is still good, and using an
older one instead would silently lose work.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.paths import PyTree

# Errors of the machine, not of the files.
_MACHINE_ERRORS = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class DamagedCheckpointError(ValueError):
    """All requested checkpoints are damaged; the text lists each with its reason."""


class Damage(Exception):
    """One step is damaged; the text is the reason."""


@contextmanager
def classify_errors(
    folder: Path,
    leaves: Sequence[str],
    *,
    subject: str,
    place: Path,
) -> Iterator[None]:
    """Converts any error in a ``with`` block to damage of the files or an error of the machine.

    Args:
        folder: the folder that is read; files are named relative to it.
        leaves: unreadable leaves, filled in while the block runs.
        subject: what is read, for the error of the machine.
        place: path in the error of the machine.

    Raises:
        Damage: the files are damaged.
        OSError: the machine failed.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        number = error_number(error)
        if number in _MACHINE_ERRORS:
            reason = os.strerror(number).lower()
            raise OSError(number, f"{subject} cannot be read now ({reason})", str(place)) from error
        raise Damage(_damage_text(error, leaves, folder)) from error


def error_number(error: BaseException | None) -> int | None:
    """The errno of an error or of its cause; None without one.

    >>> error_number(ValueError("Error opening file [os_error_code='24']"))
    24
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return int(code.group(1))
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException, length: int = 200) -> str:
    """The first line of an error text, shortened to a length.

    >>> first_line(ValueError("no such file: there, and nowhere else"), 15)
    'no such file...'
    """
    text = (str(error).strip().splitlines() or [""])[0]
    return text if len(text) <= length else text[: length - 3] + "..."


def _damage_text(error: Exception, leaves: Sequence[str], folder: Path) -> str:
    """One line that names the unreadable leaves, and the file if the error names one."""
    named = re.findall(re.escape(str(folder)) + r"""/([^\s"'\\]+)""", str(error))
    files = [name for name in (name.rstrip(":,.") for name in named) if (folder / name).is_file()]
    where = f" (in {files[-1]})" if files else ""
    if leaves:
        return f"these leaves cannot be read{where}: {', '.join(sorted(leaves))}"
    return f"its arrays cannot be read{where}: {type(error).__name__}: {first_line(error)}"


Manifest = dict[str, dict[str, Any]]
"""Per leaf, JSON-able: {"shape": [...], "dtype": "...", "crc32": n}, with "key", the name of the
generator, for typed keys; or {"python": "int" | "float" | "bool", "value": v}."""

_PYTHON = (bool, int, float)
# Dtypes that zarr files cannot hold.
_NOT_IN_ZARR = ("uint2", "uint4")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Flattens any pytree by path: keys, field names and indices joined by ``/``.

    Raises:
        ValueError: two leaves have the same path (possible with a ``/`` in a key).

    >>> named_leaves({"params": {"decoder": {"bias": 1}}, "moments": [2, 3]})
    {'moments/0': 2, 'moments/1': 3, 'params/decoder/bias': 1}
    """
    flat: dict[str, Any] = {}
    doubled: list[str] = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        doubled += [path] if path in flat else []
        flat[path] = leaf
    if doubled:
        raise ValueError(f"paths of leaves must differ, two have the same path: {sorted(doubled)}")
    return flat


def checksum(array: np.ndarray) -> int:
    """The CRC-32 of an array's dtype, shape and bytes (in row-major order).

    It detects every flipped bit and every burst of up to 32 bits. It does not protect against
    deliberate changes.

    >>> checksum(np.zeros(3, np.float32)) == checksum(np.zeros(3, np.int32))
    False
    """
    header = zlib.crc32(f"{array.dtype.name}{array.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), header)


def build_manifest(tree: PyTree) -> tuple[dict[str, np.ndarray], Manifest]:
    """Copies a pytree to the host and builds its manifest.

    The whole tree passes through the memory of this machine, even if its arrays are sharded over
    many devices or processes (then every process must call this, and gets all of it).

    Args:
        tree: any pytree whose leaves are arrays of jax or numpy (typed keys included), numpy
            scalars, or Python ints, floats and bools.

    Returns:
        The arrays by path (without those of size zero and without Python numbers, which are in the
        manifest), and the manifest.

    Raises:
        TypeError: leaves that are not numbers; all are listed.
        ValueError: leaves whose memory was donated, or that have the same path.

    >>> arrays, manifest = build_manifest({"w": np.ones(2, np.float32), "epoch": 3})
    >>> manifest["epoch"], manifest["w"]["shape"]
    ({'python': 'int', 'value': 3}, [2])
    """
    leaves = named_leaves(tree)
    _refuse_unstorable(leaves)
    numbers = {path: leaf for path, leaf in leaves.items() if type(leaf) in _PYTHON}
    others = {path: leaf for path, leaf in leaves.items() if path not in numbers}
    data = {p: jax.random.key_data(x) if _is_key(x) else x for p, x in others.items()}
    # One call for all of them, so that the copies from the device overlap.
    host = jax.device_get({path: _addressable(leaf) for path, leaf in data.items()})
    manifest: Manifest = {
        path: {"python": type(leaf).__name__, "value": leaf} for path, leaf in numbers.items()
    }
    for path, leaf in others.items():
        array = host[path] = np.asarray(host[path])
        manifest[path] = {
            "shape": list(np.shape(leaf)),
            "dtype": str(leaf.dtype),
            "crc32": checksum(array),
        }
        if _is_key(leaf):
            manifest[path]["key"] = str(jax.random.key_impl(leaf))
    return {path: array for path, array in host.items() if array.size}, manifest


def differences(manifest: Mapping[str, Any], like: PyTree) -> list[str]:
    """Differences between a manifest and a template, one line each.

    Args:
        manifest: of the saved tree.
        like: a pytree of arrays or ``jax.ShapeDtypeStruct``; only paths, shapes and dtypes count.

    Returns:
        The differences in the order of the paths; empty if the template fits.

    >>> differences(build_manifest({"w": np.ones(2)})[1], {"w": np.ones(3), "b": 0})
    ['asked for, not saved: b (Python int)', 'w: saved as float64[2], asked for as float64[3]']
    """
    asked = {path: _describe(leaf) for path, leaf in named_leaves(like).items()}
    saved = {path: _describe_entry(entry) for path, entry in manifest.items()}
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


def corrupted(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Paths of the arrays that differ from the manifest, sorted.

    >>> arrays, manifest = build_manifest({"w": np.zeros(2), "b": np.zeros(1)})
    >>> corrupted(manifest, arrays | {"w": np.array([0.0, 1e-9])})
    ['w']
    """
    return sorted(
        path
        for path in stored(manifest)
        if path not in arrays or checksum(arrays[path]) != manifest[path]["crc32"]
    )


def stored(manifest: Mapping[str, Any]) -> list[str]:
    """Paths of the leaves that are stored as arrays, and not in the manifest itself.

    >>> stored(build_manifest({"w": np.ones(2), "none": np.ones((0, 3)), "epoch": 3})[1])
    ['w']
    """
    return [p for p, e in manifest.items() if "shape" in e and 0 not in e["shape"]]


def rebuild(manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    """Restores saved leaves in the structure, types and shardings of a template.

    A leaf of ``like`` with a sharding (a committed ``jax.Array``, or a ``ShapeDtypeStruct`` with
    one) is placed there, whatever its sharding was when it was saved; any other jax leaf is
    uncommitted, like a new array. numpy stays numpy and Python numbers stay Python numbers. The
    result can share memory with ``arrays``. Requires that ``differences(manifest, like)`` is
    empty.

    >>> arrays, manifest = build_manifest({"w": np.ones(2), "epoch": 3})
    >>> rebuild(manifest, arrays, {"w": np.zeros(2), "epoch": 0})
    {'epoch': 3, 'w': array([1., 1.])}
    """
    filled = [
        _fill(manifest[path], arrays.get(path), leaf) for path, leaf in named_leaves(like).items()
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
        # Weakly typed scalars promote differently: a resumed step must have the same type.
        weak = jnp.asarray(array.item())
        if weak.dtype == like.dtype:
            return weak if sharding is None else jax.device_put(weak, sharding)
    if sharding is None:
        return jnp.array(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _place_key(data: np.ndarray, impl: str, sharding: jax.sharding.Sharding | None) -> jax.Array:
    key: jax.Array
    if sharding is None:
        key = jax.random.wrap_key_data(jnp.array(data), impl=impl)
        return key
    # Through jit, because device_put refuses typed keys on devices of other processes.
    wrap = jax.jit(lambda x: jax.random.wrap_key_data(x, impl=impl), out_shardings=sharding)
    key = wrap(data)
    return key


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
            "leaves of a saved tree must be arrays or numbers (put text into meta):\n  "
            + "\n  ".join(wrong)
        )
    deleted = [p for p, x in leaves.items() if isinstance(x, jax.Array) and x.is_deleted()]
    if deleted:
        raise ValueError(
            "the memory of these leaves was donated to a compiled function; save the tree that it "
            f"returned instead: {deleted}"
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
