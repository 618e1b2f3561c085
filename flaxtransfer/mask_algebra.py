"""The algebra of masks: expressions with ``& | - ~``, globs, and what they select on a tree.

What each function of ``flaxtransfer.masks`` means is one row of ``_PREDICATES``; the functions
document it.

The grammar of globs over the paths of leaves, such as "encoder/**/bias": ``?`` is one character and
``*`` any number of them, within a component; ``**`` is any number of components, none included;
``{a,b}`` are alternatives; ``[0-9]`` and ``[!0-9]`` are classes, in which a special character
stands for itself: ``[*]``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flaxtransfer.models.layout import LAYOUTS, Layout, layout_of
from flaxtransfer.paths import PyTree, flatten, listing, map_with_path, shortened, suggest

__all__ = ["Atom", "Compound", "Mask", "Where", "atoms", "check_glob", "matches_glob", "select"]


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
    "glob": lambda one, pattern: matches_glob(pattern, one.path),
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


def matches_glob(pattern: str, path: str) -> bool:
    """Whether a glob matches a whole path.

    The grammar: ``?`` ``*`` ``**`` ``{a,b}`` ``[0-9]`` ``[!0-9]``.

    Raises:
        ValueError: A pattern outside the grammar; the text says where.

    >>> matches_glob("encoder/*/dense?/kernel", "encoder/0/dense1/kernel")
    True
    >>> matches_glob("encoder/*", "encoder/0/dense1/kernel")
    False
    >>> matches_glob("**/norm[0-9]/{scale,bias}", "norm1/scale")
    True
    """
    return _compiled(pattern).matches(path)


def check_glob(pattern: str) -> None:
    """Raises for a pattern outside the grammar, before there is a path to match.

    Raises:
        ValueError: As ``match``.
    """
    _compiled(pattern)


MOST_CHARACTERS, MOST_BRACES, MOST_EXPANDED = 2000, 64, 50_000
"""Limits of a glob: characters, opened braces, and characters with all alternatives written out.

Twenty pairs of braces have a million alternatives; a pattern of a person has fewer than a hundred.
"""


class _Glob(NamedTuple):
    """A glob that is ready to be matched, in time linear in the path for each of its components.

    Args:
        expression: All alternatives with at most one ``**``, for paths that end with a ``/``, so
            that each component ends alike; None where there are none.
        walks: The other alternatives, by component; None is ``**``. A regular expression would try
            every way to share the path out among several of them.
    """

    expression: re.Pattern[str] | None
    walks: tuple[tuple[re.Pattern[str] | None, ...], ...]

    def matches(self, path: str) -> bool:
        if self.expression is not None and self.expression.fullmatch(path + "/"):
            return True
        return any(_walk(walk, path.split("/")) for walk in self.walks)


def _walk(walk: tuple[re.Pattern[str] | None, ...], components: list[str]) -> bool:
    """Whether components match, by the set of places in the pattern that each may stand at."""

    def with_skipped(places: set[int]) -> set[int]:
        # ``**`` may stand for none.
        for place in range(len(walk)):
            if place in places and walk[place] is None:
                places.add(place + 1)
        return places

    places = with_skipped({0})
    for component in components:
        after = set()
        for place in places - {len(walk)}:
            part = walk[place]
            if part is None:
                after |= {place} if component else set()
            elif part.fullmatch(component):
                after.add(place + 1)
        places = with_skipped(after)
    return len(walk) in places


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> _Glob:
    opened = pattern.count("{")
    if len(pattern) > MOST_CHARACTERS or opened > MOST_BRACES:
        raise ValueError(
            f"glob {_quoted(pattern)} must have at most {MOST_CHARACTERS:,} characters and "
            f"{MOST_BRACES} '{{', got {len(pattern):,} and {opened}"
        )
    plain_ones, walks = [], []
    for plain in _expand(pattern, pattern):
        components = plain.split("/")
        if "" in components:
            raise ValueError(f"glob {_quoted(pattern)} has an empty component")
        translated = [_component(component, pattern) for component in components]
        if components.count("**") > 1:
            walks.append(
                tuple(
                    None if component == "**" else re.compile(expression.removesuffix("/"))
                    for component, expression in zip(components, translated, strict=True)
                )
            )
        else:
            plain_ones.append("".join(translated))
    return _Glob(re.compile("|".join(plain_ones)) if plain_ones else None, tuple(walks))


def _quoted(pattern: str) -> str:
    return shortened(repr(pattern))


def _expand(text: str, pattern: str) -> list[str]:
    """Writes ``{a,b}`` out as one pattern for each alternative."""
    depth, starts, i = 0, [0], 0
    while i < len(text):
        if text[i] == "[":
            i = _class_end(text, i, pattern)
        elif text[i] == "{":
            if depth == 0:
                opened, starts = i, [i + 1]
            depth += 1
        elif text[i] == "," and depth == 1:
            starts.append(i + 1)
        elif text[i] == "}":
            depth -= 1
            if depth < 0:
                raise ValueError(f"glob {_quoted(pattern)} closes a brace that it never opened")
            if depth == 0:
                ends = [*(start - 1 for start in starts[1:]), i]
                heads = [text[start:end] for start, end in zip(starts, ends, strict=True)]
                tails = _expand(text[i + 1 :], pattern)
                inner = [text[:opened] + each for head in heads for each in _expand(head, pattern)]
                size = sum(map(len, inner)) * len(tails) + sum(map(len, tails)) * len(inner)
                if size > MOST_EXPANDED:
                    raise ValueError(
                        f"glob {_quoted(pattern)} has too many alternatives: written out they must "
                        f"have at most {MOST_EXPANDED:,} characters"
                    )
                return [head + tail for head in inner for tail in tails]
        i += 1
    if depth:
        raise ValueError(f"glob {_quoted(pattern)} never closes a brace that it opened")
    return [text]


def _class_end(text: str, start: int, pattern: str) -> int:
    """The index of the ``]`` that closes the class opened at ``start``."""
    first = start + (2 if text[start + 1 : start + 2] in ("!", "^") else 1)
    # Directly after the opening a "]" is a member, as in every shell.
    end = text.find("]", first + 1)
    if end < 0:
        raise ValueError(f"glob {_quoted(pattern)} never closes a '[', or the class is empty")
    return end


def _component(component: str, pattern: str) -> str:
    if component == "**":
        return "(?:[^/]+/)*"
    if "**" in re.sub(r"\[.*?\]", "[]", component):
        raise ValueError(
            f"glob {_quoted(pattern)}: '**' stands for whole components, as in 'a/**/b'"
        )
    # Between two stars the first match is as good as any later one, so that it may be final, "(?>":
    # otherwise the tries would multiply with each star.
    chunks, chunk, i = [], "", 0
    while i < len(component):
        character = component[i]
        if character == "[":
            end = _class_end(component, i, pattern)
            chunk += _class(component[i + 1 : end], pattern)
            i = end
        elif character == "*":
            chunks.append(chunk)
            chunk = ""
        else:
            chunk += {"?": "[^/]"}.get(character) or re.escape(character)
        i += 1
    if not chunks:
        return chunk + "/"
    first, *middle = chunks
    return first + "".join(f"(?>[^/]*?{each})" for each in middle) + f"[^/]*{chunk}/"


def _class(members: str, pattern: str) -> str:
    negated = members[0] in "!^"
    members = members[1:] if negated else members
    ranges, i = [], 0
    while i < len(members):
        if members[i + 1 : i + 2] == "-" and i + 2 < len(members):
            low, high = members[i], members[i + 2]
            if low > high:
                raise ValueError(f"glob {_quoted(pattern)}: the range {low}-{high} runs backwards")
            ranges.append(f"{re.escape(low)}-{re.escape(high)}")
            i += 3
        else:
            ranges.append(re.escape(members[i]))
            i += 1
    # The lookahead keeps a range such as [+-9] from matching the separator.
    return f"(?!/)[{'^' if negated else ''}{''.join(ranges)}]"
