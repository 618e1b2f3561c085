"""ONNX files as graphs: nodes, arrays and metadata, read and written without other packages.

An ONNX file is a protocol buffer: a tree of numbered fields. ``parse`` follows the few messages
that hold a graph and its weights, and skips all others. Nothing in a file is run. Arrays may lie in
another file of the same folder; the caller reads that one.

References: the ONNX authors, ``onnx/onnx.proto``, 2017-. Google, "Protocol Buffers: Encoding".
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from flaxtransfer.paths import shortened

__all__ = ["FLOATS", "Graph", "Node", "parse", "serialize"]


_MOST_FIELDS = 1_000_000
"""Fields of all messages; a ResNet-152 has about 30,000."""

_MOST_AXES = 8

_NUMBERS: dict[int, Any] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    4: np.dtype("<u2"),
    5: np.dtype("<i2"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    10: np.dtype("<f2"),
    11: np.dtype("<f8"),
    12: np.dtype("<u4"),
    13: np.dtype("<u8"),
}
"""The dtype of each number in a file; text, complex and narrower numbers are left out."""
_BFLOAT16 = 16
"""The number of the one dtype that numpy knows through jax alone."""

FLOATS = (1, 10, 11, _BFLOAT16)
"""The floating-point ones."""

_TYPED = {4: np.dtype("<f4"), 10: np.dtype("<f8")}
"""Fields of an array whose numbers have their own width; in 5, 7 and 11 they have any."""

Value = int | memoryview
Shape = tuple[int | str, ...]


def _dtype(number: int) -> Any:
    if number == _BFLOAT16:
        import jax.numpy as jnp  # Here: the names of formats are asked for without jax.

        return np.dtype(jnp.bfloat16)
    return _NUMBERS.get(number)


@dataclasses.dataclass(frozen=True)
class Node:
    """An operator.

    Args:
        kind: the operator's name, such as "Conv"; with its domain where that is not ONNX's.
        inputs: names of tensors; "" for one that is left out.
        outputs: likewise.
        attributes: integers, floats, texts, tuples of them, or arrays.
        name: for a person.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = ""

    @property
    def output(self) -> str:
        """The first output."""
        return self.outputs[0]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A graph with its weights.

    Args:
        nodes: in an order in which they can be computed.
        arrays: the constant tensors by name.
        inputs: the shape of each tensor that the caller gives; names stand for free sizes.
        outputs: likewise, of what the graph returns.
        metadata: text by name.
        name: of the graph.
    """

    nodes: tuple[Node, ...]
    arrays: Mapping[str, np.ndarray]
    inputs: Mapping[str, Shape]
    outputs: Mapping[str, Shape]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "graph"


def parse(
    data: bytes | memoryview, beside: Callable[[str], bytes | memoryview] | None = None
) -> Graph:
    """Reads a graph; arrays are views of the bytes.

    Args:
        data: the whole file.
        beside: returns the bytes of another file by its name, for arrays that lie there.

    Raises:
        ValueError: a damaged file, one without a graph, or arrays of other types.

    >>> graph = Graph((), {"x": np.ones(2, np.float32)}, {"images": ("batch", 3)}, {})
    >>> parse(serialize(graph, 17)).arrays["x"].tolist()
    [1.0, 1.0]
    """
    reader = _Reader(beside)
    model = reader.fields(memoryview(data))
    if len(model.get(7, ())) != 1:
        raise ValueError("an ONNX model must hold one graph; the file is incomplete or damaged")
    graph = reader.fields(_bytes(model[7][0]))
    if 15 in graph:
        raise ValueError("the arrays of an ONNX model must not be sparse")
    arrays: dict[str, np.ndarray] = {}
    for value in graph.get(5, ()):
        name, array = reader.tensor(_bytes(value))
        arrays[name] = array
    return Graph(
        tuple(reader.node(_bytes(value)) for value in graph.get(1, ())),
        arrays,
        dict(reader.tensor_type(_bytes(value)) for value in graph.get(11, ())),
        dict(reader.tensor_type(_bytes(value)) for value in graph.get(12, ())),
        dict(reader.pair(_bytes(value)) for value in model.get(14, ())),
        _text(graph.get(2, (b"",))[-1]),
    )


class _Reader:
    """Reads messages and counts their fields."""

    def __init__(self, beside: Callable[[str], bytes | memoryview] | None) -> None:
        self.beside = beside
        self.left = _MOST_FIELDS

    def fields(self, data: memoryview) -> dict[int, list[Value]]:
        """The values of a message by the number of their field."""
        found: dict[int, list[Value]] = {}
        place, end = 0, len(data)
        while place < end:
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"an ONNX model must have at most {_MOST_FIELDS:,} fields")
            tag, place = _varint(data, place)
            number, wire = tag >> 3, tag & 7
            value: Value
            if wire == 0:
                value, place = _varint(data, place)
            else:
                if wire == 2:
                    size, place = _varint(data, place)
                elif wire in (1, 5):
                    size = 8 if wire == 1 else 4
                else:
                    raise _damaged()
                if size > end - place:
                    raise _damaged()
                value = data[place : place + size]
                place += size
            found.setdefault(number, []).append(value)
        return found

    def node(self, data: memoryview) -> Node:
        """Reads a NodeProto."""
        fields = self.fields(data)
        domain = _text(fields.get(7, (b"",))[-1])
        kind = _text(fields.get(4, (b"",))[-1])
        return Node(
            kind if domain in ("", "ai.onnx") else f"{domain}.{kind}",
            tuple(map(_text, fields.get(1, ()))),
            tuple(map(_text, fields.get(2, ()))),
            dict(self.attribute(_bytes(value)) for value in fields.get(5, ())),
            _text(fields.get(3, (b"",))[-1]),
        )

    def attribute(self, data: memoryview) -> tuple[str, Any]:
        """Reads an AttributeProto; of a subgraph only that there is one."""
        fields = self.fields(data)
        value: Any = None
        if 2 in fields:
            # The shortest decimal number that is this one: 1e-05, not 9.999999747e-06.
            value = float(str(_numbers(fields[2], np.dtype("<f4"))[-1]))
        elif 3 in fields:
            value = int(_integers(fields[3])[-1])
        elif 4 in fields:
            value = _text(fields[4][-1])
        elif 5 in fields:
            value = self.tensor(_bytes(fields[5][-1]))[1]
        elif 7 in fields:
            value = tuple(map(float, _numbers(fields[7], np.dtype("<f4"))))
        elif 8 in fields:
            value = tuple(map(int, _integers(fields[8])))
        return _text(fields.get(1, (b"",))[-1]), value

    def tensor(self, data: memoryview) -> tuple[str, np.ndarray]:
        """Reads a TensorProto: its name and array."""
        fields = self.fields(data)
        name = _text(fields.get(8, (b"",))[-1])
        what = f"the array {shortened(name, 80)!r}"
        shape = tuple(map(int, _integers(fields.get(1, ()))))
        (number,) = _integers(fields.get(2, (0,))[-1:])
        dtype = _dtype(int(number))
        if dtype is None:
            raise ValueError(f"{what} must have numbers of 8 bits or more, got ONNX type {number}")
        if len(shape) > _MOST_AXES or min(shape, default=0) < 0:
            raise ValueError(f"{what} must have sizes >= 0 on at most {_MOST_AXES} axes")
        if fields.get(14, [0])[-1] == 1:
            stored: Any = self._elsewhere(fields.get(13, ()), what)
        elif 9 in fields:
            stored = _bytes(fields[9][-1])
        else:
            array = self._listed(fields, dtype)
            if array.size != math.prod(shape):
                raise _unfilled(what, shape, dtype, array.nbytes)
            return name, array.reshape(shape)
        if len(stored) != math.prod(shape) * dtype.itemsize:
            raise _unfilled(what, shape, dtype, len(stored))
        return name, np.frombuffer(stored, dtype).reshape(shape)

    def _listed(self, fields: Mapping[int, list[Value]], dtype: np.dtype[Any]) -> np.ndarray:
        """The numbers of an array that are fields of their own."""
        for number, own in _TYPED.items():
            if number in fields:
                return _numbers(fields[number], own).astype(dtype)
        listed = _integers([value for number in (5, 7, 11) for value in fields.get(number, ())])
        # The bits of half-precision numbers are stored as integers.
        if dtype.kind in "fV" and dtype.itemsize == 2:
            return listed.astype(np.uint16).view(dtype)
        return listed.astype(dtype)

    def _elsewhere(self, entries: Iterable[Value], what: str) -> memoryview:
        said = dict(self.pair(_bytes(entry)) for entry in entries)
        name, offset, length = (said.get(key, "") for key in ("location", "offset", "length"))
        if self.beside is None:
            raise ValueError(f"{what} must lie in the file, but lies in {shortened(name, 80)!r}")
        if not all(number.isascii() and number.isdigit() for number in (offset or "0", length)):
            raise ValueError(f"{what} must state where it begins and how long it is, as integers")
        content = memoryview(self.beside(name))
        start, size = (int(number[:20] or 0) for number in (offset, length))
        if start + size > len(content):
            raise ValueError(
                f"{what} must end within {shortened(name, 80)!r}, which has {len(content):,} "
                f"bytes, got {start:,} + {size:,}; the file is incomplete or another one"
            )
        return content[start : start + size]

    def tensor_type(self, data: memoryview) -> tuple[str, Shape]:
        """Reads a ValueInfoProto: the name and shape of a tensor."""
        fields = self.fields(data)
        sizes: list[int | str] = []
        inner = fields
        for number in (2, 1, 2):
            inner = self.fields(_bytes(inner[number][-1])) if number in inner else {}
        for dimension in inner.get(1, ()):
            size = self.fields(_bytes(dimension))
            if 1 in size:
                sizes.append(int(_integers(size[1])[-1]))
            else:
                sizes.append(_text(size.get(2, (b"",))[-1]))
        return _text(fields.get(1, (b"",))[-1]), tuple(sizes)

    def pair(self, data: memoryview) -> tuple[str, str]:
        """Reads a StringStringEntryProto."""
        fields = self.fields(data)
        key, value = (_text(fields.get(number, (b"",))[-1]) for number in (1, 2))
        return key, value


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """An integer of 7 bits per byte, lowest first, and the place behind it."""
    result = 0
    for shift, byte in enumerate(data[place : place + 10]):
        result |= (byte & 127) << 7 * shift
        if byte < 128:
            return result, place + shift + 1
    raise _damaged()


def _integers(values: Iterable[Value]) -> np.ndarray:
    """Signed 64-bit integers, one by one or packed."""
    parts = [
        np.array([value & (1 << 64) - 1], np.uint64) if isinstance(value, int) else _packed(value)
        for value in values
    ]
    return np.concatenate(parts or [np.zeros(0, np.uint64)]).view(np.int64)


def _packed(data: memoryview) -> np.ndarray:
    """The integers of a packed field."""
    found = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(found < 128)
    if not len(found):
        return np.zeros(0, np.uint64)
    lengths = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] != len(found) - 1 or lengths.max() > 10:
        raise _damaged()
    result = np.zeros(len(ends), np.uint64)
    for place in range(int(lengths.max())):
        has = lengths > place
        digits = found[(ends - lengths + 1)[has] + place].astype(np.uint64) & np.uint64(127)
        result[has] |= digits << np.uint64(7 * place)
    return result


def _numbers(values: Iterable[Value], dtype: Any) -> np.ndarray:
    """Numbers of a fixed width, one by one or packed."""
    parts = [_bytes(value) for value in values]
    if any(len(part) % dtype.itemsize for part in parts):
        raise _damaged()
    if len(parts) == 1:
        return np.frombuffer(parts[0], dtype)
    return np.frombuffer(b"".join(parts), dtype)


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise _damaged()
    return value


def _text(value: Value | bytes) -> str:
    return bytes(value).decode(errors="backslashreplace") if not isinstance(value, int) else ""


def _damaged() -> ValueError:
    return ValueError("the ONNX model is incomplete or damaged: its fields do not fit together")


def _unfilled(what: str, shape: tuple[int, ...], dtype: Any, size: int) -> ValueError:
    return ValueError(f"the bytes of {what[4:]} must fit {dtype.name}{list(shape)}, got {size:,}")


def serialize(graph: Graph, opset: int) -> bytes:
    """The bytes of an ONNX file; every input and output has float32 numbers.

    Args:
        graph: to be written.
        opset: version of ONNX's operators.
    """
    body: list[Any] = [_field(1, _node_bytes(node)) for node in graph.nodes]
    body.append(_field(2, graph.name))
    for name, array in graph.arrays.items():
        body += _tensor_parts(name, np.asarray(array, order="C"))
    body += [_field(11, _type_bytes(name, shape)) for name, shape in graph.inputs.items()]
    body += [_field(12, _type_bytes(name, shape)) for name, shape in graph.outputs.items()]
    head = _field(1, _IR_VERSION) + _field(2, "flaxtransfer")
    metadata = (
        _field(14, _field(1, key) + _field(2, text)) for key, text in graph.metadata.items()
    )
    tail = _field(8, _field(1, "") + _field(2, opset)) + b"".join(metadata)
    return b"".join([head, _tag(7, sum(map(len, body))), *body, tail])


_IR_VERSION = 8
"""Version of the format; onnxruntime reads it since 1.10."""


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _digits(number << 3) + _digits(value)
    value = value.encode() if isinstance(value, str) else value
    return _tag(number, len(value)) + value


def _tag(number: int, size: int) -> bytes:
    """What stands before ``size`` bytes of a field."""
    return _digits(number << 3 | 2) + _digits(size)


def _digits(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def _node_bytes(node: Node) -> bytes:
    return b"".join(
        [
            *(_field(1, name) for name in node.inputs),
            *(_field(2, name) for name in node.outputs),
            _field(3, node.name),
            _field(4, node.kind),
            *(_field(5, _attribute_bytes(*item)) for item in node.attributes.items()),
        ]
    )


def _attribute_bytes(name: str, value: Any) -> bytes:
    if isinstance(value, float):
        content, kind = _digits(2 << 3 | 5) + np.float32(value).tobytes(), 1
    elif isinstance(value, int):
        content, kind = _field(3, value), 2
    elif isinstance(value, str):
        content, kind = _field(4, value), 3
    else:
        content, kind = b"".join(_field(8, each) for each in value), 7
    return _field(1, name) + content + _field(20, kind)


def _tensor_parts(name: str, array: np.ndarray) -> tuple[bytes, memoryview]:
    number = next(n for n in (*_NUMBERS, _BFLOAT16) if _dtype(n) == array.dtype)
    head = b"".join(_field(1, size) for size in array.shape) + _field(2, number) + _field(8, name)
    content = memoryview(array.reshape(-1).view(np.uint8))
    head += _tag(9, len(content))
    return _tag(5, len(head) + len(content)) + head, content


def _type_bytes(name: str, shape: Shape) -> bytes:
    sizes = [_field(1, _field(1 if isinstance(size, int) else 2, size)) for size in shape]
    tensor = _field(1, 1) + _field(2, b"".join(sizes))
    return _field(1, name) + _field(2, _field(1, tensor))
