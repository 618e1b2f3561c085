"""Pickles of torch, read as data: tensors, plain containers, and nothing that can be called.

A pickle is a program for a small machine, two of whose instructions call whatever function the
file names. Here is the machine without that: names mean what `torch_names` says and are never
looked up in Python, so that there is nothing to run. The standard library's `pickletools` decodes
the instructions, and allocates no more for them than the file holds.

Reference: A. Pitrou, "Pickle protocol 5 with out-of-band data", PEP 574, 2018.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from flaxtransfer.weights import torch_names
from flaxtransfer.weights.torch_names import Foreign, Storage, Tensor

__all__ = ["read"]

MOST_INSTRUCTIONS = 5_000_000
"""A ResNet-152 with the state of its optimizer has 10^5. An instruction makes an object of some
100 bytes, or one as long as itself."""


def read(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """The value of the pickle at a file's position, which is behind it afterwards.

    Returns:
        Numbers, text, lists, tuples, dictionaries, `Tensor` and `Foreign`; and the storages that
        were mentioned, by key.

    Raises:
        Refused: the name of a function or class that is on no list.
        ValueError: bytes that are no pickle of torch's; or whatever else Python raises where
            instructions do not fit each other (`IndexError`, `KeyError`, `TypeError`).

    >>> import io, pickle
    >>> read(io.BytesIO(pickle.dumps({"epoch": (3, None)})))
    ({'epoch': (3, None)}, {})
    >>> read(io.BytesIO(pickle.dumps(print)))
    Traceback (most recent call last):
    flaxtransfer.weights.torch_names.Refused: builtins.print
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
            raise ValueError(f"the instruction {opcode.name}, which torch.save does not write")
    raise ValueError("a pickle without an end")


class _Machine:
    """The stack of a pickle, and what it remembers."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.push = self.stack.append

    def mark(self) -> None:
        """Remembers how high the stack is."""
        self.marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        """Takes what was put on the stack after the last mark."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def last(self, count: int) -> list[Any]:
        """Takes the topmost values, the topmost last."""
        if len(self.stack) < count:
            raise ValueError("a pickle that takes more than it made")
        found = self.stack[-count:]
        del self.stack[-count:]
        return found

    def put(self, place: int) -> None:
        """Remembers the topmost value."""
        self.memo[place] = self.stack[-1]

    def name(self) -> None:
        """The name that the two topmost texts form."""
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        self.push(torch_names.known(f"{module}.{name}"))

    def call(self, arguments: int = 1) -> None:
        """What a call gives; arguments by name, which only foreign classes take, are dropped."""
        called, given, *_ = self.last(1 + arguments)
        self.push(torch_names.made(called, given))

    def build(self) -> None:
        """Drops the state of marks, and torch's `_metadata` of dictionaries."""
        self.last(1)
        if not isinstance(self.stack[-1], dict | Foreign | Tensor):
            raise ValueError(f"a {type(self.stack[-1]).__name__} with a state")

    def extend(self, values: list[Any]) -> None:
        """Adds to the list on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Foreign):
            raise ValueError(f"a {type(target).__name__} that grows like a list")

    def update(self, items: list[Any]) -> None:
        """Adds to the dictionary on top of the stack."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, Foreign):
            raise ValueError(f"a {type(target).__name__} that grows like a dictionary")

    def storage(self) -> None:
        """What lies outside of the pickle: the numbers of tensors, and nothing else."""
        found = torch_names.storage(self.last(1)[0])
        if isinstance(found, Storage):
            first = self.storages.setdefault(found.key, found)
            if (first.dtype, first.count) != (found.dtype, found.count):
                raise ValueError(f"the storage {found.key!r} is of two kinds")
        self.push(found)


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return torch_names.ordered(list(zip(items[::2], items[1::2], strict=True)))


_ARGUMENTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
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
    "GLOBAL": lambda machine, text: machine.push(torch_names.known(text.replace(" ", ".", 1))),
    "STACK_GLOBAL": lambda machine, _: machine.name(),
    "REDUCE": lambda machine, _: machine.call(),
    "NEWOBJ": lambda machine, _: machine.call(),
    "NEWOBJ_EX": lambda machine, _: machine.call(2),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.storage(),
}
