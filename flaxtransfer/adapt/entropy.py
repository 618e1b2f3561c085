"""Entropy minimization at test time: BatchNorm scales and biases that make predictions sharper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from scipy.special import entr, softmax

from flaxtransfer.adapt.batch_norm import Guard, batch_norms, check_guard, judged
from flaxtransfer.adapt.scores import Estimate, exceeds_shift, unlabeled_scores
from flaxtransfer.adapt.statistics import Images, Reader, reader, reestimate, target_logits
from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import label, rest
from flaxtransfer.masks import batch_norm
from flaxtransfer.models.model import Model
from flaxtransfer.optimizers import frozen, merge, partition, trainable
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.training.recalibration import without_padding
from flaxtransfer.types import Params, Variables
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = ["LEAST_BATCH", "EntropyReport", "tent"]


LEAST_BATCH = 32
"""Images in a batch, at least: with fewer, its statistics are noise, and their gradients too."""

_COLLAPSE = 0.5
"""Share of its effective classes that the mean prediction of a batch may not fall below."""


@dataclass(frozen=True, eq=False)
class EntropyReport:
    """What entropy minimization did.

    Args:
      adapted: whether the variables that came back have moved.
      refusals: why not; with ``guard="warn"``, what would have been a reason.
      notes: what a person should know, collapses among it.
      logits: float32 [images, classes], of each image after the steps on its batch, normalized by
        the statistics of that batch; in the images' order.
      entropies: mean entropy of the predictions of each batch before its steps, in nats.
      effective_classes: exp(entropy) of the mean prediction of each batch after its steps.
      collapses: batches after which everything was set back to the source's.
    """

    adapted: bool
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    logits: np.ndarray
    entropies: tuple[float, ...]
    effective_classes: tuple[float, ...]
    collapses: int

    def __str__(self) -> str:
        lines = []
        if self.entropies:
            lines.append(
                f"entropy minimized on {len(self.logits)} target images in {len(self.entropies)} "
                f"batches: {np.mean(self.entropies):.3f} nats a prediction before, "
                f"{np.mean(self.effective_classes):.1f} effective classes after; "
                f"set back after {self.collapses} batches"
            )
        word = "reason against it" if self.entropies else "not adapted"
        lines += [f"{word}: {reason}" for reason in self.refusals]
        return "\n".join([*lines, *self.notes])


def tent(
    model: Model,
    variables: Variables,
    images: Images,
    preprocessing: Preprocessing,
    *,
    source: Calibration | None = None,
    episodic: bool = False,
    learning_rate: float = 1e-3,
    steps: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    guard: Guard = "refuse",
    estimate: Estimate | None = None,
    mesh: Mesh | None = None,
) -> tuple[Variables, EntropyReport]:
    """Moves BatchNorm scales and biases so that predictions on the target become surer.

    It comes after ``adapt_batch_norm``, for what statistics alone do not mend; every batch is
    normalized by its own statistics, and all other parameters are frozen. It believes the
    predictions, right or wrong, and ends in one class where the batches have one: it is refused
    under label shift, and set back where the mean prediction collapses. Afterwards confidence says
    nothing about accuracy any more, for confidence is what was maximized.

    Args:
      model: the network.
      variables: the source's; not changed.
      images: unlabeled, of the target. Arrays are shuffled, feeds are taken in their order.
      preprocessing: that belongs to the weights.
      source: calibration of this network on held-out examples of the source; without it label
        shift is not looked for.
      episodic: whether every batch starts at the source's parameters and a fresh optimizer;
        otherwise what one batch taught stays for the next.
      learning_rate: of Adam.
      steps: on each batch.
      batch_size: of arrays, 32 or more.
      seed: of the shuffle.
      guard: "refuse" or "warn", as in ``adapt_batch_norm``.
      estimate: of the target's prevalence; by default maximum likelihood.
      mesh: devices; by default all of them.

    Returns:
      Variables with the parameters after the last batch and statistics of all images under them;
      the source's where it was refused, and with ``episodic``, for then each batch has its own
      parameters and only the logits remain. And the report.

    Raises:
      ValueError: batches of fewer than 32 images; no BatchNorm; no image; options out of range.
      TypeError: images that are not uint8.

    References:
      D. Wang, E. Shelhamer, S. Liu, B. Olshausen, T. Darrell, "Tent: Fully Test-Time Adaptation by
      Entropy Minimization", 2021.

    >>> import jax, numpy as np, flaxtransfer as ft
    >>> model = ft.Model(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> variables = model.init(jax.random.key(0))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> adapted, report = tent(model, variables, images, preprocessing)
    >>> report.adapted, report.logits.shape, len(report.entropies)
    (True, (64, 2), 1)
    """
    check_guard(guard)
    if steps < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps is 1 or more and learning_rate positive, not {steps} and {learning_rate}"
        )
    chosen, mesh = batch_norms(model, variables, None), mesh or make_mesh()
    read, order = _shuffled(images, batch_size, seed)
    parts = [part for part, _ in without_padding(read())]
    if few := [len(part) for part in parts if len(part) < LEAST_BATCH] or not parts:
        raise ValueError(
            f"entropy is minimized on batches of {LEAST_BATCH} images or more, not of "
            f"{few if parts else 0}; adapt_batch_norm with a source_weight takes fewer"
        )

    def with_statistics(of: Variables) -> Variables:
        found = reestimate(model, of, read, preprocessing, chosen, mesh=mesh)
        return {**of, "batch_stats": found.batch_stats}

    def logits_of(of: Variables) -> np.ndarray:
        return target_logits(model, of, read, preprocessing, mesh)

    # What the mean prediction may not fall from: target statistics, and nothing learned yet.
    reference = logits_of(with_statistics(variables))
    refusals: list[str] = []
    notes: list[str] = []
    if source is None:
        notes.append("no calibration was given: label shift was not looked for")
    else:
        before, after = (
            unlabeled_scores(z, source, estimate) for z in (logits_of(variables), reference)
        )
        refusals, _ = judged(before, after, source)
        # Gradients follow the classes that there are; no gain makes up for that.
        distant = exceeds_shift(max((before, after), key=lambda one: one.accuracy).prevalence)
        refusals = refusals or [distant] * bool(distant)
    if refusals and guard == "refuse":
        logits = logits_of(variables)[np.argsort(order)]
        return variables, EntropyReport(False, tuple(refusals), tuple(notes), logits, (), (), 0)

    tent = _tent(model, preprocessing, learning_rate)
    course = _course(tent, variables, parts, reference, steps, episodic, mesh)
    report = EntropyReport(
        adapted=not episodic,
        refusals=tuple(refusals),
        notes=(*notes, *course.notes),
        logits=np.concatenate(course.logits)[np.argsort(order)],
        entropies=tuple(course.entropies),
        effective_classes=tuple(course.classes),
        collapses=len(course.notes),
    )
    if episodic:
        return variables, report
    moved = merge(variables["params"], jax.device_get(course.moving))
    return with_statistics({**variables, "params": moved}), report


@dataclass
class _Course:
    """What happened batch by batch."""

    moving: Any
    state: Any
    logits: list[np.ndarray] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    classes: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Tent(NamedTuple):
    """The compiled functions of one network."""

    begin: Callable[[Params], tuple[Any, Any]]
    step: Callable[[Any, Any, Variables, Any], tuple[Any, Any, jax.Array]]
    predict: Callable[[Any, Variables, Any], jax.Array]


def _course(
    tent: _Tent,
    variables: Variables,
    parts: list[np.ndarray],
    reference: np.ndarray,
    steps: int,
    episodic: bool,
    mesh: Mesh,
) -> _Course:
    fresh = tent.begin(variables["params"])
    run = _Course(*fresh)
    placed = place_replicated(variables, mesh)
    first = 0
    for number, part in enumerate(parts):
        whole = len(part) % len(mesh.local_devices) == 0
        pixels = place_batch(part, mesh) if whole else place_replicated(part, mesh)
        if episodic:
            run.moving, run.state = fresh
        entropies = []
        for _ in range(steps):
            run.moving, run.state, entropy = tent.step(run.moving, run.state, placed, pixels)
            entropies.append(float(entropy))
        logits = np.asarray(tent.predict(run.moving, placed, pixels))
        usual = _effective_classes(reference[first : first + len(part)])
        effective = _effective_classes(logits)
        if not effective >= _COLLAPSE * usual:
            run.moving, run.state = fresh
            logits = np.asarray(tent.predict(run.moving, placed, pixels))
            run.notes.append(
                f"the mean prediction of batch {number} collapsed from {usual:.1f} to "
                f"{effective:.1f} effective classes: everything was set back to the source's"
            )
        run.logits.append(logits)
        run.entropies.append(entropies[0])
        run.classes.append(effective)
        first += len(part)
    return run


@lru_cache(maxsize=8)
def _tent(model: Model, preprocessing: Preprocessing, learning_rate: float) -> _Tent:
    labels = label(model.abstract()["params"], {"affine": batch_norm(), "frozen": rest()})
    groups = {"affine": Group(optax.adam, learning_rate), "frozen": FROZEN}
    transformation = partition(groups, trainable(labels, labels, groups))

    def by_batch(moving: Any, variables: Variables, images: jax.Array) -> jax.Array:
        params = merge(frozen(variables["params"], labels, groups), moving)
        normal = normalize(images, preprocessing.mean, preprocessing.std)
        return model.apply({**variables, "params": params}, normal, norm="batch")[0]

    def entropy(moving: Any, variables: Variables, images: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(by_batch(moving, variables, images))
        return -(jnp.exp(logs) * logs).sum(-1).mean()

    def begin(params: Params) -> tuple[Any, Any]:
        moving = trainable(params, labels, groups)
        return moving, transformation.init(moving)

    def step(
        moving: Any, state: Any, variables: Variables, images: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(entropy)(moving, variables, images)
        updates, state = transformation.update(gradient, state, moving)
        return optax.apply_updates(moving, updates), state, value

    return _Tent(begin, jax.jit(step), jax.jit(by_batch))


def _shuffled(images: Images, batch_size: int, seed: int) -> tuple[Reader, np.ndarray]:
    """Batches, and which image each row is: files come sorted by class, and batches must not."""
    if callable(images):
        read = reader(images, batch_size)
        return read, np.arange(sum(int((batch["weight"] > 0).sum()) for batch in read()))
    reader(images, batch_size)  # for its checks
    order = np.random.default_rng(seed).permutation(len(images))
    return reader(images[order], batch_size), order


def _effective_classes(logits: np.ndarray) -> float:
    shares = softmax(logits.astype(np.float64), axis=-1).mean(axis=0)
    return float(np.exp(entr(shares).sum()))
