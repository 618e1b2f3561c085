"""Paths of leaves: pytrees by "encoder/0/kernel", and the glob grammar over them.

A path is the keys from the root to a leaf, joined by ``/``. Every pytree has paths: of a dict the
keys, of a list or tuple the positions, of a named tuple, dataclass or module the names of the
fields. A variable of Flax is looked through: its array has the path of the variable. Nothing here
knows what the leaves are: arrays, ``jax.ShapeDtypeStruct``, booleans and labels are all alike.

The grammar of globs: ``?`` is one character and ``*`` any number of them, within a component;
``**`` is any number of components, none included; ``{a,b}`` are alternatives; ``[0-9]`` and
``[!0-9]`` are classes, in which a special character stands for itself: ``[*]``.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from flaxtransfer.types import PyTree

__all__ = [
    "check",
    "flatten",
    "is_nested_dict",
    "listing",
    "map_with_path",
    "match",
    "merge",
    "nearest",
    "shortened",
    "suggest",
    "unflatten",
    "visible",
]


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


def match(pattern: str, path: str) -> bool:
    """Whether a glob matches a whole path.

    The grammar is this module's: ``?`` ``*`` ``**`` ``{a,b}`` ``[0-9]`` ``[!0-9]``.

    Raises:
        ValueError: A pattern outside the grammar; the text says where.

    >>> match("encoder/*/dense?/kernel", "encoder/0/dense1/kernel")
    True
    >>> match("encoder/*", "encoder/0/dense1/kernel")
    False
    >>> match("**/norm[0-9]/{scale,bias}", "norm1/scale")
    True
    """
    return _compiled(pattern).matches(path)


def check(pattern: str) -> None:
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
