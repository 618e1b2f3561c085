"""Paths of leaves: pytrees by "encoder/0/kernel"; and text for errors: near names, lists, escapes.

A path is the keys from the root to a leaf, joined by ``/``. Every pytree has paths: of a dict the
keys, of a list or tuple the positions, of a named tuple, dataclass or module the names of the
fields. A variable of Flax is looked through: its array has the path of the variable. Nothing here
knows what the leaves are: arrays, ``jax.ShapeDtypeStruct``, booleans and labels are all alike.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

__all__ = [
    "Params",
    "PyTree",
    "Variables",
    "flatten",
    "is_nested_dict",
    "listing",
    "map_with_path",
    "merge",
    "nearest",
    "nested_differences",
    "shortened",
    "suggest",
    "unflatten",
    "visible",
]


PyTree = Any
"""Any tree that JAX can flatten."""

Params = dict[str, Any]
"""Nested dict with string keys; the leaves are arrays or ``jax.ShapeDtypeStruct``."""

Variables = dict[str, Any]
"""``{"params": Params, "batch_stats": Params}``."""


def flatten(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by path.

    Nested dicts keep the order of their keys; other nodes have the order of JAX. Nodes without
    leaves (an empty dict, None, ``optax.MaskedNode``) leave no trace, as in JAX. Keys may hold a
    ``/``, as the module names of Haiku do, as long as no two leaves get the same path.

    Args:
        tree: Any pytree but a single leaf: nested dicts, lists, modules, ``nnx.State``.

    Returns:
        ``{path: leaf}``.

    Raises:
        TypeError: A single leaf in place of a tree, or keys that are neither strings nor ints; the
            text lists them all.
        ValueError: Empty keys, or two leaves with one path; the text names both.

    >>> flatten({"decoder": {"kernel": 1, "bias": 2}, "encoder": [3, {"scale": 4}]})
    {'decoder/kernel': 1, 'decoder/bias': 2, 'encoder/0': 3, 'encoder/1/scale': 4}
    """
    return _leaves(tree)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with these leaves: the inverse of ``flatten`` on dicts without ``/`` in keys.

    Raises:
        ValueError: A path with an empty component, or one that runs through another's leaf.

    >>> unflatten({"decoder/kernel": 1, "decoder/bias": 2})
    {'decoder': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    problems = []
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        through = ["/".join(parents[: n + 1]) for n in range(len(parents))]
        if "" in (*parents, name):
            problems.append(f"{path!r} has an empty component")
        elif clash := [parent for parent in through if parent in flat]:
            problems.append(f"{clash[0]!r} is a leaf, and {path!r} runs through it")
        else:
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)
            node[name] = leaf
    if problems:
        raise ValueError("no nested dict has these paths: " + "; ".join(problems))
    return tree


def map_with_path(f: Callable[[str, Any], Any], tree: PyTree) -> Any:
    """A tree of the same structure with ``f(path, leaf)`` in place of each leaf.

    Nodes without leaves stay as they are.

    Raises:
        TypeError, ValueError: As ``flatten``.

    >>> map_with_path(lambda path, leaf: path, {"decoder": [1, 2], "scale": 3})
    {'decoder': ['decoder/0', 'decoder/1'], 'scale': 'scale'}
    """
    _leaves(tree)  # For its checks.

    def walk(node: Any, path: str) -> Any:
        below = _below(node)
        if below is None:
            return f(path, node)
        return below.rebuilt(
            walk(child, _joined(path, key))
            for key, child in zip(below.keys, below.children, strict=True)
        )

    return walk(tree, "")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of two nested dicts; where both have one, that of ``over``.

    Nodes without leaves are left out.

    Raises:
        ValueError: A leaf of one tree where the other has a branch, or two leaves of different
            shapes; all of them in one text.

    >>> merge({"encoder": {"kernel": 1}, "decoder": {"bias": 2}}, {"decoder": {"bias": 3}})
    {'encoder': {'kernel': 1}, 'decoder': {'bias': 3}}
    """
    shapes: list[str] = []
    clashes: list[str] = []

    def both(below: Any, above: Any, path: str) -> Any:
        branches = isinstance(below, Mapping), isinstance(above, Mapping)
        if all(branches):
            merged = {}
            for key in dict.fromkeys([*below, *above]):
                there = [side[key] for side in (below, above) if key in side]
                there = [one for one in there if _has_leaves(one)]
                if there:
                    place = _joined(path, key)
                    last = there[-1]
                    merged[key] = both(there[0], last, place) if len(there) > 1 else _pruned(last)
            return merged
        if any(branches):
            inner = next(iter(_leaves(below if branches[0] else above)))
            clashes.append(f"{path!r} is a leaf, and {path + '/' + inner!r} runs through it")
        elif hasattr(above, "shape") and _shape(below) != _shape(above):
            shapes.append(f"{path}: {_shape(below)} and {_shape(above)}")
        return above

    merged: dict[str, Any] = both(dict(base), dict(over), "")
    if shapes:
        raise ValueError("leaves of different shapes cannot be merged: " + listing(shapes))
    if clashes:
        raise ValueError("no nested dict has these paths: " + "; ".join(clashes))
    return merged


def is_nested_dict(tree: PyTree) -> bool:
    """Whether every node with leaves is a plain dict.

    >>> is_nested_dict({"a": {"b": 1}, "c": None}), is_nested_dict({"a": [1]})
    (True, False)
    """
    if type(tree) is dict:
        return all(_below(v) is None or is_nested_dict(v) for v in tree.values())
    return _below(tree) is not None and not _has_leaves(tree)


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The candidates most like ``name``, best first; empty when none is alike.

    Paths are compared as wholes and by their first or last components, so that ``decoder`` and
    ``dense9/kernel`` find ``decoder/kernel`` and ``encoder/0/dense1/kernel``.

    >>> nearest("encodr", ["encoder", "decoder", "head"], n=1)
    ['encoder']
    >>> nearest("head/kernle", ["stem/kernel", "head/kernel", "head/bias"], n=1)
    ['head/kernel']
    """
    scores = {candidate: _likeness(name, candidate) for candidate in candidates}
    alike = [candidate for candidate, score in scores.items() if score >= 0.6]
    return sorted(alike, key=lambda candidate: -scores[candidate])[:n]


def suggest(name: str, candidates: Iterable[str]) -> str:
    """The nearest candidates as the end of an error text, or nothing.

    >>> suggest("haed", ["head", "late"])
    "; did you mean 'head'?"
    >>> suggest("xyz", ["head", "late"])
    ''
    """
    names = [repr(candidate) for candidate in nearest(name, candidates)]
    return f"; did you mean {' or '.join(names)}?" if names else ""


def listing(names: Iterable[str], most: int = 6) -> str:
    """Names for an error text: the first few, and how many more there are.

    >>> listing(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def shortened(text: str, most: int = 100) -> str:
    """Text for an error that may be as long as a file: its beginning and its end.

    >>> shortened("a" * 30 + "z", most=21)
    'aaaaaaa ... aaaaaaaz'
    """
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[: most - 5 - half - 1]} ... {text[-half:]}"


_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)
"""Control characters, marks that turn the direction of text, and what stands for bytes of names
that are not UTF-8."""


def visible(text: Any, *, keep: str = "") -> str:
    r"""Text of a file, folder or user as it may be printed: nothing in it acts or hides.

    Every text from outside goes through it on its way to a terminal, page or figure. A terminal
    obeys control characters, and a name of bytes that are not UTF-8 cannot be written at all.

    Args:
        text: the text.
        keep: characters that stay as they are, such as the line feeds of a table.

    >>> visible("a\x1b]0;owned\x07"), visible(b"caf\xe9".decode(errors="surrogateescape"))
    ('a\\x1b]0;owned\\x07', 'caf\\xe9')
    """

    def code(found: re.Match[str]) -> str:
        number = ord(found[0])
        if found[0] in keep:
            return found[0]
        number -= 0xDC00 if 0xDC80 <= number <= 0xDCFF else 0
        return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"

    return _UNSEEN.sub(code, str(text))


def _leaves(tree: Any) -> dict[str, Any]:
    """``{path: leaf}``, checked."""
    _check_root(tree)
    flat: dict[str, Any] = {}
    types: list[str] = []
    values: list[str] = []
    twice: list[str] = []

    def walk(node: Any, path: str) -> None:
        below = _below(node)
        if below is None:
            if path in flat:
                twice.append(path)
            flat[path] = node
            return
        for key, child in zip(below.keys, below.children, strict=True):
            if type(key) is not str or not key:
                place = f" in {path!r}" if path else ""
                if key == "":
                    values.append(f"key ''{place} is empty")
                elif key is not _BOX and (not isinstance(key, str | int) or isinstance(key, bool)):
                    types.append(f"key {key!r}{place} must be a string or an int")
            walk(child, _joined(path, key))

    walk(tree, "")
    if types:
        raise TypeError("keys are joined to paths by '/': " + listing([*types, *values]))
    if values or twice:
        problems = values + [f"{' and '.join(_places(tree, p))} have the path {p!r}" for p in twice]
        raise ValueError("keys are joined to paths by '/': " + listing(problems))
    return flat


class _Below(NamedTuple):
    """What is one level below a node: keys, children, and the structure that JAX gives it.

    A plain dict has no structure (None), so that its order stays.
    """

    keys: list[Any]
    children: list[Any]
    structure: Any

    def rebuilt(self, children: Iterable[Any]) -> Any:
        if self.structure is None:
            return dict(zip(self.keys, children, strict=True))
        import jax

        return jax.tree_util.tree_unflatten(self.structure, list(children))


_BOX = object()
"""The key of the only child of a variable, which adds no component to the path."""


def _below(node: Any) -> _Below | None:
    """The level below a node; None for a leaf."""
    if type(node) is dict:
        return _Below(list(node), list(node.values()), None)
    if _is_leaf(node):
        # JAX does not know every mapping.
        unknown = isinstance(node, Mapping)
        return _Below(list(node), list(node.values()), None) if unknown else None
    import jax

    below, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    keys = [_key(path[0]) for path, _ in below]
    if keys == ["value"] and _is_variable(node):
        keys = [_BOX]
    return _Below(keys, [child for _, child in below], structure)


def _key(entry: Any) -> Any:
    """The raw key of one of JAX's key entries."""
    for name in ("key", "idx", "name"):
        if hasattr(entry, name):
            return getattr(entry, name)
    import jax

    return jax.tree_util.keystr((entry,), simple=True)


def _is_variable(node: Any) -> bool:
    """Whether a node is one of Flax's boxes around an array (``nnx.Param``, ``nn.Partitioned``)."""
    ours = any(kind.__module__.partition(".")[0] == "flax" for kind in type(node).__mro__)
    return ours and (hasattr(node, "get_value") or hasattr(node, "unbox"))


def _is_leaf(node: Any) -> bool:
    # Here and not above, so that an error text with the nearest name costs no import of JAX.
    import jax

    return jax.tree_util.all_leaves([node])


def _shape(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))


def _has_leaves(node: Any) -> bool:
    below = _below(node)
    return below is None or any(map(_has_leaves, below.children))


def _pruned(node: Any) -> Any:
    """A part of a nested dict without its nodes without leaves."""
    if not isinstance(node, Mapping):
        return node
    return {key: _pruned(child) for key, child in node.items() if _has_leaves(child)}


def _joined(path: str, key: Any) -> str:
    if key is _BOX:
        return path
    return f"{path}/{key}" if path else str(key)


def _check_root(tree: Any) -> None:
    if _below(tree) is None:
        shown = type(tree).__name__
        raise TypeError(f"a tree of leaves, such as a nested dict, is needed, got one {shown}")


def _places(tree: Any, wanted: str) -> list[str]:
    """How Python reaches the leaves with this path."""
    found = []

    def walk(node: Any, path: str, place: str) -> None:
        below = _below(node)
        if below is None:
            if path == wanted:
                found.append(place)
            return
        for key, child in zip(below.keys, below.children, strict=True):
            here = place if key is _BOX else f"{place}[{key!r}]"
            walk(child, _joined(path, key), here)

    walk(tree, "", "")
    return found


def _likeness(name: str, candidate: str) -> float:
    whole = _ratio(name, candidate)
    asked, there = name.split("/"), candidate.split("/")
    if len(asked) == len(there) == 1 or len(asked) > len(there):
        return whole
    # A little less than a whole match of the same quality, which should come first.
    weight = 1.0 if len(asked) == len(there) else 0.95
    ends = (there[: len(asked)], there[-len(asked) :])
    return max(whole, *(weight * sum(map(_ratio, asked, end)) / len(asked) for end in ends))


def _ratio(a: str, b: str) -> float:
    # The time grows with the square of the lengths, and a name in a file may be as long as it.
    a, b = a[:200].lower(), b[:200].lower()
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def nested_differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what differs in nested values, such as those of JSON.

    >>> list(nested_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}))
    [('a.b', 1, 3)]
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in [*one, *(n for n in other if n not in one)]:
            inner = f"{path}.{name}" if path else name
            yield from nested_differences(one.get(name), other.get(name), inner)
    elif one != other:
        yield path, one, other
