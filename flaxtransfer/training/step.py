"""The training state and the jit-compiled training step.

``State`` is everything that a run changes, as one pytree. The step is pure, donated, and takes the
gradient of the trainable leaves only. Equal phases of equal models share a compiled program, which
``CompileKey`` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flaxtransfer.data.loader import Batch, DataLoaders
from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.models.model import Model
from flaxtransfer.models.resnet import Noise, depth_rates
from flaxtransfer.optimizers import Scaled, migrate
from flaxtransfer.paths import Params, Variables, merge
from flaxtransfer.sharding import batch_rows, replicated
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
        mesh: devices, on which the state stays replicated; None where the compiler decides.
    """

    model: Model
    phase: Phase = field(repr=False)
    preprocessing: Preprocessing
    start: str | None
    task: Task = SINGLE_LABEL
    mesh: Mesh | None = None

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
        parts = (self.model, preprocessing, self.start, self.task, self.mesh)
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
    state leaves a step as it came, replicated: otherwise the compiler may choose another sharding
    for it, and the next step would be compiled anew.

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
    program = CompileKey(model, phase, feed.preprocessing, feed.start, task, mesh)
    return _shared(program) if program.identity is not None else _compiled(program)


@lru_cache(maxsize=32)
def _shared(program: CompileKey) -> Callable[[State, Batch], tuple[State, Metrics]]:
    return _compiled(program)


def _compiled(program: CompileKey) -> Callable[[State, Batch], tuple[State, Metrics]]:
    model, phase = program.model, program.phase
    update = optimizer(phase).update
    norm, task = phase.batch_norm_policy(), program.task
    loss_of = phase.loss or task.loss

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
        still = phase.param_groups.frozen(state.params)
        moving = phase.param_groups.trainable(state.params)
        key = jax.random.fold_in(state.key, state.step)
        count = len(batch["label"])
        rows = batch_rows(program.mesh, count)
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
        whole = whole_batch(batch, rows, blended=blend is not None)
        if phase.accumulate == 1:
            (loss, (batch_stats, score)), gradient = differentiate(
                moving, state.batch_stats, whole, key
            )
        else:
            batch_stats, (loss, score, gradient) = accumulated(
                lambda stats, part, part_key: differentiate(moving, stats, part, part_key),
                state.batch_stats,
                whole,
                phase.accumulate,
                key,
            )
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
        params = merge(still, moved)
        following = State(
            state.step + 1, params, batch_stats, opt_state, ema, state.ema_stats, state.key
        )
        return following, metrics

    if program.mesh is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=replicated(program.mesh))


_BLEND, _NOISE = 0x626C656E, 0x6E6F6973
"""Streams of a step's key. That of the loss is the key itself."""


class Part(NamedTuple):
    """The rows of a batch that are computed at once.

    Args:
        image: [rows, height, width, channels], or activations.
        label: [rows, ...].
        rows: which rows of the batch they are, int [rows].
        other_image: what each image is blended with; None for nothing.
        other_label: its label.
    """

    image: jax.Array
    label: jax.Array
    rows: jax.Array
    other_image: jax.Array | None = None
    other_label: jax.Array | None = None


def whole_batch(batch: Batch, rows: np.ndarray, *, blended: bool) -> Part:
    """The batch, each example beside the one that it is blended with: that of the mirrored row.

    Orders are random, so that this is as good as another draw, and no example meets itself, but for
    the one in the middle of an odd batch.

    Args:
        batch: placed.
        rows: from ``batch_rows``.
        blended: whether there are others.
    """
    image, label = batch["image"], batch["label"]
    if not blended:
        return Part(image, label, jnp.asarray(rows))
    # Where rows are in order, devices then exchange their halves instead of gathering all.
    in_order = np.array_equal(rows, np.arange(len(rows)))
    others = slice(None, None, -1) if in_order else np.argsort(rows)[len(rows) - 1 - rows]
    return Part(image, label, jnp.asarray(rows), image[others], label[others])


def resized_shape(shape: Sequence[int], side: int | None) -> tuple[int, ...]:
    """The shape of images [batch, height, width, channels] of this side; None leaves it.

    >>> resized_shape((2, 8, 8, 3), 4)
    (2, 4, 4, 3)
    """
    return tuple(shape) if side is None else (shape[0], side, side, shape[3])


class Blend(NamedTuple):
    """How two images become one: by their values (MixUp), or by a rectangle (CutMix).

    Args:
        own: share of each image's own label.
        value: share of its own values outside of the rectangle.
        other: bool [height, width, 1], the rectangle, in which the other image is.
    """

    own: jax.Array
    value: jax.Array
    other: jax.Array

    def of(self, own: jax.Array, other: jax.Array) -> jax.Array:
        """Blends what belongs to the labels, [batch, ...]."""
        return self.own * own + (1 - self.own) * other

    def images(self, own: jax.Array, other: jax.Array) -> jax.Array:
        """Blends images [batch, height, width, channels]."""
        return jnp.where(self.other, other, self.value * own + (1 - self.value) * other)


def draw_blend(key: jax.Array, mixup: float, cutmix: float, size: Sequence[int]) -> Blend:
    """The blend of one step.

    Args:
        key: of this draw.
        mixup: alpha of MixUp, or 0.
        cutmix: alpha of CutMix, or 0; with both, each is drawn with probability 1/2.
        size: height and width of the images, in px.

    >>> blend = draw_blend(jax.random.key(0), 0.0, 1.0, (8, 8))
    >>> float(blend.own) == 1 - float(blend.other.mean())
    True
    """
    choose, first, second, *places = jax.random.split(key, 5)
    cuts = jnp.asarray(cutmix > 0)
    if mixup and cutmix:
        cuts = jax.random.bernoulli(choose)
    value = jax.random.beta(first, mixup, mixup) if mixup else jnp.ones(())
    area = jax.random.beta(second, cutmix, cutmix) if cutmix else jnp.ones(())
    center = [jax.random.randint(k, (), 0, n) for k, n in zip(places, size, strict=True)]
    box = cuts & cut_out(1 - area, center, size)
    return Blend(jnp.where(cuts, 1 - box.mean(), value), jnp.where(cuts, 1.0, value), box)


def cut_out(share: jax.Array, center: Sequence[Any], size: Sequence[int]) -> jax.Array:
    """CutMix's rectangle, bool [height, width, 1]: cut off at the edges of the image.

    Args:
        share: of the area, before it is cut off.
        center: row and column, in px.
        size: height and width of the image, in px.

    >>> int(cut_out(jnp.asarray(0.25), (4, 4), (8, 8)).sum())
    16
    """
    inside = []
    for middle, length in zip(center, size, strict=True):
        side = (length * jnp.sqrt(share)).astype(int)
        place = jnp.arange(length) - (middle - side // 2)
        inside.append((place >= 0) & (place < side))
    rows, columns = inside
    rectangle: jax.Array = rows[:, None, None] & columns[:, None]
    return rectangle


def accumulated(
    differentiate: Callable[..., Any], batch_stats: Params, whole: Part, parts: int, key: jax.Array
) -> tuple[Params, tuple[jax.Array, jax.Array, Any]]:
    """Statistics after all parts of a batch, and the means of loss, score and gradient.

    A part takes every ``parts``-th row, so that a batch that is split over devices stays where it
    is. On the CPU the parts are written out: a loop with convolutions in it is slow there.

    Args:
        differentiate: ``(batch_stats, part, key) -> ((loss, (batch_stats, score)), gradient)``.
        batch_stats: before the step.
        whole: the batch.
        parts: how many.
        key: of the loss, from which each part gets its own.

    Raises:
        ValueError: the batch cannot be divided into as many parts.
    """
    count = len(whole.label)
    if count % parts:
        raise ValueError(f"accumulate must divide the batch size {count}, got {parts}")

    def divided(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(count // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def body(carry: Any, given: tuple[Part, jax.Array]) -> tuple[Any, None]:
        stats, sums = carry
        part, number = given
        part = part._replace(image=after(part.image, sums))
        (loss, (stats, score)), gradient = differentiate(
            stats, part, jax.random.fold_in(key, number)
        )
        return (stats, jax.tree.map(jnp.add, sums, (loss, score, gradient))), None

    given = jax.tree.map(divided, whole), jnp.arange(parts)
    first = jax.tree.map(lambda leaf: leaf[0], given)
    shapes = jax.eval_shape(lambda: differentiate(batch_stats, first[0], key))
    (loss, (_, score)), gradient = shapes
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (loss, score, gradient))
    unroll = parts if jax.default_backend() == "cpu" else 1
    (stats, sums), _ = jax.lax.scan(body, (batch_stats, zeros), given, unroll=unroll)
    return stats, jax.tree.map(lambda leaf: leaf / parts, sums)


def after(images: jax.Array, sums: Any) -> jax.Array:
    """The images, as a result of what has to be computed before them.

    A compiler may take independent parts at the same time, which then take their memory at the same
    time. (``optimization_barrier`` says it more plainly, and is dropped on the CPU.)
    """
    none = sum(jnp.minimum(jnp.abs(leaf.ravel()[0]), 0) for leaf in jax.tree.leaves(sums))
    return images + jnp.asarray(none).astype(images.dtype)


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
