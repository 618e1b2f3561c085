"""From labels and groups to one optax transformation over the leaves that move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from flaxtransfer.groups import FROZEN, Frozen, Group, Schedule, check_groups, trainable_mask
from flaxtransfer.masks import segment_or_empty
from flaxtransfer.optimizer_state import migrate
from flaxtransfer.paths import (
    flatten,
    listing,
    map_with_path,
    segment_of,
    segment_position,
    unflatten,
)

__all__ = [
    "FROZEN",
    "Frozen",
    "Group",
    "Scaled",
    "Schedule",
    "frozen",
    "layerwise_decay",
    "merge",
    "migrate",
    "partition",
    "scaled",
    "trainable",
    "trainable_mask",
]


def partition(
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen],
    labels: Mapping[str, Any],
    *,
    clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One optax transformation that treats each leaf as its label's group says.

    The order is: clip, then in each group decay and optimizer. Frozen leaves count for no norm,
    have no state, do not decay, and get the update -0.0: it is zero, and unlike 0.0 it also leaves
    a parameter of -0.0 as it is. An addition can still flush a subnormal number to zero, and a
    gradient that is not needed costs time: give ``trainable(labels, labels, groups)`` as labels and
    apply the updates to ``trainable(params, labels, groups)``, and frozen leaves see no arithmetic.

    Args:
      groups: for each label a ``Group``, any optax transformation, or ``FROZEN``.
      labels: nested dict of label names with the structure of the parameters (or of those that
        are trainable).
      clip: largest global norm of the gradients of all trainable leaves together; not of each
        group, which would let k groups pass sqrt(k) times as much.

    Returns:
      A transformation for trees of the structure of ``labels``.

    Raises:
      ValueError: labels without group, groups other than ``FROZEN`` without leaves (all in one
        text), or a clip that is not positive; at ``init``, parameters of another structure.
      TypeError: a group of another type.

    >>> tx = partition({"new": optax.sgd(0.5), "old": FROZEN}, {"fc": "new", "conv1": "old"})
    >>> params = {"fc": jnp.ones(()), "conv1": jnp.ones(())}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["fc"]), float(updates["conv1"])
    (-0.5, -0.0)
    """
    named = check_groups(groups, labels)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is the largest norm that passes, above 0; not {clip!r}")
    used = dict.fromkeys(named.values())
    inner = optax.partition({name: _transformation(groups[name]) for name in used}, labels)
    moving = trainable_mask(labels, groups)
    steps: list[optax.GradientTransformation] = [inner]
    if clip is not None and any(jax.tree.leaves(moving)):
        steps.insert(0, optax.masked(optax.clip_by_global_norm(clip), moving))
    chain = optax.chain(*steps)

    def init(params: Any) -> Any:
        if isinstance(params, Mapping):
            _check_same_leaves(labels, params, "parameters")
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init, chain.update)


def trainable(
    tree: Mapping[str, Any], labels: Mapping[str, Any], groups: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves of a tree that move, as a nested dict without the others.

    What is differentiated, updated and averaged; ``merge`` puts the whole together again.

    Args:
      tree: nested dict with the structure of ``labels``, of any leaves: parameters, or labels.
      labels: nested dict of label names.
      groups: for each label its group.

    Raises:
      ValueError: a tree of another structure, or labels and groups that do not fit.

    >>> groups = {"new": optax.sgd(0.1), "old": FROZEN}
    >>> labels = {"conv1": {"kernel": "old"}, "fc": {"bias": "new"}}
    >>> trainable({"conv1": {"kernel": 1}, "fc": {"bias": 2}}, labels, groups)
    {'fc': {'bias': 2}}
    """
    return _part(tree, labels, groups, moves=True)


def frozen(
    tree: Mapping[str, Any], labels: Mapping[str, Any], groups: Mapping[str, Any]
) -> dict[str, Any]:
    """The leaves of a tree that do not move: the complement of ``trainable``.

    Raises:
      ValueError: as ``trainable``.
    """
    return _part(tree, labels, groups, moves=False)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of both trees; where both have one, that of ``over``.

    Raises:
      ValueError: a leaf of one tree where the other has a branch, or two leaves of different
        shapes.

    >>> merge({"conv1": {"kernel": 1}, "fc": {"bias": 2}}, {"fc": {"bias": 3}})
    {'conv1': {'kernel': 1}, 'fc': {'bias': 3}}
    """
    below, above = flatten(base), flatten(over)
    differing = [
        f"{path}: {jnp.shape(below[path])} and {jnp.shape(leaf)}"
        for path, leaf in above.items()
        if hasattr(leaf, "shape") and path in below and jnp.shape(below[path]) != leaf.shape
    ]
    if differing:
        raise ValueError("leaves of different shapes cannot be merged: " + listing(differing))
    return unflatten(below | above)


@dataclass(frozen=True)
class Scaled:
    """A schedule times a constant.

    >>> Scaled(optax.constant_schedule(0.5), 0.5)(0)
    0.25
    """

    schedule: Schedule
    factor: float

    def __call__(self, step: Any) -> Any:
        return self.schedule(step) * self.factor


def layerwise_decay(
    params: Mapping[str, Any],
    group: Group,
    decay: float = 0.75,
    by: Literal["segment", "block"] = "segment",
) -> tuple[dict[str, Any], dict[str, Group]]:
    """Labels and groups whose learning rate shrinks with the distance from the head.

    Use it to fine-tune everything while the early, general features move least. The head keeps
    the group's learning rate; what is d steps before it has ``learning_rate * decay**d``. Schedules
    are scaled as a whole. An input adapter is the deepest of all; ``adapter()`` in a label of its
    own suits one that starts untrained better.

    Args:
      params: nested dict of a ResNet's parameters, or their shapes.
      group: the optimizer, and the head's learning rate.
      decay: factor for each step, in (0, 1].
      by: what a step is: a segment (adapter, stem, layer1 .. layer4) or a residual block
        (layer1/0, layer1/1, ...), beside stem and adapter.

    Returns:
      (labels, groups), the labels named after segment or block, the groups in the network's order.

    Raises:
      ValueError: a decay outside (0, 1], an unknown ``by``, or leaves that are no ResNet's.

    References:
      J. Howard, S. Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018
      (discriminative fine-tuning). K. Clark et al., "ELECTRA: Pre-training Text Encoders as
      Discriminators Rather Than Generators", 2020. H. Bao et al., "BEiT: BERT Pre-Training of
      Image Transformers", 2021.

    >>> params = {"bn1": {"bias": 0}, "layer1": {"0": {"bn1": {"bias": 0}}}, "fc": {"bias": 0}}
    >>> labels, groups = layerwise_decay(params, Group(optax.sgd, 1.0), decay=0.5)
    >>> {name: group.learning_rate for name, group in groups.items()}
    {'stem': 0.25, 'layer1': 0.5, 'head': 1.0}
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is a factor in (0, 1], not {decay!r}")
    if by not in ("segment", "block"):
        raise ValueError(f"by is 'segment' or 'block', not {by!r}")
    if not isinstance(group, Group):
        raise TypeError(f"layerwise_decay scales the learning rate of a Group, not of {group!r}")
    flat = flatten(params)
    if foreign := [path for path in flat if not segment_or_empty(path)]:
        raise ValueError(
            f"no segment of a ResNet has these leaves: {listing(foreign)}; label other networks "
            "with masks and give each label its Group"
        )
    units = {path: _unit(path, by) for path in flat}
    order = sorted(dict.fromkeys(units.values()), key=_unit_position)
    # Without a head in the tree, its last part is still one step before where the head would be.
    last = len(order) - (1 if order and order[-1] == "head" else 0)
    factors = {name: decay ** (last - position) for position, name in enumerate(order)}
    groups = {
        name: replace(group, learning_rate=scaled(group.learning_rate, factor))
        for name, factor in factors.items()
    }
    return map_with_path(lambda path, leaf: units[path], params), groups


def _transformation(group: Any) -> optax.GradientTransformation:
    if group is FROZEN:
        return optax.stateless_with_tree_map(_negative_zero)
    return group.transformation() if isinstance(group, Group) else group


def _negative_zero(gradient: jax.Array, parameter: Any) -> jax.Array:
    del parameter
    # x + 0.0 turns -0.0 into 0.0; x + -0.0 is x, always. Integers have no sign of zero.
    zeros = jnp.zeros_like(gradient)
    return -zeros if jnp.issubdtype(zeros.dtype, jnp.inexact) else zeros


def _part(
    tree: Mapping[str, Any], labels: Mapping[str, Any], groups: Mapping[str, Any], *, moves: bool
) -> dict[str, Any]:
    named = check_groups(groups, labels)
    _check_same_leaves(labels, tree, "tree")
    return unflatten(
        {
            path: leaf
            for path, leaf in flatten(tree).items()
            if (groups[named[path]] is not FROZEN) == moves
        }
    )


def _check_same_leaves(labels: Mapping[str, Any], tree: Mapping[str, Any], what: str) -> None:
    named, there = flatten(labels), flatten(tree)
    problems = []
    if unlabeled := [path for path in there if path not in named]:
        problems.append(f"{len(unlabeled)} leaves without label: {listing(unlabeled)}")
    if absent := [path for path in named if path not in there]:
        problems.append(f"{len(absent)} labels without leaf: {listing(absent)}")
    if problems:
        raise ValueError(f"labels are not of this {what}: {'; '.join(problems)}")


def _unit(path: str, by: str) -> str:
    segment = segment_of(path)
    block = path.split("/")[1] if "/" in path else ""
    in_block = by == "block" and segment.startswith("layer") and block.isdecimal()
    return f"{segment}/{block}" if in_block else segment


def _unit_position(unit: str) -> tuple[tuple[int, int], int]:
    segment, _, block = unit.partition("/")
    return segment_position(segment), int(block or -1)


def scaled(learning_rate: Any, factor: float) -> Any:
    """A learning rate, a schedule or a ``WarmupCosine``, times a constant."""
    # A number and a WarmupCosine know how to be multiplied; a function does not.
    return Scaled(learning_rate, factor) if callable(learning_rate) else learning_rate * factor
