"""Masks: which leaves, as values that can be composed, printed and read back.

A mask is an expression, not a tree: ``stage(4) - batch_norm()``. It becomes a tree of booleans when
it is resolved on one, which may hold arrays or ``jax.ShapeDtypeStruct``. True means selected, and
wherever a mask speaks of training, trainable: there is no other polarity.

``stem``, ``stage``, ``head``, ``adapter``, ``up_to`` and ``batch_norm`` know a ResNet's names;
``glob``, ``kernels``, ``biases``, ``matrices`` and ``everything`` serve any nested dict.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flaxtransfer import expressions, globs
from flaxtransfer.algebra import Atom, Mask, select
from flaxtransfer.paths import SEGMENT_ORDER, map_with_path, suggest

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
    "up_to",
]


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
    ``BatchNorm_0``, and the scale, bias, mean and var of a normalisation among the numbered parts
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

    See ``flaxtransfer.globs`` for the grammar. Resolving it on a tree where it matches nothing is
    an error, also in the midst of a larger expression.

    Raises:
      TypeError: no string.
      ValueError: a pattern outside the grammar.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"glob() takes a string, not {pattern!r}")
    globs.check(pattern)
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
    return expressions.read(text, _FUNCTIONS)


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
