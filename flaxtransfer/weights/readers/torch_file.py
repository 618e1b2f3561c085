"""Read files of ``torch.save``, in both of its layouts, without torch and without running code.

Since 2020 such a file is a zip archive with one pickle and one file per storage. Before, it was a
sequence of pickles followed by the storages. ``torch_pickle`` decodes the pickle; here the storages
of the weights become arrays. Storages of an optimizer are not read.

Reference: PyTorch contributors, "torch/serialization.py", 2016-.
"""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from flaxtransfer.paths import shortened, visible
from flaxtransfer.weights.readers import archives, torch_pickle
from flaxtransfer.weights.readers.torch_pickle import NOT_DENSE, Foreign, Refused, Storage, Tensor

__all__ = [
    "NAMES",
    "Choice",
    "Undamaged",
    "class_names",
    "names_of",
    "read_torch",
    "tells_names",
    "tensors",
]


_DEEPEST = 16
_LONGEST = 500
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DAMAGED = "it is truncated, damaged or not a torch checkpoint: "


@dataclasses.dataclass(frozen=True)
class _Content:
    """The value of the pickle, and access to the bytes of its storages: copied, or in place."""

    value: Any
    bytes_of: Callable[[Storage, bool], bytes | memoryview]
    swapped: bool = False
    notes: tuple[str, ...] = ()


Choice = Callable[[Mapping[str, Tensor]], Collection[str]]
"""Says by which of these names arrays are wanted."""


def read_torch(
    data: bytes | memoryview, choose: Choice = list
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of a torch file: arrays, class names as metadata, and notes.

    Containers in containers give names such as "state_dict/model.conv1.weight".

    Args:
        data: the bytes of the file.
        choose: says which tensors are wanted; only their storages are read.

    Raises:
        ValueError: a file that would run code, is damaged, or does not hold named tensors.
    """
    try:
        with _zipped(data) if data[:2] == b"PK" else _streamed(data) as content:
            named = tensors(content.value)
            sound = {name: each for name, each in named.items() if isinstance(each, Tensor)}
            wanted = choose(sound)
            # A tensor that is not dense is refused where its neighbors are wanted.
            near = {name.rpartition("/")[0] for name in wanted}
            dense = [n for n in named if n in sound or n.rpartition("/")[0] not in near]
            if len(dense) < len(named):
                odd = [
                    f"{shortened(visible(n), 80)} ({NOT_DENSE})" for n in named if n not in dense
                ]
                raise Undamaged(f"it holds other things than tensors by name: {', '.join(odd[:5])}")
            weights = {name: sound[name] for name in wanted}
            room = archives.most(len(data))
            unfolded = sum(math.prod(t.shape) * t.dtype.itemsize for t in weights.values())
            if unfolded > room:
                raise Undamaged(
                    f"its tensors would unpack to {unfolded:,} bytes, which weights never do"
                )
            # Arrays in place keep all bytes of the file, those of an optimizer too.
            most = 2 * unfolded > len(data)
            arrays = {key: _array(tensor, content, most) for key, tensor in weights.items()}
            names = class_names(content.value)
            return arrays, {NAMES: json.dumps(names)} if names else {}, list(content.notes)
    except (Undamaged, MemoryError):
        raise
    except Refused as error:
        raise ValueError(_refusal(shortened(visible(error.name)))) from error
    except Exception as error:
        # The exception for a damaged pickle depends on the damaged byte; no list is complete.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(_DAMAGED + shortened(visible(reason), 300)) from error


def tensors(content: Any) -> dict[str, Tensor | Foreign]:
    """All tensors with a name in what a training script saved, and marks of those not dense.

    Names of containers are separated by "/". Other entries (epoch, options) are passed over. A
    container that occurs twice is visited once.

    Raises:
        ValueError: no tensor has a name.

    >>> fc = Tensor(Storage("0", np.dtype("f4"), 1), np.dtype("f4"), 0, (1,), (1,))
    >>> list(tensors({"epoch": 3, "nets": [{"fc.bias": fc}], "args": Foreign("Namespace")}))
    ['nets/0/fc.bias']
    """
    found: dict[str, Tensor | Foreign] = {}
    for path, value in _walk(content):
        odd = isinstance(value, Foreign) and value.what == NOT_DENSE
        if path and (isinstance(value, Tensor) or odd):
            found.setdefault(path, value)
    if not any(isinstance(each, Tensor) for each in found.values()):
        what = content.what if isinstance(content, Foreign) else type(content).__name__
        held = list(found) or (list(map(str, content)) if isinstance(content, Mapping) else [])
        of = f" of {shortened(visible(', '.join(held)), 200)}" if held else ""
        why = f" ({NOT_DENSE})" if found else ""
        raise Undamaged(f"it must hold tensors by name, got a {what}{of}{why}")
    return found


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    """Every value with a name, with its path; what containers hold comes after them."""
    seen: set[int] = set()
    left = [("", content, 0)]
    while left:
        path, value, depth = left.pop()
        yield path, value
        held = value.held if isinstance(value, Foreign) else value
        if isinstance(held, list | tuple):
            held = {
                n: e for n, e in enumerate(held) if isinstance(e, dict | list | tuple | Foreign)
            }
        deep = depth == _DEEPEST or len(path) > _LONGEST
        if not isinstance(held, Mapping) or id(value) in seen or deep:
            continue
        seen.add(id(value))
        below = f"{path}/" if path else ""
        inner = [(f"{below}{str(k)[:_LONGEST]}", each, depth + 1) for k, each in held.items()]
        left += reversed(inner)


NAMES = f"{archives.FOUND}class names"
"""Key of the metadata with the class names in a file by their places, as JSON."""

_NAMED = {
    *("classes", "classnames", "classlabels", "labels", "labelnames", "categories", "vocab"),
    *("categorynames", "targetnames", "classtoidx", "classtoindex", "class2idx", "class2id"),
    *("idxtoclass", "indextoclass", "idx2class", "id2class", "idx2label", "idxtolabel"),
    *("id2label", "label2id", "label2idx", "labeltoidx"),
}
"""Under which training scripts keep class names, in lower case without "_"."""
_MOST_NAMES, _MOST_LISTS = 100_000, 20


def class_names(content: Any) -> dict[str, list[str]]:
    """The class names in what a training script saved, by their places.

    >>> class_names({"meta": {"CLASSES": ("cat", "dog")}, "args": {"classes": 2}})
    {'meta/CLASSES': ['cat', 'dog']}
    """
    found: dict[str, list[str]] = {}
    for path, value in _walk(content):
        names = names_of(path.rpartition("/")[2], value)
        if names is not None and len(found) < _MOST_LISTS:
            found[path] = names
    return found


def tells_names(key: str) -> bool:
    """Whether training scripts keep class names under this key."""
    return key.lower().replace("_", "") in _NAMED


def names_of(key: str, value: Any) -> list[str] | None:
    """The class names under a key: a list, numbers by name or names by number; None for others.

    >>> names_of("class_to_idx", {"dog": 1, "cat": 0}), names_of("labels", ["LABEL_0"])
    (['cat', 'dog'], None)
    """
    if not tells_names(key) or not value:
        return None
    if isinstance(value, Mapping) and len(value) <= _MOST_NAMES:
        pairs = [(k, v) if isinstance(v, str) else (v, k) for k, v in value.items()]
        whole = [(int(n), name) for n, name in pairs if str(n).isdecimal() and len(str(n)) < 9]
        whole.sort(key=lambda pair: pair[0])
        if [n for n, _ in whole] != list(range(len(value))):
            return None
        value = [name for _, name in whole]
    if not isinstance(value, list | tuple) or len(value) > _MOST_NAMES:
        return None
    if not all(isinstance(name, str) for name in value):
        return None
    unnamed = all(name == f"LABEL_{n}" for n, name in enumerate(value))
    return None if unnamed else list(value)


class Undamaged(ValueError):
    """The error of an undamaged file, whose text is passed on unchanged."""


@contextmanager
def _zipped(data: bytes | memoryview) -> Iterator[_Content]:
    with archives.opened(data) as file:
        entries = {entry.filename: entry for entry in file.infolist()}
        pickles = [name for name in entries if name.rsplit("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"an archive must hold one data.pkl, got {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if root + "constants.pkl" in entries:
            raise Undamaged(
                "it is a TorchScript program, which includes code; load it in torch with "
                "torch.jit.load and save its state_dict(), preferably as .safetensors"
            )
        unchecked = all(e.CRC == 0 for e in entries.values() if e.file_size)
        if unchecked:
            # torch writes 0 if it computed no checksums; None makes zipfile skip the comparison.
            for entry in entries.values():
                entry.CRC = None  # type: ignore[assignment]
        value, _ = torch_pickle.read_pickle(io.BytesIO(archives.read(file, pickles[0])))
        named = root + "byteorder"
        order = archives.read(file, named) if named in entries else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"byteorder must be little or big, got {order[:20]!r}")
        read_before: dict[str, bytes | memoryview] = {}

        def bytes_of(storage: Storage, in_place: bool) -> bytes | memoryview:
            name = f"{root}data/{storage.key}"
            if name not in entries:
                raise ValueError(f"its file {name!r} is missing")
            if name not in read_before:
                held = archives.stored(file, name, data) if in_place else None
                read_before[name] = archives.read(file, name) if held is None else held
            return read_before[name]

        notes = ("the archive has no checksums: damage cannot be detected",) if unchecked else ()
        yield _Content(value, bytes_of, swapped=order == b"big", notes=notes)


@contextmanager
def _streamed(data: bytes | memoryview) -> Iterator[_Content]:
    file = archives.as_file(data)
    first, _ = torch_pickle.read_pickle(file)
    if first != _MAGIC:
        raise Undamaged(
            "it is a pickle that torch.save did not write; if you trust its author, unpickle it "
            "and save its arrays with numpy.savez or as .safetensors"
        )
    protocol, _ = torch_pickle.read_pickle(file)
    system, _ = torch_pickle.read_pickle(file)
    if protocol != _PROTOCOL:
        raise ValueError(
            f"the version of torch's former layout must be {_PROTOCOL}, got {protocol!r}"
        )
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise ValueError("a file in torch's former layout must be little-endian")
    value, storages = torch_pickle.read_pickle(file)
    keys, _ = torch_pickle.read_pickle(file)
    at, spans = file.tell(), {}
    if set(map(str, keys)) != set(storages):
        raise ValueError(
            f"its tensors need the storages {sorted(storages)[:5]}, but the file holds "
            f"{sorted(map(str, keys))[:5]}"
        )
    for key in keys:
        storage = storages[str(key)]
        size = storage.count * (1 if storage.dtype is None else storage.dtype.itemsize)
        if int.from_bytes(data[at : at + 8], "little") != storage.count or at + 8 + size > len(
            data
        ):
            raise ValueError(f"the storage {key!r} must have {size:,} bytes")
        spans[str(key)] = memoryview(data)[at + 8 : at + 8 + size]
        at += 8 + size
    if at != len(data):
        raise ValueError(f"{len(data) - at:,} bytes follow the last storage")
    yield _Content(value, lambda storage, in_place: spans[storage.key])


def _array(tensor: Tensor, content: _Content, in_place: bool) -> np.ndarray:
    """A view of the storage's bytes; its bounds are checked here, because numpy does not."""
    storage, kind = tensor.storage, tensor.dtype
    data = content.bytes_of(storage, in_place)
    size = storage.count * (1 if storage.dtype is None else storage.dtype.itemsize)
    if len(data) != size:
        raise ValueError(f"a storage must have {size:,} bytes, got {len(data):,}")
    numbers = np.frombuffer(data, kind)
    if content.swapped and kind.itemsize > 1:
        part = np.dtype(f"u{kind.itemsize // (2 if kind.kind == 'c' else 1)}")
        numbers = numbers.view(part).byteswap().view(kind)
    end = len(numbers) if storage.length is None else storage.start + storage.length
    if end > len(numbers):
        raise ValueError("a view exceeds its storage")
    numbers = numbers[storage.start : end]
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, kind)
    steps = zip(tensor.shape, tensor.strides, strict=True)
    if tensor.offset + sum((n - 1) * step for n, step in steps) >= len(numbers):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} exceeds its storage")
    strides = tuple(step * kind.itemsize for step in tensor.strides)
    array = np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides)
    array = -array if tensor.negative else array
    return array.conj() if tensor.conjugate else array


def _refusal(name: str) -> str:
    networks = (
        *("torch.nn.modules.", "torchvision.models.", "timm.models.", "fastai.", "a class with"),
        *("transformers.models.", "mmpretrain.models.", "mmcls.models.", "torch.fx.", "__main__."),
    )
    whole = "it is a whole network, pickled with its code: " if name.startswith(networks) else ""
    return (
        f"{whole}it is refused, and no code in it was run, because it calls {name}; weights must "
        "be tensors only. If you trust its author, load it in torch and save model.state_dict(), "
        "preferably as .safetensors"
    )
