"""Weights in HDF5 as Keras writes them: arrays by the names of their layers.

HDF5 can point out of itself, to other files and to datasets stored elsewhere; nothing of that kind
is followed.
"""

import io
from typing import Any

import numpy as np

from flaxtransfer.weights.readers import archives

__all__ = ["read_hdf5", "read_keras_archive"]


_DEEPEST = 32


def read_hdf5(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Arrays by "layer/variable", no metadata, and notes of a whole `.h5` file.

    What an optimizer kept is left out. Keras 3 numbers the variables of a layer ("conv1_conv/0"),
    earlier ones name them ("conv1_conv/kernel").

    Raises:
        ImportError: h5py is not installed.
        ValueError: bytes that are no complete HDF5 file, that point to other files, or whose
            arrays would unfold to far more than the file holds.
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
            left_out = [name for name in file if name.startswith("optimizer")]
            seen: set[Any] = set()
            for name in file:
                if name not in left_out:
                    _collect(file, name, "", arrays, h5py, seen, archives.most(len(data)))
    except ValueError:
        raise
    except Exception as error:
        # What h5py raises for a damaged file depends on the byte that is wrong.
        raise ValueError(f"no complete HDF5 file: {type(error).__name__} {error}") from error
    return arrays, {}, ["the optimizer's state was left out"] if left_out else []


def read_keras_archive(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """The same of a `.keras` archive, whose weights are an HDF5 file in it."""
    files = archives.members(data)
    if "model.weights.h5" not in files:
        raise ValueError(f"a .keras archive has model.weights.h5, and this one {sorted(files)}")
    return read_hdf5(files["model.weights.h5"])


def _collect(
    group: Any,
    name: str,
    path: str,
    arrays: dict[str, np.ndarray],
    h5py: Any,
    seen: set[Any],
    room: int,
) -> None:
    """Adds the arrays of an entry of a group, which is visited once, by whatever name it goes."""
    below = f"{path}/{name}"
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{below} points elsewhere, which weights do not")
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
            raise ValueError(f"two arrays are called {key!r}")
        used = sum(array.nbytes for array in arrays.values())
        arrays[key] = _array(entry, below, room - used)


def _key(group: Any, name: str) -> str:
    layer = group.attrs.get("name") or group.name.rsplit("/", 1)[-1]
    return f"{layer}/{name.removesuffix(':0')}"


def _array(entry: Any, path: str, room: int) -> np.ndarray:
    if entry.is_virtual or entry.external:
        raise ValueError(f"{path} is stored in another file, which is not read")
    if entry.dtype.kind not in "fiub":
        raise ValueError(f"{path} holds {entry.dtype}, and weights are numbers")
    if entry.nbytes > room:
        raise ValueError(f"{path} would unfold to {entry.nbytes:,} bytes, which no weights do")
    return np.asarray(entry[()])
