"""A network and a data set, understood: what it passes, where the classes are, what errs and why.

Beside the evidence that advice is made of, this measures what explains it: the frequencies that
each segment responds to, how far the images are from those that the network was trained on, what
part of the error more labels would mend, and labels that look wrong. Nothing is trained.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.advice.evidence import Evidence, gather, most_images
from flaxtransfer.analysis.frequency import FrequencyResponse, frequency_response
from flaxtransfer.analysis.profile import (
    ErrorSplit,
    LabelSuspects,
    error_split,
    label_suspects,
)
from flaxtransfer.analysis.spectrum import OCTAVE_NAMES, table_text
from flaxtransfer.batchnorm import modules
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import groups_of, subsample
from flaxtransfer.features.inputs import standardization
from flaxtransfer.metrics import Skill
from flaxtransfer.models.layout import segment_of
from flaxtransfer.models.moments import Moments, displacement
from flaxtransfer.paths import flatten
from flaxtransfer.training.evaluation import measure_moments

__all__ = ["Understanding", "source_distance", "understand"]

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
    """

    evidence: Evidence
    response: FrequencyResponse
    distance: Mapping[str, float]
    split: ErrorSplit | None
    suspects: LabelSuspects | None
    class_names: tuple[str, ...]
    files: Sequence[str] | None = field(default=None, repr=False)
    seconds: float = 0.0

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
) -> Understanding:
    """What a pre-trained network makes of labelled images; nothing is trained.

    Args:
        network: pre-trained, with the preprocessing that the images want; its head is not used.
        source: images and labels; what is said of single labels is for one class per image.
        positions: int ``[examples]``; by default all of the source.
        batch_size: images per forward pass.
        seed: of folds, halves and random weights.
        mesh: devices; by default all of them.

    Raises:
        ValueError: as ``flaxtransfer.advice.gather``.

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
    began = time.perf_counter()
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
