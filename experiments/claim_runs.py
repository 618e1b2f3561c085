"""What claims.py is decided by: heads at every depth, short training runs, costs; one seed each.

A target is drawn once per seed, 100 training images of each class and 400 test images: 5 labels
per class are the first of 20, and every strategy and every number of labels is tested on the same
images. Nothing of a training run is chosen on test images.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import bands
import flaxtransfer as ft
import targets
from strategy_grid import shifted

BUILT_IN, THIN = "built-in", "thin ResNet-50"
DEPTHS = ("stem", "layer1", "layer2", "layer3", "layer4")
LABELS = (5, 20, 50, 100)
"""Labels per class."""

HELD = 20
"""Images per class that rates are chosen on: the last of the 100; such runs train on the first."""

SPLIT_TARGETS = ("digits", "polygons", "counts")
"""Targets whose error is split into bias and variance."""

MOST_LABELS = (*SPLIT_TARGETS, "digits, shifted", "photographs", "fine gratings")
"""Targets whose heads get all of LABELS, and not all but the last."""


@dataclass(frozen=True, order=True)
class Run:
    """One measurement.

    Args:
        network: BUILT_IN or THIN.
        target: of targets.py.
        what: "heads", "freezing", "gray, ..." or one of STRATEGIES.
        per_class: labels per class; heads are made with all of LABELS at once.
    """

    network: str
    target: str
    what: str
    per_class: int = LABELS[-1]


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Args:
        steps: of each training run.
        batch_size: images per step.
        tests: test images of all classes together.
        thin_size: px to which the thin ResNet-50 sees images enlarged; others see 32.
    """

    steps: int = 200
    batch_size: int = 16
    tests: int = 400
    thin_size: int = 64


Plans = Callable[[ft.models.Params, int], ft.Plan]


def _all_running(params: ft.models.Params, steps: int) -> ft.Plan:
    """Everything moves, and BatchNorms keep the statistics of the pre-training."""
    phase = ft.recipes.full_fine_tuning(params, steps=steps).phases[0]
    return ft.Plan([replace(phase, norm={ft.everything(): "running"})])


def _late(params: ft.models.Params, steps: int) -> ft.Plan:
    """All but the stem and layer1, at the rate of early_layers."""
    late = ft.stages(2, 3, 4)
    return ft.recipes.surgical(params, part=late, steps=steps, learning_rate=3e-3)


def _gradual(params: ft.models.Params, steps: int, *, guided: bool) -> ft.Plan:
    """One part more in each phase, at the rate of full fine-tuning, the same steps in all."""
    each = max(1, steps // (1 + len(DEPTHS)))
    plan = ft.recipes.progressive_unfreezing(params, steps=each, decay=1.0)
    return plan if guided else ft.Plan(plan.phases)


def _uniform(params: ft.models.Params, steps: int, *, rate: float) -> ft.Plan:
    return ft.recipes.full_fine_tuning(
        params, steps=steps, learning_rate=rate, head_learning_rate=rate
    )


def _discriminative(params: ft.models.Params, steps: int, *, rate: float) -> ft.Plan:
    return ft.recipes.discriminative(params, steps=steps, learning_rate=rate)


RATES = {"uniform": (3e-4, 1e-3, 3e-3), "discriminative": (1e-3, 3e-3, 1e-2)}
"""Peak rates that are tried, as many of one as of the other; discriminative ones are the head's."""

GUIDED = "gradual, by validation"

STRATEGIES: dict[str, Plans] = {
    "layer4": lambda p, n: ft.recipes.surgical(p, part="stage(4)", steps=n),
    "everything": lambda p, n: ft.recipes.full_fine_tuning(p, steps=n),
    "everything at 3e-3": lambda p, n: ft.recipes.high_rate_fine_tuning(p, steps=n),
    "everything, running statistics": _all_running,
    "BatchNorm": lambda p, n: ft.recipes.batch_norm_only(p, steps=n),
    "BatchNorm, running statistics": lambda p, n: ft.recipes.batch_norm_only(
        p, steps=n, statistics=False
    ),
    "stem and layer1": lambda p, n: ft.recipes.early_layers(p, steps=n),
    "layer2 to layer4": _late,
    "gradual": functools.partial(_gradual, guided=False),
    GUIDED: functools.partial(_gradual, guided=True),
    **{f"uniform at {r:g}": functools.partial(_uniform, rate=r) for r in RATES["uniform"]},
    **{
        f"discriminative at {r:g}": functools.partial(_discriminative, rate=r)
        for r in RATES["discriminative"]
    },
}
"""Training runs by name."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A target with a network for it.

    Args:
        network: with a new head.
        source: training images, then test images.
        labels: of both, int ``[images]``.
        training: how many train.
        seed: of the draw.
    """

    network: ft.Classifier
    source: ft.ArraySource
    labels: np.ndarray
    training: int
    seed: int

    @property
    def classes(self) -> int:
        return len(self.source.class_names)

    @property
    def test(self) -> np.ndarray:
        return np.arange(self.training, len(self.labels))

    def of_each(self, chosen: slice) -> np.ndarray:
        """Positions of training images, the same number of each class."""
        own = self.labels[: self.training]
        return np.sort(
            np.concatenate([np.flatnonzero(own == c)[chosen] for c in range(self.classes)])
        )


@functools.cache
def checkpoint(network: str, weights: Path | None, size: int) -> ft.Pretrained:
    """Pre-trained weights, which see images of ``size`` px."""
    if network == THIN:
        # As the file's makers give images to it: Caffe's mean, and pixels of 0 to 255.
        found = ft.load(weights, model="resnet50w32s64_v1_ceilpool")
        mean = (123 / 255, 117 / 255, 104 / 255)
        return replace(found, preprocessing=ft.Preprocessing(mean, (1 / 255,) * 3, size, size))
    found = ft.load("builtin")
    return replace(found, preprocessing=replace(found.preprocessing, size=size, resize=size))


@functools.lru_cache(maxsize=4)
def cell(network: str, target: str, seed: int, size: int, tests: int, weights: Path | None) -> Cell:
    """Draws a target."""
    each = -(-tests // targets.FAMILIES[target][1])
    # Photographs are cut as large as they are looked at: enlarged crops would have no detail.
    cut = target == "photographs" and size != targets.SIZE
    make = (
        functools.partial(targets.photograph_strips, size=size)
        if cut
        else functools.partial(targets.draw, target)
    )
    train, test = make(LABELS[-1], seed), make(each, seed, test=True)
    names = [f"class {n}" for n in range(train.classes)]
    labels = np.concatenate([train.labels, test.labels])
    source = ft.ArraySource(np.concatenate([train.images, test.images]), labels, names)
    found = ft.transfer(
        checkpoint(network, weights, size), classes=train.classes, class_names=names, seed=seed
    )
    return Cell(found, source, labels, len(train.labels), seed)


def measure(run: Run, seed: int, scale: Scale, weights: Path | None = None) -> dict[str, float]:
    """The numbers of a run; accuracies are shares of test images."""
    if run.what.startswith("gray, "):
        return gray(run, seed, scale, weights)
    size = scale.thin_size if run.network == THIN else targets.SIZE
    made = cell(run.network, run.target, seed, size, scale.tests, weights)
    if run.what == "heads":
        counts = LABELS if run.target in MOST_LABELS else LABELS[:-1]
        return heads(made, counts, split=run.target in SPLIT_TARGETS)
    if run.what == "freezing":
        return freezing(made, scale)
    return trained(made, run.what, run.per_class, scale)


def heads(made: Cell, counts: Sequence[int], *, split: bool) -> dict[str, float]:
    """Ridge heads at every depth by number of labels, and how far the images are.

    Of each number of labels n: "n layer2" is the accuracy on test images, "n layer2, folds" on
    folds of the labels. "n sixteenth" has a random sixteenth of layer4's features, "n gray" is on
    layer4 for images without color. With ``split``, "n bias" and "n variance" of a head on layer4.
    """
    used = np.concatenate([made.of_each(slice(counts[-1])), made.test])
    features = _features(made, used, DEPTHS)
    last, width = features[DEPTHS[-1]], features[DEPTHS[-1]].shape[1]
    drawn = np.random.default_rng(made.seed).permutation(width)
    features["sixteenth"] = last[:, drawn[: width // 16]]
    if np.ptp(np.asarray(made.source.images), axis=-1).any():
        features["gray"] = _features(without_color(made), used, DEPTHS[-1:])[DEPTHS[-1]]
    labels, test = made.labels[used], np.flatnonzero(used >= made.training)
    found: dict[str, float] = {}
    for count in counts:
        rows = np.flatnonzero(np.isin(used, made.of_each(slice(count))))
        for name, matrix in features.items():
            scaled = ft.features.standardization(matrix[rows])(matrix)
            judged = ft.features.cross_validate(scaled[rows], labels[rows], classes=made.classes)
            head = ft.features.ridge_path(
                scaled[rows], labels[rows], [judged.strength], classes=made.classes
            )
            found[f"{count} {name}"] = float((head.predict(scaled[test]) == labels[test]).mean())
            found[f"{count} {name}, folds"] = judged.accuracy
            if split and name == DEPTHS[-1]:
                parts = ft.analysis.error_split(scaled[rows], labels[rows], seed=made.seed)
                found |= {f"{count} bias": parts.bias, f"{count} variance": parts.variance}
    apart = ft.advice.source_distance(made.network, made.source, made.of_each(slice(20)))
    return found | {"distance": float(np.mean(list(apart.values())))}


def _features(made: Cell, used: np.ndarray, depths: Sequence[str]) -> dict[str, np.ndarray]:
    batches = ft.eval_batches(made.source, used, made.network.preprocessing)
    return ft.features.segment_features(made.network, batches, depths)[0]


def without_color(made: Cell) -> Cell:
    """The same images with the mean of their channels in all three."""
    mean = np.asarray(made.source.images).mean(axis=-1, keepdims=True).round().astype(np.uint8)
    names = made.source.class_names
    return replace(made, source=ft.ArraySource(np.repeat(mean, 3, axis=-1), made.labels, names))


def trained(made: Cell, what: str, per_class: int, scale: Scale) -> dict[str, float]:
    """Trains, and tests: "test", and "held", the accuracy on images that rates are chosen on."""
    network, train = made.network, made.of_each(slice(per_class))
    plan, held = STRATEGIES[what](network.params, scale.steps), np.arange(0)
    if what == GUIDED:
        part = ft.features.stratified_folds(made.labels[train], 5, made.seed)
        train, held = train[part > 0], train[part == 0]
    splits = ft.data.Splits.of(train, held, made.test)
    data = ft.loaders(
        made.source,
        splits,
        network.preprocessing,
        batch_size=scale.batch_size,
        transform=shifted,
        seed=made.seed,
    )
    phases = len(plan.phases) if what == GUIDED else 1
    options = ft.FitOptions(evaluate_every=max(1, scale.steps // phases))
    with tempfile.TemporaryDirectory() as folder:
        fitted = ft.fit(
            network,
            plan,
            data,
            folder,
            seed=made.seed,
            options=options,
            cache=ft.Cache("memory"),
        )

    def accuracy(positions: np.ndarray) -> float:
        batches = ft.eval_batches(made.source, positions, network.preprocessing)
        return ft.evaluate(fitted.network, batches).accuracy

    found = {"test": accuracy(made.test)}
    if what.startswith(tuple(RATES)):
        found["held"] = accuracy(made.of_each(slice(-HELD, None)))
    return found


def freezing(made: Cell, scale: Scale) -> dict[str, float]:
    """What a step costs by depth of freezing, and what becomes of frozen leaves.

    "flops layer2" is relative to a step in which nothing is frozen, with everything up to layer2
    frozen. "moved" counts frozen leaves and statistics that have other bits after 5 steps of AdamW
    with decay and clipping, with three depths frozen in turn. "gradient" is the largest absolute
    gradient of a frozen leaf where it is asked for, at layer2.
    """
    costs = {depth: _flops(made.network.model, depth, scale.batch_size) for depth in ("", *DEPTHS)}
    found = {f"flops {depth}": costs[depth] / costs[""] for depth in DEPTHS}
    splits = ft.data.Splits.of(made.of_each(slice(5)))
    data = ft.loaders(
        made.source, splits, made.network.preprocessing, batch_size=16, transform=shifted
    )
    found["moved"] = 0.0
    for depth in DEPTHS[::2]:
        with tempfile.TemporaryDirectory() as folder:
            plan = ft.Plan([_freeze_up_to(depth)])
            after = ft.fit(made.network, plan, data, folder, seed=made.seed)
        found["moved"] += len(moved(made.network.variables, after.variables, depth))
    return found | {"gradient": _gradient_of_frozen(made, "layer2")}


def moved(before: ft.models.Variables, after: ft.models.Variables, depth: str) -> list[str]:
    """Leaves and statistics up to a depth that are not the same bits."""
    old, new = ft.models.flatten(before), ft.models.flatten(after)
    frozen = ft.models.selected(ft.up_to(depth), before["params"])
    rooms = {path.rpartition("/")[0] for path in frozen}
    return [
        path
        for path, leaf in old.items()
        if path.partition("/")[2].rpartition("/")[0] in rooms
        and np.asarray(leaf).tobytes() != np.asarray(new[path]).tobytes()
    ]


def _freeze_up_to(depth: str) -> ft.Phase:
    """Five steps of everything behind a depth."""
    labels = {"frozen": ft.up_to(depth), "free": ft.rest()}
    groups = {"frozen": ft.FROZEN, "free": ft.recipes.adamw(1e-3, 0.1)}
    return ft.Phase(labels, groups, steps=5, clip=1.0)


@functools.cache
def _flops(model: ft.Model, depth: str, batch_size: int) -> float:
    everything = {"all": ft.everything()}, {"all": ft.recipes.adamw(1e-3, 0.1)}
    phase = _freeze_up_to(depth) if depth else ft.Phase(*everything, steps=5, clip=1.0)
    mesh = ft.training.make_mesh(jax.devices()[:1])
    shape = (targets.SIZE, targets.SIZE, 3)
    return ft.training.step_cost(model, phase, mesh, batch_size, shape).flops


def _gradient_of_frozen(made: Cell, depth: str) -> float:
    """The largest gradient of a leaf that the loss sees through ``stop_gradient``."""
    network = made.network
    groups = _freeze_up_to(depth).resolve(network.params).param_groups
    batches = ft.eval_batches(
        made.source, made.of_each(slice(1)), network.preprocessing, batch_size=16
    )
    batch = next(iter(batches))
    images = ft.weights.normalize(
        batch["image"], network.preprocessing.mean, network.preprocessing.std
    )
    # A head of zeros would let no gradient pass, frozen or not.
    start = jax.tree.map(lambda leaf: leaf + 0.01, network.params)

    @jax.jit
    def gradient(params: ft.models.Params) -> Any:
        def loss(params: ft.models.Params) -> jax.Array:
            seen = groups.merge(jax.lax.stop_gradient(params), groups.trainable(params))
            stats = network.variables["batch_stats"]
            logits, _ = network.model.apply({"params": seen, "batch_stats": stats}, images)
            labels = batch["label"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return jax.grad(loss)(params)

    found = gradient(start)
    moving = max(float(abs(g).max()) for g in jax.tree.leaves(groups.trainable(found)))
    if not moving > 0:
        raise ValueError("the gradient of the trainable leaves must not be 0, or nothing is shown")
    return max(float(abs(g).max()) for g in jax.tree.leaves(groups.frozen(found)))


def gray(run: Run, seed: int, scale: Scale, weights: Path | None) -> dict[str, float]:
    """Gray values in interlocking windows, through an adapter and a frozen network (bands.py)."""
    way = bands.WAYS["gray"][run.what.removeprefix("gray, ")]
    found = checkpoint(run.network, weights, targets.SIZE)
    config = bands.Bands(size=targets.SIZE, steps=max(1, scale.steps // 2), test=scale.tests)
    accuracy, report = bands.adapt(config, found, "gray", way, seed)
    plain = ft.analysis.stem_report(found.variables["params"]["conv1"]["kernel"])
    passed = [report.shares[i] for i in plain.opponent if i in report.shares]
    return {
        "test": accuracy,
        "opponent": sum(plain.energies[i] for i in plain.opponent),
        "awake": float(np.mean(passed)) if passed else 0.0,
    }
