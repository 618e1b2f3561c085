"""Everything that a run changes as it goes, as one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxtransfer.optimizers import carry, merge, partition, trainable
from flaxtransfer.training.phases import Phase
from flaxtransfer.types import Params, Variables


class State(NamedTuple):
    """The state of a run.

    Args:
      step: optimizer steps since the start of the run, int32 scalar. It is also the position in
        the training data.
      params: all parameters.
      batch_stats: all BatchNorm statistics.
      opt_state: of the trainable leaves of the current phase, and of no others.
      ema: average of the trainable leaves, or an empty dict.
      key: the random key that the step's randomness is folded from.
    """

    step: jax.Array
    params: Params
    batch_stats: Params
    opt_state: Any
    ema: Params
    key: jax.Array

    def variables(self) -> Variables:
        """What evaluation uses: the average where there is one."""
        params = merge(self.params, self.ema) if self.ema else self.params
        return {"params": params, "batch_stats": self.batch_stats}


def optimizer(phase: Phase) -> optax.GradientTransformation:
    """The phase's optimizer over the nested dict of its trainable leaves."""
    labels = trainable(phase.labels, phase.labels, phase.groups)
    return partition(phase.groups, labels, clip=phase.clip)


def start(variables: Variables, phase: Phase, seed: int) -> State:
    """The state before the first step of a run."""
    moving = trainable(variables["params"], phase.labels, phase.groups)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer(phase).init(moving),
        ema=_average_of(moving, phase),
        key=jax.random.key(seed),
    )


def advance(state: State, phase: Phase) -> State:
    """The state before the first step of the next ``phase``.

    An average that the last phase kept becomes the parameters: it is what was validated.
    """
    params = state.variables()["params"]
    moving = trainable(params, phase.labels, phase.groups)
    return state._replace(
        params=params,
        opt_state=carry(state.opt_state, optimizer(phase).init(moving)),
        ema=_average_of(moving, phase),
    )


def with_params(state: State, params: Params, phase: Phase) -> State:
    """The state before the first step of ``phase`` with other parameters; its average follows."""
    moving = trainable(params, phase.labels, phase.groups)
    return state._replace(params=params, ema=_average_of(moving, phase))


def _average_of(moving: Params, phase: Phase) -> Params:
    # A copy, because donated buffers may not appear twice in the state.
    return {} if phase.ema is None else jax.tree.map(jnp.array, moving)
