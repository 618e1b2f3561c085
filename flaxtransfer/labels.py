"""Labels, and ``ParamGroups``, which binds them to what they mean.

Rules give every leaf exactly one label; groups say how a label is trained; everything else follows
from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import optax

from flaxtransfer import batchnorm
from flaxtransfer.batchnorm import Norm
from flaxtransfer.groups import FROZEN, Frozen, Group, check_groups
from flaxtransfer.mask_algebra import select
from flaxtransfer.masks import Mask, as_mask
from flaxtransfer.models.layout import Layout, layout_of
from flaxtransfer.optimizers import check_same_leaves, partition_checked
from flaxtransfer.overview import ParameterTable, parameter_table
from flaxtransfer.paths import PyTree, flatten, is_nested_dict, listing, map_with_path, merge

__all__ = ["ParamGroups", "Rest", "label", "rest"]


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


@dataclass(frozen=True)
class ParamGroups:
    """The labels of a network's parameters together with the group of each label.

    Use it to train part of a network with a loop of your own: differentiate, update and average
    ``trainable(params)``, and ``merge`` with ``frozen(params)`` for the forward pass, so that the
    backward pass ends at the lowest trainable leaf. It is checked once, when it is made.

    A part of nested dicts is a nested dict without the other leaves. A part of any other tree
    (lists, modules, ``nnx.State``) has the structure of the whole, with None for the other leaves.

    Args:
        labels: Tree of label names with the structure of the parameters, as ``label`` returns it.
        groups: For each label a ``Group``, any optax transformation, or ``FROZEN``.

    Raises:
        ValueError: A label without group, or a group without leaves; all in one text.
        TypeError: A group of another type, or a label that is not a string.

    >>> labels = {"encoder": {"kernel": "old"}, "decoder": {"kernel": "new"}}
    >>> groups = ParamGroups(labels, {"new": Group(optax.adamw, 1e-3), "old": FROZEN})
    >>> params = {"encoder": {"kernel": 1.0}, "decoder": {"kernel": 2.0}}
    >>> groups.trainable(params), groups.frozen(params)
    ({'decoder': {'kernel': 2.0}}, {'encoder': {'kernel': 1.0}})
    >>> groups.merge(groups.frozen(params), {"decoder": {"kernel": 3.0}})
    {'encoder': {'kernel': 1.0}, 'decoder': {'kernel': 3.0}}
    """

    labels: PyTree = field(compare=False)
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen]
    named: Mapping[str, str] = field(init=False, repr=False)
    """``{path: label}``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "named", check_groups(self.labels, self.groups))

    @classmethod
    def of(
        cls,
        params: PyTree,
        rules: Mapping[str, Mask | str | Rest],
        groups: Mapping[str, Any],
        *,
        layout: Layout | None = None,
    ) -> ParamGroups:
        """``ParamGroups(label(params, rules), groups)``.

        Args:
            params: Parameters or their shapes.
            rules: For each label a mask, a mask's expression, or (once) ``rest()``.
            groups: For each label its group.
            layout: What the parts of the network are called; by default the known family's.

        Raises:
            ValueError, TypeError: As ``label``, and as ``ParamGroups``.
        """
        return cls(label(params, rules, layout=layout), groups)

    @cached_property
    def mask(self) -> Any:
        """The tree of booleans that is True where a leaf is trainable."""
        return map_with_path(lambda path, name: self.groups[name] is not FROZEN, self.labels)

    @cached_property
    def trainable_paths(self) -> tuple[str, ...]:
        """The paths of the trainable leaves."""
        return tuple(filter(self._moves, self.named))

    def trainable(self, tree: PyTree) -> Any:
        """The leaves of a tree that move: what is differentiated, updated and averaged.

        Args:
            tree: Of the structure of the labels, of any leaves: parameters, gradients, labels.

        Raises:
            ValueError: A tree of other leaves.
        """
        return self._part(tree, moves=True)

    def frozen(self, tree: PyTree) -> Any:
        """The leaves of a tree that do not move: the complement of ``trainable``.

        Raises:
            ValueError: As ``trainable``.
        """
        return self._part(tree, moves=False)

    def merge(self, frozen: PyTree, trainable: PyTree) -> Any:
        """The whole tree of its two parts.

        Where both have a leaf, ``trainable``'s is taken: ``frozen`` may be the whole tree.

        Raises:
            ValueError: Trees that do not fit each other.
        """
        if self._nested:
            return merge(frozen, trainable)
        return jax.tree.map(
            lambda still, moving: still if moving is None else moving,
            frozen,
            trainable,
            is_leaf=lambda node: node is None,
        )

    def optimizer(self, clip: float | None = None) -> optax.GradientTransformationExtraArgs:
        """The optimizer over ``trainable(params)``; ``partition`` is the one over all leaves.

        Args:
            clip: Largest global norm of the gradients of all trainable leaves together.

        Raises:
            ValueError: A clip that is not positive.
        """
        moving = {path: self.named[path] for path in self.trainable_paths}
        return partition_checked(self.groups, self.trainable(self.labels), moving, clip)

    def table(self, variables: Mapping[str, Any], norm: Norm | None = None) -> ParameterTable:
        """``parameter_table`` of these labels and groups."""
        return parameter_table(variables, self.labels, self.groups, norm)

    def batch_norm(
        self,
        tree: PyTree | None = None,
        overrides: Mapping[Mask | str, Literal["running", "batch"]] | None = None,
    ) -> frozenset[str]:
        """The BatchNorm policy that follows: batch statistics where a leaf is trainable.

        Args:
            tree: Parameters or BatchNorm statistics; by default the parameters that are labeled,
                among which BatchNorms go by name.
            overrides: Exceptions, as for ``flaxtransfer.batchnorm.policy``.

        Raises:
            ValueError: As ``flaxtransfer.batchnorm.policy``.
        """
        if tree is None:
            return batchnorm.policy_of_paths(self.named, self.trainable_paths, overrides)
        return batchnorm.policy(tree, self.mask, overrides=overrides)

    @cached_property
    def _nested(self) -> bool:
        return is_nested_dict(self.labels)

    @cached_property
    def _leaves(self) -> tuple[list[bool], Any]:
        """Which leaves move, in JAX's order, and the structure of the tree."""
        leaves, structure = jax.tree.flatten(self.mask)
        return leaves, structure

    def _part(self, tree: PyTree, *, moves: bool) -> Any:
        if not self._nested:
            moving, structure = self._leaves
            leaves, given = jax.tree.flatten(tree)
            if given != structure:
                check_same_leaves(self.named, flatten(tree), "tree")
                here = {path for path in self.named if self._moves(path) == moves}
                return map_with_path(lambda path, leaf: leaf if path in here else None, tree)
            chosen = [x if m == moves else None for x, m in zip(leaves, moving, strict=True)]
            return jax.tree.unflatten(given, chosen)
        part, count = _chosen(tree, self.mask, moves) if isinstance(tree, Mapping) else ({}, -1)
        if count != len(self.named):
            check_same_leaves(self.named, flatten(tree), "tree")
            raise ValueError("labels are not of this tree: its leaves are nested in another way")
        return part

    def _moves(self, path: str) -> bool:
        return self.groups[self.named[path]] is not FROZEN


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


def _chosen(tree: Any, mask: Any, moves: bool) -> tuple[dict[str, Any], int]:
    """The leaves of a nested dict that move, or do not, and how many leaves it has in all.

    One walk without paths; a leaf where the labels have none makes the count -1 or less.
    """
    part: dict[str, Any] = {}
    count = 0
    for key, child in tree.items():
        below = mask.get(key) if isinstance(mask, Mapping) else None
        if isinstance(child, Mapping):
            inner, inside = _chosen(child, below, moves)
            count += inside
            if inner:
                part[key] = inner
        elif jax.tree_util.all_leaves([child]):
            if not isinstance(below, bool):
                return {}, -(1 << 30)
            count += 1
            if below == moves:
                part[key] = child
    return part, count
