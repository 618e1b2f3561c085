"""The algebra of masks: expressions with ``& | - ~``, their text, and what they select."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flaxtransfer.paths import flatten, listing, map_with_path, segment_position, suggest
from flaxtransfer.predicates import PREDICATES, segment_or_empty

__all__ = ["Atom", "Both", "Either", "Less", "Mask", "Not", "select"]


class Mask:
    """An expression that selects leaves; made by the functions of ``masks``.

    ``a & b`` is what both select, ``a | b`` what either does, ``a - b`` what a does and b does
    not, ``~a`` what a does not. Masks are immutable, hashable and equal when their expressions
    are, and ``repr`` is the expression. Calling one resolves it: ``mask(tree)``.

    >>> Atom("stage", (4,)) - Atom("batch_norm") | Atom("head")
    stage(4) - batch_norm() | head()
    """

    __slots__ = ()

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other) if isinstance(other, Mask) else NotImplemented

    def __sub__(self, other: "Mask") -> "Mask":
        return Less(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> "Mask":
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} is neither true nor false: compose masks with & | - ~ "
            "instead of 'and', 'or', 'not'"
        )

    def __call__(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """The tree of booleans: ``flaxtransfer.masks.resolve(self, tree)``."""
        taken = select(self, tree)
        return map_with_path(lambda path, leaf: path in taken, tree)


@dataclass(frozen=True, repr=False, slots=True)
class Atom(Mask):
    """A call of one of the functions of ``masks``."""

    function: str
    arguments: tuple[int | str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.function}({', '.join(map(repr, self.arguments))})"


@dataclass(frozen=True, repr=False, slots=True)
class Not(Mask):
    """What ``mask`` does not select."""

    mask: Mask

    def __repr__(self) -> str:
        return f"~{_bracketed(self.mask, _BINDING[Not])}"


@dataclass(frozen=True, repr=False, slots=True)
class _Binary(Mask):
    left: Mask
    right: Mask

    def __repr__(self) -> str:
        # All three group to the left in Python, so an equal operator needs brackets on the right.
        binding = _BINDING[type(self)]
        left, right = _bracketed(self.left, binding), _bracketed(self.right, binding + 1)
        return f"{left} {_SYMBOL[type(self)]} {right}"


class Both(_Binary):
    """What both sides select."""

    __slots__ = ()


class Either(_Binary):
    """What at least one side selects."""

    __slots__ = ()


class Less(_Binary):
    """What the left side selects and the right side does not."""

    __slots__ = ()


# Python's own precedence, which ``repr`` follows and ``parse`` reads.
_SYMBOL: dict[type[Mask], str] = {Either: "|", Both: "&", Less: "-"}
_BINDING: dict[type[Mask], int] = {Either: 1, Both: 2, Less: 3, Not: 4, Atom: 5}


def _bracketed(mask: Mask, binding: int) -> str:
    return f"({mask!r})" if _BINDING[type(mask)] < binding else repr(mask)


def select(mask: Mask, tree: Mapping[str, Any], *, allow_empty: bool = False) -> frozenset[str]:
    """The paths of the leaves that a mask selects; see ``flaxtransfer.masks.resolve``."""
    flat = flatten(tree)
    taken = _evaluate(mask, flat)
    if allow_empty:
        return taken
    problems = [problem for atom in dict.fromkeys(_atoms(mask)) if (problem := _amiss(atom, flat))]
    if not taken:
        problems.insert(0, f"{mask!r} selects none of the {len(flat)} leaves")
    if problems:
        raise ValueError(f"{'; '.join(problems)}. {_inventory(flat)}")
    return taken


def _evaluate(mask: Mask, flat: Mapping[str, Any]) -> frozenset[str]:
    match mask:
        case Both():
            return _evaluate(mask.left, flat) & _evaluate(mask.right, flat)
        case Either():
            return _evaluate(mask.left, flat) | _evaluate(mask.right, flat)
        case Less():
            return _evaluate(mask.left, flat) - _evaluate(mask.right, flat)
        case Not():
            return frozenset(flat) - _evaluate(mask.mask, flat)
        case Atom():
            accepts = PREDICATES[mask.function]
            return frozenset(p for p, leaf in flat.items() if accepts(p, leaf, *mask.arguments))
    raise TypeError(f"{mask!r} is no mask")


def _atoms(mask: Mask) -> Iterator[Atom]:
    match mask:
        case Atom():
            yield mask
        case Not():
            yield from _atoms(mask.mask)
        case _Binary():
            yield from _atoms(mask.left)
            yield from _atoms(mask.right)


def _amiss(atom: Atom, flat: Mapping[str, Any]) -> str:
    """What is wrong with an atom that names something which is not there."""
    segments = {segment_or_empty(path) for path in flat}
    match atom:
        case Atom("stage" | "stages", numbers):
            absent = [f"layer{number}" for number in numbers if f"layer{number}" not in segments]
            return f"{atom!r}: there is no {' and no '.join(absent)}" if absent else ""
        case Atom("glob", (str(pattern),)) if not _evaluate(atom, flat):
            # Wildcards are like nothing; what is left of the pattern can be compared.
            name = "/".join(filter(None, (re.sub(r"[*?]", "", c) for c in pattern.split("/"))))
            return f"{atom!r} matches nothing{suggest(name, flat)}"
    return ""


def _inventory(flat: Mapping[str, Any]) -> str:
    segments = sorted({segment_or_empty(path) for path in flat} - {""}, key=segment_position)
    if not flat:
        return "The tree has no leaves"
    known = f"segments {', '.join(segments)}" if segments else "no segment of a ResNet"
    return f"The tree has {known}; its leaves are {listing(flat)}"
