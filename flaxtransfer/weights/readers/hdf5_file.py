"""Read and write Keras weights in HDF5: arrays by the names of their layers.

HDF5 can point to other files and to datasets that are stored elsewhere; such links are refused.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from flaxtransfer.weights.readers import archives

__all__ = ["CONFIG", "LAYERS", "read_hdf5", "read_keras_archive", "write_hdf5"]


CONFIG = "configuration of the Keras model"
"""Key of the metadata with the layers of a model, as JSON."""
LAYERS = "layers of the Keras model"
"""Key of the metadata with the names of layers without arrays too, by lines; without settings."""
_HEADER = "flaxtransfer"
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
            header = file.attrs.get(_HEADER)
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
    if isinstance(config, bytes):
        config = config.decode("utf-8", "replace")
    metadata = {LAYERS: "\n".join(layers)}
    if isinstance(config, str):
        metadata[CONFIG] = config
    if isinstance(header, str):
        metadata[_HEADER] = header
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
        if key in arrays and not key.startswith(_BODY):
            # Layers of different models may have the same name.
            key = f"{below.strip('/').replace('/', ':')}/{name}"
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
