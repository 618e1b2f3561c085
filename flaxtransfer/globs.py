"""The one grammar of patterns over paths.

``?`` is one character and ``*`` any number of them, within a component; ``**`` is any number of
components, none included; ``{a,b}`` are alternatives; ``[0-9]`` and ``[!0-9]`` are classes, in
which a special character stands for itself: ``[*]``.
"""

import functools
import re

__all__ = ["check", "match"]


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
