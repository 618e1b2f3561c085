"""Groups: what a label means for the optimizer, from its learning rate to standing still."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxtransfer.masks import Mask, as_mask, matrices, resolve
from flaxtransfer.paths import PyTree, flatten, listing, map_with_path, suggest

__all__ = [
    "FROZEN",
    "AnchorState",
    "Frozen",
    "Group",
    "Schedule",
    "WarmupCosine",
    "check_groups",
    "decay_to_init",
    "trainable_mask",
]


Schedule = Callable[[Any], Any]
"""``step -> learning rate``, as optax's schedules."""


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warmup from 0 to the peak, then cosine decay to the end.

    An optax schedule is a function of the step with a fixed length; this one is a value that can be
    printed, compared and written to a file, and takes its length from the phase.

    Args:
        peak: highest learning rate.
        warmup: fraction of the steps, >= 0 and < 1; at least one step, unless it is 0.
        end: learning rate after the last step, as a fraction of the peak.

    Raises:
        ValueError: numbers out of range; all in one text.

    References:
        I. Loshchilov, F. Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017.
        P. Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017
        (warm-up).

    >>> rate = WarmupCosine(1e-3).over(100)
    >>> [float(rate(step)).__round__(6) for step in (0, 10, 100)]
    [0.0, 0.001, 0.0]
    """

    peak: float
    warmup: float = 0.1
    end: float = 0.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be >= 0{below}, got {value!r}"
            for name, value, limit, below in (
                ("peak", self.peak, math.inf, ""),
                ("warmup", self.warmup, 1, " and < 1"),
                ("end", self.end, math.inf, ""),
            )
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < limit
        ]
        if problems:
            raise ValueError("invalid WarmupCosine: " + "; ".join(problems))

    def over(self, steps: int) -> Any:
        """The optax schedule for ``steps`` steps; the same object for equal arguments."""
        return _schedule(self, steps)

    def __mul__(self, factor: float) -> WarmupCosine:
        """The schedule with its peak multiplied by ``factor``."""
        return replace(self, peak=self.peak * factor)


@functools.lru_cache(maxsize=1024)
def _schedule(rate: WarmupCosine, steps: int) -> Any:
    rising = max(1, int(steps * rate.warmup)) if rate.warmup else 0
    # optax needs at least one step of decay.
    return optax.warmup_cosine_decay_schedule(
        0.0 if rising else rate.peak,
        rate.peak,
        rising,
        max(steps, rising + 1),
        end_value=rate.end * rate.peak,
    )


# optax's names for decay and its mask, in the optimizers that apply it themselves.
_DECAY_NAMES = ("weight_decay", "weight_decay_rate")
_DECAY_MASK_NAMES = ("mask", "weight_decay_mask")


class Frozen:
    """The type of ``FROZEN``."""

    def __repr__(self) -> str:
        return "FROZEN"

    def __reduce__(self) -> str:
        # By name, so that a copied or unpickled FROZEN is still the one that ``is`` compares with.
        return "FROZEN"


FROZEN = Frozen()
"""The group of leaves that do not move: no gradient, no decay, no optimizer state."""


@dataclass(frozen=True)
class Group:
    """An optimizer with its own learning rate and weight decay.

    Use it where learning rates are to be read, scaled and printed. Any optax transformation can
    stand in its place, but hides its learning rate.

    Weight decay goes to the leaves in ``decay_mask`` alone, by default the matrices: neither
    biases nor BatchNorm. An optimizer that knows decay (adamw, lion, lamb, ...) applies its own
    kind, with this value also where that is 0: optax's adamw would otherwise decay by 1e-4. For
    any other (sgd, adam, ...) the decay is added to the gradient, after clipping and before the
    optimizer, as torch's SGD does: an L2 penalty.

    Args:
        optimizer: An optax function of ``learning_rate``: ``optax.adamw``, or with more settings
            ``functools.partial(optax.sgd, momentum=0.9)``.
        learning_rate: A number, an optax schedule, or a ``WarmupCosine``, which takes the length of
            the phase.
        weight_decay: Coefficient, at least 0.
        decay_mask: Which leaves decay; a mask or its expression. A predicate in it (``where``) sees
            paths, shapes and dtypes.
        decay_toward: "zero", or "start": the values that the leaves had when they first became
            trainable. That decay is always an L2 penalty, added to the gradient.

    Raises:
        TypeError, ValueError: A setting that cannot be meant; the text says which.

    References:
        I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019.

    >>> Group(optax.adamw, learning_rate=1e-3).weight_decay
    0.0
    """

    optimizer: Callable[..., optax.GradientTransformation]
    learning_rate: float | Schedule | WarmupCosine
    weight_decay: float = 0.0
    decay_mask: Mask = matrices()
    decay_toward: Literal["zero", "start"] = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay_mask", as_mask(self.decay_mask))
        if not callable(self.optimizer):
            raise TypeError(
                "optimizer must be the function, such as optax.adamw, without its learning rate, "
                f"got {self.optimizer!r}"
            )
        if isinstance(self.optimizer, functools.partial):
            ours = ("learning_rate", *_DECAY_NAMES, *_DECAY_MASK_NAMES)
            doubled = [name for name in self.optimizer.keywords if name in ours]
            if doubled or self.optimizer.args:
                raise ValueError(
                    "give learning_rate, weight_decay and decay_mask to Group, not to partial: "
                    f"{_name(self.optimizer)} already has {self.optimizer.args or doubled}"
                )
        known = _parameters(self.optimizer)
        if known and "learning_rate" not in known:
            raise ValueError(f"{_name(self.optimizer)} takes no learning_rate; it takes {known}")
        if not callable(self.learning_rate) and not isinstance(self.learning_rate, WarmupCosine):
            _check_number("learning_rate", self.learning_rate)
        _check_number("weight_decay", self.weight_decay)
        if self.decay_toward not in ("zero", "start"):
            raise ValueError(f"decay_toward must be 'zero' or 'start', got {self.decay_toward!r}")

    def over(self, steps: int) -> Group:
        """The group for a phase of so many steps: its schedule as a function of the step."""
        if not isinstance(self.learning_rate, WarmupCosine):
            return self
        return replace(self, learning_rate=self.learning_rate.over(steps))

    def transformation(self) -> optax.GradientTransformation:
        """The optax transformation, for a tree of this group's leaves.

        Raises:
            ValueError: The schedule has not been told its length.
        """
        if isinstance(self.learning_rate, WarmupCosine):
            raise ValueError(
                f"{self.learning_rate} takes its length from a phase; outside of one, say it: "
                "group.over(steps)"
            )
        known = _parameters(self.optimizer)
        decay_name = next((name for name in _DECAY_NAMES if name in known), None)
        mask_name = next((name for name in _DECAY_MASK_NAMES if name in known), None)
        mask = functools.partial(_mask_tree, self.decay_mask)
        toward_start = self.decay_toward == "start"
        if decay_name and mask_name and not toward_start:
            own = {decay_name: self.weight_decay, mask_name: mask}
            return self.optimizer(learning_rate=self.learning_rate, **own)
        # An optimizer that decays but cannot be told which leaves is told not to.
        own = {decay_name: 0.0} if decay_name else {}
        optimizer = self.optimizer(learning_rate=self.learning_rate, **own)
        if not self.weight_decay:
            return optimizer
        if toward_start:
            pull = optax.masked(decay_to_init(self.weight_decay), mask)
            return optax.chain(pull, optimizer)
        return optax.chain(optax.add_decayed_weights(self.weight_decay, mask=mask), optimizer)


def check_groups(labels: PyTree, groups: Mapping[str, Any]) -> dict[str, str]:
    """Checks that every label has its group, and every group its leaves.

    A ``FROZEN`` group may have none: trees of trainable leaves hold no frozen label.

    Args:
        labels: Tree of label names.
        groups: For each label a ``Group``, an optax transformation or ``FROZEN``.

    Returns:
        ``{path: label}``.

    Raises:
        ValueError: A label without group, or a group without leaves; all in one text.
        TypeError: A group of another type, or a label that is not a string.
    """
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups must be a dict by label, got {groups!r}")
    flat = flatten(labels)
    wrong = [f"{n!r}: {group!r}" for n, group in groups.items() if not _is_group(group)]
    wrong += [f"{path!r}: {name!r}" for path, name in flat.items() if not isinstance(name, str)]
    if wrong:
        raise TypeError(
            "a label must be a string and a group a Group, an optax transformation or FROZEN, got "
            + listing(wrong)
        )
    used = dict.fromkeys(flat.values())
    problems = [
        f"label {name!r} has no group{suggest(name, groups)} "
        f"(leaves {listing(path for path in flat if flat[path] == name)})"
        for name in used
        if name not in groups
    ]
    problems += [
        f"group {name!r} has no leaves{suggest(name, used)}"
        for name, group in groups.items()
        if name not in used and group is not FROZEN
    ]
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. Labels: {', '.join(used)}; groups: {', '.join(groups)}"
        )
    return flat


def trainable_mask(labels: PyTree, groups: Mapping[str, Any]) -> Any:
    """The tree of booleans that is True where the leaf's group is not ``FROZEN``.

    Raises:
        ValueError, TypeError: As ``check_groups``.

    >>> groups = {"frozen": FROZEN, "new": optax.sgd(0.1)}
    >>> trainable_mask({"encoder": "frozen", "decoder": "new"}, groups)
    {'encoder': False, 'decoder': True}
    """
    check_groups(labels, groups)
    return map_with_path(lambda path, name: groups[name] is not FROZEN, labels)


def _is_group(value: Any) -> bool:
    return value is FROZEN or isinstance(value, Group | optax.GradientTransformation)


def _mask_tree(mask: Mask, tree: PyTree) -> Any:
    # A group without a leaf that decays is no mistake: take the head's bias alone.
    leaves, structure = jax.tree.flatten(tree)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return jax.tree.unflatten(structure, _decaying(mask, structure, shapes))


@functools.lru_cache(maxsize=64)
def _decaying(
    mask: Mask, structure: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...]
) -> tuple[bool, ...]:
    """Which leaves a mask selects; optax asks again at every trace."""
    abstract = [jax.ShapeDtypeStruct(*one) for one in shapes]  # type: ignore[no-untyped-call]
    tree = jax.tree.unflatten(structure, abstract)
    return tuple(jax.tree.leaves(resolve(mask, tree, allow_empty=True)))


def _parameters(optimizer: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(optimizer).parameters)
    except (TypeError, ValueError):  # A builtin says nothing about its parameters.
        return []


def _name(optimizer: Callable[..., Any]) -> str:
    function = optimizer.func if isinstance(optimizer, functools.partial) else optimizer
    return getattr(function, "__name__", repr(function))


def _check_number(name: str, value: Any) -> None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")


class AnchorState(NamedTuple):
    """Where the parameters started.

    Args:
        anchor: A copy of the parameters at ``init``; ``migrate`` hands it on from phase to phase
            like a moment, so that a leaf's anchor is where it first became trainable.
    """

    anchor: Any


def decay_to_init(strength: float) -> optax.GradientTransformation:
    """Adds ``strength * (parameter - start)`` to the gradient: an L2 penalty around the start.

    Args:
        strength: Coefficient, at least 0.

    References:
        X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", 2018 (L2-SP).

    >>> tx = decay_to_init(0.5)
    >>> state = tx.init({"w": jnp.array(1.0)})
    >>> gradient, _ = tx.update({"w": jnp.array(0.0)}, state, {"w": jnp.array(3.0)})
    >>> float(gradient["w"])
    1.0
    """

    def init(params: Any) -> AnchorState:
        # Copies, because the parameters themselves are donated to the step.
        return AnchorState(jax.tree.map(jnp.array, params))

    def update(updates: Any, state: AnchorState, params: Any = None) -> tuple[Any, AnchorState]:
        if params is None:
            raise ValueError(
                "decay toward the start needs the parameters: update(g, state, params)"
            )
        pulled = jax.tree.map(
            lambda g, p, a: g + (strength * (p - a)).astype(g.dtype), updates, params, state.anchor
        )
        return pulled, state

    return optax.GradientTransformation(init, update)
