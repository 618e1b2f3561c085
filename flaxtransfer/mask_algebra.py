"""The algebra of masks: expressions with ``& | - ~``, and what they select on a tree.

What each function of ``flaxtransfer.masks`` means is one row of ``_PREDICATES``; the functions
document it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flaxtransfer import globs
from flaxtransfer.models.layout import LAYOUTS, Layout, layout_of
from flaxtransfer.paths import PyTree, flatten, listing, map_with_path, suggest

__all__ = ["Atom", "Compound", "Mask", "Where", "atoms", "select"]


class Mask:
    """An expression that selects leaves; made by the functions of ``masks``.

    ``a & b`` is what both select, ``a | b`` what either does, ``a - b`` what a does and b does
    not, ``~a`` what a does not. Masks are immutable, hashable and equal when their expressions
    are, and ``repr`` is the expression. Calling one resolves it: ``mask(tree)``.

    >>> from flaxtransfer.masks import batch_norm, head, stage
    >>> stage(4) - batch_norm() | head()
    stage(4) - batch_norm() | head()
    """

    __slots__ = ()

    def __and__(self, other: Mask) -> Mask:
        return Compound("&", (self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Compound("|", (self, other)) if isinstance(other, Mask) else NotImplemented

    def __sub__(self, other: Mask) -> Mask:
        return Compound("-", (self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Compound("~", (self,))

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} is neither true nor false: compose masks with & | - ~ "
            "instead of 'and', 'or', 'not'"
        )

    def __call__(self, tree: PyTree) -> Any:
        """The tree of booleans: ``flaxtransfer.masks.resolve(self, tree)``."""
        taken = select(self, flatten(tree))
        return map_with_path(lambda path, leaf: path in taken, tree)


@dataclass(frozen=True, repr=False, slots=True)
class Atom(Mask):
    """A call of one of the functions of ``masks``.

    Args:
        function: Its name.
        arguments: Its arguments.
    """

    function: str
    arguments: tuple[int | str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.function}({', '.join(map(repr, self.arguments))})"


@dataclass(frozen=True, repr=False, slots=True)
class Where(Mask):
    """A predicate of a program's own, by name; made by ``where``.

    Args:
        name: What it is called in texts.
        predicate: ``(path, leaf) -> bool``.
    """

    name: str
    predicate: Callable[[str, Any], bool]

    def __repr__(self) -> str:
        return f"where({self.name!r})"


@dataclass(frozen=True, repr=False, slots=True)
class Compound(Mask):
    """Masks joined by an operator.

    Args:
        operator: One of ``& | - ~``.
        operands: Two masks, or one for ``~``.
    """

    operator: str
    operands: tuple[Mask, ...]

    def __repr__(self) -> str:
        # All three group to the left in Python, so an equal operator needs brackets on the right.
        binding = _BINDING[self.operator]
        texts = [_bracketed(mask, binding + place) for place, mask in enumerate(self.operands)]
        return f" {self.operator} ".join(texts) if len(texts) == 2 else f"~{texts[0]}"


# Python's own precedence, which ``repr`` follows and ``parse`` reads.
_BINDING = {"|": 1, "&": 2, "-": 3, "~": 4}


def _bracketed(mask: Mask, binding: int) -> str:
    weaker = isinstance(mask, Compound) and _BINDING[mask.operator] < binding
    return f"({mask!r})" if weaker else repr(mask)


def atoms(mask: Mask) -> Iterator[Atom | Where]:
    """The masks that an expression is made of."""
    if isinstance(mask, Compound):
        for operand in mask.operands:
            yield from atoms(operand)
    elif isinstance(mask, Atom | Where):
        yield mask


def select(
    mask: Mask,
    flat: Mapping[str, Any],
    *,
    allow_empty: bool = False,
    layout: Layout | None = None,
) -> frozenset[str]:
    """The paths that a mask selects; see ``flaxtransfer.masks.selected``.

    Args:
        mask: The mask.
        flat: ``{path: leaf}``.
        allow_empty: Permits that nothing is selected, and parts that match nothing.
        layout: What the parts are called; by default that of the family whose names there are.

    Raises:
        ValueError: Nothing is selected, or a part of the mask names something that is not there.
    """
    layout = layout_of(flat) if layout is None else layout
    taken = _evaluate(mask, flat, layout)
    if allow_empty:
        return taken
    parts = dict.fromkeys(atoms(mask))
    problems = [problem for atom in parts if (problem := _amiss(atom, flat, layout))]
    if not taken:
        problems.insert(0, f"{mask!r} selects none of the {len(flat)} leaves")
    if problems:
        raise ValueError(f"{'; '.join(problems)}. {_inventory(parts, flat, layout)}")
    return taken


def _evaluate(mask: Mask, flat: Mapping[str, Any], layout: Layout | None) -> frozenset[str]:
    match mask:
        case Compound("~", (inner,)):
            return frozenset(flat) - _evaluate(inner, flat, layout)
        case Compound(symbol, (left, right)):
            sides = _evaluate(left, flat, layout), _evaluate(right, flat, layout)
            return _SETS[symbol](*sides)
        case Atom():
            accepts = _PREDICATES[mask.function]
            leaves = (_Leaf(path, leaf, layout) for path, leaf in flat.items())
            return frozenset(one.path for one in leaves if accepts(one, *mask.arguments))
        case Where():
            return frozenset(path for path, leaf in flat.items() if _accepts(mask, path, leaf))
    raise TypeError(f"{mask!r} is not a mask")


_SETS: dict[str, Callable[..., frozenset[str]]] = {
    "&": frozenset.intersection,
    "|": frozenset.union,
    "-": frozenset.difference,
}


class _Leaf(NamedTuple):
    """What a predicate may ask about."""

    path: str
    leaf: Any
    layout: Layout | None

    @property
    def segment(self) -> str:
        return self.layout.segment(self.path) if self.layout is not None else ""


def _accepts(mask: Where, path: str, leaf: Any) -> bool:
    answer = mask.predicate(path, leaf)
    if not isinstance(answer, bool | np.bool_):
        raise TypeError(f"{mask!r} must return True or False, got {answer!r} for {path!r}")
    return bool(answer)


def _in_segment(name: str) -> Callable[..., bool]:
    return lambda one: one.segment == name


def _named(name: str) -> Callable[..., bool]:
    return lambda one: one.path.split("/")[-1] == name


def _in_stages(one: _Leaf, *numbers: int) -> bool:
    return one.layout is not None and one.layout.stage_number(one.segment) in numbers


def _up_to(one: _Leaf, last: str) -> bool:
    if one.layout is None or not one.segment or last not in one.layout.segments:
        return False
    return one.layout.position(one.segment) <= one.layout.position(last)


def _is_matrix(one: _Leaf) -> bool:
    if not hasattr(one.leaf, "shape"):
        raise TypeError(f"matrices() needs shapes, but {one.path!r} is {one.leaf!r}")
    return len(one.leaf.shape) >= 2


_BATCH_NORM_NAME = re.compile(r"(?:.*_)?bn(?:[0-9_].*)?|batch_?norm.*", re.IGNORECASE)


def _is_batch_norm(one: _Leaf) -> bool:
    if any(map(_BATCH_NORM_NAME.fullmatch, one.path.split("/"))):
        return True
    # A part of a network, without the names that would tell its family, may be of any.
    layouts = LAYOUTS if one.layout is None else (one.layout,)
    return any(layout.is_batch_norm(one.path) for layout in layouts)


_PREDICATES: dict[str, Callable[..., bool]] = {
    "adapter": _in_segment("adapter"),
    "batch_norm": _is_batch_norm,
    "biases": _named("bias"),
    "everything": lambda one: True,
    "glob": lambda one, pattern: globs.match(pattern, one.path),
    "head": _in_segment("head"),
    "kernels": _named("kernel"),
    "matrices": _is_matrix,
    "stage": _in_stages,
    "stages": _in_stages,
    "stem": _in_segment("stem"),
    "up_to": _up_to,
}

_OF_A_FAMILY = ("adapter", "head", "stage", "stages", "stem", "up_to")


def _amiss(atom: Atom | Where, flat: Mapping[str, Any], layout: Layout | None) -> str:
    """What is wrong with an atom that names something which is not there."""
    match atom:
        case Atom("stage" | "stages", numbers):
            segments = {layout.segment(path) for path in flat} if layout is not None else set()
            called = [layout.stage.format(n) if layout else f"stage {n}" for n in numbers]
            absent = [name for name in called if name not in segments]
            return f"{atom!r}: there is no {' and no '.join(absent)}" if absent else ""
        case Atom("up_to", (str(segment),)) if layout and segment not in layout.segments:
            names = ", ".join(layout.segments)
            return f"{atom!r}: a {layout.family} has no {segment!r}; there are {names}"
        case Atom("glob", (str(pattern),)) if not _evaluate(atom, flat, layout):
            # Wildcards are like nothing; what is left of the pattern can be compared.
            name = "/".join(filter(None, (re.sub(r"[*?]", "", c) for c in pattern.split("/"))))
            return f"{atom!r} matches nothing{suggest(name, flat)}"
    return ""


def _inventory(
    parts: Mapping[Atom | Where, None], flat: Mapping[str, Any], layout: Layout | None
) -> str:
    if not flat:
        return "The tree has no leaves"
    if layout is not None:
        known = f"segments {', '.join(layout.present(flat))}"
    else:
        known = f"no segment of a {' or '.join(one.family for one in LAYOUTS)}"
    text = f"The tree has {known}; its leaves are {listing(flat)}"
    if layout is None and any(isinstance(a, Atom) and a.function in _OF_A_FAMILY for a in parts):
        text += ". stem(), stage(), head() and the like know the parts of that family alone: here "
        text += "use ft.glob or ft.where"
    return text
