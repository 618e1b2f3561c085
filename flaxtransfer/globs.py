"""Globs over the paths of leaves, such as "encoder/**/bias".

The grammar: ``?`` is one character and ``*`` any number of them, within a component; ``**`` is any
number of components, none included; ``{a,b}`` are alternatives; ``[0-9]`` and ``[!0-9]`` are
classes, in which a special character stands for itself: ``[*]``.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from flaxtransfer.paths import shortened

__all__ = ["check", "match"]


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
