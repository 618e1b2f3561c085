"""What a phase of training makes small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax

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


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """Cross-entropy against labels that give ``amount`` of their mass to all classes evenly.

    Args:
      amount: at least 0 and less than 1.

    Raises:
      ValueError: another amount.

    References:
      Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016.

    >>> import jax, jax.numpy as jnp
    >>> loss = SmoothedCrossEntropy(0.1)
    >>> float(loss(jnp.zeros((1, 4)), jnp.array([2]), jax.random.key(0))[0]).__round__(4)
    1.3863
    """

    amount: float

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise ValueError(
                f"smoothing gives away a share of at least 0 and less than 1, not {self.amount}"
            )

    def __call__(self, logits: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        del key  # See `cross_entropy`.
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), self.amount)
        return optax.softmax_cross_entropy(logits, targets)
