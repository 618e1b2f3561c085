"""Test-time adaptation by entropy minimization (Tent).

``tent`` trains the scales and biases of BatchNorm on unlabeled target images, so that predictions
become more confident. Use it after ``adapt_batch_norm``, where statistics alone are not enough.
"""

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

from flaxtransfer.adapt.batch_norm import (
    Guard,
    check_guard_option,
    check_guards,
    select_batch_norms,
)
from flaxtransfer.adapt.scores import Estimate, exceeds_shift, unlabeled_scores
from flaxtransfer.adapt.statistics import Images, Reader, image_reader, predict_logits, reestimate
from flaxtransfer.classifier import Classifier
from flaxtransfer.distributed import check_alone
from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import ParamGroups, label, rest
from flaxtransfer.masks import batch_norm
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Params, Variables, merge
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.task import for_classes
from flaxtransfer.training.evaluation import without_padding
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = ["MIN_BATCH", "EntropyReport", "tent"]


MIN_BATCH = 32
"""Images per batch; with fewer, the statistics and their gradients are noise."""

_COLLAPSE = 0.5
"""Fraction of its effective classes below which the mean prediction of a batch has collapsed."""


@dataclass(frozen=True, eq=False)
class EntropyReport:
    """Report of an entropy minimization.

    Args:
        adapted: whether the returned variables have changed.
        refusals: reasons against the adaptation; with ``guard="warn"`` they are only reported.
        notes: remarks, in sentences, collapses included.
        logits: float32 ``[images, classes]``, of each image after the steps on its batch,
            normalized by the statistics of that batch; in the order of the images.
        entropies: mean entropy of the predictions per batch, before its steps, in nats.
        effective_classes: exp(entropy) of the mean prediction per batch, after its steps.
        collapses: number of batches after which everything was reset to the source.
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
                f"batches: {np.mean(self.entropies):.3f} nats per prediction before, "
                f"{np.mean(self.effective_classes):.1f} effective classes after; "
                f"reset after {self.collapses} batches"
            )
        word = "reason against it" if self.entropies else "not adapted"
        lines += [f"{word}: {reason}" for reason in self.refusals]
        return "\n".join([*lines, *self.notes])


def tent(
    network: Classifier,
    images: Images,
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
    """Tent: test-time adaptation by entropy minimization.

    It trains the scales and biases of BatchNorm on unlabeled images; all other parameters are
    frozen, and every batch is normalized by its own statistics. Use it where ``adapt_batch_norm``
    is not enough. It trusts the predictions, right or wrong, and collapses to one class if the
    batches have one: it is refused under label shift, and reset if the mean prediction collapses.
    Afterwards confidence does not estimate accuracy, because it was maximized.

    Args:
        network: of the source; not changed.
        images: unlabeled, of the target. Arrays are shuffled; batches of a function keep their
            order.
        source: calibration of this network on held-out examples of the source; without it label
            shift is not checked.
        episodic: whether every batch starts with the parameters of the source and a new optimizer
            state; otherwise each batch continues from the previous one.
        learning_rate: of Adam.
        steps: per batch.
        batch_size: of arrays, 32 or more.
        seed: of the shuffle.
        guard: "refuse" or "warn", as in ``adapt_batch_norm``.
        estimate: estimator of the prevalence of the target; default: maximum likelihood.
        mesh: devices; default: all.

    Returns:
        Variables with the parameters after the last batch and the statistics of all images, and the
        report. If it was refused, and with ``episodic`` (where each batch has its own parameters
        and only the logits remain), the variables of the source.

    Raises:
        ValueError: batches of fewer than 32 images; no BatchNorm; no images; options out of range;
            several processes.
        TypeError: images that are not uint8.

    References:
        D. Wang, E. Shelhamer, S. Liu, B. Olshausen, T. Darrell, "Tent: Fully Test-Time Adaptation
        by Entropy Minimization", 2021.

    >>> import jax, numpy as np, flaxtransfer as ft
    >>> model = ft.Model(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> adapted, report = tent(network, images)
    >>> report.adapted, report.logits.shape, len(report.entropies)
    (True, (64, 2), 1)
    """
    check_alone("tent")
    for_classes(network.task, "entropy minimization")
    check_guard_option(guard)
    variables = network.variables
    if steps < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps must be >= 1 and learning_rate > 0, got {steps} and {learning_rate}"
        )
    chosen, mesh = select_batch_norms(network, None), mesh or make_mesh()
    read, order = _shuffled(images, batch_size, seed)
    parts = [np.asarray(batch["image"]) for batch in without_padding(read())]
    if small := [len(part) for part in parts if len(part) < MIN_BATCH] or not parts:
        raise ValueError(
            f"batches must have at least {MIN_BATCH} images, got {small if parts else 0}; "
            "adapt_batch_norm with a source_weight takes fewer"
        )

    def with_statistics(of: Variables) -> Variables:
        found = reestimate(network.with_variables(of), read, chosen, mesh=mesh)
        return {**of, "batch_stats": found.batch_stats}

    def logits_of(of: Variables) -> np.ndarray:
        return predict_logits(network.with_variables(of), read, mesh)

    # Reference for a collapse of the mean prediction: target statistics, before any training.
    reference = logits_of(with_statistics(variables))
    refusals: list[str] = []
    notes: list[str] = []
    if source is None:
        notes.append("without a calibration, label shift is not checked")
    else:
        before, after = (
            unlabeled_scores(z, source, estimate) for z in (logits_of(variables), reference)
        )
        refusals, _ = check_guards(before, after, source)
        # Gradients follow the classes that are present, whatever the gain in accuracy.
        distant = exceeds_shift(max((before, after), key=lambda one: one.accuracy).prevalence)
        refusals = refusals or [distant] * bool(distant)
    if refusals and guard == "refuse":
        logits = logits_of(variables)[np.argsort(order)]
        return variables, EntropyReport(False, tuple(refusals), tuple(notes), logits, (), (), 0)

    functions = _tent_functions(network.model.on(mesh), network.preprocessing, learning_rate)
    run = _adapt_batches(functions, variables, parts, reference, steps, episodic, mesh)
    report = EntropyReport(
        adapted=not episodic,
        refusals=tuple(refusals),
        notes=(*notes, *run.notes),
        logits=np.concatenate(run.logits)[np.argsort(order)],
        entropies=tuple(run.entropies),
        effective_classes=tuple(run.classes),
        collapses=len(run.notes),
    )
    if episodic:
        return variables, report
    adapted = merge(variables["params"], jax.device_get(run.trainables))
    return with_statistics({**variables, "params": adapted}), report


@dataclass
class _Run:
    """State and results, batch by batch."""

    trainables: Any
    state: Any
    logits: list[np.ndarray] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    classes: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _TentFunctions(NamedTuple):
    """Compiled functions for one network."""

    begin: Callable[[Params], tuple[Any, Any]]
    step: Callable[[Any, Any, Variables, Any], tuple[Any, Any, jax.Array]]
    predict: Callable[[Any, Variables, Any], jax.Array]


def _adapt_batches(
    functions: _TentFunctions,
    variables: Variables,
    parts: list[np.ndarray],
    reference: np.ndarray,
    steps: int,
    episodic: bool,
    mesh: Mesh,
) -> _Run:
    fresh = functions.begin(variables["params"])
    run = _Run(*fresh)
    placed = place_replicated(variables, mesh)
    first = 0
    for number, part in enumerate(parts):
        divides = len(part) % len(mesh.local_devices) == 0
        pixels = place_batch(part, mesh) if divides else place_replicated(part, mesh)
        if episodic:
            run.trainables, run.state = fresh
        entropies = []
        for _ in range(steps):
            run.trainables, run.state, entropy = functions.step(
                run.trainables, run.state, placed, pixels
            )
            entropies.append(float(entropy))
        logits = np.asarray(functions.predict(run.trainables, placed, pixels))
        expected = _effective_classes(reference[first : first + len(part)])
        effective = _effective_classes(logits)
        if not effective >= _COLLAPSE * expected:
            run.trainables, run.state = fresh
            logits = np.asarray(functions.predict(run.trainables, placed, pixels))
            run.notes.append(
                f"the mean prediction of batch {number} collapsed from {expected:.1f} to "
                f"{effective:.1f} effective classes: everything was reset to the source"
            )
        run.logits.append(logits)
        run.entropies.append(entropies[0])
        run.classes.append(effective)
        first += len(part)
    return run


@lru_cache(maxsize=8)
def _tent_functions(
    model: Model, preprocessing: Preprocessing, learning_rate: float
) -> _TentFunctions:
    labels = label(model.abstract()["params"], {"affine": batch_norm(), "frozen": rest()})
    groups = {"affine": Group(optax.adam, learning_rate), "frozen": FROZEN}
    bound = ParamGroups(labels, groups)
    transformation = bound.optimizer()

    def by_batch(trainables: Any, variables: Variables, images: jax.Array) -> jax.Array:
        params = bound.merge(bound.frozen(variables["params"]), trainables)
        normal = normalize(images, preprocessing.mean, preprocessing.std)
        return model.apply({**variables, "params": params}, normal, norm="batch")[0]

    def entropy(trainables: Any, variables: Variables, images: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(by_batch(trainables, variables, images))
        return -(jnp.exp(logs) * logs).sum(-1).mean()

    def begin(params: Params) -> tuple[Any, Any]:
        trainables = bound.trainable(params)
        return trainables, transformation.init(trainables)

    def step(
        trainables: Any, state: Any, variables: Variables, images: jax.Array
    ) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(entropy)(trainables, variables, images)
        updates, state = transformation.update(gradient, state, trainables)
        return optax.apply_updates(trainables, updates), state, value

    return _TentFunctions(begin, jax.jit(step), jax.jit(by_batch))


def _shuffled(images: Images, batch_size: int, seed: int) -> tuple[Reader, np.ndarray]:
    """Shuffled batches, because files come sorted by class, and the image of each row."""
    if callable(images):
        read = image_reader(images, batch_size)
        return read, np.arange(sum(int((batch["weight"] > 0).sum()) for batch in read()))
    image_reader(images, batch_size)  # for its checks
    order = np.random.default_rng(seed).permutation(len(images))
    return image_reader(images[order], batch_size), order


def _effective_classes(logits: np.ndarray) -> float:
    shares = softmax(logits.astype(np.float64), axis=-1).mean(axis=0)
    return float(np.exp(entr(shares).sum()))
