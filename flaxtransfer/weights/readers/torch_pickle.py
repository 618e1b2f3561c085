"""Unpickle torch files as data, without running code.

A pickle is a program for a stack machine, and two of its instructions call any function that the
file names. This module implements the machine without calls: no name is ever looked up in Python.
Names that weights are made of are on a list, and the results of their calls are built here. Names
that training scripts store next to weights are on another list, and a ``Foreign`` mark replaces
their values. Every other name is refused. ``pickletools`` of the standard library decodes the
instructions and allocates no more than the file holds.

Reference: A. Pitrou, "Pickle protocol 5 with out-of-band data", PEP 574, 2018.
"""

import contextlib
import dataclasses
import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

__all__ = [
    "Foreign",
    "Name",
    "Refused",
    "Storage",
    "Tensor",
    "key_of",
    "known",
    "made",
    "ordered",
    "read_pickle",
]


_STORAGES: dict[str, Any] = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": jnp.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
}
_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": jnp.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "float8_e4m3fn": jnp.float8_e4m3fn,
    "float8_e5m2": jnp.float8_e5m2,
    "float8_e4m3fnuz": jnp.float8_e4m3fnuz,
    "float8_e5m2fnuz": jnp.float8_e5m2fnuz,
}

STORAGES: dict[str, np.dtype | None] = {
    **{
        f"{module}.{kind}Storage": np.dtype(dtype)
        for module in ("torch", "torch.cuda")
        for kind, dtype in _STORAGES.items()
    },
    # Of bytes: the tensors say what they are.
    "torch.UntypedStorage": None,
    "torch.storage.UntypedStorage": None,
}
DTYPES = {f"torch.{name}": np.dtype(dtype) for name, dtype in _DTYPES.items()}
_QUANTISED = {f"torch.{kind}Storage" for kind in ("QInt8", "QUInt8", "QInt32", "QUInt4x2")}

INERT = {
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            "bytearray",
            "complex",
            "set",
            "frozenset",
            "list",
            "dict",
            "int",
            "float",
            "long",
            "str",
        )
    ),
    "_codecs.encode",
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "collections.deque",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    # Random states and histories are arrays of numpy's.
    *(
        f"numpy.{module}.{name}"
        for module in ("core", "_core")
        for name in ("multiarray._reconstruct", "numeric._frombuffer")
    ),
    "numpy.ndarray",
    *(f"datetime.{name}" for name in ("date", "datetime", "timedelta", "timezone")),
    "functools.partial",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "types.SimpleNamespace",
    "typing.Any",
    # Options and states of other libraries' training.
    "easydict.EasyDict",
    "fastcore.foundation.L",
    "mmcv.utils.config.ConfigDict",
    "mmengine.config.config.ConfigDict",
    "mmengine.logging.history_buffer.HistoryBuffer",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    "yacs.config.CfgNode",
    *(f"torch.optim.{name}" for name in ("adam.Adam", "adamw.AdamW", "rmsprop.RMSprop", "sgd.SGD")),
    *(
        f"torch.optim.lr_scheduler.{name}"
        for name in (
            "CosineAnnealingLR",
            "MultiStepLR",
            "OneCycleLR",
            "ReduceLROnPlateau",
            "StepLR",
        )
    ),
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "torch.Size",
    "torch.Tensor",
    "torch._tensor.Tensor",
    "torch.device",
    "torch.dtype",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.serialization._get_layout",
    "torch.qint8",
    "torch.quint8",
    "torch.qint32",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
    *_QUANTISED,
}
"""Script arguments, options, histories and positions; a ``Foreign`` mark replaces each."""

_NOT_DENSE = {
    f"torch._utils._rebuild_{kind}"
    for kind in (
        "sparse_tensor",
        "sparse_csr_tensor",
        "qtensor",
        "meta_tensor_no_storage",
        "nested_tensor",
        "device_tensor_from_numpy",
        "device_tensor_from_cpu_tensor",
    )
}

MOST_AXES = 64
NOT_DENSE = "sparse, quantized or empty tensor"


class Refused(ValueError):
    """Refusal of a function or class that weights do not need; its name was not looked up."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclasses.dataclass(frozen=True, slots=True)
class Name:
    """A name "module.name" in the file."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Foreign:
    """The mark of a value that was not built, with the attributes or entries of a plain record."""

    what: str
    held: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The numbers of tensors, which are stored elsewhere in the file.

    Args:
        key: its name in the file.
        dtype: of the numbers; None if the tensors state it.
        count: number of numbers; of bytes if the tensors state the dtype.
        start: first number of a view.
        length: numbers of a view; None for all that follow.
    """

    key: str
    dtype: np.dtype | None
    count: int
    start: int = 0
    length: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """The numbers of a storage that form an array; offset and strides are in numbers, not bytes.

    Args:
        storage: of the numbers.
        dtype: of the numbers.
        offset: of the first.
        shape: of the array.
        strides: step along each axis.
        negative: whether the numbers are stored negated.
        conjugate: whether complex numbers are stored conjugated.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool = False
    conjugate: bool = False


def known(text: str) -> Name:
    """The name, if it is on one of the lists.

    Raises:
        Refused: it is on none of them.

    >>> known("os.system")
    Traceback (most recent call last):
    flaxtransfer.weights.readers.torch_pickle.Refused: os.system
    """
    if not any(text in names for names in (_CALLS, STORAGES, DTYPES, INERT, _NOT_DENSE)):
        raise Refused(text)
    return Name(text)


def made(called: Any, given: Any) -> Any:
    """The result of a call: a value that weights are made of, or a ``Foreign`` mark.

    Raises:
        ValueError: the called value is not a function, or has other arguments than in torch.

    >>> made(known("collections.OrderedDict"), ([["fc.bias", 1]],))
    {'fc.bias': 1}
    >>> made(known("argparse.Namespace"), ())
    Foreign(what='Namespace')
    """
    if not isinstance(called, Name) or not isinstance(given, tuple):
        raise ValueError("the called value is not a function")
    if called.text in _CALLS:
        return _CALLS[called.text](*given)
    return Foreign(NOT_DENSE if called.text in _NOT_DENSE else called.text.rsplit(".", 1)[-1])


def storage(given: Any) -> Storage | Foreign:
    """The storage that a tuple in a torch file describes.

    Raises:
        Refused: the source code of a class, which pickled networks include.
        ValueError: another tuple.
    """
    if isinstance(given, tuple) and given[:1] == ("module",):
        raise Refused("a class with its source code")
    if not isinstance(given, tuple) or given[:1] != ("storage",) or len(given) not in (5, 6):
        raise ValueError("a persistent id must describe a storage")
    kind, key, _, count = given[1:5]
    view = given[5] if len(given) == 6 else None
    if isinstance(kind, Name) and kind.text in _QUANTISED:
        return Foreign(NOT_DENSE)
    if not isinstance(kind, Name) or kind.text not in STORAGES:
        raise ValueError("a storage of an unknown kind")
    if not isinstance(key, str | int):
        raise ValueError("a storage without a name")
    start, length = (0, None) if view is None else (_whole(view[1]), _whole(view[2]))
    return Storage(str(key), STORAGES[kind.text], _whole(count), start, length)


def ordered(items: Any = None) -> dict[Any, Any]:
    """A dictionary from a list of pairs. The list is consumed: a file that refers to one list a
    million times would otherwise make a million copies of it.

    Raises:
        ValueError: other things than pairs, a consumed list, or an invalid key (``key_of``).
    """
    if items is None:
        return {}
    if not isinstance(items, list):
        raise ValueError("a dictionary must be built from a list of pairs")
    found = {key_of(key): value for key, value in items}
    items[:] = [None]
    return found


def key_of(key: Any) -> Any:
    """The key, if a dictionary may have it: nested tuples can take forever to hash.

    Raises:
        ValueError: an invalid key.
    """
    flat = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, int) and abs(part) > MOST_KEY for part in flat):
        raise ValueError(f"a number that is a key must be at most {MOST_KEY:,}")
    if all(part is None or isinstance(part, str | int | float | bytes) for part in flat):
        return key
    raise ValueError(f"a key of a dictionary must not be a {type(key).__name__}")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
    dtype: np.dtype | None = None,
) -> Tensor | Foreign:
    del requires_grad, hooks
    if isinstance(storage, Foreign):
        return Foreign(NOT_DENSE)
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
        raise ValueError(f"a tensor with {len(shape)} axes and {len(strides)} strides")
    shape, strides = (tuple(map(_whole, numbers)) for numbers in (shape, strides))
    kind = dtype or storage.dtype
    if kind is None:
        raise ValueError("a tensor of numbers of an unknown kind")
    flags = metadata if isinstance(metadata, dict) else {}
    negative, conjugate = flags.get("neg") is True, flags.get("conj") is True
    return Tensor(storage, kind, _whole(offset), shape, strides, negative, conjugate)


def _tensor_of_bytes(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor | Foreign:
    if not isinstance(dtype, Name) or dtype.text not in DTYPES:
        raise ValueError("a tensor of numbers of an unknown kind")
    kind = DTYPES[dtype.text]
    return _tensor(storage, offset, shape, strides, requires_grad, hooks, metadata, kind)


def _parameter(tensor: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Any:
    del requires_grad, hooks, state
    return tensor


def _with_attributes(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Any:
    del kind, state
    return made(rebuild, arguments)


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"sizes and offsets must be integers >= 0, got {number!r:.40}")
    return number


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}


MOST_INSTRUCTIONS = 300_000
"""A ResNet-152 with the state of its optimizer has 10^5, and 10^5 take a second. An instruction
allocates about 100 bytes, or as much as its own length."""

MOST_KEY = 2**60
"""Whole numbers above have the hashes of smaller ones; a dictionary of such keys takes hours."""


def read_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Reads the pickle at the position of a file, and moves the position behind it.

    Returns:
        The value (numbers, text, lists, tuples, dictionaries, ``Tensor`` and ``Foreign``), and its
        storages by key.

    Raises:
        Refused: the name of a function or class that is on no list.
        ValueError: a pickle that torch does not write. Inconsistent instructions can also raise
            ``IndexError``, ``KeyError`` or ``TypeError``.

    >>> import io, pickle
    >>> read_pickle(io.BytesIO(pickle.dumps({"epoch": (3, None)})))
    ({'epoch': (3, None)}, {})
    >>> read_pickle(io.BytesIO(pickle.dumps(print)))
    Traceback (most recent call last):
    flaxtransfer.weights.readers.torch_pickle.Refused: builtins.print
    """
    machine = _Machine()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if count == MOST_INSTRUCTIONS:
            raise ValueError(f"a pickle of more than {MOST_INSTRUCTIONS:,} instructions")
        if opcode.name == "STOP":
            return machine.last(1)[0], machine.storages
        if opcode.name in _ARGUMENTS:
            machine.push(argument)
        elif opcode.name in _CONSTANTS:
            machine.push(_CONSTANTS[opcode.name]())
        elif opcode.name in _STEPS:
            _STEPS[opcode.name](machine, argument)
        elif opcode.name not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {opcode.name} is not written by torch.save")
    raise ValueError("a pickle without an end")


class _Machine:
    """The stack machine of a pickle, with its memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.push = self.stack.append

    def mark(self) -> None:
        """Marks the height of the stack."""
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        """Pops the values above the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def last(self, count: int) -> list[Any]:
        """Pops ``count`` values; the topmost comes last."""
        if len(self.stack) < count:
            raise ValueError("the pickle pops more than it pushed")
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def put(self, place: int) -> None:
        """Stores the topmost value in the memo."""
        self.memo[place] = self.stack[-1]

    def name(self) -> None:
        """Combines the two topmost texts to a name."""
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name must be text")
        self.push(known(f"{module}.{name}"))

    def call(self, arguments: int = 1) -> None:
        """Pushes the result of a call; keyword arguments, which only marks take, are dropped."""
        called, given, *_ = self.last(1 + arguments)
        self.push(made(called, given))

    def build(self) -> None:
        """Keeps the attributes of marks, and drops the ``_metadata`` of torch's dictionaries."""
        (state,) = self.last(1)
        target = self.stack[-1]
        if not isinstance(target, dict | Foreign | Tensor):
            raise ValueError(f"a {type(target).__name__} cannot have a state")
        if isinstance(target, Foreign) and isinstance(state, dict):
            target.held.update(state)

    def extend(self, values: list[Any]) -> None:
        """Adds to the list on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Foreign):
            raise ValueError(f"a {type(target).__name__} cannot be extended like a list")

    def update(self, items: list[Any]) -> None:
        """Adds to the dictionary on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif isinstance(target, Foreign):
            # The entries of a counter or a set of options may have keys of any kind.
            with contextlib.suppress(ValueError):
                target.held.update(_pairs(items))
        else:
            raise ValueError(f"a {type(target).__name__} cannot be extended like a dictionary")

    def storage(self) -> None:
        """Pushes a storage, the only kind of persistent id."""
        found = storage(self.last(1)[0])
        if isinstance(found, Storage):
            first = self.storages.setdefault(found.key, found)
            if (first.dtype, first.count) != (found.dtype, found.count):
                raise ValueError(f"the storage {found.key!r} has two dtypes or sizes")
        self.push(found)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return ordered(list(zip(items[::2], items[1::2], strict=True)))


_ARGUMENTS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": lambda: Foreign("set"),
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.last(1).clear(),
    "POP_MARK": lambda machine, _: machine.since_mark().clear(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "BINPUT": lambda machine, place: machine.put(place),
    "LONG_BINPUT": lambda machine, place: machine.put(place),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    "BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.push(machine.memo[place]),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: machine.push(_pairs(machine.since_mark())),
    "FROZENSET": lambda machine, _: machine.push(Foreign(f"{len(machine.since_mark())} values")),
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.update(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    # pickletools separates the two parts of a name by a space.
    "GLOBAL": lambda machine, text: machine.push(known(text.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.name(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "NEWOBJ_EX": lambda machine, _: machine.call(2),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}
