"""Evidence on which strategy fits: one pass over labelled images, and heads in closed form.

Nothing is trained. All heads are judged on the same folds, so that any two can be compared on the
same images.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh
from scipy.special import log_ndtr, log_softmax, ndtri_exp

from flaxtransfer.analysis.profile import LearningCurve, Outputs, learning_curve
from flaxtransfer.analysis.spectrum import (
    Bottleneck,
    SpectralFeatures,
    bottleneck,
    octave_features,
    spectral_features,
)
from flaxtransfer.classifier import Classifier
from flaxtransfer.data.loader import Batch, eval_batches
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import groups_of, subsample
from flaxtransfer.distributed import check_alone
from flaxtransfer.features.class_means import expected_error
from flaxtransfer.features.inputs import segment_features, standardization
from flaxtransfer.features.ridge import TargetValidation, cross_validate
from flaxtransfer.metrics import ACCURACY, Draws, Skill
from flaxtransfer.paths import flatten
from flaxtransfer.task import OUTPUTS

__all__ = ["Evidence", "HeadEvidence", "alignment", "gather", "most_images", "wrong_labels"]

MOST_IMAGES = 5000
"""More images than that are not looked at: they change an accuracy by less than half a point."""

MOST_FOR_SPECTRA = 1000
"""The same for spectra: a bottleneck is ten points or it is none."""


@dataclass(frozen=True, eq=False)
class HeadEvidence:
    """A closed-form head on features of the images, judged on held-out folds.

    Args:
        name: of the segment it reads, or "pixels" for their power spectrum.
        features: how many it reads.
        skill: held out, by the metric that ranks; see ``metrics.Skill``. For classes, accuracy.
        standard_error: of the skill: binomial, or by the bootstrap.
        degrees_of_freedom: effective ones, at the penalty that was chosen.
        alignment: how far held-out scores go with the labels, in standard deviations of labels
            that are drawn anew; features without information are within 4, and within 5 for labels
            that are no classes.
        judged: whether each example was classified rightly, bool ``[examples]``; or draws.
    """

    name: str
    features: int
    skill: float
    standard_error: float
    degrees_of_freedom: float
    alignment: float
    judged: np.ndarray | Draws = field(repr=False)

    @property
    def examples(self) -> int:
        """That it was judged on."""
        return self.judged.examples if isinstance(self.judged, Draws) else len(self.judged)

    @property
    def left(self) -> float:
        """All that training can gain; of classes, the share of new images expected to be wrong."""
        if isinstance(self.judged, Draws):
            return max(1 - self.skill, 0.0)
        return expected_error(self.skill, self.examples)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, without the examples."""
        return {
            "name": self.name,
            "features": self.features,
            "skill": self.skill,
            "standard_error": self.standard_error,
            "degrees_of_freedom": self.degrees_of_freedom,
            "alignment": self.alignment,
        }


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured on the images of a target.

    Args:
        network: name of the network.
        examples: images that were looked at.
        available: images there are.
        repeated: images that are there before, pixel for pixel, and were left out.
        task: what the labels are, by its name.
        measure: what heads are judged by.
        outputs: number of classes, labels or targets that something can be learned of.
        constant: names of labels and targets of which all images have one value; they are left out.
        smallest: examples of the rarest class; of labels, of the rarer value of the rarest label;
            of targets, known values of the one with the fewest.
        parameters: of the whole network.
        depths: a head on each segment, from the input to the output.
        reference: a head on the power spectrum of the pixels, which needs no network.
        mirrored: skill of that reference on mirrored images, fitted to images as they are.
        bottleneck: where the network knows less than that reference.
        curve: of the best head by number of labels; None with too few of a class, with groups, and
            for labels that are no classes.
        seconds: that it took.
        grouped: whether images belong together, such as those of a patient; the folds then hold
            each group out as a whole.
        features: what the heads read, ``[examples, features]`` by depth, and the labels, in the
            order of the positions, for whoever would run the network for them again; None where
            not all images were looked at.
        wrong: share of labels that are wrong, as far as the strongest head shows it; 0 where that
            may be luck, and for labels that are no classes. See ``wrong_labels``.
    """

    network: str
    examples: int
    available: int
    repeated: int
    task: str
    measure: Skill
    outputs: int
    constant: tuple[str, ...]
    smallest: int
    parameters: int
    depths: tuple[HeadEvidence, ...]
    reference: HeadEvidence
    mirrored: float
    bottleneck: Bottleneck
    curve: LearningCurve | None
    seconds: float
    grouped: bool = False
    features: tuple[Mapping[str, np.ndarray], np.ndarray] | None = field(default=None, repr=False)
    wrong: float = 0.0

    @property
    def best(self) -> HeadEvidence:
        """The depth with the most skill; of equal ones the earliest, which is cheapest."""
        return max(self.depths, key=lambda head: head.skill)

    @property
    def outputs_text(self) -> str:
        """How many classes, labels or targets there are."""
        return f"{self.outputs} {OUTPUTS[self.task]}"

    @property
    def last(self) -> HeadEvidence:
        """The head that reads the whole network."""
        return self.depths[-1]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "network": self.network,
            "examples": self.examples,
            "available": self.available,
            "repeated": self.repeated,
            "task": self.task,
            "metric": self.measure.metric.name,
            "outputs": self.outputs,
            "constant": list(self.constant),
            "smallest": self.smallest,
            "guess": self.measure.of_guess,
            "parameters": self.parameters,
            "depths": [head.to_json() for head in self.depths],
            "reference": self.reference.to_json(),
            "mirrored": self.mirrored,
            "bottleneck": self.bottleneck.to_json(),
            "curve": None if self.curve is None else self.curve.to_json(),
            "seconds": self.seconds,
            "grouped": self.grouped,
            "wrong": self.wrong,
        }


def gather(
    network: Classifier,
    source: Source,
    positions: Any = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Evidence:
    """Looks at labelled images through a network; one pass, and nothing is trained.

    Args:
        network: pre-trained, with the preprocessing that the images want; its head is not used.
        source: images and labels.
        positions: int ``[examples]``, the training images; by default all of the source.
        batch_size: images per forward pass.
        seed: of the folds.
        mesh: devices; by default all of them.

    Raises:
        ValueError: no image, one class, one example of every class, labels that are no classes of
            the source, features that are not finite; several processes.
    """
    check_alone("advice (ft.advise, ft.auto)")
    began = time.perf_counter()
    labels = np.asarray(source.labels())
    chosen = np.arange(len(labels)) if positions is None else np.asarray(positions)
    if not len(chosen):
        raise ValueError("there must be images to advise on, got none")
    looked = subsample(chosen, most_images(labels), labels)
    segments = network.model.segments
    depths = segments[segments.index("stem") : segments.index("pool")]
    few = np.isin(looked, subsample(looked, MOST_FOR_SPECTRA, labels))
    pixels = _Pixels(few)
    batches = eval_batches(source, looked, network.preprocessing, batch_size=batch_size)
    features, label = segment_features(network, pixels.passing(batches), depths, mesh)
    seen = (features, label) if len(looked) == len(chosen) else None
    # Of an image that is there twice, one would be judged by what was learned from the other.
    _, first = np.unique(pixels.digests, return_index=True)
    kept = np.zeros(len(label), bool)
    kept[first] = True
    if kept.sum() < 3:
        raise ValueError(f"there must be 3 or more different images to advise on, got {kept.sum()}")
    every = groups_of(source)
    groups = None if every is None else np.unique(every, return_inverse=True)[1][looked][kept]
    known: _Classes | Outputs
    if label.ndim == 1:
        known = _Classes.of(label[kept], groups, seed)
    else:
        known = Outputs.of(label[kept], network.task, groups, seed)
    found = {name: _head(name, features[name][kept], known) for name in depths}
    few, spectra = pixels.wanted[kept], kept[pixels.wanted]
    some = known.part(few)
    own, mirrored = pixels.spectra()[spectra], pixels.mirrored()[spectra]
    reference, of_reference = _head("pixels", own, some)
    by_octave = {
        name: _head(name, part[spectra], some)[0].judged for name, part in pixels.octaves().items()
    }
    heads = tuple(head for head, _ in found.values())
    best = max(heads, key=lambda head: head.skill)
    left = (
        []
        if isinstance(known, _Classes)
        else np.delete(np.arange(label.shape[1]), known.kept).tolist()
    )
    return Evidence(
        network.model.config.name,
        int(kept.sum()),
        len(chosen),
        int((~kept).sum()),
        network.task.name,
        known.measure,
        int(known.values.max()) + 1 if known.values.ndim == 1 else known.values.shape[1],
        tuple(source.class_names[k] for k in left),
        _smallest(known),
        sum(math.prod(leaf.shape) for leaf in flatten(network.params).values()),
        heads,
        reference,
        _head("pixels", own, some, mirrored)[0].skill,
        bottleneck(
            reference.judged,
            {name: _judged_on(*one, known, few) for name, one in found.items()},
            octave_correct=by_octave,
            measure=known.measure,
        ),
        _curve(features[best.name][kept], known),
        time.perf_counter() - began,
        groups is not None,
        seen,
        _wrong([*((*one, known) for one in found.values()), (reference, of_reference, some)]),
    )


MOST_WITH_GAPS = 1000
"""Images that are looked at where labels are missing here and there: heads of labels that other
images know share no decomposition."""


def most_images(labels: np.ndarray) -> int:
    """How many images are looked at."""
    if labels.ndim == 1:
        return MOST_IMAGES
    patterns = np.unique(np.isnan(labels).T, axis=0)
    return MOST_IMAGES if len(patterns) == 1 else MOST_WITH_GAPS


class _Pixels:
    """What is kept of the pixels while batches pass: spectra of some images, a digest of each."""

    def __init__(self, wanted: np.ndarray) -> None:
        self.wanted = wanted
        self.digests: list[bytes] = []
        self._found: list[SpectralFeatures] = []

    def passing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches as they are."""
        for batch in batches:
            images = np.asarray(batch["image"])
            images = images[np.asarray(batch.get("weight", np.ones(len(images)))) > 0]
            wanted = self.wanted[len(self.digests) :][: len(images)]
            self.digests += [hashlib.sha256(image.tobytes()).digest() for image in images]
            if wanted.any():
                self._found.append(spectral_features(images[wanted]))
            yield batch

    def spectra(self) -> np.ndarray:
        """Float64 ``[wanted images, features]``."""
        return np.concatenate([found.values for found in self._found])

    def mirrored(self) -> np.ndarray:
        """The same of the images as a mirror shows them."""
        return np.concatenate([found.mirrored for found in self._found])

    def octaves(self) -> dict[str, np.ndarray]:
        """The same by octave."""
        parts = [octave_features(found) for found in self._found]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True, eq=False)
class _Classes:
    """One class per image, and how ridge heads of them are judged; beside ``Outputs``.

    Args:
        values: 0 .. n - 1, int ``[examples]``, each with an example.
        measure: accuracy.
        groups: int ``[examples]``, held out as a whole.
        seed: of the folds.
    """

    values: np.ndarray
    measure: Skill
    groups: np.ndarray | None
    seed: int

    @classmethod
    def of(cls, values: np.ndarray, groups: np.ndarray | None, seed: int) -> _Classes:
        values = np.unique(values, return_inverse=True)[1]
        return cls(values, Skill.of(ACCURACY.metric, values), groups, seed)

    def part(self, rows: np.ndarray) -> _Classes:
        """Some of the examples."""
        groups = None if self.groups is None else self.groups[rows]
        return _Classes.of(self.values[rows], groups, self.seed)


def _head(
    name: str, features: np.ndarray, known: _Classes | Outputs, others: np.ndarray | None = None
) -> tuple[HeadEvidence, np.ndarray]:
    """A head on features, and what it predicts of each held-out example.

    Args:
        name: of what it reads.
        features: ``[examples, features]``.
        known: the labels.
        others: the features of the same images in another state, of which the predictions are.
    """
    width = features.shape[1]
    try:
        if isinstance(known, Outputs):
            of_all = known.head(features, others)
            head = HeadEvidence(
                name,
                width,
                of_all.judged.value,
                of_all.standard_error,
                of_all.solved.degrees_of_freedom,
                _alignment_of_any(of_all.solved, of_all.targets, known.groups),
                of_all.judged,
            )
            return head, of_all.predictions
        scaling = standardization(features)
        matrix = scaling(np.asarray(features, np.float64))
        found = cross_validate(matrix, known.values, seed=known.seed, groups=known.groups)
        if others is not None:
            found = cross_validate(
                matrix,
                known.values,
                seed=known.seed,
                strengths=[found.strength],
                judged=scaling(np.asarray(others, np.float64)),
                groups=known.groups,
            )
    except ValueError as error:
        raise ValueError(f"no head can be fitted to {name}: {error}") from error
    head = HeadEvidence(
        name,
        width,
        found.accuracy,
        found.standard_error,
        found.degrees_of_freedom,
        alignment(found.scores, known.values, known.groups),
        (found.scores.argmax(axis=1) == known.values) & found.held_out,
    )
    return head, found.scores


def _smallest(known: _Classes | Outputs) -> int:
    """See ``Evidence``."""
    if isinstance(known, _Classes):
        return int(np.bincount(known.values).min())
    if known.task.standardizes:
        return int((~np.isnan(known.values)).sum(axis=0).min())
    return int(min((known.values == each).sum(axis=0).min() for each in (0, 1)))


def _curve(features: np.ndarray, known: _Classes | Outputs) -> LearningCurve | None:
    """How the error of a head falls with the labels; of classes without groups."""
    if isinstance(known, Outputs) or known.groups is not None:
        return None  # Its parts would tear groups apart.
    try:
        return learning_curve(standardization(features)(features), known.values, seed=known.seed)
    except ValueError:
        return None  # Too few of a class.


def _alignment_of_any(
    solved: TargetValidation, targets: np.ndarray, groups: np.ndarray | None
) -> float:
    """The alignment of all outputs with one penalty, or of one alone with its own.

    One that is learnable would be lost among many that are not, and many that are hardly learnable
    are only so together. The largest of several is brought to the level of one (Bonferroni).
    """
    each = [
        alignment(solved.scores[:, k : k + 1], targets[:, k : k + 1], groups)
        for k in range(targets.shape[1])
    ]
    if len(each) == 1:
        return each[0]
    largest = max(alignment(solved.shared, targets, groups), *each)
    level = float(log_ndtr(-largest)) + math.log(len(each) + 1)
    return -float(ndtri_exp(min(level, math.log(0.5))))


def _wrong(heads: Sequence[tuple[HeadEvidence, np.ndarray, _Classes | Outputs]]) -> float:
    """The share of wrong labels that the strongest of some heads shows.

    A weaker one cannot tell a wrong label from what it does not see.
    """
    _, scores, known = max(heads, key=lambda one: one[0].skill)
    return 0.0 if isinstance(known, Outputs) else wrong_labels(scores, known.values)


def _judged_on(
    head: HeadEvidence, predictions: np.ndarray, known: _Classes | Outputs, few: np.ndarray
) -> np.ndarray | Draws:
    """What a head, fitted to all images, makes of a part of them."""
    if not isinstance(head.judged, Draws):
        return np.asarray(head.judged[few])
    if few.all():
        return head.judged
    some = known.part(few)
    return some.measure.judged(predictions[few], some.values, some.groups)


def wrong_labels(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of labels that are wrong, by how a head contradicts them; 0 where that may be luck.

    Where a head is unsure, it says so; a label that is wrong contradicts a head that is sure, and
    names any class. So each label is either what the head's probabilities say, or drawn from all
    classes, and the share of those that are drawn is that of the largest likelihood, with the scale
    that makes probabilities of scores. It is 0 if the logarithm of the likelihood is not larger by
    3 for it, which one in a hundred clean sets has.

    Args:
        scores: float ``[examples, classes]``, held out.
        labels: integers ``[examples]``, 0 .. classes - 1.

    References:
        J. B. Copas, "Binary Regression Models for Contaminated Data", 1988.

    >>> labels = np.arange(200) % 4
    >>> scores = np.linspace(0, 1, 200)[:, None] * np.eye(4)[labels]  # Some are surer than others.
    >>> wrong_labels(scores, labels)
    0.0
    >>> swapped = np.where(np.arange(200) % 10 < 3, (labels + 1) % 4, labels)
    >>> round(wrong_labels(scores, swapped), 1)
    0.3
    """
    rows = np.unique(np.linspace(0, len(labels) - 1, MOST_FOR_SPECTRA).astype(int))
    scores, labels, number = scores[rows], labels[rows], int(scores.shape[1])
    own = np.arange(len(rows))
    drawn = np.linspace(0, 0.9, 46)
    likelihood = np.array(
        [
            np.log(np.outer(1 - drawn, chance) + drawn[:, None] / number + 1e-12).sum(axis=1)
            for scale in np.geomspace(0.3, 300, 40)
            for chance in [np.exp(log_softmax(scale * scores, axis=1)[own, labels])]
        ]
    )
    best = likelihood.max(axis=0)
    if best.max() - best[0] < _PROOF:
        return 0.0
    return float(drawn[best.argmax()]) * (1 - 1 / number)


_PROOF = 3.0
"""Logarithm of a ratio of likelihoods: twice that is 6, which chi-squared of one degree of freedom
passes in 1.4 of 100 draws, and half as often where only one sign counts."""


def alignment(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None) -> float:
    """How far scores go with labels, in standard deviations of labels that are shuffled.

    The sum over examples of the products of scores and labels, both centered, of which shuffled
    labels have a mean of 0 and a known variance. Other than accuracy it does not ask for the
    largest class to be beaten, so that it sees what rare classes show.

    Args:
        scores: float ``[examples, outputs]``, held out.
        labels: integers ``[examples]``, 0 .. classes - 1; or float ``[examples, outputs]``, which
            are scaled to one standard deviation, NaN where missing.
        groups: int ``[examples]``; labels and scores that are alike within groups say less.

    References:
        W. Hoeffding, "A Combinatorial Central Limit Theorem", 1951.
        B. R. Moulton, "Random Group Effects and the Precision of Regression Estimates", 1986.

    >>> labels = np.arange(100) % 4
    >>> alignment(np.eye(4)[labels], labels) > 15, alignment(np.ones((100, 4)), labels)
    (True, 0.0)
    >>> alignment(np.eye(4)[labels], labels, labels) < 4
    True
    """
    if labels.ndim == 1:
        wanted = (labels[:, None] == np.arange(scores.shape[1])).astype(np.float64)
        wanted -= wanted.mean(axis=0)
    else:
        wanted = np.nan_to_num(labels - np.nanmean(labels, axis=0))
        wanted /= np.maximum(np.sqrt(np.square(wanted).mean(axis=0)), 1e-12)
    centered = scores - scores.mean(axis=0)
    of_scores, of_labels = centered.T @ centered, wanted.T @ wanted
    variance = float((of_scores * of_labels).sum()) / (len(scores) - 1)
    if groups is not None:
        units = np.unique(groups, return_inverse=True)[1]
        sums = [np.zeros((int(units.max()) + 1, scores.shape[1])) for _ in range(2)]
        for total, values in zip(sums, (centered, wanted), strict=True):
            np.add.at(total, units, values)
        pairs = int(np.square(np.bincount(units)).sum()) - len(units)
        within = (sums[0].T @ sums[0] - of_scores) * (sums[1].T @ sums[1] - of_labels)
        variance += max(float(within.sum()), 0.0) / max(pairs, 1)
    # Scores that differ by rounding alone say nothing.
    if variance <= 1e-18 * max(float(np.square(scores).sum()), 1e-300):
        return 0.0
    return float((centered * wanted).sum() / math.sqrt(variance))
