"""Optimizer state across a change of labels: moments follow their leaves.

A state is read as a list of nodes: optax's named tuples that hold, for each parameter, moments
(``ScaleByAdamState.mu``, ``TraceState.trace``) and, for all of them, shared values (``count``).
Labels, chains and masks around a node say nothing about a parameter, and are looked through.
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

from flaxtransfer.paths import flatten, listing, map_with_path

__all__ = ["migrate"]


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

    >>> import optax
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
