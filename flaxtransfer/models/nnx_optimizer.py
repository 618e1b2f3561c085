"""Masks and labels for NNX: what the gradient is taken of, and what the optimizer does."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

from flaxtransfer import optimizers
from flaxtransfer.groups import Frozen, Group, trainable_mask
from flaxtransfer.masks import Mask, as_mask, selected
from flaxtransfer.models.nnx_variables import as_dict, variables
from flaxtransfer.paths import flatten, listing

__all__ = ["Where", "partition", "where"]


@dataclass(frozen=True)
class Where:
    """An NNX filter that selects variables by path; made by ``where``.

    It is a value: equal ones compile once.

    >>> Where(frozenset({"blocks/0/kernel"}))(("blocks", 0, "kernel"), None)
    True
    """

    paths: frozenset[str] = field(repr=False)

    def __call__(self, path: tuple[Any, ...], value: Any) -> bool:
        del value
        return "/".join(map(str, path)) in self.paths


def where(
    which: Mask | str | Mapping[str, Any], module: Any, groups: Mapping[str, Any] | None = None
) -> Where:
    """The filter for a module's parameters that a mask, or labels, say may move.

    For ``nnx.DiffState(0, filter)``, so that the gradient ends at what moves, and for
    ``nnx.Optimizer(..., wrt=filter)``, so that nothing else has a state. It is made for one module:
    inside another one the paths are longer.

    Args:
      which: a mask or its expression, a nested dict of booleans, or, with groups, of labels.
      module: any module or state, or an abstract one.
      groups: for each label its group; all that is not ``FROZEN`` is selected.

    Raises:
      ValueError: a mask that selects nothing, labels or booleans of another tree, groups that do
        not fit.
      TypeError: labels without groups.

    >>> from flax import nnx
    >>> layers = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))])
    >>> nnx.to_flat_state(nnx.state(layers, where("glob('1/*')", layers))).paths
    ((1, 'bias'), (1, 'kernel'))
    """
    params = variables(module)["params"]
    if isinstance(which, Mapping):
        flat = flatten(which if groups is None else trainable_mask(which, groups))
        if wrong := [path for path, value in flat.items() if not isinstance(value, bool)]:
            raise TypeError(
                f"a tree of booleans is needed, or labels with their groups; see {listing(wrong)}"
            )
        _check_same(flat, flatten(params), "these booleans or labels are of another module")
        paths = frozenset(path for path, value in flat.items() if value)
        if not paths:
            raise ValueError("nothing is selected: every leaf is False, or in a FROZEN group")
        return Where(paths)
    if groups is not None:
        raise TypeError("groups belong to labels; a mask selects without them")
    return Where(selected(as_mask(which), params))


def partition(
    groups: Mapping[str, Group | optax.GradientTransformation | Frozen],
    labels: Mapping[str, Any],
    *,
    clip: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`flaxtransfer.partition` for ``nnx.Optimizer``: on states in the place of nested dicts.

    Args:
      groups: for each label a ``Group``, any optax transformation, or ``FROZEN``.
      labels: from ``label(variables(module)["params"], ...)``.
      clip: largest global norm of the gradients of all trainable leaves together.

    Returns:
      A transformation for states of all labelled parameters (``wrt=nnx.Param``) or of those that
      move (``wrt=where(labels, module, groups)``).

    Raises:
      ValueError, TypeError: as `flaxtransfer.partition`; at ``init`` and ``update``, a state of
        other leaves.

    >>> from flax import nnx
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> groups = {"new": optax.sgd(1.0), "old": optimizers.FROZEN}
    >>> labels = {"kernel": "old", "bias": "new"}
    >>> optimizer = nnx.Optimizer(layer, partition(groups, labels), wrt=nnx.Param)
    >>> before = variables(layer)["params"]
    >>> gradients = nnx.grad(lambda layer: layer(before["kernel"][:1, :2]).sum())(layer)
    >>> _ = optimizer.update(layer, gradients)
    >>> layer.bias[...].tolist(), bool((layer.kernel[...] == before["kernel"]).all())
    ([-1.0, -1.0, -1.0], True)
    """
    whole = optimizers.partition(groups, labels, clip=clip)
    moving = optimizers.trainable(labels, labels, groups)
    part = optimizers.partition(groups, moving, clip=clip)
    every, some = frozenset(flatten(labels)), frozenset(flatten(moving))

    def fitting(tree: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        there = frozenset(flatten(tree))
        if there == some:
            return part
        _check_same(
            there,
            every,
            "the optimizer's parameters are not the labelled ones; give wrt=nnx.Param, or "
            "wrt=where(labels, module, groups)",
        )
        return whole

    def init(params: Any) -> optax.OptState:
        tree, _ = as_dict(params)
        return fitting(tree).init(tree)

    def update(
        updates: Any, state: optax.OptState, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.OptState]:
        tree, restored = as_dict(updates)
        values = None if params is None else as_dict(params)[0]
        updated, state = fitting(tree).update(tree, state, values, **extra)
        return restored(updated), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_same(there: Iterable[str], wanted: Iterable[str], text: str) -> None:
    """Raises unless both have the same paths."""
    there, wanted = set(there), set(wanted)
    problems = [f"unknown: {listing(sorted(there - wanted))}"] if there - wanted else []
    problems += [f"missing: {listing(sorted(wanted - there))}"] if wanted - there else []
    if problems:
        raise ValueError(f"{text}; {'; '.join(problems)}")
