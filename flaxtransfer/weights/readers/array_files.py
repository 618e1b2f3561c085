"""Containers of named arrays, which cannot run code: safetensors, msgpack, orbax's folders, HDF5.

safetensors is a JSON header and raw bytes. msgpack (``flax.serialization``) and orbax hold trees of
arrays; a folder of orbax can come from any program, or be a step of one of our runs. HDF5 has the
weights of Keras by the names of their layers; it can point to other files and to datasets that are
stored elsewhere, and such links are refused.
"""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import safetensors.numpy

from flaxtransfer.files import parse_json, read_json
from flaxtransfer.paths import shortened
from flaxtransfer.weights.readers import archives

__all__ = [
    "CONFIG",
    "LAYERS",
    "MODEL",
    "read_flax",
    "read_hdf5",
    "read_keras_archive",
    "read_orbax",
    "read_safetensors",
    "write_hdf5",
    "write_safetensors",
]


_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
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
    return arrays, archives.stated(metadata), []


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


_ARRAY, _SCALAR = 1, 3
"""The msgpack extension types of arrays and of numpy's scalars in flax: shape, dtype, bytes."""

_NAMES = (
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
    if name not in _NAMES or not isinstance(content, bytes):
        raise ValueError(f"the dtype of an array must be numeric, got {name!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of an array must be integers >= 0, got {shape!r}")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"the bytes of an array must fit {name}{shape}, got {len(content):,}")
    return np.frombuffer(content, dtype).reshape(shape)


_COLLECTIONS = ("params", "batch_stats")
"""Trees of one network that a program may have saved as items of their own."""

MODEL = f"{archives.FOUND}model of the run"
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


CONFIG = f"{archives.FOUND}configuration of the Keras model"
"""Key of the metadata with the layers of a model, as JSON."""
LAYERS = f"{archives.FOUND}layers of the Keras model"
"""Key of the metadata with the names of layers without arrays too, by lines; without settings."""
_HDF5_HEADER = "flaxtransfer"
"""Attribute of our own files with the text that states their network."""
_BODY = ("conv", "stack", "post_bn/", "predictions/")
"""How the names of layers of ResNets start, of which a file can hold one."""
_DEEPEST, _MOST_LAYERS = 32, 10_000


def read_hdf5(
    data: bytes | memoryview,
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of an ``.h5`` file: arrays by "layer/variable", metadata and notes.

    The state of the optimizer is omitted. Keras 3 numbers the variables of a layer
    ("conv1_conv/0"), earlier versions name them ("conv1_conv/kernel").

    Raises:
        ImportError: h5py is not installed.
        ValueError: a damaged HDF5 file, one that points to other files, or one whose arrays would
            unpack to far more than the file holds.
    """
    h5py = _h5py("reading .h5 and .keras files")
    arrays: dict[str, np.ndarray] = {}
    try:
        with h5py.File(archives.as_file(data), "r") as file:
            left_out = [name for name in file if name.startswith("optimizer")]
            seen: set[Any] = set()
            config, layers = file.attrs.get("model_config"), _layers(file, h5py)
            header = file.attrs.get(_HDF5_HEADER)
            for name in file:
                if name not in left_out:
                    _collect_hdf5(file, name, "", arrays, h5py, seen, archives.most(len(data)))
    except ValueError:
        raise
    except Exception as error:
        # The exception of h5py for a damaged file depends on the damaged byte.
        raise ValueError(
            f"incomplete or damaged HDF5 file: {type(error).__name__} {error}"
        ) from error
    if isinstance(config, bytes):
        config = config.decode("utf-8", "replace")
    metadata = {LAYERS: "\n".join(layers)}
    if isinstance(config, str):
        metadata[CONFIG] = config
    if isinstance(header, str):
        metadata[_HDF5_HEADER] = header
    return arrays, metadata, ["the optimizer's state was left out"] if left_out else []


def write_hdf5(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The bytes of an ``.h5`` file from which Keras' ``load_weights`` fills a model.

    Keras goes by the order of the layers, or by their names with ``by_name=True``. Keras 2 and 3
    read this layout; their own ``.weights.h5`` is another, and only Keras 3 reads it.

    Args:
        arrays: by "layer/variable", in the order of the model's layers and of their variables.
        metadata: attributes of the file; Keras ignores them.

    Raises:
        ImportError: h5py is not installed.
    """
    h5py = _h5py("writing .h5 files")
    layers: dict[str, list[str]] = {}
    for key in arrays:
        layers.setdefault(key.rpartition("/")[0], []).append(key)
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        file.attrs.update(metadata)
        file.attrs["layer_names"] = [name.encode() for name in layers]
        for name, keys in layers.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [f"{key}:0".encode() for key in keys]
            for key in keys:
                group[f"{key}:0"] = arrays[key]
    return data.getvalue()


def _h5py(task: str) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{task} needs h5py: pip install 'flaxtransfer[keras]'") from error
    return h5py


def read_keras_archive(
    data: bytes | memoryview,
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the HDF5 file with the weights, and the configuration, of a ``.keras`` archive."""
    files = archives.members(data)
    if "model.weights.h5" not in files:
        raise ValueError(f"a .keras archive must hold model.weights.h5, got {sorted(files)}")
    arrays, metadata, notes = read_hdf5(files["model.weights.h5"])
    if "config.json" in files:
        metadata[CONFIG] = files["config.json"].decode("utf-8", "replace")
    return arrays, metadata, notes


def _layers(file: Any, h5py: Any) -> list[str]:
    """The names of the layers of a model: in its attributes, or as groups, in models in it too."""
    stated = [
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        for name in file.attrs.get("layer_names", ())
    ]
    groups: list[tuple[Any, int]] = [(file, 0)]
    found: list[str] = []
    while groups:
        group, depth = groups.pop()
        held = group.get("layers", getlink=True)
        if not isinstance(held, h5py.HardLink) or not isinstance(group["layers"], h5py.Group):
            continue
        for name in group["layers"]:
            link = group["layers"].get(name, getlink=True)
            if isinstance(link, h5py.HardLink) and depth < _DEEPEST and len(found) < _MOST_LAYERS:
                found.append(name)
                if isinstance(group["layers"][name], h5py.Group):
                    groups.append((group["layers"][name], depth + 1))
    return [*stated, *found]


def _collect_hdf5(
    group: Any,
    name: str,
    path: str,
    arrays: dict[str, np.ndarray],
    h5py: Any,
    seen: set[Any],
    room: int,
) -> None:
    """Adds the arrays of an entry of a group; an entry with several names is visited once."""
    below = f"{path}/{name}"
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{below} must not link to another place")
    entry = group[name]
    address = h5py.h5o.get_info(entry.id).addr
    if address in seen or path.count("/") > _DEEPEST:
        return
    seen.add(address)
    if isinstance(entry, h5py.Group):
        for inner in entry:
            _collect_hdf5(entry, inner, below, arrays, h5py, seen, room)
    elif isinstance(entry, h5py.Dataset):
        key = _key(group, name)
        if key in arrays and not key.startswith(_BODY):
            # Layers of different models may have the same name.
            key = f"{below.strip('/').replace('/', ':')}/{name}"
        if key in arrays:
            raise ValueError(f"two arrays have the name {key!r}")
        used = sum(array.nbytes for array in arrays.values())
        arrays[key] = _hdf5_array(entry, below, room - used)


def _key(group: Any, name: str) -> str:
    layer = group.attrs.get("name") or group.name.rsplit("/", 1)[-1]
    return f"{layer}/{name.removesuffix(':0')}"


def _hdf5_array(entry: Any, path: str, room: int) -> np.ndarray:
    if entry.is_virtual or entry.external:
        raise ValueError(f"{path} must not be stored in another file")
    if entry.dtype.kind not in "fiub":
        raise ValueError(f"the dtype of {path} must be numeric, got {entry.dtype}")
    if entry.nbytes > room:
        raise ValueError(f"{path} would unpack to {entry.nbytes:,} bytes, which weights never do")
    return np.asarray(entry[()])
