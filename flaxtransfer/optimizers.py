"""Optimizers: labels and groups as one optax transformation, and its state across phases.

``migrate`` reads a state as a list of nodes: optax's named tuples that hold, for each parameter,
moments (``ScaleByAdamState.mu``, ``TraceState.trace``) and, for all of them, shared values
(``count``). Labels, chains and masks around a node say nothing about a parameter, and are looked
through.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxtransfer.groups import FROZEN, Frozen, Group, Schedule, check_groups
from flaxtransfer.models.layout import LAYOUTS, By, Layout, layout_of
from flaxtransfer.paths import PyTree, flatten, listing, map_with_path

__all__ = [
    "Scaled",
    "by_parts",
    "check_same_leaves",
    "layerwise_decay",
    "migrate",
    "partition",
    "partition_checked",
    "scaled",
]


def partition(
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen],
    labels: PyTree,
    *,
    clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One optax transformation that treats each leaf as its label's group says.

    It has the order of arguments of ``optax.partition``. The order of work is: clip, then in each
    group decay and optimizer. Frozen leaves count for no norm, have no state, do not decay, and get
    the update -0.0: it is zero, and unlike 0.0 it also leaves a parameter of -0.0 as it is. An
    addition can still flush a subnormal number to zero, and a gradient that is not needed costs
    time: with ``ParamGroups`` the optimizer runs over the trainable leaves alone, and frozen leaves
    see no arithmetic.

    Args:
        groups: For each label a ``Group``, any optax transformation, or ``FROZEN``.
        labels: Tree of label names with the structure of the parameters (or of those that are
            trainable).
        clip: Largest global norm of the gradients of all trainable leaves together; not of each
            group, which would let k groups pass sqrt(k) times as much.

    Returns:
        A transformation for trees of the structure of ``labels``.

    Raises:
        ValueError: Labels without group, groups other than ``FROZEN`` without leaves (all in one
            text), or a clip that is not positive; at ``init``, parameters of another structure.
        TypeError: A group of another type.

    >>> labels = {"decoder": "new", "encoder": "old"}
    >>> tx = partition({"new": optax.sgd(0.5), "old": FROZEN}, labels)
    >>> params = {"decoder": jnp.ones(()), "encoder": jnp.ones(())}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["decoder"]), float(updates["encoder"])
    (-0.5, -0.0)
    """
    return partition_checked(groups, labels, check_groups(labels, groups), clip)


def partition_checked(
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen],
    labels: PyTree,
    named: Mapping[str, str],
    clip: float | None,
) -> optax.GradientTransformationExtraArgs:
    """``partition`` with labels that have been checked; ``named`` are the same by path."""
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0 (the largest norm that passes), got {clip!r}")
    used = dict.fromkeys(named.values())
    transformations = {name: _transformation(groups[name]) for name in used}
    # As a function, because optax would call labels of a module that can be called.
    inner = optax.partition(transformations, lambda _: labels)
    steps: list[optax.GradientTransformation] = [inner]
    if clip is not None and any(groups[name] is not FROZEN for name in used):
        moving = map_with_path(lambda path, name: groups[name] is not FROZEN, labels)
        steps.insert(0, optax.masked(optax.clip_by_global_norm(clip), moving))
    chain = optax.chain(*steps)

    def init(params: Any) -> Any:
        # What optax itself passes to ask for a state's structure has no leaves.
        if isinstance(params, Mapping) or jax.tree.leaves(params):
            check_same_leaves(named, flatten(params), "parameters")
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init, chain.update)


def check_same_leaves(named: Mapping[str, str], flat: Mapping[str, Any], what: str) -> None:
    """Raises unless labels and leaves, both by path, are of one tree.

    Raises:
        ValueError: Leaves without label, or labels without leaf.
    """
    problems = []
    if unlabeled := [path for path in flat if path not in named]:
        problems.append(f"{len(unlabeled)} leaves without label: {listing(unlabeled)}")
    if absent := [path for path in named if path not in flat]:
        problems.append(f"{len(absent)} labels without leaf: {listing(absent)}")
    if problems:
        raise ValueError(f"labels are not of this {what}: {'; '.join(problems)}")


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
    params: PyTree,
    group: Group,
    decay: float = 0.75,
    by: By = "segment",
    *,
    layout: Layout | None = None,
) -> tuple[Any, dict[str, Group]]:
    """Layer-wise learning-rate decay: labels and groups whose rates shrink toward the input.

    Use it to fine-tune everything while the early, general features move least. The head keeps
    the group's learning rate; what is d steps before it has ``learning_rate * decay**d``. Schedules
    are scaled as a whole. An input adapter is the deepest of all; ``adapter()`` in a label of its
    own suits one that starts untrained better.

    Args:
        params: Parameters of a known family of networks, or their shapes.
        group: The optimizer, and the head's learning rate.
        decay: Factor for each step, in (0, 1].
        by: What a step is: a segment of the network or a residual block.
        layout: What the parts of the network are called; by default that of the family whose names
            the tree has.

    Returns:
        (labels, groups), the labels named after segment or block, the groups in the network's
        order.

    Raises:
        ValueError: A decay outside (0, 1], an unknown ``by``, or leaves of no known family.

    References:
        J. Howard, S. Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018
        (discriminative fine-tuning). K. Clark et al., "ELECTRA: Pre-training Text Encoders as
        Discriminators Rather Than Generators", 2020. H. Bao et al., "BEiT: BERT Pre-Training of
        Image Transformers", 2021.

    >>> from flaxtransfer.models.registry import resnet
    >>> params = resnet("resnet18").abstract()["params"]
    >>> labels, groups = layerwise_decay(params, Group(optax.sgd, 8.0), decay=0.5)
    >>> [group.learning_rate for group in groups.values()]
    [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be a factor in (0, 1], got {decay!r}")
    if not isinstance(group, Group):
        raise TypeError(f"layerwise_decay scales the learning rate of a Group, not of {group!r}")
    layout, order = by_parts(params, by, layout)
    # Without a head in the tree, its last part is still one step before where the head would be.
    last = len(order) - (1 if order and order[-1] == "head" else 0)
    groups = {
        name: replace(group, learning_rate=scaled(group.learning_rate, decay ** (last - position)))
        for position, name in enumerate(order)
    }
    return map_with_path(lambda path, leaf: layout.part(path, by), params), groups


def by_parts(
    params: PyTree, by: By = "segment", layout: Layout | None = None
) -> tuple[Layout, list[str]]:
    """The layout of a network, and its parts from the input to the output.

    Raises:
        ValueError: Another ``by``, or leaves that are of no part of a known family.
    """
    if by not in ("segment", "block"):
        raise ValueError(f"by must be 'segment' or 'block', got {by!r}")
    flat = flatten(params)
    layout = layout_of(flat) if layout is None else layout
    foreign = [path for path in flat if layout is None or not layout.segment(path)]
    if layout is None or foreign:
        families = layout.family if layout else " or ".join(one.family for one in LAYOUTS)
        raise ValueError(
            f"no segment of a {families} has these leaves: {listing(foreign)}; label other "
            "networks with ft.glob or ft.where and give each label its Group"
        )
    return layout, layout.parts(flat, by)


def _transformation(group: Any) -> optax.GradientTransformation:
    if group is FROZEN:
        return optax.stateless_with_tree_map(_negative_zero)
    return group.transformation() if isinstance(group, Group) else group


def _negative_zero(gradient: jax.Array, parameter: Any) -> jax.Array:
    del parameter
    # x + 0.0 turns -0.0 into 0.0; x + -0.0 is x, always. Integers have no sign of zero.
    zeros = jnp.zeros_like(gradient)
    return -zeros if jnp.issubdtype(zeros.dtype, jnp.inexact) else zeros


def scaled(learning_rate: Any, factor: float) -> Any:
    """A learning rate, a schedule or a ``WarmupCosine``, times a constant."""
    # A number and a WarmupCosine know how to be multiplied; a function does not.
    return Scaled(learning_rate, factor) if callable(learning_rate) else learning_rate * factor


# Dicts in optax's states that are named by hyperparameter, not by parameter.
_NOT_BY_PARAMETER = ("hyperparams", "hyperparams_states")

# Lion counts its steps and makes no use of it.
_IDLE_COUNTS = (optax.ScaleByLionState,)


def migrate(opt_state: Any, fresh: Any) -> Any:
    """The fresh state of a new phase with the moments of all leaves that were already trainable.

    Use it when labels change: after unfreezing, every leaf that goes on moving keeps its moments,
    under whatever label, and its count of steps for Adam's bias correction. Schedules begin anew,
    for the new phase brings its own. Moments of another kind of optimizer are of no use and are
    not carried. It is pure; the result shares the arrays of moments with ``opt_state``.

    Parameters may be any pytree without named tuples, which cannot be told from optax's nodes; the
    moments of such leaves start anew.

    Args:
        opt_state: The state after the last step of the old phase.
        fresh: ``tx.init(params)`` of the new phase's transformation.

    Returns:
        A state of the structure of ``fresh``.

    Raises:
        ValueError: A leaf of another shape than its moments; all in one text.

    Warns:
        UserWarning: Carried leaves share a count with leaves that are new or have another count.
            The count is then the largest of the carried ones, so that bias correction is over too
            early for some leaves, whose first steps are too large or too small. Another label for
            the new leaves gives them a count of their own.

    References:
        D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015 (section 3).

    >>> params = {"decoder": {"bias": jnp.ones(2)}}
    >>> tx = optax.adam(1e-3)
    >>> _, old = tx.update(params, tx.init(params), params)
    >>> float(migrate(old, tx.init(params))[0].mu["decoder"]["bias"][0]).__round__(6)
    0.1
    """
    donors: dict[tuple[type, str, int], _Node] = {}

    def collect(node: _Node) -> _Node:
        donors.update(dict.fromkeys(_keys(node, seen), node))
        return node

    seen: Counter[tuple[type, str]] = Counter()
    _map_nodes(collect, opt_state)

    problems: list[str] = []
    notes: list[str] = []

    def fill(node: _Node) -> _Node:
        found = {key[1]: donors[key] for key in _keys(node, seen) if key in donors}
        problems.extend(_misfits(node, found))
        if problems or not found:
            return node
        notes.extend(_shared_counts(node, found))
        return _filled(node, found)

    seen.clear()
    state = _map_nodes(fill, fresh)
    if problems:
        raise ValueError(f"moments fit no leaf of another shape: {listing(problems)}")
    if notes:
        warnings.warn("; ".join(notes), UserWarning, stacklevel=2)
    return state


@dataclass(frozen=True, eq=False)
class _Node:
    """A named tuple with moments.

    Args:
        kind: Its type.
        moments: ``{(field, path): array}``.
        shared: ``{field: array}``, what it holds once for all parameters.
    """

    kind: type
    moments: Mapping[tuple[str, str], Any]
    shared: Mapping[str, Any]

    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for _, path in self.moments))


def _map_nodes(f: Callable[[_Node], _Node], state: Any) -> Any:
    """The state with ``f(node)`` in place of every node, in a fixed order."""
    if jax.tree_util.all_leaves([state]):
        return state
    if not _is_named_tuple(state):
        # One level of whatever it is: chain, list, dict by label.
        one_level = functools.partial(jax.tree.map, is_leaf=lambda below: below is not state)
        return one_level(functools.partial(_map_nodes, f), state)
    fields = state._asdict()
    trees = {name: value for name, value in fields.items() if _is_by_parameter(name, value)}
    shared = {name: value for name, value in fields.items() if jax.tree_util.all_leaves([value])}
    moments = {(n, path): leaf for n, tree in trees.items() for path, leaf in flatten(tree).items()}
    node = _Node(type(state), moments, shared)
    if moments:
        node = f(node)
    new = {name: _tree_of(node, name, tree) for name, tree in trees.items()}
    new.update(node.shared)
    rest = {name: _map_nodes(f, value) for name, value in fields.items() if name not in new}
    return type(state)(**new, **rest)


def _tree_of(node: _Node, field: str, tree: Any) -> Any:
    return map_with_path(lambda path, leaf: node.moments[field, path], tree)


def _is_named_tuple(value: Any) -> bool:
    # Those without fields, as MaskedNode, stand for nothing and hold nothing.
    return isinstance(value, tuple) and bool(getattr(value, "_fields", ()))


def _is_by_parameter(name: str, value: Any) -> bool:
    if name in _NOT_BY_PARAMETER or jax.tree_util.all_leaves([value]):
        return False
    nodes = jax.tree.leaves(value, is_leaf=_is_named_tuple)
    return bool(nodes) and not any(map(_is_named_tuple, nodes))


def _keys(node: _Node, seen: Counter[tuple[type, str]]) -> Iterable[tuple[type, str, int]]:
    """What a parameter's moments are found by: kind, path, and which of several such nodes."""
    for path in node.paths():
        yield node.kind, path, seen[node.kind, path]
        seen[node.kind, path] += 1


def _misfits(node: _Node, found: Mapping[str, _Node]) -> list[str]:
    return [
        f"{path} has {field} of shape {tuple(leaf.shape)}, carried is {tuple(old.shape)}"
        for (field, path), leaf in node.moments.items()
        if path in found
        and (old := found[path].moments.get((field, path), leaf)).shape != leaf.shape
    ]


def _filled(node: _Node, found: Mapping[str, _Node]) -> _Node:
    moments = {
        (field, path): _as_dtype_of(leaf, found[path].moments.get((field, path), leaf))
        if path in found
        else leaf
        for (field, path), leaf in node.moments.items()
    }
    # A copy, because one old count may serve several new labels, and a donated state may not
    # hold one buffer twice.
    shared = {
        field: jnp.array(_largest(field, found.values(), value))
        for field, value in node.shared.items()
    }
    return replace(node, moments=moments, shared=shared)


def _as_dtype_of(fresh: Any, carried: Any) -> Any:
    return carried if carried.dtype == fresh.dtype else carried.astype(fresh.dtype)


def _largest(field: str, donors: Iterable[_Node], fresh: Any) -> Any:
    values = {id(donor): donor.shared.get(field, fresh) for donor in donors}
    first, *others = values.values()
    if jnp.ndim(fresh):  # A constant of the optimizer, such as Muon's coefficients.
        return fresh
    return jnp.max(jnp.stack([first, *others])) if others else first


def _shared_counts(node: _Node, found: Mapping[str, _Node]) -> list[str]:
    """What to tell about leaves that share a count with others of another age."""
    count = node.shared.get("count")
    if count is None or node.kind in _IDLE_COUNTS:
        return []
    ages = {path: donor.shared.get("count", count) for path, donor in found.items()}
    if any(isinstance(age, jax.core.Tracer) for age in (count, *ages.values())):
        return []
    steps = {path: int(age) for path, age in ages.items()}
    shared = max(steps.values())
    younger = {
        p: steps.get(p, int(count)) for p in node.paths() if steps.get(p, int(count)) < shared
    }
    if not younger:
        return []
    new = [path for path in younger if path not in steps]
    what = f"new leaves ({listing(new)})" if new else f"leaves ({listing(younger)})"
    return [
        f"{what} share a group with leaves that are {shared} steps old, and take over "
        f"their count: the bias correction of {node.kind.__name__} is then over for them before "
        "their moments have settled; give them a label of their own"
    ]
