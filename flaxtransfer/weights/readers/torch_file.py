"""Files of `torch.save`, in both of its layouts, read without torch and without running anything.

Since 2020 such a file is a zip archive with a pickle in it and a file for each storage; before, it
was a row of pickles and the storages behind them. What the pickle holds is for `pickled`; here the
storages become arrays, and only those of the weights: what an optimizer kept is not unfolded.

Reference: PyTorch contributors, "torch/serialization.py", 2016-.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from flaxtransfer.weights.readers import archives, torch_pickle
from flaxtransfer.weights.readers.torch_pickle import Foreign, Refused, Storage, Tensor

__all__ = ["read_torch", "unwrap"]


WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")
"""Where training scripts keep the weights, best first: an average before what it averages."""

_DEEPEST = 8
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DAMAGED = "it is truncated, damaged or no checkpoint of torch: "


@dataclasses.dataclass(frozen=True)
class _Content:
    """What the pickle holds, and how the bytes of its storages are come by."""

    value: Any
    bytes_of: Callable[[Storage], bytes | memoryview]
    swapped: bool = False
    notes: tuple[str, ...] = ()


def read_torch(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Arrays, no metadata, and notes of a whole file.

    Raises:
        ValueError: a file that wants to run code, is damaged, or holds no named tensors.
    """
    try:
        with _zipped(data) if data.startswith(b"PK") else _streamed(data) as content:
            weights, notes = unwrap(content.value)
            _require_tensors(weights)
            room = archives.most(len(data))
            unfolded = sum(math.prod(t.shape) * t.dtype.itemsize for t in weights.values())
            if unfolded > room:
                raise _Whole(f"its tensors would unfold to {unfolded:,} bytes, which no weights do")
            arrays = {key: _array(tensor, content) for key, tensor in weights.items()}
            return arrays, {}, [*content.notes, *notes]
    except (_Whole, MemoryError):
        raise
    except Refused as error:
        raise ValueError(_refusal(error.name)) from error
    except Exception as error:
        # What a damaged pickle leads to depends on the byte that is wrong: no list is complete.
        raise ValueError(
            _DAMAGED + (str(error).splitlines() or [type(error).__name__])[0]
        ) from error


def unwrap(content: Any) -> tuple[Mapping[Any, Any], list[str]]:
    """The weights inside of what a training script saved, and a note on which were taken.

    Raises:
        ValueError: no mapping.

    >>> unwrap({"epoch": 3, "model": {"fc.bias": 0}})
    ({'fc.bias': 0}, ["the weights are those under 'model'"])
    """
    notes: list[str] = []
    while isinstance(content, Mapping) and len(notes) < _DEEPEST:
        present = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not present:
            return content, notes
        others = f" (not those under {', '.join(map(repr, present[1:]))})" if present[1:] else ""
        notes.append(f"the weights are those under {present[0]!r}{others}")
        content = content[present[0]]
    what = content.what if isinstance(content, Foreign) else type(content).__name__
    raise _Whole(f"it holds a {what} and no tensors by name")


class _Whole(ValueError):
    """What is said of a file that is not damaged."""


@contextmanager
def _zipped(data: bytes) -> Iterator[_Content]:
    with archives.opened(data) as file:
        entries = {entry.filename: entry for entry in file.infolist()}
        pickles = [name for name in entries if name.rsplit("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"an archive with {len(pickles)} pickles called data.pkl in it")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in entries:
            raise _Whole(
                "it is a TorchScript program, code and all; in torch, load it with torch.jit.load "
                "and save its state_dict(), best as .safetensors"
            )
        unchecked = all(e.CRC == 0 for e in entries.values() if e.file_size)
        if unchecked:
            # torch writes 0 where it was told to compute none, and zipfile then compares nothing.
            for entry in entries.values():
                entry.CRC = None  # type: ignore[assignment]
        value, _ = torch_pickle.read_pickle(io.BytesIO(file.read(pickles[0])))
        order = file.read(root + "byteorder") if root + "byteorder" in entries else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"an order of bytes called {order[:20]!r}")
        read_before: dict[str, bytes] = {}

        def bytes_of(storage: Storage) -> bytes:
            name = f"{root}data/{storage.key}"
            if name not in entries:
                raise ValueError(f"its file {name!r} is missing")
            if name not in read_before:
                read_before[name] = file.read(name)
            return read_before[name]

        notes = ("the archive has no checksums: damage to it would not show",) if unchecked else ()
        yield _Content(value, bytes_of, swapped=order == b"big", notes=notes)


@contextmanager
def _streamed(data: bytes) -> Iterator[_Content]:
    file = io.BytesIO(data)
    first, _ = torch_pickle.read_pickle(file)
    if first != _MAGIC:
        raise ValueError("a pickle that torch.save did not write")
    protocol, _ = torch_pickle.read_pickle(file)
    system, _ = torch_pickle.read_pickle(file)
    if protocol != _PROTOCOL or not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError(f"version {protocol!r} of torch's former layout, or one of big endians")
    value, storages = torch_pickle.read_pickle(file)
    keys, _ = torch_pickle.read_pickle(file)
    at, spans = file.tell(), {}
    if set(map(str, keys)) != set(storages):
        raise ValueError(
            f"its tensors are in the storages {sorted(storages)[:5]}, and behind it there are "
            f"{sorted(map(str, keys))[:5]}"
        )
    for key in keys:
        storage = storages[str(key)]
        size = storage.count * (1 if storage.dtype is None else storage.dtype.itemsize)
        if int.from_bytes(data[at : at + 8], "little") != storage.count or at + 8 + size > len(
            data
        ):
            raise ValueError(f"the storage {key!r} has not the {size:,} bytes that it should have")
        spans[str(key)] = memoryview(data)[at + 8 : at + 8 + size]
        at += 8 + size
    if at != len(data):
        raise ValueError(f"{len(data) - at:,} bytes too many")
    yield _Content(value, lambda storage: spans[storage.key])


def _require_tensors(weights: Mapping[Any, Any]) -> None:
    foreign = [
        f"{str(key)[:80]} ({value.what if isinstance(value, Foreign) else type(value).__name__})"
        for key, value in weights.items()
        if not isinstance(key, str) or not isinstance(value, Tensor)
    ]
    if foreign:
        more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
        raise _Whole(f"it holds other things than tensors by name: {', '.join(foreign[:10])}{more}")


def _array(tensor: Tensor, content: _Content) -> np.ndarray:
    """A view of the storage's bytes, whose bounds are checked here: numpy does not."""
    storage, kind = tensor.storage, tensor.dtype
    data = content.bytes_of(storage)
    size = storage.count * (1 if storage.dtype is None else storage.dtype.itemsize)
    if len(data) != size:
        raise ValueError(f"a storage of {size:,} bytes has {len(data):,}")
    numbers = np.frombuffer(data, kind)
    if content.swapped and kind.itemsize > 1:
        part = np.dtype(f"u{kind.itemsize // (2 if kind.kind == 'c' else 1)}")
        numbers = numbers.view(part).byteswap().view(kind)
    end = len(numbers) if storage.length is None else storage.start + storage.length
    if end > len(numbers):
        raise ValueError("a view beyond its storage")
    numbers = numbers[storage.start : end]
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, kind)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    if tensor.offset + sum((n - 1) * step for n, step in steps) >= len(numbers):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} goes beyond its storage")
    strides = tuple(step * kind.itemsize for step in tensor.strides)
    array = np.lib.stride_tricks.as_strided(
        numbers[tensor.offset :], tensor.shape, strides, writeable=False
    )
    array = -array if tensor.negative else array
    return array.conj() if tensor.conjugate else array


def _refusal(name: str) -> str:
    networks = ("torch.nn.modules.", "torchvision.models.", "timm.models.", "a class with")
    whole = "it is a whole network, pickled with its code: " if name.startswith(networks) else ""
    return (
        f"{whole}it is refused, and nothing in it was run, because it wants to call {name} and "
        "weights are tensors alone. If you trust its author, load it in torch and save "
        "model.state_dict(), best as .safetensors"
    )
