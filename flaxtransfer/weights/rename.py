"""A table of names that must fit a file exactly, in both directions.

A table says once how a foreign key and a leaf of ours correspond; reading, writing and every
complaint about a file that does not fit follow from it.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from flaxtransfer.paths import suggest

__all__ = ["CONV", "DENSE", "Rule", "Table", "batch_norm", "leaf_of", "to_keys", "to_leaves"]

CONV = (2, 3, 1, 0)
"""[out, in / groups, height, width] -> [height, width, in / groups, out]."""
DENSE = (1, 0)
"""[out, in] -> [in, out]."""

_PLACEHOLDER = re.compile(r"\{(\w+)(?:-(\d+))?\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One correspondence between keys of a file and leaves.

    Args:
        key: the file's name; `{s}` stands for a number, `{s-1}` for that number less one.
        leaf: our path, with the same placeholders.
        axes: the order in which the file's axes become the leaf's; None leaves them.
    """

    key: str
    leaf: str
    axes: tuple[int, ...] | None = None


Table = tuple[Rule, ...]


def batch_norm(key: str, path: str) -> Table:
    """The four rules of a BatchNorm; torch's counter of batches has no leaf.

    >>> [rule.leaf for rule in batch_norm("bn1", "bn1")][2:]
    ['batch_stats/bn1/mean', 'batch_stats/bn1/var']
    """
    return (
        Rule(f"{key}.weight", f"params/{path}/scale"),
        Rule(f"{key}.bias", f"params/{path}/bias"),
        Rule(f"{key}.running_mean", f"batch_stats/{path}/mean"),
        Rule(f"{key}.running_var", f"batch_stats/{path}/var"),
    )


def leaf_of(table: Table, key: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
    """The leaf that a key names, and its shape there; None for a key that no rule knows.

    >>> leaf_of((Rule("layer{s}.conv.weight", "params/layer{s}/conv/kernel", CONV),),
    ...         "layer2.conv.weight", (8, 4, 3, 3))
    ('params/layer2/conv/kernel', (3, 3, 4, 8))
    """
    for rule in table:
        numbers = _read(rule.key, key)
        if numbers is not None:
            if rule.axes is not None and len(rule.axes) == len(shape):
                shape = tuple(shape[axis] for axis in rule.axes)
            return _write(rule.leaf, numbers), shape
    return None


def to_leaves(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    what: str,
) -> dict[str, np.ndarray]:
    """Every leaf from its key, or one error with every difference.

    Args:
        table: the file's naming.
        tensors: the file's arrays by key.
        shapes: the shape of each leaf that has to be filled.
        what: begins the error text: which file, as what.

    Returns:
        An array for each path in `shapes`, in its order.

    Raises:
        ValueError: keys that are missing, unexpected or of another shape. Only torch's
            `num_batches_tracked` beside an expected BatchNorm is excused.
    """
    wanted = _wanted(table, shapes)
    expected = {key: _foreign_shape(rule, shapes[leaf]) for key, (leaf, rule) in wanted.items()}
    counters = {_counter(key) for key in wanted if key.endswith(".running_mean")}
    missing = [key for key in expected if key not in tensors]
    unexpected = [key for key in tensors if key not in expected and key not in counters]
    misshaped = [
        key for key, shape in expected.items() if key in tensors and tensors[key].shape != shape
    ]
    if missing or unexpected or misshaped:
        lines = [
            f"{what}; keys: {len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(misshaped)} of another shape"
        ]
        lines += [f"  missing: {key} {list(expected[key])}" for key in missing]
        lines += [
            f"  unexpected: {key} {list(tensors[key].shape)}{suggest(key, missing)}"
            for key in unexpected
        ]
        lines += [
            f"  shape: {key} is {list(tensors[key].shape)} in the file, "
            f"{list(expected[key])} in the network"
            for key in misshaped
        ]
        raise ValueError("\n".join(lines))
    return {
        leaf: tensors[key] if rule.axes is None else np.transpose(tensors[key], rule.axes)
        for key, (leaf, rule) in wanted.items()
    }


def to_keys(table: Table, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays under the file's names and in its axes: the way back from `to_leaves`.

    >>> list(to_keys((Rule("fc.bias", "params/fc/bias"),), {"params/fc/bias": np.zeros(2)}))
    ['fc.bias']
    """
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    return {
        key: np.asarray(leaves[path])
        if rule.axes is None
        else np.transpose(np.asarray(leaves[path]), np.argsort(rule.axes))
        for key, (path, rule) in _wanted(table, shapes).items()
    }


def _wanted(table: Table, leaves: Iterable[str]) -> dict[str, tuple[str, Rule]]:
    """The key of each leaf. A leaf without a rule is a gap in the table, not in the file."""
    wanted = {}
    for leaf in leaves:
        for rule in table:
            numbers = _read(rule.leaf, leaf)
            if numbers is not None:
                wanted[_write(rule.key, numbers)] = (leaf, rule)
                break
        else:
            raise ValueError(f"this naming has no key for the leaf {leaf!r}")
    return wanted


def _foreign_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    if rule.axes is None:
        return tuple(shape)
    return tuple(shape[rule.axes.index(axis)] for axis in range(len(shape)))


def _counter(key: str) -> str:
    return key.removesuffix("running_mean") + "num_batches_tracked"


@functools.cache
def _compiled(pattern: str) -> tuple[re.Pattern[str], tuple[tuple[str, int], ...]]:
    numbers = tuple((name, int(less or 0)) for name, less in _PLACEHOLDER.findall(pattern))
    literal = _PLACEHOLDER.sub("\0", pattern)
    return re.compile(re.escape(literal).replace("\0", "(0|[1-9][0-9]*)")), numbers


def _read(pattern: str, text: str) -> dict[str, int] | None:
    """The numbers at the placeholders, or None where the text has another form.

    >>> _read("stages.{s-1}.weight", "stages.0.weight")
    {'s': 1}
    """
    expression, numbers = _compiled(pattern)
    found = expression.fullmatch(text)
    if found is None:
        return None
    return {
        name: int(value) + less for (name, less), value in zip(numbers, found.groups(), strict=True)
    }


def _write(pattern: str, numbers: Mapping[str, int]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(numbers[found[1]] - int(found[2] or 0)), pattern)
