"""Detect the container format of a weight file, and read its arrays by key.

The content of a file decides, not its name. ``read_tensors`` also reads folders and removes the
prefixes that data parallelism, compilation and self-supervised training put before the keys.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath

import numpy as np

from flaxtransfer.files import check_regular
from flaxtransfer.paths import shortened, suggest
from flaxtransfer.weights.naming import native
from flaxtransfer.weights.readers import (
    archives,
    flax_file,
    hdf5_file,
    safetensors_file,
    torch_file,
)

__all__ = [
    "CONTAINERS",
    "SUFFIXES",
    "Container",
    "Tensors",
    "has_weights_name",
    "read_tensors",
    "recognize",
    "strip",
]


@dataclasses.dataclass(frozen=True)
class Container:
    """A way to pack named arrays into a file.

    Args:
        text: the name for a person.
        suffixes: under which such files are published.
        read: converts the bytes of a file to arrays, metadata and notes.
    """

    text: str
    suffixes: tuple[str, ...]
    read: Callable[[bytes], tuple[dict[str, np.ndarray], dict[str, str], list[str]]]


CONTAINERS: dict[str, Container] = {
    "safetensors": Container(
        "a safetensors file", (".safetensors",), safetensors_file.read_safetensors
    ),
    "torch": Container(
        "a file of torch.save", (".pth", ".pt", ".bin", ".ckpt", ".pth.tar"), torch_file.read_torch
    ),
    "npz": Container("an archive of numpy's", (".npz",), archives.read_npz),
    "hdf5": Container("an HDF5 file", (".h5", ".hdf5"), hdf5_file.read_hdf5),
    "keras": Container("an archive of Keras'", (".keras",), hdf5_file.read_keras_archive),
    "msgpack": Container("a msgpack of flax's", (".msgpack",), flax_file.read_flax),
}

SUFFIXES = tuple(suffix for container in CONTAINERS.values() for suffix in container.suffixes)

_MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, by the format's definition."""


def has_weights_name(name: str) -> bool:
    """Whether a file name has a suffix of weight files.

    >>> has_weights_name("moco_v2_800ep_pretrain.pth.tar"), has_weights_name("images.tar")
    (True, False)
    """
    return PurePath(name).name.endswith(SUFFIXES)


def recognize(data: bytes, name: str) -> tuple[Container, list[str]]:
    r"""Detects the container of a file; with a note if its name states another one or none.

    Args:
        data: the whole file; its first bytes decide, or the file names in a zip archive.
        name: of the file.

    Raises:
        ValueError: an empty file, the result of a failed download, or an unknown format.

    >>> recognize(b"\x89HDF\r\n\x1a\n", "weights.h5")[0].text
    'an HDF5 file'
    >>> recognize(b"\x89HDF\r\n\x1a\n", "0a4e6b")[1]
    ['an HDF5 file by its content; its name has no such suffix']
    """
    container = CONTAINERS[_kind(data, name)]
    if name.endswith(container.suffixes):
        return container, []
    suffix_of_name = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if suffix_of_name is None:
        return container, [f"{container.text} by its content; its name has no such suffix"]
    return container, [
        f"{container.text} by its content, although its name ends in {suffix_of_name}"
    ]


def _kind(data: bytes, name: str) -> str:
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            "the file is a Git LFS pointer, not the weights; download them with `git lfs pull`"
        )
    if data.lstrip()[:1] == b"<":
        raise ValueError("the file is a web page, not the weights; the download failed")
    # The header of a safetensors file is JSON behind its length, whose bytes may be anything.
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and length <= _MOST_HEADER:
        return "safetensors"
    if data.startswith(b"PK\x03\x04"):
        return _kind_of_archive(archives.names(data))
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if data[0] == 0x80 and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"
    # A dictionary of 1 to 15, or of more entries, whose first key is a text.
    key = {0xDE: 3, 0xDF: 5}.get(data[0], 1)
    if (0x80 < data[0] < 0x90 or key > 1) and data[key : key + 1] > b"\x9f":
        return "msgpack"
    if foreign := _foreign(data, name):
        raise ValueError(f"the file is {foreign}")
    # Truncated or damaged: the reader reports by how much.
    if name.endswith(".safetensors") and (len(data) < 9 or data[4:8] == bytes(4)):
        return "safetensors"
    kinds = "; ".join(f"{c.text} ({', '.join(c.suffixes)})" for c in CONTAINERS.values())
    raise ValueError(f"unknown format: the first bytes are {data[:8]!r}; known: {kinds}")


def _foreign(data: bytes, name: str) -> str:
    """What a file is that is known and not read, and what to do instead; "" for others."""
    # A protobuf with the version of its format first, and the producer or the graph second.
    onnx = data[:1] == b"\x08" and 0 < data[1] < 32 and data[2:3] in (b"\x12", b"\x3a", b"\x42")
    if onnx or (name.endswith(".onnx") and data[:1] in (b"\x08", b"\x0a", b"\x12", b"\x3a")):
        return (
            "an ONNX model, a program with its weights, which is written (--to onnx) and not read; "
            "give the weights that it was exported from"
        )
    if data.startswith(b"GGUF"):
        return "a GGUF file of a language model; ResNets come as safetensors or .pth"
    if data[4:8] == b"TFL3":
        return "a TensorFlow Lite model, which is not read; give the Keras weights it was made from"
    return ""


def _kind_of_archive(names: list[str]) -> str:
    last = {name.rsplit("/", 1)[-1] for name in names}
    if "data.pkl" in last:
        return "torch"
    if "model.weights.h5" in names:
        return "keras"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    held = shortened(", ".join(names[:5]), 200) + (", ..." if len(names) > 5 else "")
    raise ValueError(
        "unknown zip archive: torch's holds data.pkl, Keras' holds model.weights.h5, numpy's "
        f"holds only .npy files, got {held or 'nothing'}"
    )


IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
PREFIXES = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors:
    """The content of a weight file.

    Args:
        path: where it was read.
        arrays: by the file's keys, with the file's dtypes and axes.
        metadata: text by name, as in a safetensors header.
        sha256: of the bytes, in hexadecimal.
        notes: what was removed or converted.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    sha256: str
    notes: tuple[str, ...]


def read_tensors(path: Path) -> Tensors:
    """Reads a weight file or folder once, with the checksum of the bytes that were read.

    Args:
        path: a file, a folder with one (Hugging Face's layout), or a folder of orbax.

    Raises:
        FileNotFoundError: the file does not exist; the text names the nearest in the folder.
        ValueError: a file that is empty, damaged, unsafe or of another kind.
    """
    path = _found(path)
    try:
        arrays, metadata, sha256, told = _folder(path) if path.is_dir() else _file(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    arrays, removed = strip(arrays)
    prefixes = [f"the prefix {prefix!r} was removed from the keys" for prefix in removed]
    arrays, left_out = native.encoder_of(arrays)
    return Tensors(path, arrays, metadata, sha256, (*told, *prefixes, *left_out))


_Read = tuple[dict[str, np.ndarray], dict[str, str], str, list[str]]


def _file(path: Path) -> _Read:
    check_regular(path)
    try:
        data = path.read_bytes()
    except MemoryError as error:
        size = path.stat().st_size
        raise ValueError(f"it does not fit into memory: it has {size:,} bytes") from error
    container, named = recognize(data, path.name)
    arrays, metadata, notes = container.read(data)
    return arrays, metadata, hashlib.sha256(data).hexdigest(), [*named, *notes]


def _folder(path: Path) -> _Read:
    """Reads a tree of orbax; the checksum is that of its leaves, sorted by path."""
    found = flax_file.read_orbax(path)
    if found is None:
        steps = sorted(map(str, path.glob("checkpoints/[0-9]*")))
        raise FileNotFoundError(
            f"the folder {path} holds 0 checkpoints: no {', '.join(SUFFIXES)} file, and nothing "
            "that orbax wrote"
            + (f"; the steps of an unfinished run are {', '.join(steps)}" if steps else "")
        )
    arrays, metadata, notes = found
    checksum = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        checksum.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        checksum.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return arrays, metadata, checksum.hexdigest(), notes


def strip(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes the prefixes that data parallelism and compilation put before each key.

    Raises:
        ValueError: two keys become equal.

    >>> strip({"module._orig_mod.fc.bias": 0})
    ({'fc.bias': 0}, ['module.', '_orig_mod.'])
    """
    stripped: dict[str, np.ndarray] = {}
    removed: list[str] = []
    for key, array in arrays.items():
        short = key
        while prefix := next((p for p in PREFIXES if short.startswith(p)), None):
            short = short.removeprefix(prefix)
            removed += [] if prefix in removed else [prefix]
        if short in stripped:
            raise ValueError(f"two keys become {short!r} after the prefixes {removed} are removed")
        stripped[short] = array
    return stripped, removed


def _found(path: Path) -> Path:
    if path.is_dir():
        files = _weights_in(path)
        if not files:
            return path
        preferred = [name for name in IN_A_FOLDER if name in files] or files
        if len(preferred) != 1 and preferred[:1] != [IN_A_FOLDER[0]]:
            raise FileNotFoundError(
                f"the folder {path} holds {len(files)} checkpoints, name one: {', '.join(files)}"
            )
        return path / preferred[0]
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"no file {path}: the folder {folder} does not exist")
        names = sorted(entry.name for entry in folder.iterdir())
        nearest = suggest(path.name, names)
        raise FileNotFoundError(
            f"no file {path.name!r} in {folder.resolve()}"
            + (nearest or f"; checkpoints there: {', '.join(_weights_in(folder)) or 'none'}")
        )
    return path


def _weights_in(folder: Path) -> list[str]:
    return sorted(e.name for e in folder.iterdir() if has_weights_name(e.name))
