"""The training step: pure, jit-compiled, donated, with gradients of the trainable leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flaxtransfer.data.normalisation import normalise
from flaxtransfer.models import Model
from flaxtransfer.optimizers import frozen, merge, trainable
from flaxtransfer.training.feed import Batch, Feed
from flaxtransfer.training.phases import Phase
from flaxtransfer.training.program import Program
from flaxtransfer.training.state import State, optimizer
from flaxtransfer.types import Variables
from flaxtransfer.weights import Preprocessing

Metrics = dict[str, jax.Array]


def train_step(
    model: Model, phase: Phase, feed: Feed
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of one phase, to be compiled once.

    The gradient is taken with respect to the trainable leaves, so that the backward pass ends at
    the lowest of them. (Differentiating everything and zeroing afterwards costs the whole pass
    again as soon as a norm over all gradients is logged.) Clipping, decay, the average and the
    logged norms therefore see trainable leaves only.

    Equal phases of equal models share a program (`training/program.py`), so that the second run of
    a plan, on other data or from another seed, neither traces nor compiles.

    Returns:
      ``(state, batch) -> (state, metrics)``; the state is donated. Metrics are float scalars:
      ``loss`` in nats, ``accuracy`` and ``gradient_norm`` before clipping.
    """
    program = Program(model, phase, feed.preprocessing, feed.start)
    return _shared(program) if program.identity is not None else _compiled(program)


@lru_cache(maxsize=32)
def _shared(program: Program) -> Callable[[State, Batch], tuple[State, Metrics]]:
    return _compiled(program)


def _compiled(program: Program) -> Callable[[State, Batch], tuple[State, Metrics]]:
    model, phase = program.model, program.phase
    update = optimizer(phase).update
    norm = phase.batch_norm_policy()

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        still = frozen(state.params, phase.labels, phase.groups)
        inputs = network_input(batch["image"], program.preprocessing, program.start)
        loss_key = jax.random.fold_in(state.key, state.step)

        def objective(moving: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            variables = {"params": merge(still, moving), "batch_stats": state.batch_stats}
            logits, batch_stats = model.apply(variables, inputs, norm=norm, start=program.start)
            losses = phase.loss(logits, batch["label"], loss_key)
            return losses.mean(), (batch_stats, logits)

        moving = trainable(state.params, phase.labels, phase.groups)
        (loss, (batch_stats, logits)), gradient = jax.value_and_grad(objective, has_aux=True)(
            moving
        )
        updates, opt_state = update(gradient, state.opt_state, moving)
        moved = optax.apply_updates(moving, updates)
        ema = state.ema
        if phase.ema is not None:
            ema = optax.incremental_update(moved, ema, 1 - phase.ema)
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
            "gradient_norm": optax.tree.norm(gradient),
        }
        params = merge(still, moved)
        return State(state.step + 1, params, batch_stats, opt_state, ema, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def network_input(images: jax.Array, preprocessing: Preprocessing, start: str | None) -> jax.Array:
    """Images normalised on the device; activations that enter at a later segment as they are."""
    if start is None:
        return normalise(images, preprocessing.mean, preprocessing.std)
    return images.astype(jnp.promote_types(images.dtype, jnp.float32))


@lru_cache(maxsize=8)
def forward(
    model: Model, preprocessing: Preprocessing, start: str | None = None, stop: str | None = None
) -> Callable[[Variables, Any], jax.Array]:
    """The compiled evaluation pass from segment ``start`` up to, not including, ``stop``.

    By default from uint8 images [batch, height, width, channels] to float32 logits.
    """

    @jax.jit
    def output(variables: Variables, images: jax.Array) -> jax.Array:
        inputs = network_input(images, preprocessing, start)
        return model.apply(variables, inputs, norm="running", start=start, stop=stop)[0]

    return output


@lru_cache(maxsize=8)
def forward_with_features(
    model: Model, preprocessing: Preprocessing, start: str | None = None
) -> Callable[[Variables, Any], tuple[jax.Array, jax.Array]]:
    """The compiled evaluation pass that also says what the head saw.

    From what enters at ``start``, by default images, to float32 logits [batch, classes] and
    float32 features [batch, channels].
    """
    before_head = forward(model, preprocessing, start, "head")

    @jax.jit
    def output(variables: Variables, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = before_head(variables, images)
        logits, _ = model.apply(variables, features, norm="running", start="head")
        return logits, features.astype(jnp.float32)

    return output
