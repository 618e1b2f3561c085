"""The arrays of a file by key, before anything is known about what they mean."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from flaxtransfer.paths import suggest
from flaxtransfer.weights import (
    backbones,
    flax_file,
    hdf5_file,
    npz_file,
    safetensors_file,
    torch_file,
)

__all__ = ["Tensors", "read", "strip"]

READERS: dict[str, Callable[[bytes], tuple[dict[str, np.ndarray], dict[str, str], list[str]]]] = {
    ".safetensors": safetensors_file.read,
    ".pth": torch_file.read,
    ".pt": torch_file.read,
    ".bin": torch_file.read,
    ".npz": npz_file.read,
    ".h5": hdf5_file.read,
    ".hdf5": hdf5_file.read,
    ".keras": hdf5_file.read_archive,
    ".msgpack": flax_file.read,
}
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
        path: a file, or a folder that holds one as Hugging Face lays them out.

    Raises:
        FileNotFoundError: no such file; the text names the nearest in the folder.
        ValueError: a file that is empty, damaged, unsafe or of another kind.
    """
    path = _found(path)
    data = path.read_bytes()
    problem = _impostor(data, path.suffix)
    if problem:
        raise ValueError(f"{path}: {problem}")
    try:
        arrays, metadata, notes = READERS[path.suffix](data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    arrays, removed = strip(arrays)
    notes += [f"the prefix {prefix!r} was removed from the keys" for prefix in removed]
    arrays, left_out = backbones.encoder_of(arrays)
    notes += left_out
    return Tensors(path, arrays, metadata, hashlib.sha256(data).hexdigest(), tuple(notes))


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
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix in READERS)
        preferred = [name for name in IN_A_FOLDER if name in files] or files
        if len(preferred) != 1 and preferred[:1] != [IN_A_FOLDER[0]]:
            raise FileNotFoundError(
                f"{path} is a folder with {len(files)} checkpoints in it, name one: "
                f"{', '.join(files) or 'no ' + ', '.join(READERS) + ' file is there'}"
            )
        return path / preferred[0]
    if not path.exists():
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"no file {path}: there is no folder {folder}")
        names = sorted(entry.name for entry in folder.iterdir())
        files = [name for name in names if Path(name).suffix in READERS]
        raise FileNotFoundError(
            f"no file {path.name!r} in {folder.resolve()}"
            + (suggest(path.name, names) or f"; checkpoints there: {', '.join(files) or 'none'}")
        )
    if path.suffix not in READERS:
        raise ValueError(
            f"{path}: {path.suffix or 'no suffix'} is not a kind of checkpoint that can be read; "
            f"these are: {', '.join(READERS)}"
        )
    return path


def _impostor(data: bytes, suffix: str) -> str:
    """What the first bytes say against the suffix; "" when nothing does."""
    if not data:
        return "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer and not the weights; fetch them with `git lfs pull`"
    if data.lstrip()[:1] == b"<":
        return "this is a web page and not the weights; the download went wrong"
    # A zip archive or a pickle; the header of a safetensors file begins after its length.
    zipped = data.startswith(b"PK\x03\x04")
    saved_by_torch = zipped or data.startswith(b"\x80")
    safetensors_like = data[8:9] == b"{"
    if suffix == ".safetensors" and saved_by_torch and not safetensors_like:
        return "this is a file of torch.save and no safetensors file; give it the suffix .pth"
    if suffix != ".safetensors" and safetensors_like:
        return "this is a safetensors file; give it the suffix .safetensors"
    if suffix in (".npz", ".keras"):
        return "" if zipped else f"this is no {suffix} archive"
    if suffix == ".msgpack":
        return "" if 0x80 < data[0] < 0xE0 else "this is no msgpack of a dictionary"
    if suffix in (".h5", ".hdf5"):
        return "" if data.startswith(b"\x89HDF") else "this is no HDF5 file"
    if suffix != ".safetensors" and not saved_by_torch:
        return "this is no file of torch.save, which is a zip archive or a pickle"
    return ""
