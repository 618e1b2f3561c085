"""The training state and the jit-compiled training step.

``State`` is everything that a run changes, as one pytree. The step is pure, donated, and takes the
gradient of the trainable leaves only. Equal phases of equal models share a compiled program, which
``CompileKey`` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxtransfer.data.loader import Batch, DataLoaders
from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.models.model import Model
from flaxtransfer.optimizers import Scaled, migrate
from flaxtransfer.paths import Params, Variables, merge
from flaxtransfer.sharding import leaf_shardings, replicated
from flaxtransfer.task import SINGLE_LABEL, Task
from flaxtransfer.training.plan import Phase
from flaxtransfer.weights.preprocessing import Preprocessing, normalize


class State(NamedTuple):
    """The state of a run.

    Args:
        step: optimizer steps since the start of the run, int32 scalar. It is also the position in
            the training data.
        params: all parameters.
        batch_stats: all BatchNorm statistics.
        opt_state: of the trainable leaves of the current phase, and of no others.
        ema: average of the trainable leaves, or an empty dict.
        ema_stats: BatchNorm statistics of the network with the average, as they were last measured,
            or an empty dict. Those in ``batch_stats`` are of other weights.
        key: the random key that the step's randomness is folded from.
    """

    step: jax.Array
    params: Params
    batch_stats: Params
    opt_state: Any
    ema: Params
    ema_stats: Params
    key: jax.Array

    def variables(self) -> Variables:
        """What evaluation uses: the average, with its own statistics, where there is one."""
        if not self.ema:
            return {"params": self.params, "batch_stats": self.batch_stats}
        return {"params": merge(self.params, self.ema), "batch_stats": self.ema_stats}


def optimizer(phase: Phase) -> optax.GradientTransformation:
    """The phase's optimizer over the nested dict of its trainable leaves."""
    return phase.param_groups.optimizer(phase.clip)


def start(variables: Variables, phase: Phase, seed: int) -> State:
    """The state before the first step of a run."""
    moving = phase.param_groups.trainable(variables["params"])
    return State(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer(phase).init(moving),
        ema=_average_of(moving, phase),
        ema_stats=_average_of(variables["batch_stats"], phase),
        key=jax.random.key(seed),
    )


def advance(state: State, phase: Phase) -> State:
    """The state before the first step of the next ``phase``.

    An average that the last phase kept becomes the parameters, and its statistics theirs: it is
    what was validated.
    """
    variables = state.variables()
    moving = phase.param_groups.trainable(variables["params"])
    return state._replace(
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=migrate(state.opt_state, optimizer(phase).init(moving)),
        ema=_average_of(moving, phase),
        ema_stats=_average_of(variables["batch_stats"], phase),
    )


def with_variables(state: State, variables: Variables, phase: Phase) -> State:
    """The state before the first step of ``phase`` with other variables; its average follows."""
    moving = phase.param_groups.trainable(variables["params"])
    return state._replace(
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        ema=_average_of(moving, phase),
        ema_stats=_average_of(variables["batch_stats"], phase),
    )


def _average_of(tree: Params, phase: Phase) -> Params:
    # A copy, because donated buffers may not appear twice in the state.
    return {} if phase.ema is None else jax.tree.map(jnp.array, tree)


@dataclass(frozen=True, eq=False)
class CompileKey:
    """All that a compiled training step depends on, besides its arguments.

    Args:
        model: the network.
        phase: resolved.
        preprocessing: whose mean and deviation the images are normalized by.
        start: segment that the batches enter at; None for images.
        task: what the labels are.
        mesh: devices, on which the state stays as it was placed; None where the compiler decides.
        above: bytes from which a leaf of the state is split over them; None splits nothing.
    """

    model: Model
    phase: Phase = field(repr=False)
    preprocessing: Preprocessing
    start: str | None
    task: Task = SINGLE_LABEL
    mesh: Mesh | None = None
    above: float | None = None

    @cached_property
    def identity(self) -> Hashable | None:
        """What equal programs have in common; None where that cannot be told from outside.

        A function of somebody else's may read what has changed since it was compiled, and a
        transformation of optax shows none of its numbers. Such a phase is compiled for itself.
        """
        phase = self.phase
        plain = all(_is_plain(group) for group in phase.groups.values())
        if not ((phase.loss is None or _of(phase.loss, "flaxtransfer")) and plain):
            return None
        preprocessing = (self.preprocessing.mean, self.preprocessing.std)
        decides = tuple(phase.in_step().items())
        parts = (self.model, preprocessing, self.start, self.task, self.mesh, self.above)
        identity = (type(phase), decides, *parts)
        try:
            hash(identity)
        except TypeError:
            return None
        return identity

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CompileKey) or self.identity is None:
            return self is other
        return self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def _is_plain(group: Any) -> bool:
    """Whether a group is all numbers, masks, and functions of optax."""
    if not isinstance(group, Group):
        return group is FROZEN
    rate = group.learning_rate
    while isinstance(rate, Scaled):
        rate = rate.schedule
    return _of(group.optimizer, "optax") and (not callable(rate) or _of(rate, "optax"))


def _of(function: Any, package: str) -> bool:
    """Whether a function, or the class of a callable value, is a package's own."""
    module = getattr(function, "__module__", "")
    return str(module).split(".")[0] == package


Metrics = dict[str, jax.Array]


def train_step(
    model: Model,
    phase: Phase,
    feed: DataLoaders,
    task: Task = SINGLE_LABEL,
    mesh: Mesh | None = None,
    above: float | None = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The step of one phase, to be compiled once.

    The gradient is taken with respect to the trainable leaves, so that the backward pass ends at
    the lowest of them. (Differentiating everything and zeroing afterwards costs the whole pass
    again as soon as a norm over all gradients is logged.) Clipping, decay, the average and the
    logged norms therefore see trainable leaves only.

    Equal phases of equal models share a program (``CompileKey``), so that the second run of
    a plan, on other data or from another seed, neither traces nor compiles. With a ``mesh`` the
    state leaves a step as it came, as ``place_replicated(state, mesh, above)`` placed it: otherwise
    the compiler may choose another sharding for it, and the next step would be compiled anew.
    What is split is joined for the pass through the network, so that every device convolves its
    images with whole kernels; the optimizer updates its part of them.

    Returns:
        ``(state, batch) -> (state, metrics)``; the state is donated. Metrics are float scalars:
        ``loss``, the mean of the task's score (``accuracy``), ``gradient_norm`` before clipping.
    """
    model = model if mesh is None else model.on(mesh)
    program = CompileKey(model, phase, feed.preprocessing, feed.start, task, mesh, above)
    return _shared(program) if program.identity is not None else _compiled(program)


@lru_cache(maxsize=32)
def _shared(program: CompileKey) -> Callable[[State, Batch], tuple[State, Metrics]]:
    return _compiled(program)


def _compiled(program: CompileKey) -> Callable[[State, Batch], tuple[State, Metrics]]:
    model, phase = program.model, program.phase
    update = optimizer(phase).update
    norm, task = phase.batch_norm_policy(), program.task
    loss_of = phase.loss or task.loss

    mesh, above = program.mesh, program.above
    constrain: Callable[..., Any] = jax.lax.with_sharding_constraint

    def whole(tree: Any) -> Any:
        return tree if mesh is None or above is None else constrain(tree, replicated(mesh))

    def parted(tree: Any) -> Any:
        if mesh is None or above is None:
            return tree
        return constrain(tree, leaf_shardings(tree, mesh, above))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        joined = whole(state.params)
        still = phase.param_groups.frozen(joined)
        inputs = network_input(batch["image"], program.preprocessing, program.start)
        loss_key = jax.random.fold_in(state.key, state.step)
        targets = task.targets(batch["label"])

        def objective(moving: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            variables = {"params": merge(still, moving), "batch_stats": state.batch_stats}
            logits, batch_stats = model.apply(variables, inputs, norm=norm, start=program.start)
            losses = loss_of(logits, targets, loss_key)
            return losses.mean(), (batch_stats, logits)

        (loss, (batch_stats, logits)), gradient = jax.value_and_grad(objective, has_aux=True)(
            phase.param_groups.trainable(joined)
        )
        moving, gradient = phase.param_groups.trainable(state.params), parted(gradient)
        updates, opt_state = update(gradient, state.opt_state, moving)
        moved = optax.apply_updates(moving, updates)
        ema = state.ema
        if phase.ema is not None:
            ema = optax.incremental_update(moved, ema, 1 - phase.ema)
        metrics = {
            "loss": loss,
            task.score_name: jnp.mean(task.score(logits, targets)),
            "gradient_norm": optax.tree.norm(gradient),
        }
        params = merge(phase.param_groups.frozen(state.params), moved)
        following = State(
            state.step + 1, params, batch_stats, opt_state, ema, state.ema_stats, state.key
        )
        return parted(following), whole(metrics)

    if mesh is None or above is not None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))


def network_input(images: jax.Array, preprocessing: Preprocessing, start: str | None) -> jax.Array:
    """Images normalized on the device; activations that enter at a later segment as they are."""
    if start is None:
        return normalize(images, preprocessing.mean, preprocessing.std)
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
