"""How a file is packed, by its content: what it is called was decided by a person or a cache."""

import dataclasses
from collections.abc import Callable
from pathlib import PurePath

import numpy as np

from flaxtransfer.weights import (
    archive,
    flax_file,
    hdf5_file,
    npz_file,
    safetensors_file,
    torch_file,
)

__all__ = ["CONTAINERS", "SUFFIXES", "Container", "has_weights_name", "recognise"]


@dataclasses.dataclass(frozen=True)
class Container:
    """A way to pack named arrays into a file.

    Args:
        text: what a person calls such a file.
        suffixes: under which such files are published.
        read: arrays, metadata and notes of the bytes of one.
    """

    text: str
    suffixes: tuple[str, ...]
    read: Callable[[bytes], tuple[dict[str, np.ndarray], dict[str, str], list[str]]]


CONTAINERS: dict[str, Container] = {
    "safetensors": Container("a safetensors file", (".safetensors",), safetensors_file.read),
    "torch": Container(
        "a file of torch.save", (".pth", ".pt", ".bin", ".ckpt", ".pth.tar"), torch_file.read
    ),
    "npz": Container("an archive of numpy's", (".npz",), npz_file.read),
    "hdf5": Container("an HDF5 file", (".h5", ".hdf5"), hdf5_file.read),
    "keras": Container("an archive of Keras'", (".keras",), hdf5_file.read_archive),
    "msgpack": Container("a msgpack of flax's", (".msgpack",), flax_file.read),
}

SUFFIXES = tuple(suffix for container in CONTAINERS.values() for suffix in container.suffixes)

_MOST_HEADER = 100_000_000
"""Bytes of a safetensors header, by the format's definition."""


def has_weights_name(name: str) -> bool:
    """Whether files of this name are usually weights.

    >>> has_weights_name("moco_v2_800ep_pretrain.pth.tar"), has_weights_name("images.tar")
    (True, False)
    """
    return PurePath(name).name.endswith(SUFFIXES)


def recognise(data: bytes, name: str) -> tuple[Container, list[str]]:
    r"""The container of a file, and a note where its name says another one or none.

    Args:
        data: the whole file; its first bytes decide, and the names of the files in a zip archive.
        name: of the file.

    Raises:
        ValueError: an empty file, what a failed download leaves, or bytes of another kind.

    >>> recognise(b"\x89HDF\r\n\x1a\n", "weights.h5")[0].text
    'an HDF5 file'
    >>> recognise(b"\x89HDF\r\n\x1a\n", "0a4e6b")[1]
    ['an HDF5 file by its content; its name does not say so']
    """
    container = CONTAINERS[_kind(data, name)]
    if name.endswith(container.suffixes):
        return container, []
    said = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
    if said is None:
        return container, [f"{container.text} by its content; its name does not say so"]
    return container, [f"{container.text} by its content, though its name ends in {said}"]


def _kind(data: bytes, name: str) -> str:
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            "this is a Git LFS pointer and not the weights; fetch them with `git lfs pull`"
        )
    if data.lstrip()[:1] == b"<":
        raise ValueError("this is a web page and not the weights; the download went wrong")
    # The header of a safetensors file is JSON behind its length, whose bytes may be anything.
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and length <= _MOST_HEADER:
        return "safetensors"
    if data.startswith(b"PK\x03\x04"):
        return _kind_of_archive(archive.names(data))
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if data[0] == 0x80 and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "torch"
    # A dictionary of 1 to 15, or of more entries, whose first key is a text.
    key = {0xDE: 3, 0xDF: 5}.get(data[0], 1)
    if (0x80 < data[0] < 0x90 or key > 1) and data[key : key + 1] > b"\x9f":
        return "msgpack"
    # Cut off or damaged: its reader says by how much.
    if name.endswith(".safetensors") and (len(data) < 9 or data[4:8] == bytes(4)):
        return "safetensors"
    kinds = "; ".join(f"{c.text} ({', '.join(c.suffixes)})" for c in CONTAINERS.values())
    raise ValueError(
        f"its first bytes, {data[:8]!r}, are those of no container of weights; there are: {kinds}"
    )


def _kind_of_archive(names: list[str]) -> str:
    last = {name.rsplit("/", 1)[-1] for name in names}
    if "data.pkl" in last:
        return "torch"
    if "model.weights.h5" in names:
        return "keras"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise ValueError(
        "a zip archive of no known kind: torch's has data.pkl in it, Keras' model.weights.h5, "
        f"numpy's nothing but .npy files, and this one {held or 'nothing'}"
    )
