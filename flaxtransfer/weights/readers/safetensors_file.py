"""Read and write safetensors files: a JSON header and raw bytes, which cannot run code."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from flaxtransfer.files import parse_json
from flaxtransfer.paths import shortened

__all__ = ["read_safetensors", "write_safetensors"]


_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(
    data: bytes | memoryview,
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of a safetensors file: arrays in place, metadata and no notes.

    Raises:
        ValueError: an incomplete or damaged file, or an unsupported dtype.
    """
    start = 8 + _length(data)
    try:
        if len(data) < min(start, 9) or start > min(len(data), _MOST_HEADER):
            raise ValueError(f"its header ends at byte {start}, but the file has {len(data)}")
        entries = _header(data)
        metadata = entries.pop("__metadata__", None) or {}
        unknown = {name: e["dtype"] for name, e in entries.items() if e["dtype"] not in _DTYPES}
        spans = {} if unknown else _spans(entries)
        end = start + max((last for _, last in spans.values()), default=0)
        if end != len(data) and not unknown:
            raise ValueError(f"its header states {end} bytes, got {len(data)}")
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata must be text")
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged("its header does not state type, shape and place of each array") from error
    except ValueError as error:
        raise _damaged(str(error)) from error
    if unknown:
        raise ValueError(f"unsupported dtypes: {shortened(str(unknown), 300)}")
    body = memoryview(data)[start:]
    arrays = {}
    for name, (first, last) in spans.items():
        kind, shape = _DTYPES[entries[name]["dtype"]], entries[name]["shape"]
        array = np.frombuffer(body[first:last], kind) if first < last else np.empty(0, kind)
        # Nothing in the format aligns the header.
        arrays[name] = np.require(array, requirements="A").reshape(shape)
    return arrays, metadata, []


def _spans(entries: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """First and last byte of each array. They follow each other: no byte belongs to two or none."""
    spans = {}
    for name, entry in entries.items():
        shape, (first, last) = entry["shape"], entry["data_offsets"]
        size = math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        if not whole or len(shape) > _MOST_AXES or last - first != size:
            raise ValueError(
                f"{shortened(name, 100)} must have the size of its shape, got the shape "
                f"{shortened(str(shape), 60)} in the bytes {first} to {last}"
            )
        spans[name] = (first, last)
    end = 0
    for first, last in sorted(spans.values()):
        if first != end:
            raise ValueError(f"the array at byte {first} must begin at byte {end}, the next one")
        end = last
    return spans


def _damaged(reason: str) -> ValueError:
    return ValueError(f"incomplete or damaged safetensors file ({shortened(reason, 300)})")


def write_safetensors(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Writes the bytes of a safetensors file; the same arguments give the same bytes.

    >>> read_safetensors(write_safetensors({"w": np.ones(2, np.float32)}, {"format": "pt"}))[1]
    {'format': 'pt'}
    """
    # `np.ascontiguousarray` would add an axis to a scalar.
    data = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})
    # The library writes metadata in random order.
    header = json.dumps(
        {"__metadata__": dict(sorted(metadata.items())), **_header(data)}, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + _length(data) :]


_MOST_HEADER = 100_000_000
"""Bytes of a header, by the format's definition."""
_MOST_AXES = 32
"""Of an array; numpy has no more than 64."""


def _length(data: bytes | memoryview) -> int:
    return int.from_bytes(data[:8], "little")


def _header(data: bytes | memoryview) -> dict[str, Any]:
    result: dict[str, Any] = parse_json(bytes(data[8 : 8 + _length(data)]), "its header")
    return result
