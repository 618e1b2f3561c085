"""Arrays that were dear to compute, kept in memory, or on disk under what they came from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Fingerprint", "OutOfRange", "find", "keep", "make_room", "write"]

Fingerprint = Mapping[str, str]
"""Everything the array depends on, by name, each as a short text or a digest."""

_VALUES, _META = "features.npy", "features.json"

_CHUNK = 2**24
"""Bytes read at a time."""


class OutOfRange(ValueError):
    """A number is too large for the dtype that was to hold it."""


def _name(fingerprint: Fingerprint) -> str:
    """The name under which an array with this fingerprint lies."""
    return hashlib.sha256(json.dumps(dict(fingerprint), sort_keys=True).encode()).hexdigest()[:16]


def make_room(folder: Path, wanted: int, budget: int) -> list[str]:
    """Removes what was not used for longest until ``wanted`` more bytes fit the budget.

    What a killed process of this machine has left half-written goes as well.

    Returns:
      The names of the arrays that were removed.
    """
    if not folder.is_dir():
        return []
    for path in folder.glob(".*@*:*"):
        host, _, process = path.name.rpartition("@")[2].partition(":")
        if host == platform.node() and process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)
    slots = sorted(
        (path.parent for path in folder.glob(f"*/{_META}")), key=lambda slot: slot.stat().st_mtime
    )
    sizes = {slot: sum(file.stat().st_size for file in slot.iterdir()) for slot in slots}
    removed = []
    for slot in slots:
        if sum(sizes.values()) + wanted <= budget:
            break
        shutil.rmtree(slot, ignore_errors=True)
        del sizes[slot]
        removed.append(slot.name)
    return removed


def keep(shape: tuple[int, ...], dtype: str, parts: Iterable[np.ndarray]) -> np.ndarray:
    """The parts, one after the other, as one array in memory.

    Raises:
      OutOfRange: a number does not fit ``dtype``.
      ValueError: a number is not finite, or the parts do not make up the shape.
    """
    values = np.empty(shape, dtype)
    filled = 0
    for part in _narrow(parts, shape, dtype):
        values[filled : filled + len(part)] = part
        filled += len(part)
    return values


def write(
    folder: Path,
    fingerprint: Fingerprint,
    shape: tuple[int, ...],
    dtype: str,
    parts: Iterable[np.ndarray],
) -> np.ndarray:
    """The parts, one after the other, as one array on disk, mapped into memory.

    It lies in a folder of its own, which appears under its name only when it is complete.

    Raises:
      OSError: the disk is full or the folder cannot be written; nothing is left behind.
      OutOfRange, ValueError: as ``keep``.
    """
    name = _name(fingerprint)
    partial, final = folder / f".{name}@{platform.node()}:{os.getpid()}", folder / name
    try:
        partial.mkdir(parents=True, exist_ok=True)
        checksum = 0
        # Plain writes: a full disk under a mapped file would end the process by a signal.
        with (partial / _VALUES).open("wb") as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in _narrow(parts, shape, dtype):
                data = memoryview(np.ascontiguousarray(part)).cast("B")
                file.write(data)
                checksum = zlib.crc32(data, checksum)
            file.flush()
            os.fsync(file.fileno())
        meta = {"fingerprint": dict(fingerprint), "shape": shape, "dtype": dtype, "crc32": checksum}
        (partial / _META).write_text(json.dumps(meta, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return np.load(final / _VALUES, mmap_mode="r")


def find(
    folder: Path, fingerprint: Fingerprint, shape: tuple[int, ...], dtype: str
) -> tuple[np.ndarray | None, str]:
    """The array with this very fingerprint, if it lies there whole.

    Returns:
      The array mapped into memory, or None; and why not, for a person. What is damaged is removed.
    """
    slot = folder / _name(fingerprint)
    if not slot.is_dir():
        return None, _explain(folder, fingerprint)
    try:
        values = _read(slot, fingerprint, shape, dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        shutil.rmtree(slot, ignore_errors=True)
        return None, f"the one in {slot} is damaged ({error}) and is made anew"
    return values, ""


def _explain(folder: Path, fingerprint: Fingerprint) -> str:
    """How the nearest of the arrays that lie there differs from what is wanted; "" if none does."""
    nearest: list[str] | None = None
    for path in sorted(folder.glob(f"*/{_META}")) if folder.is_dir() else []:
        try:
            other = json.loads(path.read_text())["fingerprint"]
            differs = sorted(k for k in fingerprint if other.get(k) != fingerprint[k])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if nearest is None or len(differs) < len(nearest):
            nearest = differs
    if nearest is None:
        return ""
    return f"none of those in {folder} fits; the nearest differs in {', '.join(nearest)}"


def _read(slot: Path, fingerprint: Fingerprint, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    meta: dict[str, Any] = json.loads((slot / _META).read_text())
    wanted = {"fingerprint": dict(fingerprint), "shape": list(shape), "dtype": dtype}
    if foreign := [name for name, value in wanted.items() if meta[name] != value]:
        raise ValueError(f"its {' and '.join(foreign)} are of something else")
    with (slot / _VALUES).open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0) or np.lib.format.read_array_header_1_0(file) != (
            shape, False, np.dtype(dtype),
        ):  # fmt: skip
            raise ValueError("its header is of another array")
        start, size = file.tell(), os.fstat(file.fileno()).st_size
        expected = math.prod(shape) * np.dtype(dtype).itemsize
        if size - start != expected:
            raise ValueError(f"it has {size - start} bytes of numbers, and not {expected}")
        checksum = 0
        while data := file.read(_CHUNK):
            checksum = zlib.crc32(data, checksum)
    if checksum != meta["crc32"]:
        raise ValueError("its checksum is another")
    with contextlib.suppress(OSError):  # A folder that may only be read is as good.
        os.utime(slot)  # For whoever clears away what was not used for long.
    return np.load(slot / _VALUES, mmap_mode="r")


def _narrow(
    parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: str
) -> Iterator[np.ndarray]:
    count, largest = 0, float(np.finfo(dtype).max)
    for part in parts:
        if not np.isfinite(part).all():
            raise ValueError("the activations hold numbers that are not finite")
        if part.size and (most := float(np.abs(part).max())) > largest:
            raise OutOfRange(f"{most:.3g} is beyond the {largest:.5g} of {dtype}")
        count += len(part)
        if part.shape[1:] != shape[1:] or count > shape[0]:
            raise ValueError(f"parts of shape {part.shape} do not make up {shape}")
        yield part.astype(dtype, copy=False)
    if count != shape[0]:
        raise ValueError(f"{count} rows do not make up {shape}")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
