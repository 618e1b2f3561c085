"""The arrays of a file by key, before anything is known about what they mean."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flaxtransfer.paths import suggest
from flaxtransfer.weights import backbones, containers, orbax_folder

__all__ = ["Tensors", "read", "strip"]

IN_A_FOLDER = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
PREFIXES = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors:
    """The content of one file.

    Args:
        path: where it was read.
        arrays: by the file's own keys, in the file's own dtypes and axes.
        metadata: text by name, as a safetensors header has it.
        sha256: of the bytes, in hexadecimal.
        notes: what was done to get at the arrays.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    sha256: str
    notes: tuple[str, ...]


def read(path: Path) -> Tensors:
    """Reads a file once: its checksum is that of the bytes that became the arrays.

    Args:
        path: a file, a folder that holds one as Hugging Face lays them out, or one of orbax'.

    Raises:
        FileNotFoundError: no such file; the text names the nearest in the folder.
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
    arrays, left_out = backbones.encoder_of(arrays)
    return Tensors(path, arrays, metadata, sha256, (*told, *prefixes, *left_out))


_Read = tuple[dict[str, np.ndarray], dict[str, str], str, list[str]]


def _file(path: Path) -> _Read:
    data = path.read_bytes()
    container, named = containers.recognise(data, path.name)
    arrays, metadata, notes = container.read(data)
    return arrays, metadata, hashlib.sha256(data).hexdigest(), [*named, *notes]


def _folder(path: Path) -> _Read:
    """A tree of orbax', whose checksum is that of its leaves in the order of their paths."""
    found = orbax_folder.read(path)
    if found is None:
        steps = sorted(map(str, path.glob("checkpoints/[0-9]*")))
        raise FileNotFoundError(
            f"{path} is a folder with 0 checkpoints in it: no {', '.join(containers.SUFFIXES)} "
            "file is there, and nothing that orbax wrote"
            + (f"; a run that has not finished has steps: {', '.join(steps)}" if steps else "")
        )
    arrays, metadata, notes = found
    checksum = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        checksum.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        checksum.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return arrays, metadata, checksum.hexdigest(), notes


def strip(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Takes off what data parallelism and compilation put before each key.

    Raises:
        ValueError: two keys that become one.

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
            raise ValueError(f"two keys name {short!r} once the prefixes {removed} are removed")
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
                f"{path} is a folder with {len(files)} checkpoints in it, name one: "
                f"{', '.join(files)}"
            )
        return path / preferred[0]
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"no file {path}: there is no folder {folder}")
        names = sorted(entry.name for entry in folder.iterdir())
        nearest = suggest(path.name, names)
        raise FileNotFoundError(
            f"no file {path.name!r} in {folder.resolve()}"
            + (nearest or f"; checkpoints there: {', '.join(_weights_in(folder)) or 'none'}")
        )
    return path


def _weights_in(folder: Path) -> list[str]:
    return sorted(e.name for e in folder.iterdir() if containers.has_weights_name(e.name))
