"""Read Keras weights in HDF5: arrays by the names of their layers.

HDF5 can point to other files and to datasets that are stored elsewhere; such links are refused.
"""

import io
from typing import Any

import numpy as np

from flaxtransfer.weights.readers import archives

__all__ = ["GRAPH", "read_hdf5", "read_keras_archive"]


GRAPH = "keras"
"""Name of the metadata with the JSON text of Keras' graph."""


_DEEPEST = 32


def read_hdf5(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of an ``.h5`` file: arrays by "layer/variable", Keras' graph, and notes.

    The state of the optimizer is omitted. Keras 3 numbers the variables of a layer
    ("conv1_conv/0"), earlier versions name them ("conv1_conv/kernel").

    Raises:
        ImportError: h5py is not installed.
        ValueError: a damaged HDF5 file, one that points to other files, or one whose arrays would
            unpack to far more than the file holds.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            "reading .h5 and .keras files needs h5py: pip install 'flaxtransfer[keras]'"
        ) from error

    arrays: dict[str, np.ndarray] = {}
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            graph = file.attrs.get("model_config")
            left_out = [name for name in file if name.startswith("optimizer")]
            seen: set[Any] = set()
            for name in file:
                if name not in left_out:
                    _collect(file, name, "", arrays, h5py, seen, archives.most(len(data)))
    except ValueError:
        raise
    except Exception as error:
        # The exception of h5py for a damaged file depends on the damaged byte.
        raise ValueError(
            f"incomplete or damaged HDF5 file: {type(error).__name__} {error}"
        ) from error
    text = graph.decode(errors="replace") if isinstance(graph, bytes) else graph
    metadata = {GRAPH: text} if isinstance(text, str) else {}
    return arrays, metadata, ["the optimizer's state was left out"] if left_out else []


def read_keras_archive(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the weights and the graph in the bytes of a ``.keras`` archive."""
    files = archives.members(data)
    if "model.weights.h5" not in files:
        raise ValueError(f"a .keras archive must hold model.weights.h5, got {sorted(files)}")
    arrays, metadata, notes = read_hdf5(files["model.weights.h5"])
    if "config.json" in files:
        metadata[GRAPH] = files["config.json"].decode(errors="replace")
    return arrays, metadata, notes


def _collect(
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
            _collect(entry, inner, below, arrays, h5py, seen, room)
    elif isinstance(entry, h5py.Dataset):
        key = _key(group, name)
        if key in arrays:
            raise ValueError(f"two arrays have the name {key!r}")
        used = sum(array.nbytes for array in arrays.values())
        arrays[key] = _array(entry, below, room - used)


def _key(group: Any, name: str) -> str:
    layer = group.attrs.get("name") or group.name.rsplit("/", 1)[-1]
    return f"{layer}/{name.removesuffix(':0')}"


def _array(entry: Any, path: str, room: int) -> np.ndarray:
    if entry.is_virtual or entry.external:
        raise ValueError(f"{path} must not be stored in another file")
    if entry.dtype.kind not in "fiub":
        raise ValueError(f"the dtype of {path} must be numeric, got {entry.dtype}")
    if entry.nbytes > room:
        raise ValueError(f"{path} would unpack to {entry.nbytes:,} bytes, which weights never do")
    return np.asarray(entry[()])
