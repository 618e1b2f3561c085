"""Detect the container format of a weight file, and read its arrays by key.

The content of a file decides, not its name. ``read_tensors`` also reads folders and checkpoints in
several files, and finds the network among the keys.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from queue import SimpleQueue
from typing import Any

import numpy as np

from flaxtransfer.files import check_regular, check_seal
from flaxtransfer.paths import shortened, visible
from flaxtransfer.weights.naming import native, onnx
from flaxtransfer.weights.readers import (
    archives,
    array_files,
    folders,
    torch_file,
    torch_pickle,
)

__all__ = [
    "CONTAINERS",
    "SUFFIXES",
    "Container",
    "Listing",
    "Tensors",
    "has_weights_name",
    "list_arrays",
    "read_tensors",
    "recognize",
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
    "safetensors": Container("a safetensors file", (".safetensors",), array_files.read_safetensors),
    "torch": Container(
        "a file of torch.save",
        (".pth", ".pt", ".bin", ".ckpt", ".pth.tar"),
        torch_file.read_torch,
        nested=True,
    ),
    "npz": Container("an archive of numpy's", (".npz",), archives.read_npz),
    "hdf5": Container("an HDF5 file", (".h5", ".hdf5"), array_files.read_hdf5),
    "keras": Container("an archive of Keras'", (".keras",), array_files.read_keras_archive),
    "msgpack": Container("a msgpack of flax's", (".msgpack",), array_files.read_flax),
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


def recognize(data: bytes | memoryview, name: str) -> tuple[Container, list[str]]:
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


def _kind(whole: bytes | memoryview, name: str) -> str:
    data, size = bytes(whole[:_HEAD]), len(whole)
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
        return _kind_of_archive(archives.names(whole))
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
    if name.endswith(".safetensors") and (size < 9 or data[4:8] == bytes(4)):
        return "safetensors"
    kinds = "; ".join(f"{c.text} ({', '.join(c.suffixes)})" for c in CONTAINERS.values())
    raise ValueError(f"unknown format: the first bytes are {data[:8]!r}; known: {kinds}")


_HEAD = 1 << 10


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
    if {"archive_format", "serialized_exported_program.json"} & last:
        raise ValueError(
            "the file is a program of torch.export; load it in torch with torch.export.load and "
            "save its state_dict, preferably as .safetensors"
        )
    held = shortened(visible(", ".join(names[:5])), 200) + (", ..." if len(names) > 5 else "")
    raise ValueError(
        "unknown zip archive: torch's holds data.pkl, Keras' holds model.weights.h5, numpy's "
        f"holds only .npy files, got {held or 'nothing'}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Tensors:
    """The content of a weight file.

    Args:
        path: where it was read.
        arrays: by the file's keys, with the file's dtypes and axes.
        metadata: text by name, as in a safetensors header.
        digest: waits for the SHA-256 of the bytes, in hexadecimal, which is computed while the
            arrays are used. Before it, nothing may be written to them.
        notes: what was removed or converted.
        beside: arrays around the network, by key; its head may be there.
        place: the names in the file that lead to the network.
        settings: the ``config.json`` next to it, where it was read already.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    digest: Callable[[], str]
    notes: tuple[str, ...]
    beside: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    place: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None


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
    path, chosen = folders.find(path, SUFFIXES)
    search = _Search(key)
    try:
        if path.is_dir():
            read = _folder(path)
        elif path.name.endswith(folders.INDEX):
            read = _parts(path)
        else:
            read = _file(path, search.wanted)
        arrays, metadata, digest, told = read
        found = search.found or native.find(arrays, key)
    except ValueError as error:
        raise ValueError(f"{path}: {visible(error)}") from error.__cause__
    if not arrays:
        raise ValueError(f"{path} holds no arrays")
    network = {short: arrays[name] for name, short in found.keys.items()}
    if 2 * sum(a.nbytes for a in network.values()) < sum(a.nbytes for a in arrays.values()):
        # Arrays in place keep all bytes of the file, those of an optimizer too.
        network = {short: array.copy() for short, array in network.items()}
    return Tensors(
        path,
        network,
        metadata,
        digest,
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


_Read = tuple[dict[str, np.ndarray], dict[str, str], Callable[[], str], list[str]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a file holds, whether or not it is a network.

    Args:
        path: where it was read.
        container: how it is packed, for a person.
        size: in bytes.
        arrays: by key; of torch's files what stands for them, with shape and dtype.
        notes: which of several files it is, and what its name says.
    """

    path: Path
    container: str
    size: int
    arrays: Mapping[str, Any]
    notes: tuple[str, ...]


def list_arrays(path: Path) -> Listing:
    """Lists the arrays of a weight file or folder; of torch's files no numbers are read.

    Raises:
        FileNotFoundError, ValueError: as ``read_tensors``, but for what is no network.
    """
    path, chosen = folders.find(path, SUFFIXES)
    listed: dict[str, Any] = {}

    def note(tensors: Mapping[str, torch_pickle.Tensor]) -> list[str]:
        listed.update(tensors)
        return []

    try:
        if path.is_dir():
            container, (arrays, _, _, told) = "a folder of orbax", _folder(path)
            size = sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
        elif path.name.endswith(folders.INDEX):
            parts = sorted(set(folders.weight_map(path).values()))
            container, (arrays, _, _, told) = f"{len(parts)} files and their index", _parts(path)
            size = sum(path.with_name(part).stat().st_size for part in parts)
        else:
            with _opened(path) as (data, _):
                kind, named = recognize(data, path.name)
                container, size = kind.text, len(data)
                arrays, _, told, _ = _unpacked(path, data, kind, note)
                told = [*named, *told]
    except ValueError as error:
        raise ValueError(f"{path}: {visible(error)}") from error.__cause__
    listed.update(arrays)
    return Listing(path, container, size, listed, (*chosen, *told))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[memoryview, Future[str]]]:
    """The bytes of a file and their checksum, which is computed while they are read and used.

    The bytes are read once, into memory of numpy's, whose pages are large. They become the arrays,
    and no mapped file can change under them; nor can who has the arrays, before the checksum has
    seen them. That a file is not what its run wrote is said before what else is wrong with it.
    """
    check_regular(path)
    size = path.stat().st_size
    try:
        held = np.empty(size, np.uint8)
    except MemoryError as error:
        raise ValueError(f"it does not fit into memory: it has {size:,} bytes") from error
    place, ends, thread = 0, SimpleQueue[int](), ThreadPoolExecutor(1)
    sha256 = thread.submit(_checksum, held, ends)
    thread.shutdown(wait=False)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(memoryview(held)[place : place + _PIECE]):
                place += count
                ends.put(place)
            if place < size or file.read(1):
                raise ValueError(f"it must not change while it is read, got {place:,} bytes first")
    finally:
        ends.put(_NO_MORE)
    held.flags.writeable = False
    try:
        yield memoryview(held), sha256
    finally:
        check_seal(path, sha256.result)


_PIECE = 1 << 22
"""Bytes that are read at once: a millisecond."""
_NO_MORE = -1


def _checksum(held: np.ndarray, ends: SimpleQueue[int]) -> str:
    """The SHA-256 of bytes that arrive, of which each number in the queue is the end so far.

    A step takes all that has arrived: between two steps, the thread waits for the interpreter,
    which others hold for up to 5 ms.
    """
    checksum, start, more = hashlib.sha256(), 0, True
    while more:
        news = [ends.get()]
        while not ends.empty():
            news.append(ends.get())
        more, end = _NO_MORE not in news, max(start, *news)
        checksum.update(held[start:end])
        start = end
    return checksum.hexdigest()


def _file(path: Path, wanted: torch_file.Choice = list) -> _Read:
    with _opened(path) as (data, own):
        container, named = recognize(data, path.name)
        arrays, metadata, notes, others = _unpacked(path, data, container, wanted)
    digest = _of_all([own.result, *others]) if others else own.result
    return arrays, metadata, digest, [*named, *notes]


def _of_all(digests: Sequence[Callable[[], str]]) -> Callable[[], str]:
    """Waits for the checksums of several files: the checksum of them, in order."""
    return lambda: hashlib.sha256(bytes.fromhex("".join(each() for each in digests))).hexdigest()


def _unpacked(
    path: Path, data: memoryview, container: Container, wanted: torch_file.Choice
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str], list[Callable[[], str]]]:
    """Arrays, metadata and notes of a container; checksums of other files that it keeps some in."""
    read: dict[str, tuple[memoryview, Callable[[], str]]] = {}

    def beside(name: str) -> memoryview:
        if name not in read:
            read[name] = _neighbor(path, name)
        return read[name][0]

    more = ([wanted] if container.nested else []) + ([beside] if container.spread else [])
    try:
        arrays, metadata, notes = container.read(data, *more)
    except ValueError as error:
        # Readers quote names and values of the file, which may be as long as the file.
        raise ValueError(shortened(visible(error), _TOLD)) from error.__cause__
    if read:
        notes = [f"arrays were read from {', '.join(sorted(read))} next to the file", *notes]
    return arrays, metadata, notes, [read[name][1] for name in sorted(read)]


_TOLD = 500
"""Characters of what a reader says; the path comes before it."""


def _neighbor(path: Path, name: str) -> tuple[memoryview, Callable[[], str]]:
    """The bytes of another file in the folder of a file that names it, and their checksum."""
    if not folders.is_part_name(name):
        raise ValueError(f"it must name files in its own folder, got {shortened(repr(name), 100)}")
    other = path.with_name(name)
    if not other.exists():
        raise ValueError(f"it needs {name!r} in the same folder, which is not there")
    with _opened(other) as (data, sha256):
        return data, sha256.result


def _parts(index: Path) -> _Read:
    """Reads the files that an index names; the checksum is that of their checksums, in order."""
    places = folders.weight_map(index)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} needs {len(names)} files, and {len(missing)} of them are not in the folder: "
            f"{shortened(', '.join(missing), 300)}"
        )
    arrays: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    digests: list[Callable[[], str]] = []
    notes = [f"read from {len(names)} files"]
    for name in names:
        held, more, digest, told = _file(index.parent / name)
        expected = {key for key, place in places.items() if place == name}
        if odd := sorted(expected ^ held.keys()):
            raise ValueError(
                f"{name} must hold what the index says, but {len(odd)} keys differ: "
                f"{shortened(visible(', '.join(odd)), 200)}"
            )
        arrays |= held
        metadata |= more
        notes += [note for note in told if note not in notes]
        digests.append(digest)
    return arrays, metadata, _of_all(digests), notes


def _folder(path: Path) -> _Read:
    """Reads a tree of orbax; the checksum is that of its leaves, sorted by path."""
    found = array_files.read_orbax(path)
    if found is None:
        raise FileNotFoundError(folders.nothing_in(path, SUFFIXES))
    arrays, metadata, notes = found
    checksum = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        checksum.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        checksum.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return arrays, metadata, checksum.hexdigest, notes
