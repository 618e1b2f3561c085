"""Masks: which leaves are selected, as values that compose, print and read back.

The algebra of masks: expressions with ``& | - ~``, their text, and what they select.

What each selector of the mask language means, as a predicate on (path, leaf).

The names are those of the functions in ``flaxtransfer.masks``, which document them.

Masks: which leaves, as values that can be composed, printed and read back.

A mask is an expression, not a tree: ``stage(4) - batch_norm()``. It becomes a tree of booleans when
it is resolved on one, which may hold arrays or ``jax.ShapeDtypeStruct``. True means selected, and
wherever a mask speaks of training, trainable: there is no other polarity.

``stem``, ``stage``, ``head``, ``adapter``, ``up_to`` and ``batch_norm`` know a ResNet's names;
``glob``, ``kernels``, ``biases``, ``matrices`` and ``everything`` serve any nested dict.

Reads a set expression such as ``stage(4) - batch_norm()`` without evaluating any code.
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flaxtransfer import paths
from flaxtransfer.paths import (
    SEGMENT_ORDER,
    flatten,
    listing,
    map_with_path,
    segment_of,
    segment_position,
    suggest,
)

__all__ = [
    "PREDICATES",
    "Atom",
    "Both",
    "Either",
    "Less",
    "Mask",
    "Not",
    "adapter",
    "as_mask",
    "batch_norm",
    "biases",
    "everything",
    "glob",
    "head",
    "kernels",
    "matrices",
    "parse",
    "read_expression",
    "resolve",
    "segment_or_empty",
    "select",
    "selected",
    "stage",
    "stages",
    "stem",
    "up_to",
]


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


def segment_or_empty(path: str) -> str:
    """The segment of a ResNet, or an empty string for a foreign path."""
    try:
        return segment_of(path)
    except ValueError:
        return ""


def _insegment_or_empty(name: str) -> Callable[..., bool]:
    return lambda path, leaf: segment_or_empty(path) == name


def _named(name: str) -> Callable[..., bool]:
    return lambda path, leaf: path.split("/")[-1] == name


def _in_stages(path: str, leaf: Any, *numbers: int) -> bool:
    return segment_or_empty(path) in {f"layer{number}" for number in numbers}


def _up_to(path: str, leaf: Any, last: str) -> bool:
    segment = segment_or_empty(path)
    return bool(segment) and segment_position(segment) <= segment_position(last)


def _is_matrix(path: str, leaf: Any) -> bool:
    if not hasattr(leaf, "shape"):
        raise TypeError(f"matrices() needs shapes, but {path!r} is {leaf!r}")
    return len(leaf.shape) >= 2


_BATCH_NORM_NAME = re.compile(r"(?:.*_)?bn(?:[0-9_].*)?|batch_?norm.*", re.IGNORECASE)
_DOWNSAMPLE_NORM = re.compile(r"(?:.*/)?downsample/[0-9]+/(?:scale|bias|mean|var)")


def _is_batch_norm(path: str, leaf: Any) -> bool:
    named = any(map(_BATCH_NORM_NAME.fullmatch, path.split("/")))
    return named or _DOWNSAMPLE_NORM.fullmatch(path) is not None


PREDICATES: dict[str, Callable[..., bool]] = {
    "adapter": _insegment_or_empty("adapter"),
    "batch_norm": _is_batch_norm,
    "biases": _named("bias"),
    "everything": lambda path, leaf: True,
    "glob": lambda path, leaf, pattern: paths.match(pattern, path),
    "head": _insegment_or_empty("head"),
    "kernels": _named("kernel"),
    "matrices": _is_matrix,
    "stage": _in_stages,
    "stages": _in_stages,
    "stem": _insegment_or_empty("stem"),
    "up_to": _up_to,
}
"""``{function: (path, leaf, *arguments) -> selected}``."""


def stem() -> Mask:
    """The first convolutions, their norms and their pool: ``conv1``, ``bn1``, ``maxpool``."""
    return Atom("stem")


def stage(number: int) -> Mask:
    """One of the network's stages, counted from 1: ``stage(4)`` is ``layer4``.

    Resolving it on a tree without that stage is an error.

    Raises:
      TypeError, ValueError: a number that is no positive int.
    """
    return Atom("stage", _stage_numbers((number,)))


def stages(*numbers: int) -> Mask:
    """Several stages: ``stages(3, 4)``.

    Raises:
      TypeError, ValueError: no number, or one that is no positive int.
    """
    if not numbers:
        raise ValueError("stages() needs the numbers of the stages, as in stages(3, 4)")
    return Atom("stages", _stage_numbers(numbers))


def head() -> Mask:
    """The classifier ``fc``. A leaf named ``overhead`` or ``layer1/fc`` is not part of it."""
    return Atom("head")


def adapter() -> Mask:
    """The input adapter in front of the stem, where the network has one."""
    return Atom("adapter")


def batch_norm() -> Mask:
    """Every BatchNorm, by name.

    It takes what lies under a component named ``bn``, ``bn1``, ``bn_init``, ``conv1_bn`` or
    ``BatchNorm_0``, and the scale, bias, mean and var of a normalization among the numbered parts
    of a ``downsample``. It does not take ``norm1`` and its like: LayerNorm and GroupNorm go by
    that name and have no running statistics. Where such a name is a BatchNorm, say so:
    ``glob("**/norm*/**")``.
    """
    return Atom("batch_norm")


def kernels() -> Mask:
    """Leaves named ``kernel``: the weights of convolutions and dense layers."""
    return Atom("kernels")


def biases() -> Mask:
    """Leaves named ``bias``, those of BatchNorm among them."""
    return Atom("biases")


def matrices() -> Mask:
    """Leaves of two or more dimensions: what weight decay is meant for."""
    return Atom("matrices")


def up_to(segment: str) -> Mask:
    """Everything from the input up to and with this segment.

    ``up_to("layer2")`` is adapter, stem, layer1 and layer2; ``up_to("pool")`` all but the head.

    Raises:
      ValueError: no segment's name; the text has the nearest.
    """
    if segment not in SEGMENT_ORDER:
        raise ValueError(
            f"no segment is called {segment!r}; there are {', '.join(SEGMENT_ORDER)}"
            + suggest(str(segment), SEGMENT_ORDER)
        )
    return Atom("up_to", (segment,))


def glob(pattern: str) -> Mask:
    """Leaves whose whole path matches, as in ``glob("layer4/*/conv?/kernel")``.

    See ``flaxtransfer.paths`` for the grammar. Resolving it on a tree where it matches nothing is
    an error, also in the midst of a larger expression.

    Raises:
      TypeError: no string.
      ValueError: a pattern outside the grammar.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"glob() takes a string, not {pattern!r}")
    paths.check(pattern)
    return Atom("glob", (pattern,))


def everything() -> Mask:
    """Every leaf."""
    return Atom("everything")


def resolve(
    mask: Mask | str, tree: Mapping[str, Any], *, allow_empty: bool = False
) -> dict[str, Any]:
    """The tree of booleans that a mask is on this tree.

    Args:
      mask: a mask or its expression.
      tree: nested dict of arrays or ``jax.ShapeDtypeStruct``; nothing is computed with them.
      allow_empty: permits a result without True, and stages and globs that match nothing.

    Returns:
      Nested dict of bool with the structure of ``tree``; True = selected.

    Raises:
      ValueError: the mask selects nothing, or has a stage or glob that matches nothing; the text
        has the nearest names. A part such as ``adapter()`` may be empty within a larger mask.

    >>> resolve(head() | adapter(), {"conv1": {"kernel": 0}, "fc": {"kernel": 0, "bias": 0}})
    {'conv1': {'kernel': False}, 'fc': {'kernel': True, 'bias': True}}
    """
    taken = selected(mask, tree, allow_empty=allow_empty)
    return map_with_path(lambda path, leaf: path in taken, tree)


def selected(
    mask: Mask | str, tree: Mapping[str, Any], *, allow_empty: bool = False
) -> frozenset[str]:
    """The paths that a mask selects: ``resolve`` as a set.

    Raises:
      ValueError: as ``resolve``.

    >>> sorted(selected("biases() | stem()", {"conv1": {"kernel": 0}, "fc": {"bias": 0}}))
    ['conv1/kernel', 'fc/bias']
    """
    return select(as_mask(mask), tree, allow_empty=allow_empty)


def as_mask(value: Mask | str) -> Mask:
    """A mask as it is, or read from its expression.

    Raises:
      TypeError: neither of the two.
      ValueError: as ``parse``.
    """
    if isinstance(value, Mask):
        return value
    if isinstance(value, str):
        return parse(value)
    raise TypeError(f"a mask or its expression is needed, not {value!r}")


def parse(text: str) -> Mask:
    """The mask that an expression means; ``parse(repr(mask)) == mask``.

    Reads the functions of this module and ``& | - ~``, and evaluates nothing.

    Raises:
      ValueError: anything else; an unknown function's nearest names are in the text.

    >>> parse("stage(4) - batch_norm()") == stage(4) - batch_norm()
    True
    """
    return read_expression(text, _FUNCTIONS)


_FUNCTIONS: dict[str, Callable[..., Mask]] = {
    function.__name__: function
    for function in (
        adapter,
        batch_norm,
        biases,
        everything,
        glob,
        head,
        kernels,
        matrices,
        stage,
        stages,
        stem,
        up_to,
    )
}


def _stage_numbers(numbers: tuple[int, ...]) -> tuple[int, ...]:
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"a stage is an int from 1 on, not {number!r}")
        if number < 1:
            raise ValueError(f"stages count from 1 (layer1), there is no stage {number}")
    return tuple(sorted(set(numbers)))


def read_expression(text: str, functions: Mapping[str, Callable[..., Any]]) -> Any:
    """The value of an expression of these functions, their arguments, and ``& | - ~``.

    Args:
      text: the expression. Arguments are ints and strings, by position.
      functions: what the names in it mean. Their results are combined by their own operators.

    Returns:
      Whatever the functions and operators return.

    Raises:
      ValueError: anything else in the text, an unknown function, or a function that refuses its
        arguments; the text says which.

    >>> read("odd() | upto(4)", {"odd": lambda: {1, 3, 5}, "upto": lambda n: set(range(n + 1))})
    {0, 1, 2, 3, 4, 5}
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{text!r}: {what}")

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, ast.BitAnd(), right):
                return value(left) & value(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return value(left) | value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.UnaryOp(ast.Invert(), operand):
                return ~value(operand)
            case ast.Call(ast.Name(name), arguments, []):
                return call(name, [argument(each) for each in arguments])
            case ast.Name(name):
                raise refuse(f"{name} must be called, as in {name}()" + suggest(name, functions))
        raise refuse(
            f"{ast.unparse(node)!r} is none of: a call of {', '.join(functions)}; & | - ~; brackets"
        )

    def argument(node: ast.expr) -> int | str:
        match node:
            case ast.Constant(bool()):  # An int to Python, and no argument of ours.
                pass
            case ast.Constant(int() | str() as constant):
                return constant
        raise refuse(f"arguments are ints and strings, not {ast.unparse(node)!r}")

    def call(name: str, arguments: list[int | str]) -> Any:
        if name not in functions:
            known = ", ".join(functions)
            raise refuse(f"no function is called {name!r}{suggest(name, functions)} (of {known})")
        try:
            return functions[name](*arguments)
        except (TypeError, ValueError) as error:
            raise refuse(str(error)) from error

    if not isinstance(text, str):
        raise ValueError(f"an expression is a string, not {text!r}")
    try:
        return value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise refuse(f"no expression ({error.msg})") from error
    except (RecursionError, MemoryError) as error:
        raise refuse("too deeply nested to be read") from error
