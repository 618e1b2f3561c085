"""A network and a data set, understood: what it passes, where the classes are, what errs and why.

Beside the evidence that advice is made of, this measures what explains it: the frequencies that
each segment responds to, how far the images are from those that the network was trained on, what
part of the error more labels would mend, and labels that look wrong. Nothing is trained.
``attribute_profile`` says what each depth of a network knows, by images that are made for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.ndimage
from jax.sharding import Mesh

from flaxtransfer.advice.evidence import Evidence, gather, most_images
from flaxtransfer.analysis.frequency import FrequencyResponse, frequency_response
from flaxtransfer.analysis.profile import (
    ErrorSplit,
    LabelSuspects,
    error_split,
    label_suspects,
    probe_profile,
)
from flaxtransfer.analysis.spectrum import OCTAVE_NAMES, table_text
from flaxtransfer.batchnorm import modules
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch, eval_batches
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import groups_of, subsample
from flaxtransfer.features.inputs import FOLDS, segment_features, standardization
from flaxtransfer.metrics import Skill
from flaxtransfer.models.layout import segment_of
from flaxtransfer.models.moments import Moments, displacement
from flaxtransfer.paths import flatten
from flaxtransfer.training.evaluation import measure_moments

__all__ = [
    "ATTRIBUTES",
    "AttributeProfile",
    "Understanding",
    "attribute_profile",
    "source_distance",
    "understand",
]

MOST_FOR_RESPONSE = 16
"""Images for frequencies: their spread is below half a decibel there."""

MOST_FOR_STATISTICS = 512
"""Images for the distance: the mean of a channel is then known to a twentieth of its deviation."""

FAR = 1.0
"""Standard deviations from which on the inputs of a segment are not those it was trained on."""

_SHOWN = 10
"""Suspects that are printed; all are in the JSON."""


@dataclass(frozen=True, eq=False)
class Understanding:
    """Result of ``understand``; it prints as tables and sentences.

    Args:
        evidence: heads by depth, bottleneck, learning curve.
        response: by frequency, of each segment and of the same network with random weights.
        distance: by segment, from the images that the network was trained on, in their standard
            deviations: the median over the BatchNorms of the segment; empty without BatchNorm.
        split: of the error of the best head; None with fewer than 2 images of a class, and for
            labels that are no classes.
        suspects: labels that a head contradicts, their ``rows`` being positions in the source; None
            for labels that are no classes.
        class_names: of the labels.
        files: names of the images, where they have names.
        seconds: that it took.
        attributes: what each depth knows of generated images; None where it was not asked for.
    """

    evidence: Evidence
    response: FrequencyResponse
    distance: Mapping[str, float]
    split: ErrorSplit | None
    suspects: LabelSuspects | None
    class_names: tuple[str, ...]
    files: Sequence[str] | None = field(default=None, repr=False)
    seconds: float = 0.0
    attributes: AttributeProfile | None = None

    def findings(self) -> list[str]:
        """What follows, a sentence for each number with its threshold."""
        return [
            *self._of_depth(),
            *self._of_frequencies(),
            *self._of_distance(),
            *self._of_labels(),
        ]

    def _of_depth(self) -> list[str]:
        best, last, measure = self.evidence.best, self.evidence.last, self.evidence.measure
        text = f"A head on {best.name} has {_held_out(measure, best.skill)} on held-out images"
        if best is not last:
            text += f", one on {last.name} {measure.text(last.skill)}"
        freedom = best.degrees_of_freedom
        return [
            f"{text}; a guess that looks at no image has {measure.text(measure.of_guess)}.",
            f"That head uses {freedom:.0f} of {best.features} degrees of freedom"
            + (
                ": so few say that it found next to nothing."
                if freedom < 1
                else f", {freedom / self.evidence.examples:.2f} per image."
            ),
        ]

    def _of_frequencies(self) -> list[str]:
        found = [
            f"{stage.segment} is {stage.kind}, within 3 dB of its strongest from "
            f"{stage.band[0]:.2f} to {stage.band[1]:.2f} cycles per pixel of its input image"
            for stage in (self.response.stages[0], self.response.stages[-1])
        ]
        sentences = [f"{'; '.join(found)}."]
        neck = self.evidence.bottleneck
        if neck.segment is not None:
            octave = neck.octave
            text = neck.summary()
            if octave in OCTAVE_NAMES:
                decibels = self.response.stage(neck.segment).decibels[OCTAVE_NAMES.index(octave)]
                if decibels is not None:
                    text += f" {neck.segment} responds there with {decibels:.1f} dB."
            sentences.append(text)
        return sentences

    def _of_distance(self) -> list[str]:
        if not self.distance:
            return ["The network keeps no statistics: its distance from these images is not known."]
        far = max(self.distance, key=lambda name: self.distance[name])
        value = self.distance[far]
        what = (
            "these are not the images it was trained on, which by itself does not say that it "
            "fails on them"
            if value > FAR
            else "none is far"
        )
        return [
            f"What enters {far} is {value:.2f} standard deviations from what the network was "
            f"trained on (threshold: {FAR:g}), the farthest of its segments: {what}."
        ]

    def _of_labels(self) -> list[str]:
        if self.suspects is None:
            return [
                "Which labels look wrong, and what part of the error more labels would mend, is "
                f"said for one class per image alone, not for the task {self.evidence.task}."
            ]
        sentences = []
        curve, split = self.evidence.curve, self.split
        if split is not None:
            rest = f"{100 * split.bias:.1f} points stay whichever half of the labels is used"
            moves = f"{100 * split.variance:.1f} come and go with it"
            small = max(split.bias, split.variance) < 0.01
            follows = (
                "neither has a point to gain"
                if small
                else "more labels would help more than other features"
                if split.variance > split.bias
                else "other features would help more than more labels"
            )
            sentences.append(f"Of the error with half the labels {rest}, {moves}: {follows}.")
        if curve is not None and curve.fits:
            sentences.append(
                f"Half the labels would cost {100 * curve.cost_of_half:.1f} points; "
                f"{_more(curve.labels_for(0.02))}"
            )
        worst = int(np.nanargmin(self.suspects.agreement))
        sentences.append(
            f"{len(self.suspects.rows)} of {self.suspects.examples} labels "
            f"({100 * self.suspects.share:.1f} %) are contradicted with confidence by a head that "
            f"has not seen them. Of class {self.class_names[worst]!r}, the least certain one, "
            f"{100 * self.suspects.agreement[worst]:.0f} % are confirmed."
        )
        return sentences

    def suspected(self) -> list[tuple[str, str, str, float]]:
        """Name, label, what a head says instead, and by how much it finds that more probable."""
        found = self.suspects
        if found is None:
            return []
        rows = zip(found.rows.tolist(), found.labels, found.instead, found.margins, strict=True)
        return [
            (
                str(row) if self.files is None else str(self.files[row]),
                self.class_names[label],
                self.class_names[instead],
                float(margin),
            )
            for row, label, instead, margin in rows
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        return {
            "version": 2,
            "findings": self.findings(),
            "evidence": self.evidence.to_json(),
            "response": self.response.to_json(),
            "distance": dict(self.distance),
            "split": None if self.split is None else self.split.to_json(),
            "suspects": None if self.suspects is None else self.suspects.to_json(),
            "class_names": list(self.class_names),
            "attributes": None if self.attributes is None else self.attributes.to_json(),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("segment", "head", "features", "used", "distance, sd")
        for head in self.evidence.depths:
            apart = self.distance.get(head.name)
            table.add_row(
                head.name,
                self.evidence.measure.text(head.skill, head.standard_error),
                str(head.features),
                f"{head.degrees_of_freedom:.0f}",
                "" if apart is None else f"{apart:.2f}",
            )
        for column in table.columns[1:]:
            column.justify = "right"
        parts: list[Any] = [table, self.response]
        parts += [] if self.attributes is None else [self.attributes]
        if suspected := self.suspected():
            doubts = Table("suspected label", "is", "looks like", "more probable by")
            for name, label, instead, margin in suspected[:_SHOWN]:
                doubts.add_row(name, label, instead, f"{100 * margin:.0f} %")
            doubts.columns[3].justify = "right"
            parts.append(doubts)
        return Group(*parts, *(f"- {text}" for text in self.findings()))


def _held_out(measure: Skill, skill: float) -> str:
    return f"{measure.name} {measure.text(skill)}"


def _more(labels: int | None) -> str:
    if labels is None:
        return "2 points more are not in sight within four times as many."
    return f"about {labels:,} more would gain 2 points."


def understand(
    network: Classifier,
    source: Source,
    positions: Any = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
    mesh: Mesh | None = None,
    attributes: bool = False,
) -> Understanding:
    """What a pre-trained network makes of labelled images; nothing is trained.

    Args:
        network: pre-trained, with the preprocessing that the images want; its head is not used.
        source: images and labels; what is said of single labels is for one class per image.
        positions: int ``[examples]``; by default all of the source.
        batch_size: images per forward pass.
        seed: of folds, halves and random weights.
        mesh: devices; by default all of them.
        attributes: whether to say, too, what each depth knows of generated images; see
            ``attribute_profile``.

    Raises:
        ValueError: as ``flaxtransfer.advice.gather``, and as ``attribute_profile``.

    >>> import flaxtransfer as ft
    >>> random = np.random.default_rng(0)
    >>> labels = np.arange(24) % 2
    >>> images = (60 + 90 * labels[:, None, None, None] + random.integers(0, 40, (24, 32, 32, 3)))
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=2))
    >>> preprocessing = ft.weights.Preprocessing((0.5,) * 3, (0.25,) * 3, size=32, resize=32)
    >>> import jax
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> found = understand(network, ft.ArraySource(images.astype(np.uint8), labels))
    >>> found.evidence.best.skill, len(found.suspects.rows)
    (1.0, 0)
    """
    began, known = time.perf_counter(), None
    if attributes:  # First: it refuses networks of other bands.
        known = attribute_profile(network, seed=seed, batch_size=batch_size, mesh=mesh)
    labels = np.asarray(source.labels())
    chosen = np.arange(len(labels)) if positions is None else np.asarray(positions)
    looked = subsample(chosen, most_images(labels), labels)
    evidence = gather(network, source, looked, batch_size=batch_size, seed=seed, mesh=mesh)
    assert evidence.features is not None, "all images were looked at"
    features, label = evidence.features
    suspects, split = None, None
    if label.ndim == 1:
        best = features[evidence.best.name]
        suspects, split = _of_classes(best, label, source, looked, seed)
    few = subsample(looked, MOST_FOR_RESPONSE, labels)
    (batch,) = eval_batches(source, few, network.preprocessing, batch_size=len(few))
    return Understanding(
        evidence,
        frequency_response(
            network.model,
            network.variables,
            np.asarray(batch["image"]),
            network.preprocessing,
            random_weights=True,
            seed=seed,
        ),
        source_distance(
            network,
            source,
            subsample(looked, MOST_FOR_STATISTICS, labels),
            batch_size=batch_size,
            mesh=mesh,
        ),
        split,
        suspects,
        tuple(source.class_names),
        getattr(source, "files", None),
        time.perf_counter() - began,
        known,
    )


def _of_classes(
    features: np.ndarray, label: np.ndarray, source: Source, looked: np.ndarray, seed: int
) -> tuple[LabelSuspects, ErrorSplit | None]:
    """Labels that look wrong, and the parts of the error."""
    present, own = np.unique(label, return_inverse=True)
    matrix = standardization(features)(np.asarray(features, np.float64))
    groups = groups_of(source)
    of_head = label_suspects(
        matrix, own, seed=seed, groups=None if groups is None else np.asarray(groups)[looked]
    )
    suspects = LabelSuspects(
        looked[of_head.rows],
        present[of_head.labels],
        present[of_head.instead],
        of_head.margins,
        _spread(of_head.agreement, present, len(source.class_names)),
        of_head.examples,
    )
    halved = np.bincount(own).min() >= 2
    return suspects, error_split(matrix, own, seed=seed) if halved else None


def _spread(values: np.ndarray, present: np.ndarray, classes: int) -> np.ndarray:
    """Values of the classes that have examples, NaN for the others."""
    found = np.full(classes, np.nan)
    found[present] = values
    return found


def source_distance(
    network: Classifier,
    source: Source,
    positions: Any,
    *,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> dict[str, float]:
    """How far images are from those that a network was trained on, which are not needed.

    BatchNorms keep mean and variance of what they saw in training. The distance of a BatchNorm is
    the root mean square over its channels of the Wasserstein distance between normal distributions
    with the moments of both, in standard deviations of training; that of a segment is the median of
    its BatchNorms. It does not say how well the network transfers: images that are far can be easy,
    and images that are near can be hard.

    Args:
        network: with the statistics of its training.
        source: images; labels are not used.
        positions: int ``[examples]``.
        batch_size: images per forward pass.
        mesh: devices; by default all of them.

    Returns:
        By segment from the input to the output; empty for a network without BatchNorm.

    References:
        Y. Li, N. Wang, J. Shi, X. Hou, J. Liu, "Adaptive Batch Normalization for Practical Domain
        Adaptation", 2018 (that these statistics carry the domain).
    """
    kept = network.variables["batch_stats"]
    paths = modules(kept)
    if not paths:
        return {}
    batches = eval_batches(source, positions, network.preprocessing, batch_size=batch_size)
    found = measure_moments(network, batches, frozenset(paths), by_batch=False, mesh=mesh)
    flat = flatten(kept)
    by_segment: dict[str, list[float]] = {}
    for path in paths:
        before = Moments(np.asarray(flat[f"{path}/mean"]), np.asarray(flat[f"{path}/var"]), 0)
        apart = displacement(before, found[path], network.model.config.epsilon)
        by_segment.setdefault(segment_of(f"{path}/scale"), []).append(apart)
    order = [name for name in network.model.segments if name in by_segment]
    return {name: float(np.median(by_segment[name])) for name in order}


_LARGEST = 64
"""Sides of generated images in pixels, at most: what they show is drawn in pixels, or fits."""


@dataclass(frozen=True, eq=False)
class AttributeProfile:
    """Result of ``attribute_profile``; it prints as a table.

    Args:
        segments: from the input to the output.
        accuracy: by attribute, of a head on each segment, held out.
        guess: by attribute, of a head that knows nothing: one in as many as it has values.
        images: by attribute, their number.
        size: side of the images in pixels.
        seconds: that it took.
        notes: what was left out.
    """

    segments: tuple[str, ...]
    accuracy: Mapping[str, tuple[float, ...]]
    guess: Mapping[str, float]
    images: Mapping[str, int]
    size: int
    seconds: float
    notes: tuple[str, ...] = ()

    def best(self, attribute: str) -> str:
        """The segment that knows most of an attribute; of equal ones the earliest."""
        found = self.accuracy[attribute]
        return self.segments[found.index(max(found))]

    def findings(self) -> list[str]:
        """Where each attribute is known, and where it is lost, in sentences."""
        error = math.sqrt(0.25 / min(self.images.values()))
        lost, late, unknown = [], [], []
        for name, found in self.accuracy.items():
            top, last = max(found), found[-1]
            text = f"{name} ({100 * top:.0f} % at {self.best(name)}, {100 * last:.0f} % at the end)"
            if top - self.guess[name] < 4 * error:
                unknown.append(name)
            elif top - last > 4 * error:
                lost.append(text)
            elif last - found[0] > 4 * error:
                late.append(f"{name} ({100 * found[0]:.0f} %, and {100 * last:.0f} % at the end)")
        sentences = [
            f"{what}: {', '.join(names)}."
            for what, names in (
                ("Lost on the way through the network, by more than 4 standard errors", lost),
                ("Known less at the beginning, by as much", late),
                ("Known at no depth", unknown),
            )
            if names
        ]
        return [*sentences, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "segments": list(self.segments),
            "accuracy": {name: list(found) for name, found in self.accuracy.items()},
            "guess": dict(self.guess),
            "images": dict(self.images),
            "size": self.size,
            "seconds": self.seconds,
            "findings": self.findings(),
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("accuracy, %", *self.segments, "guess")
        for name, found in self.accuracy.items():
            cells = (f"{100 * value:.0f}" for value in (*found, self.guess[name]))
            table.add_row(name, *cells)
        for column in table.columns[1:]:
            column.justify = "right"
        return Group(
            f"What each depth knows, by heads on generated images of {self.size} px:",
            table,
            *self.findings(),
        )


def attribute_profile(
    network: Classifier,
    *,
    per_class: int = 30,
    seed: int = 0,
    batch_size: int = 64,
    mesh: Mesh | None = None,
) -> AttributeProfile:
    """What each depth of a network knows: orientation, hue, texture, number, polygon, letter.

    Each attribute has a set of generated images in which nothing else decides: a head in closed
    form on each segment says, on held-out images, how much of it a linear map can read there. It
    needs no images and no labels of yours, and says nothing about them: see ``understand`` for
    that. Images have the size of the network's, 64 px at most.

    Args:
        network: of gray or RGB images; its head is not used.
        per_class: images of each value of an attribute, 5 or more.
        seed: of the images and the folds.
        batch_size: images per forward pass.
        mesh: devices; by default all of them.

    Raises:
        ValueError: a network of other bands, fewer images.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=2))
    >>> preprocessing = ft.weights.Preprocessing((0.5,) * 3, (0.25,) * 3, size=32, resize=32)
    >>> import jax
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> found = attribute_profile(network, per_class=6)
    >>> list(found.accuracy)[:3], len(found.accuracy["hue"])
    (['coarse orientation', 'fine orientation', 'hue'], 5)

    References:
        M. D. Zeiler, R. Fergus, "Visualizing and Understanding Convolutional Networks", 2014 (that
        depths differ in what they respond to).
        K. Hermann, A. Lampinen, "What Shapes Feature Representations? Exploring Datasets,
        Architectures, and Training", 2020 (attributes decoded by depth, on generated images).
    """
    began = time.perf_counter()
    bands = network.model.config.bands
    if bands not in (1, 3):
        raise ValueError(
            f"network must be of images with 1 or 3 bands to be shown some, got {bands}"
        )
    if per_class < FOLDS:
        raise ValueError(f"per_class must be >= {FOLDS}, got {per_class}")
    segments = network.model.segments
    depths = segments[segments.index("stem") : segments.index("pool")]
    size = min(network.preprocessing.size, _LARGEST)
    accuracy, images, notes = {}, {}, []
    for number, (name, (values, maker)) in enumerate(ATTRIBUTES.items()):
        if name == "hue" and bands == 1:
            notes.append("Hue is left out: the network is of gray images.")
            continue
        random = np.random.default_rng([seed, number])
        label = random.permutation(np.repeat(np.arange(values), per_class))
        made = np.clip(maker(label, random, size), 0, 255).astype(np.uint8)
        pixels = made[..., :bands]
        features, labels = segment_features(
            network, _batched(pixels, label, batch_size), depths, mesh
        )
        profile = probe_profile(features, labels, classes=values)
        accuracy[name] = tuple(probe.skill for probe in profile.probes)
        images[name] = len(label)
    return AttributeProfile(
        depths,
        accuracy,
        {name: 1 / ATTRIBUTES[name][0] for name in accuracy},
        images,
        size,
        time.perf_counter() - began,
        tuple(notes),
    )


def _batched(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Batches of one size: the last one is filled up with images of weight 0."""
    for first in range(0, len(images), batch_size):
        rows = np.arange(first, first + batch_size)
        inside = np.minimum(rows, len(images) - 1)
        yield {
            "image": images[inside],
            "label": labels[inside],
            "weight": (rows < len(images)).astype(np.float32),
        }


# Generated images: float [images, side, side, 3], of labels [images].


def _gratings(
    labels: np.ndarray,
    random: np.random.Generator,
    side: int,
    periods: tuple[float, float],
    contrast: tuple[float, float],
    background: float,
) -> np.ndarray:
    """Waves in one of six directions, of periods in pixels, on a background without detail."""
    rows, columns = np.mgrid[:side, :side]
    count = (len(labels), 1, 1)
    angle = np.pi * labels[:, None, None] / 6
    along = np.cos(angle) * columns + np.sin(angle) * rows
    turns = along / random.uniform(*periods, count) + random.random(count)
    wave = random.uniform(*contrast, count) * np.sin(2 * np.pi * turns)
    return _gray(128 + wave + _slow(len(labels), random, side, background), random)


def _coarse(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    return _gratings(labels, random, side, (8.0, 16.0), (30.0, 60.0), 20.0)


def _fine(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    return _gratings(labels, random, side, (2.2, 3.0), (8.0, 16.0), 40.0)


def _hues(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    """The hue of a disk, of eight; its brightness and the gray around it are drawn."""
    rows, columns = np.mgrid[:side, :side] / side
    place = random.uniform(0.25, 0.75, (2, len(labels), 1, 1))
    radius = random.uniform(0.12, 0.25, (len(labels), 1, 1))
    inside = np.hypot(rows - place[0], columns - place[1]) < radius
    turn = 2 * np.pi * (labels / 8 + random.normal(0, 0.012, len(labels)))
    hue = np.stack([np.cos(turn - shift) for shift in (0, 2 * np.pi / 3, 4 * np.pi / 3)], axis=-1)
    color = random.uniform(90, 170, (len(labels), 1)) + 60 * hue
    ground = random.uniform(60, 200, (len(labels), 1, 1, 1))
    images = np.where(inside[..., None], color[:, None, None], ground)
    found: np.ndarray = images + random.normal(0, 8, images.shape)
    return found


def _textures(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    """Sparse noise through one of eight kernels of 3 x 3 pixels."""
    kernels = np.random.default_rng(5).choice([-1.0, 1.0], (8, 1, 3, 3))
    shape = (len(labels), side, side)
    points = (random.random(shape) < 0.15) * random.choice([-1.0, 1.0], shape)
    texture = np.empty(shape)
    for value in np.unique(labels):
        chosen = labels == value
        texture[chosen] = scipy.ndimage.convolve(points[chosen], kernels[value], mode="wrap")
    texture *= random.uniform(10, 18, (len(labels), 1, 1))
    return _gray(128 + texture + _slow(len(labels), random, side, 40.0), random)


def _counts(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    """One to six disks of different sizes, which do not touch: each in a cell of nine."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    ink = np.zeros((len(labels), side, side))
    for image, label in zip(ink, labels, strict=True):
        for cell in random.permutation(9)[: label + 1]:
            radius = random.uniform(0.04, 0.09)
            y, x = (np.divmod(cell, 3) + random.uniform(0.36, 0.64, 2)) / 3
            apart = radius - np.hypot(rows - y, columns - x)
            np.maximum(image, np.clip(side * apart + 0.5, 0, 1), out=image)
    return _inked(ink, random)


def _polygons(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    """The outline of a regular polygon of three to eight corners."""
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    ink = np.zeros((len(labels), side, side))
    for image, label in zip(ink, labels, strict=True):
        corners, radius = label + 3, random.uniform(0.2, 0.36)
        y, x = random.uniform(0.4, 0.6, 2)
        turns = 2 * np.pi * (np.arange(corners) + random.random()) / corners
        across = [(columns - x) * np.cos(t) + (rows - y) * np.sin(t) for t in turns]
        outside = np.max(across, axis=0) - radius * np.cos(np.pi / corners)
        image[:] = np.clip(side * (0.024 - np.abs(outside)) + 0.5, 0, 1)
    return _inked(ink, random)


_LETTERS = """
.###. ####. .#### ##### #...# #...# #.... #...# #...# #####
#...# #...# #.... #.... #...# #..#. #.... ##.## ##..# ..#..
#...# #...# #.... #.... #...# #.#.. #.... #.#.# #.#.# ..#..
##### ####. #.... ####. ##### ##... #.... #.#.# #.#.# ..#..
#...# #...# #.... #.... #...# #.#.. #.... #...# #..## ..#..
#...# #...# #.... #.... #...# #..#. #.... #...# #...# ..#..
#...# ####. .#### ##### #...# #...# ##### #...# #...# ..#..
"""
"""A, B, C, E, H, K, L, M, N and T."""


def _letters(labels: np.ndarray, random: np.random.Generator, side: int) -> np.ndarray:
    """One of ten letters, of different size, slightly turned, somewhere near the middle."""
    lines = [line.split() for line in _LETTERS.split("\n") if line]
    forms = [np.array([[c == "#" for c in row[n]] for row in lines], float) for n in range(10)]
    rows, columns = (np.mgrid[:side, :side] + 0.5) / side
    ink = np.zeros((len(labels), side, side))
    for image, label in zip(ink, labels, strict=True):
        y, x = random.uniform(0.42, 0.58, 2)
        turn, pen = random.normal(0, 0.12), random.uniform(0.06, 0.1)
        down = ((rows - y) * np.cos(turn) + (columns - x) * np.sin(turn)) / pen
        right = ((columns - x) * np.cos(turn) - (rows - y) * np.sin(turn)) / pen
        places = [down + 3, right + 2]
        scipy.ndimage.map_coordinates(forms[label], places, order=1, output=image)
    return _inked(ink, random)


def _inked(ink: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Drawings from 0 to 1 on a ground, the brightness of both being drawn."""
    ground = random.uniform(30, 90, (len(ink), 1, 1))
    return _gray(ground + random.uniform(80, 150, (len(ink), 1, 1)) * ink, random)


def _slow(count: int, random: np.random.Generator, side: int, deviation: float) -> np.ndarray:
    """A background without fine detail."""
    coarse = random.normal(0, deviation, (count, 4, 4))
    found: np.ndarray = scipy.ndimage.zoom(coarse, (1, side / 4, side / 4), order=3)
    return found


def _gray(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    noisy = pixels + random.normal(0, 4, pixels.shape)
    return np.repeat(noisy[..., None], 3, axis=-1)


Maker = Callable[[np.ndarray, np.random.Generator, int], np.ndarray]

ATTRIBUTES: dict[str, tuple[int, Maker]] = {
    "coarse orientation": (6, _coarse),
    "fine orientation": (6, _fine),
    "hue": (8, _hues),
    "fine texture": (8, _textures),
    "number": (6, _counts),
    "polygon": (6, _polygons),
    "letter": (10, _letters),
}
"""How many values an attribute has, and how images of it are made."""
