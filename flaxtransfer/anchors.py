"""Decay toward where the leaves started, instead of toward zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["AnchorState", "decay_toward_start"]


class AnchorState(NamedTuple):
    """Where the parameters started.

    Args:
      anchor: a copy of the parameters at ``init``; ``carry`` hands it on from phase to phase like a
        moment, so that a leaf's anchor is where it first became trainable.
    """

    anchor: Any


def decay_toward_start(strength: float) -> optax.GradientTransformation:
    """Adds ``strength * (parameter - start)`` to the gradient: an L2 penalty around the start.

    Args:
      strength: coefficient, at least 0.

    References:
      X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with
      Convolutional Networks", 2018 (L2-SP).

    >>> tx = decay_toward_start(0.5)
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
