"""Paths of leaves: pytrees by "layer4/0/conv1/kernel", and the glob grammar over them.

Nested dicts as ``{"layer4/0/conv1/kernel": leaf}``; segments; did-you-mean.

A path is the keys from the root to a leaf, joined by ``/``. Nothing here knows what the leaves
are: arrays, ``jax.ShapeDtypeStruct``, booleans and labels are all alike.

The one grammar of patterns over paths.

``?`` is one character and ``*`` any number of them, within a component; ``**`` is any number of
components, none included; ``{a,b}`` are alternatives; ``[0-9]`` and ``[!0-9]`` are classes, in
which a special character stands for itself: ``[*]``.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

__all__ = [
    "SEGMENT_ORDER",
    "check",
    "flatten",
    "listing",
    "map_with_path",
    "match",
    "nearest",
    "segment_of",
    "segment_position",
    "segments",
    "suggest",
    "unflatten",
]


SEGMENT_ORDER = ("adapter", "stem", "layer1", "layer2", "layer3", "layer4", "pool", "head")
"""The segments of a ResNet from its input to its output."""

_STAGE = re.compile(r"layer([1-9][0-9]*)")
_SEGMENT_BY_NAME = {
    "adapter": "adapter",
    "conv1": "stem",
    "bn1": "stem",
    "gn1": "stem",
    "maxpool": "stem",
    "fc": "head",
}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a nested dict by path, in the order of the dicts.

    Nodes without leaves (an empty dict, None, ``optax.MaskedNode``) leave no trace, as in JAX.

    Args:
      tree: nested mapping with string keys; any leaves that JAX regards as such.

    Returns:
      ``{path: leaf}``.

    Raises:
      TypeError: a key that is no string, or a node that is neither mapping nor leaf; the text
        lists them all.
      ValueError: a key that is empty or holds a ``/``, which would make paths ambiguous.

    >>> flatten({"fc": {"kernel": 1, "bias": 2}, "bn1": {"scale": 3}})
    {'fc/kernel': 1, 'fc/bias': 2, 'bn1/scale': 3}
    """
    _check(tree)
    return dict(_walk(tree, ""))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with these leaves: the inverse of ``flatten``.

    Raises:
      ValueError: a path with an empty component, or one that runs through another's leaf.

    >>> unflatten({"fc/kernel": 1, "fc/bias": 2})
    {'fc': {'kernel': 1, 'bias': 2}}
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


def map_with_path(f: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of plain dicts with ``f(path, leaf)`` in place of each leaf.

    Nodes without leaves stay as they are, so the result has the structure of ``tree`` for JAX.

    Raises:
      TypeError, ValueError: as ``flatten``.

    >>> map_with_path(lambda path, leaf: path.endswith("kernel"), {"fc": {"kernel": 1, "bias": 2}})
    {'fc': {'kernel': True, 'bias': False}}
    """
    _check(tree)

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {key: walk(value, _join(path, key)) for key, value in node.items()}
        return f(path, node) if _is_leaf(node) else node

    return walk(tree, "")


def nearest(name: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The candidates most like ``name``, best first; empty when none is alike.

    Paths are compared as wholes and by their first or last components, so that ``fc`` and
    ``conv9/kernel`` find ``fc/kernel`` and ``layer1/0/conv1/kernel``.

    >>> nearest("layr2", ["layer1", "layer2", "head"], n=1)
    ['layer2']
    >>> nearest("fc/kernle", ["conv1/kernel", "fc/kernel", "fc/bias"], n=2)
    ['fc/kernel', 'conv1/kernel']
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


def segment_of(path: str) -> str:
    """The segment of a ResNet that a leaf with torchvision's name belongs to.

    Raises:
      ValueError: a path that is none of a ResNet's.

    >>> [segment_of(path) for path in ("bn1/scale", "layer3/0/conv2/kernel", "fc/bias")]
    ['stem', 'layer3', 'head']
    """
    first = path.split("/")[0]
    if first in _SEGMENT_BY_NAME:
        return _SEGMENT_BY_NAME[first]
    if _STAGE.fullmatch(first):
        return first
    known = (*_SEGMENT_BY_NAME, *SEGMENT_ORDER[2:6])
    raise ValueError(
        f"{path!r} belongs to no segment of a ResNet, whose paths start with {', '.join(known)}"
        + suggest(first, known)
    )


def segments(paths: Iterable[str]) -> list[str]:
    """The segments that these paths belong to, from the input to the output.

    Raises:
      ValueError: as ``segment_of``.

    >>> segments(["fc/bias", "layer2/0/conv1/kernel", "conv1/kernel"])
    ['stem', 'layer2', 'head']
    """
    return sorted({segment_of(path) for path in paths}, key=segment_position)


def segment_position(segment: str) -> tuple[int, int]:
    """Sorts segments from the input to the output."""
    stage = _STAGE.fullmatch(segment)
    if stage:
        return SEGMENT_ORDER.index("layer1"), int(stage[1])
    return SEGMENT_ORDER.index(segment), 0


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key


def _check(tree: Any) -> None:
    """Raises for everything in ``tree`` that has no path."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"a nested dict is needed, not {type(tree).__name__}")
    types: list[str] = []
    values: list[str] = []

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, Mapping):
            if not _is_leaf(node) and jax.tree.leaves(node):
                types.append(f"{path!r} holds a {type(node).__name__}")
            return
        for key, value in node.items():
            place = f" in {path!r}" if path else ""
            if not isinstance(key, str):
                types.append(f"key {key!r}{place} is no string")
            elif not key or "/" in key:
                values.append(f"key {key!r}{place} is empty or holds a '/'")
            walk(value, _join(path, str(key)))

    walk(tree, "")
    if types:
        raise TypeError(
            "trees are nested dicts with string keys and arrays: " + listing([*types, *values])
        )
    if values:
        raise ValueError("keys are joined to paths by '/': " + listing(values))


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _walk(value, _join(path, key))
    elif _is_leaf(node):
        yield path, node


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
    return difflib.SequenceMatcher(None, a.lower(), b.lower(), autojunk=False).ratio()


def match(pattern: str, path: str) -> bool:
    """Whether a glob matches a whole path.

    The grammar is this module's: ``?`` ``*`` ``**`` ``{a,b}`` ``[0-9]`` ``[!0-9]``.

    Raises:
      ValueError: a pattern outside the grammar; the text says where.

    >>> match("layer4/*/conv?/kernel", "layer4/0/conv1/kernel")
    True
    >>> match("layer4/*", "layer4/0/conv1/kernel")
    False
    >>> match("**/bn[0-9]/{scale,bias}", "bn1/scale")
    True
    """
    return _compiled(pattern).fullmatch(path + "/") is not None


def check(pattern: str) -> None:
    """Raises for a pattern outside the grammar, before there is a path to match.

    Raises:
      ValueError: as ``match``.
    """
    _compiled(pattern)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression for paths that end with a ``/``: so each component ends alike."""
    alternatives = []
    for plain in _expand(pattern, pattern):
        components = plain.split("/")
        if "" in components:
            raise ValueError(f"glob {pattern!r} has an empty component")
        translated = (_component(component, pattern) for component in components)
        alternatives.append("".join(translated))
    return re.compile("|".join(alternatives), re.DOTALL)


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
                raise ValueError(f"glob {pattern!r} closes a brace that it never opened")
            if depth == 0:
                ends = [*(start - 1 for start in starts[1:]), i]
                heads = [text[start:end] for start, end in zip(starts, ends, strict=True)]
                tails = _expand(text[i + 1 :], pattern)
                inner = [text[:opened] + each for head in heads for each in _expand(head, pattern)]
                return [head + tail for head in inner for tail in tails]
        i += 1
    if depth:
        raise ValueError(f"glob {pattern!r} never closes a brace that it opened")
    return [text]


def _class_end(text: str, start: int, pattern: str) -> int:
    """The index of the ``]`` that closes the class opened at ``start``."""
    first = start + (2 if text[start + 1 : start + 2] in ("!", "^") else 1)
    # Directly after the opening a "]" is a member, as in every shell.
    end = text.find("]", first + 1)
    if end < 0:
        raise ValueError(f"glob {pattern!r} never closes a '[', or the class is empty")
    return end


def _component(component: str, pattern: str) -> str:
    if component == "**":
        return "(?:[^/]+/)*"
    if "**" in re.sub(r"\[.*?\]", "", component):
        raise ValueError(f"glob {pattern!r}: '**' stands for whole components, as in 'a/**/b'")
    out, i = [], 0
    while i < len(component):
        character = component[i]
        if character == "[":
            end = _class_end(component, i, pattern)
            out.append(_class(component[i + 1 : end], pattern))
            i = end
        else:
            out.append({"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character)))
        i += 1
    return "".join(out) + "/"


def _class(members: str, pattern: str) -> str:
    negated = members[0] in "!^"
    members = members[1:] if negated else members
    ranges, i = [], 0
    while i < len(members):
        if members[i + 1 : i + 2] == "-" and i + 2 < len(members):
            low, high = members[i], members[i + 2]
            if low > high:
                raise ValueError(f"glob {pattern!r}: the range {low}-{high} runs backwards")
            ranges.append(f"{re.escape(low)}-{re.escape(high)}")
            i += 3
        else:
            ranges.append(re.escape(members[i]))
            i += 1
    # The lookahead keeps a range such as [+-9] from matching the separator.
    return f"(?!/)[{'^' if negated else ''}{''.join(ranges)}]"
