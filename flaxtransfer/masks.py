"""Masks: which leaves are selected, as values that compose, print and read back.

A mask is an expression, not a tree: ``stage(4) - batch_norm()``. It becomes a tree of booleans when
it is resolved on a pytree, which may hold arrays or ``jax.ShapeDtypeStruct``. True means selected,
and wherever a mask speaks of training, trainable: there is no other polarity.

``stem``, ``stage``, ``stages``, ``head``, ``adapter`` and ``up_to`` mean the parts of a known
family of networks, by its layout (``flaxtransfer.models.layout``). ``glob``, ``where``,
``kernels``, ``biases``, ``matrices``, ``batch_norm`` and ``everything`` serve any tree.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from typing import Any

from flaxtransfer.mask_algebra import Atom, Mask, Where, atoms, check_glob, select
from flaxtransfer.models.layout import LAYOUTS, Layout
from flaxtransfer.paths import PyTree, flatten, map_with_path, shortened, suggest

__all__ = [
    "Mask",
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
    "resolve",
    "selected",
    "stage",
    "stages",
    "stem",
    "to_text",
    "up_to",
    "where",
]


def stem() -> Mask:
    """The first convolutions, their norms and their pool."""
    return Atom("stem")


def stage(number: int) -> Mask:
    """One of the network's stages, counted from 1.

    Resolving it on a tree without that stage is an error.

    Raises:
        TypeError, ValueError: A number that is not a positive int.
    """
    return Atom("stage", _stage_numbers((number,)))


def stages(*numbers: int) -> Mask:
    """Several stages: ``stages(3, 4)``.

    Raises:
        TypeError, ValueError: No number, or one that is not a positive int.
    """
    if not numbers:
        raise ValueError("stages() needs the numbers of the stages, as in stages(3, 4)")
    return Atom("stages", _stage_numbers(numbers))


def head() -> Mask:
    """The classifier at the end of the network. A leaf named ``overhead`` is not part of it."""
    return Atom("head")


def adapter() -> Mask:
    """The input adapter in front of the stem, where the network has one."""
    return Atom("adapter")


def batch_norm() -> Mask:
    """Every BatchNorm, by name.

    It takes what lies under a component named ``bn``, ``bn_init``, ``conv_bn`` or ``BatchNorm_0``,
    with or without a number, and what the network's layout says is a BatchNorm. It does not take
    ``norm1`` and its like: LayerNorm and GroupNorm go by that name and have no running statistics.
    Where such a name is a BatchNorm, say so: ``glob("**/norm*/**")``.
    """
    return Atom("batch_norm")


def kernels() -> Mask:
    """Leaves named ``kernel``: the weights of convolutions and dense layers in Flax."""
    return Atom("kernels")


def biases() -> Mask:
    """Leaves named ``bias``, those of BatchNorm among them."""
    return Atom("biases")


def matrices() -> Mask:
    """Leaves of two or more dimensions: what weight decay is meant for."""
    return Atom("matrices")


def up_to(segment: str) -> Mask:
    """Everything from the input up to and with this segment.

    ``up_to("stem")`` is adapter and stem; ``up_to("pool")`` all but the head.

    Raises:
        ValueError: Not the name of a segment of any known family; the text has the nearest.
    """
    known = dict.fromkeys(name for layout in LAYOUTS for name in layout.segments)
    if segment not in known:
        raise ValueError(
            f"no segment is called {segment!r}; there are {', '.join(known)}"
            + suggest(str(segment), known)
        )
    return Atom("up_to", (segment,))


def glob(pattern: str) -> Mask:
    """Leaves whose whole path matches, as in ``glob("encoder/*/dense?/kernel")``.

    See ``flaxtransfer.mask_algebra`` for the grammar. Resolving it on a tree where it matches
    nothing is an error, also in the midst of a larger expression.

    Raises:
        TypeError: Not a string.
        ValueError: A pattern outside the grammar.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string, got {pattern!r}")
    check_glob(pattern)
    return Atom("glob", (pattern,))


def where(predicate: Callable[[str, Any], bool], name: str | None = None) -> Mask:
    """Leaves that a function of your own accepts.

    Use it for what no name says: shapes, dtypes, a list of paths from elsewhere. A mask that holds
    a function has no expression: it composes and prints as any other, but a plan with it cannot be
    written to a file.

    Args:
        predicate: ``(path, leaf) -> bool``; the path as "encoder/0/kernel", the leaf an array or
            ``jax.ShapeDtypeStruct``. Equal masks have the same name and the same function.
        name: What the mask is called in texts; by default the function's name.

    Raises:
        TypeError: Not a function, or a name that is not a string.
        ValueError: A function without a name, such as a lambda, and no name given.

    >>> import numpy as np
    >>> large = where(lambda path, leaf: leaf.size > 1000, name="large")
    >>> large - batch_norm()
    where('large') - batch_norm()
    >>> sorted(selected(large, {"encoder": np.zeros((64, 64)), "scale": np.zeros(64)}))
    ['encoder']
    """
    if not callable(predicate) or isinstance(predicate, Mask):
        raise TypeError(f"predicate must be a function of (path, leaf), got {predicate!r}")
    name = getattr(predicate, "__name__", "<lambda>") if name is None else name
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name in ("", "<lambda>"):
        raise ValueError(
            "a mask prints by the name of its function: where(lambda path, leaf: ..., name='large')"
        )
    return Where(name, predicate)


def everything() -> Mask:
    """Every leaf."""
    return Atom("everything")


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
            raise TypeError(f"a stage must be an int >= 1, got {number!r}")
        if number < 1:
            raise ValueError(f"a stage must be an int >= 1, got {number}")
    return tuple(sorted(set(numbers)))


def resolve(
    mask: Mask | str, tree: PyTree, *, allow_empty: bool = False, layout: Layout | None = None
) -> Any:
    """The tree of booleans that a mask is on this tree.

    Args:
        mask: A mask or its expression.
        tree: Any pytree of arrays or ``jax.ShapeDtypeStruct``; nothing is computed with them.
            Every leaf that JAX sees counts: of an Equinox module, whose leaves may be functions,
            give ``eqx.filter(model, eqx.is_array)``.
        allow_empty: Permits a result without True, and stages and globs that match nothing.
        layout: What the parts are called; by default that of the family whose names the tree has.

    Returns:
        A tree of the same structure with a bool for each leaf; True = selected.

    Raises:
        ValueError: The mask selects nothing, or has a stage or glob that matches nothing; the text
            has the nearest names. A part such as ``adapter()`` may be empty within a larger mask.

    >>> resolve(glob("decoder/**"), {"encoder": [0, 0], "decoder": {"kernel": 0, "bias": 0}})
    {'encoder': [False, False], 'decoder': {'kernel': True, 'bias': True}}
    """
    taken = selected(mask, tree, allow_empty=allow_empty, layout=layout)
    return map_with_path(lambda path, leaf: path in taken, tree)


def selected(
    mask: Mask | str, tree: PyTree, *, allow_empty: bool = False, layout: Layout | None = None
) -> frozenset[str]:
    """The paths that a mask selects: ``resolve`` as a set.

    Raises:
        ValueError: As ``resolve``.

    >>> sorted(selected("biases() | glob('*')", {"scale": 0, "decoder": {"kernel": 0, "bias": 0}}))
    ['decoder/bias', 'scale']
    """
    return select(as_mask(mask), flatten(tree), allow_empty=allow_empty, layout=layout)


def as_mask(value: Mask | str) -> Mask:
    """A mask as it is, or read from its expression.

    Raises:
        TypeError: Neither of the two.
        ValueError: As ``parse``.
    """
    if isinstance(value, Mask):
        return value
    if isinstance(value, str):
        return parse(value)
    raise TypeError(f"a mask must be a Mask or its expression, got {value!r}")


def to_text(mask: Mask) -> str:
    """The expression of a mask, which ``parse`` reads back.

    Raises:
        ValueError: The mask holds a function of the program, which has no text; it is named.

    >>> to_text(~stem() & kernels())
    '~stem() & kernels()'
    """
    if functions := [repr(atom) for atom in atoms(mask) if isinstance(atom, Where)]:
        raise ValueError(
            f"the mask {mask!r} cannot be written: {', '.join(dict.fromkeys(functions))} is a "
            "function of the program; use glob() or a function of flaxtransfer.masks"
        )
    return repr(mask)


MOST_TEXT, MOST_DEPTH, MOST_NUMBER = 20_000, 200, 10**9
"""Limits of an expression in a file: characters, operators within operators, size of a number.

A thousand globs fit in. Printing a mask takes two levels of Python's stack for each operator, of
which there are 1,000."""


def parse(text: str) -> Mask:
    """The mask that an expression means; ``parse(to_text(mask)) == mask``.

    Reads the functions of this module and ``& | - ~``, and evaluates nothing.

    Raises:
        ValueError: Anything else; an unknown function's nearest names are in the text.

    >>> parse("stage(4) - batch_norm()") == stage(4) - batch_norm()
    True
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{shortened(repr(text))}: {shortened(what, 450)}")

    def code(node: ast.expr) -> str:
        try:
            return shortened(ast.unparse(node))
        except ValueError:  # Of Python, which prints no number of more than 4,300 digits.
            return "a number of too many digits"

    def value(node: ast.expr, depth: int = 0) -> Mask:
        if depth > MOST_DEPTH:
            raise RecursionError
        match node:
            case ast.Call(ast.Name("where")):
                raise refuse(
                    f"{code(node)} is a function of a program and cannot be read from text; "
                    "use glob()"
                )
            case ast.BinOp(left, ast.BitAnd(), right):
                return value(left, depth + 1) & value(right, depth + 1)
            case ast.BinOp(left, ast.BitOr(), right):
                return value(left, depth + 1) | value(right, depth + 1)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left, depth + 1) - value(right, depth + 1)
            case ast.UnaryOp(ast.Invert(), operand):
                return ~value(operand, depth + 1)
            case ast.Call(ast.Name(name), arguments, []):
                return call(name, [argument(each) for each in arguments])
            case ast.Name(name):
                raise refuse(f"{name} must be called, as in {name}()" + suggest(name, _FUNCTIONS))
        known = ", ".join(_FUNCTIONS)
        raise refuse(f"{code(node)!r} is none of: a call of {known}; & | - ~; brackets")

    def argument(node: ast.expr) -> int | str:
        match node:
            case ast.Constant(bool()):  # An int to Python, and no argument of ours.
                pass
            case ast.Constant(int() as number) if number > MOST_NUMBER:
                raise refuse(f"an int must be at most {MOST_NUMBER:,}, got a larger one")
            case ast.Constant(int() | str() as constant):
                return constant
        raise refuse(f"arguments must be ints and strings, got {code(node)!r}")

    def call(name: str, arguments: list[int | str]) -> Mask:
        if name not in _FUNCTIONS:
            known = ", ".join(_FUNCTIONS)
            raise refuse(f"no function is called {name!r}{suggest(name, _FUNCTIONS)} (of {known})")
        try:
            return _FUNCTIONS[name](*arguments)
        except (TypeError, ValueError) as error:
            raise refuse(str(error)) from error

    if not isinstance(text, str):
        raise ValueError(f"an expression must be a string, got {shortened(repr(text))}")
    if len(text) > MOST_TEXT:
        raise refuse(f"it must have at most {MOST_TEXT:,} characters, got {len(text):,}")
    try:
        with warnings.catch_warnings():
            # Of Python's, about programs: "'int' object is not callable".
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        # ValueError: a zero byte, half of a surrogate pair.
        what = getattr(error, "msg", None) or "a character that no text has"
        what = "a number of too many digits" if "digits" in what else what
        raise refuse(f"not an expression ({what})") from error
    except (RecursionError, MemoryError) as error:
        raise refuse("too deeply nested to be read") from error
    try:
        return value(tree.body)
    except RecursionError as error:
        raise refuse(f"nested more than {MOST_DEPTH} deep") from error
