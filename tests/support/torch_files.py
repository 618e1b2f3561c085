"""Files as torch.save writes them, made without torch: nested containers with arrays."""

import struct
import zipfile
from argparse import Namespace

import numpy as np

_KINDS = {
    "float32": "Float",
    "float16": "Half",
    "float64": "Double",
    "int64": "Long",
    "bool": "Bool",
}


def save_torch(content, path):
    """Writes containers, namespaces, numbers, text and arrays as torch.save does."""
    storages = []
    pickled = b"\x80\x02" + _pickled(content, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for number, array in enumerate(storages):
            archive.writestr(f"archive/data/{number}", array.tobytes())
    return path


def _pickled(value, storages):
    if isinstance(value, dict):
        items = (_pickled(x, storages) for pair in value.items() for x in pair)
        return b"}(" + b"".join(items) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(_pickled(each, storages) for each in value) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(each, storages) for each in value) + b"t"
    if isinstance(value, Namespace):
        return b"cargparse\nNamespace\n)\x81" + _pickled(vars(value), storages) + b"b"
    if isinstance(value, str):
        return b"X" + struct.pack("<i", len(value.encode())) + value.encode()
    if value is None:
        return b"N"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    return _tensor(np.require(value, requirements="C"), storages)


def _tensor(array, storages):
    number = next((n for n, other in enumerate(storages) if other is array), len(storages))
    storages += [array] if number == len(storages) else []
    kind = _KINDS[array.dtype.name].encode()
    key, place = _pickled(str(number), []), _pickled("cpu", [])
    storage = b"(" + _pickled("storage", []) + b"ctorch\n" + kind + b"Storage\n" + key + place
    storage += _pickled(array.size, []) + b"tQ"
    strides = [step // array.itemsize for step in array.strides]
    axes = [
        b"(" + b"".join(_pickled(int(n), []) for n in numbers) + b"t"
        for numbers in (array.shape, strides)
    ]
    name = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return name + storage + _pickled(0, []) + axes[0] + axes[1] + b"\x89}tR"
