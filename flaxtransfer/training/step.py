"""The training state and the jit-compiled training step.

``State`` is everything that a run changes, as one pytree. The step is pure, donated, and takes the
gradient of the trainable leaves only. Equal phases of equal models share a compiled program, which
``CompileKey`` decides. ``step_cost`` says what a step will take of devices that need not be here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flaxtransfer.batchnorm import divided_over
from flaxtransfer.data.loader import Batch, DataLoaders
from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.models.layers import lax_conv
from flaxtransfer.models.model import Model
from flaxtransfer.models.resnet import Noise, depth_rates
from flaxtransfer.optimizers import Scaled, migrate
from flaxtransfer.paths import Params, Variables, merge
from flaxtransfer.sharding import (
    batch_rows,
    batch_sharding,
    leaf_shardings,
    memory_of,
    replicated,
)
from flaxtransfer.task import SINGLE_LABEL, Task
from flaxtransfer.training.blend import (
    Blend,
    Part,
    accumulated,
    draw_blend,
    resized_shape,
    whole_batch,
)
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

    Images are blended here (MixUp, CutMix) and not where they are read: labels stay labels until
    the loss, a process needs no image of another one, and the draws are functions of the run's key
    and the step. In parts (``Phase.accumulate``) the gradients of equal parts are averaged before
    anything is made of them.

    Equal phases of equal models share a program (``CompileKey``), so that the second run of
    a plan, on other data or from another seed, neither traces nor compiles. With a ``mesh`` the
    state leaves a step as it came, as ``place_replicated(state, mesh, above)`` placed it: otherwise
    the compiler may choose another sharding for it, and the next step would be compiled anew.
    What is split is joined for the pass through the network, so that every device convolves its
    images with whole kernels; the optimizer updates its part of them.

    Returns:
        ``(state, batch) -> (state, metrics)``; the state is donated. Metrics are float scalars:
        ``loss``, the mean of the task's score (``accuracy``), ``gradient_norm`` before clipping.
        Of blended images the score is blended like the loss.

    Raises:
        ValueError: batches of activations are to be blended or made smaller.
    """
    on_images = {name: getattr(phase, name) for name in ("mixup", "cutmix", "image_size")}
    if feed.start is not None and any(on_images.values()):
        named = ", ".join(f"{name} {value}" for name, value in on_images.items() if value)
        raise ValueError(
            f"batches must hold images for what phase {phase.name!r} does to them ({named}), got "
            f"activations before {feed.start}"
        )
    program = CompileKey(model, phase, feed.preprocessing, feed.start, task, mesh, above)
    return _shared(program) if program.identity is not None else _compiled(program)


@lru_cache(maxsize=32)
def _shared(program: CompileKey) -> Callable[[State, Batch], tuple[State, Metrics]]:
    return _compiled(program)


_BLEND, _NOISE = 0x626C656E, 0x6E6F6973
"""Streams of a step's key. That of the loss is the key itself."""


def _compiled(program: CompileKey) -> Callable[[State, Batch], tuple[State, Metrics]]:
    model, phase = program.model, program.phase
    update = optimizer(phase).update
    norm, task = phase.batch_norm_policy(), program.task
    loss_of = phase.loss or task.loss

    mesh, above = program.mesh, program.above
    model = model if mesh is None else model.on(mesh)
    constrain: Callable[..., Any] = jax.lax.with_sharding_constraint

    def whole(tree: Any) -> Any:
        return tree if mesh is None or above is None else constrain(tree, replicated(mesh))

    def parted(tree: Any) -> Any:
        if mesh is None or above is None:
            return tree
        return constrain(tree, leaf_shardings(tree, mesh, above))

    depth = depth_rates(model.config, phase.stochastic_depth, phase.param_groups.trainable_paths)

    def loss_and_score(
        logits: jax.Array, part: Part, key: jax.Array, blend: Blend | None
    ) -> tuple[jax.Array, jax.Array]:
        """Losses and scores of examples, [rows]."""
        targets = task.targets(part.label)
        if blend is None or part.other_label is None:
            return loss_of(logits, targets, key), task.score(logits, targets)
        others = task.targets(part.other_label)
        if task.standardizes:
            targets = blend.of(targets, others)
            return loss_of(logits, targets, key), task.score(logits, targets)
        losses = blend.of(loss_of(logits, targets, key), loss_of(logits, others, key))
        return losses, blend.of(task.score(logits, targets), task.score(logits, others))

    def entered(images: jax.Array) -> jax.Array:
        """What enters the network, in the size of the phase."""
        inputs = network_input(images, program.preprocessing, program.start)
        if phase.image_size is not None:
            shape = resized_shape(inputs.shape, phase.image_size)
            inputs = jax.image.resize(inputs, shape, "linear")
        return inputs

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        joined = whole(state.params)
        still = phase.param_groups.frozen(joined)
        key = jax.random.fold_in(state.key, state.step)
        count = len(batch["label"])
        rows = batch_rows(mesh, count)
        blend = None
        if phase.mixup or phase.cutmix:
            _, *size, _ = resized_shape(batch["image"].shape, phase.image_size)
            blend = draw_blend(jax.random.fold_in(key, _BLEND), phase.mixup, phase.cutmix, size)
        noise_key = jax.random.fold_in(key, _NOISE)

        def objective(
            moving: Any, batch_stats: Params, part: Part, loss_key: jax.Array
        ) -> tuple[jax.Array, tuple[Params, jax.Array]]:
            variables = {"params": merge(still, moving), "batch_stats": batch_stats}
            inputs = entered(part.image)
            if blend is not None and part.other_image is not None:
                inputs = blend.images(inputs, entered(part.other_image))
            noise = None
            if phase.dropout or depth:
                noise = Noise(noise_key, part.rows, count, phase.dropout, depth)
            with divided_over(mesh):
                logits, batch_stats = model.apply(
                    variables,
                    inputs,
                    norm=norm,
                    start=program.start,
                    noise=noise,
                    remat=phase.remat,
                )
            losses, scores = loss_and_score(logits, part, loss_key, blend)
            return losses.mean(), (batch_stats, scores.mean())

        differentiate = jax.value_and_grad(objective, has_aux=True)
        everyone = whole_batch(batch, rows, blended=blend is not None)
        moving = phase.param_groups.trainable(joined)
        if phase.accumulate == 1:
            (loss, (batch_stats, score)), gradient = differentiate(
                moving, state.batch_stats, everyone, key
            )
        else:
            batch_stats, (loss, score, gradient) = accumulated(
                lambda stats, part, part_key: differentiate(moving, stats, part, part_key),
                state.batch_stats,
                everyone,
                phase.accumulate,
                key,
                unrolled=model.is_for_cpu,
            )
        moving, gradient = phase.param_groups.trainable(state.params), parted(gradient)
        updates, opt_state = update(gradient, state.opt_state, moving)
        moved = optax.apply_updates(moving, updates)
        ema = state.ema
        if phase.ema is not None:
            ema = optax.incremental_update(moved, ema, 1 - phase.ema)
        metrics = {
            "loss": loss,
            task.score_name: score,
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


@dataclass(frozen=True)
class StepCost:
    """What one training step takes of each device, as the compiler counts it.

    Args:
        device: kind of the devices.
        devices: how many.
        arguments: bytes of state and batch.
        temporary: bytes of what lives within the step, such as activations.
        results: bytes of the following state and the metrics that do not take the place of the
            arguments.
        program: bytes of machine code.
        flops: floating-point operations, as the compiler counts them.
        traffic: bytes read and written.
        collectives: how often devices exchange arrays, by the kind of exchange.
        capacity: bytes of memory of a device; None where that is not known.

    >>> cost = StepCost("TPU v5 lite", 16, 2**30, 2**34, 0, 0, 1e12, 1e10, {}, 2**34)
    >>> cost.memory / 2**30, cost.fits
    (17.0, False)
    """

    device: str
    devices: int
    arguments: int
    temporary: int
    results: int
    program: int
    flops: float
    traffic: float
    collectives: Mapping[str, int]
    capacity: int | None

    @property
    def memory(self) -> int:
        """Bytes of a device that the step needs at least."""
        return self.arguments + self.temporary + self.results + self.program

    @property
    def fits(self) -> bool | None:
        """Whether that is at most what a device has; None where that is not known."""
        return None if self.capacity is None else self.memory <= self.capacity


def step_cost(
    model: Model,
    phase: Phase,
    mesh: Mesh,
    batch_size: int,
    image_shape: tuple[int, int, int],
    above: float | None = None,
) -> StepCost:
    """Compiles the training step of a phase, from shapes alone, and reads off what it takes.

    Nothing is allocated and nothing runs. With a mesh of ``flaxtransfer.sharding.topology_mesh``
    the devices need not exist here.

    Args:
        model: the network.
        phase: of a plan, resolved or not.
        mesh: devices.
        batch_size: images of all devices together.
        image_shape: ``(height, width, bands)``.
        above: bytes from which a leaf of the state is split over the devices, as in ``ft.fit``.

    Raises:
        ValueError: a batch size that the devices do not divide, a phase that takes no step; or the
            compiler says that the program does not fit the devices.

    >>> from flaxtransfer.models.registry import resnet
    >>> from flaxtransfer.recipes import full_fine_tuning
    >>> from flaxtransfer.sharding import make_mesh
    >>> model = resnet("resnet18w4", classes=2)
    >>> plan = full_fine_tuning(model.abstract()["params"], steps=10)
    >>> cost = step_cost(model, plan.phases[0], make_mesh(jax.devices()[:1]), 4, (32, 32, 3))
    >>> cost.devices, cost.flops > 1e6, dict(cost.collectives)
    (1, True, {})
    """
    if not phase.steps:
        raise ValueError(f"phase {phase.name!r} takes no step: its head is solved")
    if batch_size % mesh.size:
        raise ValueError(
            f"`batch_size` must be a multiple of the {mesh.size} devices, got {batch_size}"
        )
    variables = model.abstract()
    resolved = phase.resolve(variables["params"])
    shaped: Callable[..., Any] = jax.ShapeDtypeStruct
    plain = jax.eval_shape(lambda variables: start(variables, resolved, 0), variables)
    state = jax.tree.map(
        lambda leaf, held: shaped(leaf.shape, leaf.dtype, sharding=held),
        plain,
        leaf_shardings(plain, mesh, above),
    )
    bands = image_shape[-1]
    pixels = Preprocessing((0.5,) * bands, (0.5,) * bands, image_shape[0], image_shape[0])
    key = CompileKey(model, resolved, pixels, None, SINGLE_LABEL, mesh, above)
    step: Any = _compiled(key)
    split = batch_sharding(mesh)
    batch = {
        "image": shaped((batch_size, *image_shape), jnp.uint8, sharding=split),
        "label": shaped((batch_size,), jnp.int32, sharding=split),
    }
    try:
        program = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used \S+ of \S+ \w+", str(error))
        raise ValueError(
            f"the step of phase {phase.name!r} does not fit "
            f"{mesh.devices.flat[0].device_kind} with {batch_size // mesh.size:,} images of "
            f"{image_shape[0]} x {image_shape[1]} px a device; take a smaller batch. "
            + (used[0] if used else " ".join(str(error).split())[:200])
        ) from None
    sizes, counts = program.memory_analysis(), program.cost_analysis()
    flops = counts.get("flops", float("nan"))
    if model.on(mesh).is_for_cpu:
        # The compiler counts one turn of a loop, and on CPU some convolutions are loops.
        plain_step: Any = _compiled(replace(key, model=replace(model, convolution=lax_conv)))
        counted = plain_step.lower(state, batch).cost_analysis()
        flops = counted.get("flops", float("nan")) / mesh.size
    return StepCost(
        mesh.devices.flat[0].device_kind,
        mesh.size,
        sizes.argument_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.generated_code_size_in_bytes,
        flops,
        counts.get("bytes accessed", float("nan")),
        dict(Counter(_COLLECTIVE.findall(program.as_text()))),
        memory_of(mesh),
    )


_COLLECTIVE = re.compile(
    r"[ )](all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


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
