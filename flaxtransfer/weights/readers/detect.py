"""Detect the container format of a weight file, and read its arrays by key.

The content of a file decides, not its name. ``read_tensors`` also reads folders and checkpoints in
several files, and finds the network among the keys.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath

import numpy as np

from flaxtransfer.files import check_regular, read_json
from flaxtransfer.paths import shortened, suggest
from flaxtransfer.weights.naming import native, onnx
from flaxtransfer.weights.readers import (
    archives,
    flax_file,
    hdf5_file,
    safetensors_file,
    torch_file,
    torch_pickle,
)

__all__ = [
    "CONTAINERS",
    "INDEX",
    "IN_A_FOLDER",
    "SUFFIXES",
    "Container",
    "Tensors",
    "has_weights_name",
    "preferred_names",
    "read_tensors",
    "recognize",
    "weight_map",
]


@dataclasses.dataclass(frozen=True)
class Container:
    """A way to pack named arrays into a file.

    Args:
        text: the name for a person.
        suffixes: under which such files are published.
        read: converts the bytes of a file to arrays, metadata and notes.
        nested: whether ``read`` also takes a function that says which arrays are wanted.
        spread: whether ``read`` also takes a function that reads other files of the folder.
    """

    text: str
    suffixes: tuple[str, ...]
    read: Callable[..., tuple[dict[str, np.ndarray], dict[str, str], list[str]]]
    nested: bool = False
    spread: bool = False


CONTAINERS: dict[str, Container] = {
    "safetensors": Container(
        "a safetensors file", (".safetensors",), safetensors_file.read_safetensors
    ),
    "torch": Container(
        "a file of torch.save",
        (".pth", ".pt", ".bin", ".ckpt", ".pth.tar"),
        torch_file.read_torch,
        nested=True,
    ),
    "npz": Container("an archive of numpy's", (".npz",), archives.read_npz),
    "hdf5": Container("an HDF5 file", (".h5", ".hdf5"), hdf5_file.read_hdf5),
    "keras": Container("an archive of Keras'", (".keras",), hdf5_file.read_keras_archive),
    "msgpack": Container("a msgpack of flax's", (".msgpack",), flax_file.read_flax),
    "onnx": Container("an ONNX model", (".onnx",), onnx.read_onnx, spread=True),
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


def preferred_names(names: Iterable[str]) -> list[str]:
    """The names of weight files, sorted; ONNX models only where there is nothing else.

    They are exports of the other files, with less in them.

    >>> preferred_names(["net.onnx", "net.pth", "notes.txt"])
    ['net.pth']
    """
    found = sorted(filter(has_weights_name, names))
    return [name for name in found if not name.endswith(".onnx")] or found


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
    # A protobuf with the version of its format first, and the producer or the graph second.
    versioned = data[:1] == b"\x08" and b"\0" < data[1:2] < b"\x20"
    versioned = versioned and data[2:3] in (b"\x12", b"\x3a", b"\x42")
    if versioned or (name.endswith(".onnx") and data[:1] in (b"\x08", b"\x0a", b"\x12", b"\x3a")):
        return "onnx"
    if foreign := _foreign(data):
        raise ValueError(f"the file is {foreign}")
    # Truncated or damaged: the reader reports by how much.
    if name.endswith(".safetensors") and (len(data) < 9 or data[4:8] == bytes(4)):
        return "safetensors"
    kinds = "; ".join(f"{c.text} ({', '.join(c.suffixes)})" for c in CONTAINERS.values())
    raise ValueError(f"unknown format: the first bytes are {data[:8]!r}; known: {kinds}")


def _foreign(data: bytes) -> str:
    """What a file is that is known and not read, and what to do instead; "" for others."""
    if data.startswith(b"GGUF"):
        return "a GGUF file of a language model; ResNets come as safetensors or .pth"
    if data[4:8] == b"ORTM":
        return "a model of onnxruntime's own format, which is not read; give the .onnx file"
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


INDEX = ".index.json"
"""End of the name of a file that says in which files the arrays are."""

IN_A_FOLDER = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "flax_model.msgpack",
)
_PART = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
_COUNTED = re.compile(
    r"(?i)(?<![a-z])(epoch|ep|steps?|iter|iteration|checkpoint|ckpt|model)[-_=]?(\d+)(?![a-z])"
)
_PART_NAME = re.compile(r"(?!\.)[\w.+ -]+")
_BEST = re.compile(r"(?i)(?<![a-z])best(?![a-z])")


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors:
    """The content of a weight file.

    Args:
        path: where it was read.
        arrays: by the file's keys, with the file's dtypes and axes.
        metadata: text by name, as in a safetensors header.
        sha256: of the bytes, in hexadecimal.
        notes: what was removed or converted.
        beside: arrays around the network, by key; its head may be there.
        place: the names in the file that lead to the network.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    sha256: str
    notes: tuple[str, ...]
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    place: tuple[str, ...] = ()


def read_tensors(path: Path, key: str | None = None) -> Tensors:
    """Reads a weight file or folder once, with the checksum of the bytes that were read.

    Args:
        path: a file, the index of several, a folder with one of them (Hugging Face's layout), or
            a folder of orbax.
        key: the place of the network in it; None goes by the rules of ``native.find``.

    Raises:
        FileNotFoundError: the file does not exist; the text names the nearest in the folder.
        ValueError: a file that is empty, damaged, unsafe or of another kind; or several networks
            of which ``key`` must name one.
    """
    path, chosen = _found(path)
    search = _Search(key)
    try:
        if path.is_dir():
            read = _folder(path)
        elif path.name.endswith(INDEX):
            read = _parts(path)
        else:
            read = _file(path, search.wanted)
        arrays, metadata, sha256, told = read
        found = search.found or native.find(arrays, key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error.__cause__
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    return Tensors(
        path,
        {short: arrays[name] for name, short in found.keys.items()},
        metadata,
        sha256,
        (*chosen, *told, *found.notes),
        {short: arrays[name] for name, short in found.beside.items()},
        found.place,
    )


class _Search:
    """Finds the network before any array is read."""

    def __init__(self, key: str | None) -> None:
        self.key = key
        self.found: native.Found | None = None

    def wanted(self, tensors: Mapping[str, torch_pickle.Tensor]) -> list[str]:
        """The names of the network's tensors and of those around it."""
        try:
            self.found = native.find(tensors, self.key, _alike)
        except ValueError as error:
            raise torch_file.Undamaged(str(error)) from error
        return [*self.found.keys, *self.found.beside]


def _alike(ours: torch_pickle.Tensor, theirs: torch_pickle.Tensor) -> bool:
    return dataclasses.astuple(ours) == dataclasses.astuple(theirs)


_Read = tuple[dict[str, np.ndarray], dict[str, str], str, list[str]]


def _file(path: Path, wanted: torch_file.Choice = list) -> _Read:
    check_regular(path)
    try:
        data = path.read_bytes()
    except MemoryError as error:
        size = path.stat().st_size
        raise ValueError(f"it does not fit into memory: it has {size:,} bytes") from error
    container, named = recognize(data, path.name)
    checksum = hashlib.sha256(data)
    read: dict[str, bytes] = {}

    def beside(name: str) -> bytes:
        if name not in read:
            read[name] = _neighbor(path, name)
            checksum.update(read[name])
        return read[name]

    more = ([wanted] if container.nested else []) + ([beside] if container.spread else [])
    arrays, metadata, notes = container.read(data, *more)
    if read:
        notes = [f"arrays were read from {', '.join(sorted(read))} next to the file", *notes]
    return arrays, metadata, checksum.hexdigest(), [*named, *notes]


def _neighbor(path: Path, name: str) -> bytes:
    """The bytes of another file in the folder of a file that names it."""
    if not _PART_NAME.fullmatch(name):
        raise ValueError(f"it must name files in its own folder, got {shortened(repr(name), 100)}")
    other = path.with_name(name)
    if not other.exists():
        raise ValueError(f"it needs {name!r} in the same folder, which is not there")
    check_regular(other)
    return other.read_bytes()


def weight_map(index: Path) -> dict[str, str]:
    """The file of each array, by the array's key, as an index states it.

    Raises:
        ValueError: no index, or one that names files outside its folder.
    """
    content = read_json(index)
    found = content.get("weight_map") if isinstance(content, dict) else None
    places = found if isinstance(found, dict) else {}
    if not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError("an index must have a weight_map with the file of each array")
    strange = [name for name in places.values() if not _PART_NAME.fullmatch(name)]
    if strange:
        raise ValueError(
            f"an index must name files in its own folder, got {shortened(repr(strange[0]), 100)}"
        )
    return places


def _parts(index: Path) -> _Read:
    """Reads the files that an index names; the checksum is that of their checksums, in order."""
    places = weight_map(index)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} needs {len(names)} files, and {len(missing)} of them are not in the folder: "
            f"{shortened(', '.join(missing), 300)}"
        )
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    checksum = hashlib.sha256()
    notes = [f"read from {len(names)} files"]
    for name in names:
        held, more, sha256, told = _file(index.parent / name)
        expected = {key for key, place in places.items() if place == name}
        if odd := sorted(expected ^ held.keys()):
            raise ValueError(
                f"{name} must hold what the index says, but {len(odd)} keys differ: "
                f"{shortened(', '.join(odd), 200)}"
            )
        arrays |= held
        metadata |= more
        notes += [note for note in told if note not in notes]
        checksum.update(bytes.fromhex(sha256))
    return arrays, metadata, checksum.hexdigest(), notes


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


def _found(path: Path) -> tuple[Path, list[str]]:
    """The file that a path means, and a note where a folder holds several."""
    if path.is_dir():
        files = _weights_in(path)
        if not files:
            return _in_steps(path)
        preferred = [name for name in IN_A_FOLDER if name in files] or files
        # Other programs keep old formats beside safetensors.
        if preferred[0] in IN_A_FOLDER[:2]:
            return path / preferred[0], []
        if len(preferred) == 1:
            return path / preferred[0], []
        name, why = _outstanding(preferred)
        if name is None:
            raise FileNotFoundError(
                f"the folder {path} holds {len(files)} checkpoints, name one: "
                f"{shortened(', '.join(files), 400)}"
            )
        return path / name, [f"{name} is {why} of {len(files)} checkpoints in the folder, by name"]
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
    part = _PART.fullmatch(path.name)
    if part and int(part[3]) > 1:
        index = f"{part[1]}{part[4]}{INDEX}"
        raise ValueError(
            f"{path} must be a whole checkpoint, got one of {int(part[3])} parts"
            + (f"; did you mean {index!r}?" if path.with_name(index).is_file() else "")
        )
    return path, []


def _in_steps(folder: Path) -> tuple[Path, list[str]]:
    """The newest of the folders of steps, such as "checkpoint-500"; the folder if it has none."""
    steps = [
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and _COUNTED.fullmatch(entry.name) and _weights_in(entry)
    ]
    if not steps:
        return folder, []
    name = max(steps, key=lambda step: [int(count) for _, count in _COUNTED.findall(step)])
    path, notes = _found(folder / name)
    return path, [f"{name} is the newest of {len(steps)} steps in the folder, by name", *notes]


def _outstanding(names: Sequence[str]) -> tuple[str | None, str]:
    """The best or the newest of several checkpoints by their names; None if no name says it.

    >>> _outstanding(["last.pth.tar", "model_best.pth.tar"])
    ('model_best.pth.tar', 'the best')
    >>> _outstanding(["epoch=9-step=90.ckpt", "epoch=10-step=100.ckpt"])
    ('epoch=10-step=100.ckpt', 'the newest')
    >>> _outstanding(["resnet18.pth", "resnet50.pth"])
    (None, '')
    """
    best = [name for name in names if _BEST.search(name)]
    if len(best) == 1:
        return best[0], "the best"
    names = best or names
    counts = {name: [int(count) for _, count in _COUNTED.findall(name)] for name in names}
    alike = {re.sub(r"\d+(\.\d+)?", "#", name) for name in names}
    if len(alike) > 1 or not all(counts.values()):
        return None, ""
    newest = max(names, key=lambda name: counts[name])
    return newest, "the newest"


def _weights_in(folder: Path) -> list[str]:
    """The names of checkpoints in a folder; the parts of one with an index are left out."""
    names = [entry.name for entry in folder.iterdir()]
    indices = [
        name
        for name in names
        if name.removesuffix(INDEX).endswith(SUFFIXES) and name.endswith(INDEX)
    ]
    whole = {name.removesuffix(INDEX) for name in indices}
    files = [
        name
        for name in preferred_names(names)
        if not ((part := _PART.fullmatch(name)) and f"{part[1]}{part[4]}" in whole)
    ]
    return sorted([*files, *indices])
