"""Read and write safetensors files: a JSON header and raw bytes, which cannot run code."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
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


def read_safetensors(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of a safetensors file: arrays, metadata and no notes.

    Raises:
        ValueError: an incomplete or damaged file, or an unsupported dtype.
    """
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"incomplete or damaged safetensors file ({_why(data)}): {shortened(str(error), 200)}"
        ) from error
    unknown = {name: entry["dtype"] for name, entry in entries if entry["dtype"] not in _DTYPES}
    if unknown:
        raise ValueError(f"unsupported dtypes: {shortened(str(unknown), 300)}")
    arrays = {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }
    return arrays, _header(data).get("__metadata__") or {}, []


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


def _length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _header(data: bytes) -> dict[str, Any]:
    result: dict[str, Any] = parse_json(data[8 : 8 + _length(data)], "its header")
    return result


def _why(data: bytes) -> str:
    start = 8 + _length(data)
    if len(data) < start:
        return f"its header ends at byte {start}, but the file has {len(data)}"
    try:
        spans = [entry["data_offsets"] for key, entry in _header(data).items() if key[:2] != "__"]
        end = start + max(stop for _, stop in spans)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "its header is not valid JSON"
    return f"its header states {end} bytes, got {len(data)}"
