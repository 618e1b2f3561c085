"""Labels: rules that give every leaf exactly one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flaxtransfer.mask_algebra import select
from flaxtransfer.masks import Mask, as_mask
from flaxtransfer.models.layout import Layout, layout_of
from flaxtransfer.paths import flatten, listing, map_with_path
from flaxtransfer.types import PyTree

__all__ = ["Rest", "label", "rest"]


@dataclass(frozen=True)
class Rest:
    """What no other rule takes; made by ``rest``."""

    def __repr__(self) -> str:
        return "rest()"


def rest() -> Rest:
    """The rule for every leaf that no other rule takes; it may well be none.

    It is not a mask, because what it selects depends on the other rules.
    """
    return Rest()


def label(
    params: PyTree, rules: Mapping[str, Mask | str | Rest], *, layout: Layout | None = None
) -> Any:
    """Gives every leaf exactly one label.

    Use it to say, once, which parts of a network are treated alike; gradient, optimizer, learning
    rate, decay and the BatchNorm policy all follow the labels. It does not say how they are
    treated: that is what groups are for. The result serves optax as it is
    (``optax.multi_transform(transforms, labels)``); of a module that can be called, such as
    Equinox's, optax needs ``lambda _: labels``.

    Args:
        params: Any pytree of arrays or ``jax.ShapeDtypeStruct``. Every leaf that JAX sees gets a
            label: of an Equinox module, whose leaves may be functions, give
            ``eqx.filter(model, eqx.is_array)``.
        rules: For each label a mask, a mask's expression, or (once) ``rest()``.
        layout: What the parts of the network are called; by default that of the family whose names
            the tree has.

    Returns:
        A tree of the structure of ``params`` with a str for each leaf.

    Raises:
        ValueError: Leaves that no rule or several rules take, rules that take nothing, expressions
            that cannot be read, more than one ``rest()``. All of them are in one text.
        TypeError: A rule of another type, or a label that is not a string.

    >>> from flaxtransfer.masks import glob
    >>> label({"encoder": [0, 0], "decoder": 0}, {"new": glob("decoder"), "frozen": rest()})
    {'encoder': ['frozen', 'frozen'], 'decoder': 'new'}
    """
    _check_types(rules)
    flat = flatten(params)
    layout = layout_of(flat) if layout is None else layout
    problems = [] if flat else ["the tree has no leaves"]
    if flat and all(path.split("/")[0] in ("params", "batch_stats") for path in flat):
        problems.append('this looks like variables: label variables["params"]')

    taken: dict[str, frozenset[str]] = {}
    for name, rule in rules.items():
        if isinstance(rule, Rest):
            continue
        try:
            taken[name] = select(as_mask(rule), flat, layout=layout)
        except ValueError as error:
            problems.append(f"label {name!r}: {error}")
    rests = [name for name, rule in rules.items() if isinstance(rule, Rest)]
    if len(rests) > 1:
        problems.append(f"rest() can be given once, not to {' and '.join(map(repr, rests))}")

    labels = {path: [n for n, paths in taken.items() if path in paths] for path in flat}
    problems += _overlaps(labels)
    gap = [path for path, names in labels.items() if not names]
    if rests:
        labels |= {path: [rests[0]] for path in gap}
    elif gap:
        problems.append(f"no label takes {_leaves(gap)}; widen a mask or add a label for rest()")
    if problems:
        raise ValueError(
            "the labels do not give every leaf exactly one label:"
            + "".join(f"\n- {problem}" for problem in problems)
        )
    return map_with_path(lambda path, leaf: labels[path][0], params)


def _check_types(rules: Mapping[str, Any]) -> None:
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a dict of masks by label, got {rules!r}")
    wrong = [
        f"{name!r}: {rule!r}"
        for name, rule in rules.items()
        if not (isinstance(name, str) and name and isinstance(rule, Mask | str | Rest))
    ]
    if wrong:
        raise TypeError(
            "a label must be a string and its rule a mask, an expression such as 'head()', or "
            f"rest(), got {', '.join(wrong)}"
        )


def _overlaps(labels: Mapping[str, list[str]]) -> list[str]:
    """One line for each combination of labels that compete for leaves."""
    competing: dict[tuple[str, ...], list[str]] = {}
    for path, names in labels.items():
        if len(names) > 1:
            competing.setdefault(tuple(names), []).append(path)
    return [
        f"{' and '.join(map(repr, names))} all take {_leaves(paths)}; "
        f"subtract one mask from the other"
        for names, paths in competing.items()
    ]


def _leaves(paths: list[str]) -> str:
    return f"{len(paths)} {'leaf' if len(paths) == 1 else 'leaves'}: {listing(paths)}"
