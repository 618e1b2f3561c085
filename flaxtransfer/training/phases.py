"""A plan of training as data: phases of which leaves move, how fast, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import optax

from flaxtransfer.batchnorm import Norm, policy
from flaxtransfer.optimizers import FROZEN, trainable_mask

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""``(logits [batch, classes], labels [batch], key) -> losses [batch]``."""


def cross_entropy(logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Softmax cross-entropy in nats, one value an example.

    >>> import jax, jax.numpy as jnp
    >>> float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """
    del key  # A deterministic loss; others may mix examples or drop outputs.
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def smoothed_cross_entropy(amount: float) -> Loss:
    """Cross-entropy against labels that give ``amount`` of their mass to all classes evenly.

    References:
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016.

    >>> import jax, jax.numpy as jnp
    >>> loss = smoothed_cross_entropy(0.1)
    >>> float(loss(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """

    def loss(logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        del key  # See `cross_entropy`.
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), amount)
        return optax.softmax_cross_entropy(logits, targets)

    return loss


@dataclass(frozen=True)
class Phase:
    """One stretch of training with the same leaves moving.

    Use it to say what a stage of an adaptation does; it holds decisions, not state, and can be
    printed or changed with ``dataclasses.replace`` before anything is allocated.

    Args:
      labels: nested dict of label names with the structure of the parameters, from ``ft.label``.
      groups: what each label means: a ``Group``, any optax transformation, or ``FROZEN``.
      steps: optimizer steps; give this or ``epochs``.
      epochs: passes over the training examples, rounded up to whole steps.
      name: what tables and logs call the phase.
      norm: BatchNorm policy. By default a BatchNorm whose affine leaves are all frozen uses its
        running statistics and never updates them, and the others use batch statistics.
      clip: largest global norm of the gradient over the trainable leaves of all groups.
      ema: decay of an exponential moving average of the trainable leaves, which evaluation then
        uses; None for no average.
      patience: evaluations without a better validation metric after which the phase ends; needs
        a validation set.
      loss: see ``Loss``.

    Raises:
      ValueError: both or neither of steps and epochs, or numbers out of range; the text names
        them all.
    """

    labels: Mapping[str, Any]
    groups: Mapping[str, Any]
    steps: int | None = None
    epochs: float | None = None
    name: str = "fine-tune"
    norm: Norm | None = None
    clip: float | None = None
    ema: float | None = None
    patience: int | None = None
    loss: Loss = field(default=cross_entropy, repr=False)

    def __post_init__(self) -> None:
        problems = []
        if (self.steps is None) == (self.epochs is None):
            problems.append(
                f"give steps or epochs, one of them; got {self.steps} and {self.epochs}"
            )
        for name in ("steps", "epochs", "clip", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} must be positive, not {value}")
        if self.ema is not None and not 0 <= self.ema < 1:
            problems.append(f"ema must be in [0, 1), not {self.ema}")
        if problems:
            raise ValueError(f"phase {self.name!r}: " + "; ".join(problems))

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the phase in optimizer steps."""
        if self.steps is not None:
            return self.steps
        return max(1, -int(-(self.epochs or 0) * steps_per_epoch // 1))

    def batch_norm_policy(self) -> Norm:
        """The policy that applies: the one given, or the one that follows from the labels."""
        if self.norm is not None:
            return self.norm
        return policy(trainable_mask(self.labels, self.groups))

    def moves_anything(self) -> bool:
        """Whether any leaf is trainable."""
        return any(jax.tree.leaves(trainable_mask(self.labels, self.groups)))


@dataclass(frozen=True)
class Plan:
    """Phases in order. Between two, the best validated state is restored and the optimizer moments
    of leaves that stay trainable are carried over.

    Raises:
      ValueError: no phase, two phases of one name, or a phase in which nothing is trainable.
    """

    phases: Sequence[Phase]

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        names = [phase.name for phase in self.phases]
        if not names:
            raise ValueError("a plan needs at least one phase")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"phases need names of their own; repeated: {', '.join(repeated)}")
        for phase in self.phases:
            if not phase.moves_anything():
                frozen = ", ".join(n for n, group in phase.groups.items() if group is FROZEN)
                raise ValueError(f"phase {phase.name!r} trains nothing: frozen are {frozen}")
