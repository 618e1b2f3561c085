"""Key maps: tables that convert the keys of a file to our paths and back, exactly.

A table states once how a key and a leaf correspond. Reading, writing and all error texts for files
that do not fit are derived from it.
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

_PLACEHOLDER = re.compile(r"\{(\w+?)(?:([-+])(\d+))?(?::0(\d))?\}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One correspondence between the keys of a file and our leaves.

    Args:
        key: the file's name; ``{s}`` stands for a number, ``{s-1}`` for that number less one, and
            ``{s+1:02}`` for one more in two digits.
        leaf: our path, with the same placeholders.
        axes: permutation from the file's axes to the leaf's; None keeps them.
        units: axes of length 1 that only the file has; ``axes`` counts the remaining axes.
    """

    key: str
    leaf: str
    axes: tuple[int, ...] | None = None
    units: tuple[int, ...] = ()

    def leaf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the leaf for an array of the file; an invalid shape is returned as it is."""
        if any(axis >= len(shape) or shape[axis] != 1 for axis in self.units):
            return shape
        left = tuple(size for axis, size in enumerate(shape) if axis not in self.units)
        if self.axes is None or len(self.axes) != len(left):
            return left
        return tuple(left[axis] for axis in self.axes)

    def key_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file for a leaf."""
        sizes = iter(shape if self.axes is None else (shape[i] for i in _inverse(self.axes)))
        count = len(shape) + len(self.units)
        return tuple(1 if axis in self.units else next(sizes) for axis in range(count))

    def to_leaf(self, array: np.ndarray) -> np.ndarray:
        """Converts an array of the file to the leaf."""
        array = np.squeeze(array, self.units)
        return array if self.axes is None else np.transpose(array, self.axes)

    def to_key(self, array: np.ndarray) -> np.ndarray:
        """Converts a leaf to the array of the file."""
        array = array if self.axes is None else np.transpose(array, _inverse(self.axes))
        return np.expand_dims(array, self.units)


@functools.cache
def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(axis) for axis in range(len(axes)))


Table = tuple[Rule, ...]


def batch_norm(key: str, path: str) -> Table:
    """The four rules of a BatchNorm; torch's batch counter has no leaf.

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
    """The leaf of a key, and its shape; None for an unknown key.

    >>> leaf_of((Rule("layer{s}.conv.weight", "params/layer{s}/conv/kernel", CONV),),
    ...         "layer2.conv.weight", (8, 4, 3, 3))
    ('params/layer2/conv/kernel', (3, 3, 4, 8))
    """
    for rule in _likely(table, "key", key):
        numbers = _read(rule.key, key)
        if numbers is not None:
            return _write(rule.leaf, numbers), rule.leaf_shape(tuple(shape))
    return None


def to_leaves(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    what: str,
) -> dict[str, np.ndarray]:
    """Converts a file's arrays to leaves: all of them, or one error with all differences.

    Args:
        table: the file's naming.
        tensors: the file's arrays by key.
        shapes: the shape of each expected leaf.
        what: beginning of the error text: which file, as what.

    Returns:
        One array per path in ``shapes``, in the same order.

    Raises:
        ValueError: keys that are missing, unexpected or of another shape. Only torch's
            ``num_batches_tracked`` of an expected BatchNorm is excused.
    """
    rules = _rules(table, shapes)
    expected = {key: rule.key_shape(shapes[leaf]) for key, (leaf, rule) in rules.items()}
    counters = {_counter(key) for key in rules if key.endswith(".running_mean")}
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
            f"  shape: {key} must be {list(expected[key])} for the network, got "
            f"{list(tensors[key].shape)} in the file"
            for key in misshaped
        ]
        raise ValueError("\n".join(lines))
    return {leaf: rule.to_leaf(tensors[key]) for key, (leaf, rule) in rules.items()}


def to_keys(table: Table, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts leaves to a file's arrays: the inverse of ``to_leaves``.

    >>> list(to_keys((Rule("fc.bias", "params/fc/bias"),), {"params/fc/bias": np.zeros(2)}))
    ['fc.bias']
    """
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    return {
        key: rule.to_key(np.asarray(leaves[path]))
        for key, (path, rule) in _rules(table, shapes).items()
    }


def _rules(table: Table, leaves: Iterable[str]) -> dict[str, tuple[str, Rule]]:
    """Leaf and rule by key. A leaf without a rule is an error of the table, not of the file."""
    rules = {}
    for leaf in leaves:
        for rule in _likely(table, "leaf", leaf):
            numbers = _read(rule.leaf, leaf)
            if numbers is not None:
                rules[_write(rule.key, numbers)] = (leaf, rule)
                break
        else:
            raise ValueError(f"the naming has no key for the leaf {leaf!r}")
    return rules


_INDEXES: dict[tuple[int, str], tuple[Table, dict[str, list[Rule]]]] = {}
_MOST_INDEXES = 100


def _likely(table: Table, side: str, text: str) -> list[Rule]:
    """The rules of a table whose key or leaf equals a text up to its numbers, in order.

    Each key of a file is looked up in the tables of all formats, with tens of rules each.
    """
    found = _INDEXES.get((id(table), side))
    # An identity is given again after a table is gone; the one in the index is not gone.
    if found is None or found[0] is not table:
        rules: dict[str, list[Rule]] = {}
        for rule in table:
            rules.setdefault(_outline(getattr(rule, side)), []).append(rule)
        if len(_INDEXES) >= _MOST_INDEXES:
            _INDEXES.clear()
        found = _INDEXES[id(table), side] = (table, rules)
    return found[1].get(_outline(text), [])


def _outline(text: str) -> str:
    """A pattern, or a text of it, with one sign for each number.

    >>> _outline("layer{s}.{b}.conv1"), _outline("layer10.3.conv1")
    ('layer#.#.conv#', 'layer#.#.conv#')
    """
    return _kept_outline(text) if len(text) <= _SHORT else _NUMBER.sub("#", text)


_NUMBER = re.compile(r"\{[^}]*\}|[0-9]+")
_SHORT, _KEPT = 200, 8192
"""Length and number of the texts whose outlines and numbers are kept: with all tables, a ResNet-50
has 3,000, and each is looked up several times."""


@functools.lru_cache(_KEPT)
def _kept_outline(text: str) -> str:
    return _NUMBER.sub("#", text)


def _counter(key: str) -> str:
    return key.removesuffix("running_mean") + "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class _Number:
    """A placeholder: the name of the number, its offset in the text, and its digits."""

    name: str
    more: int
    digits: int

    @classmethod
    def found(cls, match: re.Match[str]) -> "_Number":
        name, sign, amount, digits = match.groups()
        return cls(name, int(f"{sign}{amount}") if sign else 0, int(digits or 1))


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """A key or leaf of a rule: what it matches, its numbers, and the text around them."""

    expression: re.Pattern[str]
    numbers: tuple[_Number, ...]
    parts: tuple[str, ...]


@functools.cache
def _compiled(pattern: str) -> _Pattern:
    numbers = tuple(_Number.found(match) for match in _PLACEHOLDER.finditer(pattern))
    parts = tuple(_PLACEHOLDER.sub("\0", pattern).split("\0"))
    text = re.escape(parts[0])
    for number, part in zip(numbers, parts[1:], strict=True):
        padded = "|0[0-9]" if number.digits > 1 else ""
        text += f"(0|[1-9][0-9]*{padded})" + re.escape(part)
    return _Pattern(re.compile(text), numbers, parts)


def _read(pattern: str, text: str) -> Mapping[str, int] | None:
    """The numbers at the placeholders, or None if the text does not match.

    >>> _read("stages.{s-1}.weight", "stages.0.weight"), _read("unit{b+1:02}/b", "unit01/b")
    ({'s': 1}, {'b': 0})
    """
    return _kept_numbers(pattern, text) if len(text) <= _SHORT else _numbers(pattern, text)


def _numbers(pattern: str, text: str) -> Mapping[str, int] | None:
    compiled = _compiled(pattern)
    found = compiled.expression.fullmatch(text)
    if found is None:
        return None
    read = {
        number.name: int(value) - number.more
        for number, value in zip(compiled.numbers, found.groups(), strict=True)
    }
    # A text that would be written differently ("unit1", "unit00") is another key.
    return read if min(read.values(), default=0) >= 0 and _write(pattern, read) == text else None


_kept_numbers = functools.lru_cache(_KEPT)(_numbers)


def _write(pattern: str, numbers: Mapping[str, int]) -> str:
    compiled = _compiled(pattern)
    text = compiled.parts[0]
    for number, part in zip(compiled.numbers, compiled.parts[1:], strict=True):
        text += str(numbers[number.name] + number.more).zfill(number.digits) + part
    return text
