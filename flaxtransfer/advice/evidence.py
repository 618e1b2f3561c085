"""Evidence on which strategy fits: one pass over labelled images, and heads in closed form.

Nothing is trained. All heads are judged on the same folds, so that any two can be compared on the
same images.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.analysis.profile import LearningCurve, learning_curve
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
from flaxtransfer.features.ridge import CrossValidation, cross_validate
from flaxtransfer.paths import flatten

__all__ = ["Evidence", "HeadEvidence", "alignment", "gather", "paired"]

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
        accuracy: held out.
        standard_error: binomial, of the accuracy.
        degrees_of_freedom: effective ones, at the penalty that was chosen.
        alignment: how far held-out scores go with the labels, in standard deviations of labels
            that are drawn anew; features without information are within 4.
        right: whether each example was classified rightly, bool ``[examples]``.
    """

    name: str
    features: int
    accuracy: float
    standard_error: float
    degrees_of_freedom: float
    alignment: float
    right: np.ndarray = field(repr=False)

    @property
    def left(self) -> float:
        """Share of new images that it is expected to get wrong: all that training can gain."""
        return expected_error(self.accuracy, len(self.right))

    @classmethod
    def of(
        cls, name: str, found: CrossValidation, features: int, labels: np.ndarray
    ) -> HeadEvidence:
        """From a cross-validation."""
        return cls(
            name,
            features,
            found.accuracy,
            found.standard_error,
            found.degrees_of_freedom,
            alignment(found.scores, labels),
            (found.scores.argmax(axis=1) == labels) & found.held_out,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, without the examples."""
        return {
            "name": self.name,
            "features": self.features,
            "accuracy": self.accuracy,
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
        classes: number of classes.
        smallest: examples of the rarest class.
        majority: share of the largest class.
        parameters: of the whole network.
        depths: a head on each segment, from the input to the output.
        reference: a head on the power spectrum of the pixels, which needs no network.
        mirrored: accuracy of that reference on mirrored images, fitted to images as they are.
        bottleneck: where the network knows less than that reference.
        curve: of the best head by number of labels; None with too few of a class.
        seconds: that it took.
        grouped: whether images belong together, such as those of a patient; the folds then hold
            each group out as a whole.
        features: what the heads read, ``[examples, features]`` by depth, and the labels, in the
            order of the positions, for whoever would run the network for them again; None where
            not all images were looked at.
    """

    network: str
    examples: int
    available: int
    repeated: int
    classes: int
    smallest: int
    majority: float
    parameters: int
    depths: tuple[HeadEvidence, ...]
    reference: HeadEvidence
    mirrored: float
    bottleneck: Bottleneck
    curve: LearningCurve | None
    seconds: float
    grouped: bool = False
    features: tuple[Mapping[str, np.ndarray], np.ndarray] | None = field(default=None, repr=False)

    @property
    def best(self) -> HeadEvidence:
        """The depth with the highest accuracy; of equal ones the earliest, which is cheapest."""
        return max(self.depths, key=lambda head: head.accuracy)

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
            "classes": self.classes,
            "smallest_class": self.smallest,
            "majority": self.majority,
            "parameters": self.parameters,
            "depths": [head.to_json() for head in self.depths],
            "reference": self.reference.to_json(),
            "mirrored": self.mirrored,
            "bottleneck": self.bottleneck.to_json(),
            "curve": None if self.curve is None else self.curve.to_json(),
            "seconds": self.seconds,
            "grouped": self.grouped,
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
    looked = subsample(chosen, MOST_IMAGES, labels)
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
    label = np.unique(label[kept], return_inverse=True)[1]
    if len(label) < 3:
        raise ValueError(f"there must be 3 or more different images to advise on, got {len(label)}")
    every = groups_of(source)
    groups = None if every is None else np.unique(every, return_inverse=True)[1][looked][kept]
    heads = tuple(_head(name, features[name][kept], label, seed, groups) for name in depths)
    few, spectra = pixels.wanted[kept], kept[pixels.wanted]
    own = None if groups is None else groups[few]
    reference = _head("pixels", pixels.spectra()[spectra], label[few], seed, own)
    mirrored = _judged(pixels.spectra()[spectra], pixels.mirrored()[spectra], label[few], seed, own)
    by_octave = {
        name: _head(name, part[spectra], label[few], seed, own).right
        for name, part in pixels.octaves().items()
    }
    counts = np.bincount(label)
    best = max(heads, key=lambda head: head.accuracy)
    return Evidence(
        network.model.config.name,
        len(label),
        len(chosen),
        int((~kept).sum()),
        len(counts),
        int(counts.min()),
        float(counts.max() / len(label)),
        sum(math.prod(leaf.shape) for leaf in flatten(network.params).values()),
        heads,
        reference,
        mirrored,
        bottleneck(
            reference.right,
            {head.name: head.right[few] for head in heads},
            octave_correct=by_octave,
        ),
        # Its parts would tear groups apart.
        None if groups is not None else _curve(features[best.name][kept], label, seed),
        time.perf_counter() - began,
        groups is not None,
        seen,
    )


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


def _head(
    name: str, features: np.ndarray, label: np.ndarray, seed: int, groups: np.ndarray | None
) -> HeadEvidence:
    try:
        matrix = standardization(features)(np.asarray(features, np.float64))
        found = cross_validate(matrix, label, seed=seed, groups=groups)
    except ValueError as error:
        raise ValueError(f"no head can be fitted to {name}: {error}") from error
    return HeadEvidence.of(name, found, matrix.shape[1], label)


def _judged(
    features: np.ndarray,
    others: np.ndarray,
    label: np.ndarray,
    seed: int,
    groups: np.ndarray | None,
) -> float:
    """The accuracy on images in another state of a head that was fitted to them as they are."""
    scaling = standardization(features)
    matrix = scaling(features)
    strength = cross_validate(matrix, label, seed=seed, groups=groups).strength
    judged = cross_validate(
        matrix, label, seed=seed, strengths=[strength], judged=scaling(others), groups=groups
    )
    return judged.accuracy


def _curve(features: np.ndarray, label: np.ndarray, seed: int) -> LearningCurve | None:
    try:
        return learning_curve(standardization(features)(features), label, seed=seed)
    except ValueError:
        return None  # Too few of a class.


def alignment(scores: np.ndarray, labels: np.ndarray) -> float:
    """How far scores go with labels, in standard deviations of labels that are shuffled.

    The sum of each example's score for its own class, of which shuffled labels have a mean of 0 and
    a known variance. Other than accuracy it does not ask for the largest class to be beaten, so
    that it sees what rare classes show.

    Args:
        scores: float ``[examples, classes]``, held out.
        labels: integers ``[examples]``, 0 .. classes - 1.

    References:
        W. Hoeffding, "A Combinatorial Central Limit Theorem", 1951.

    >>> labels = np.arange(100) % 4
    >>> alignment(np.eye(4)[labels], labels) > 15, alignment(np.ones((100, 4)), labels)
    (True, 0.0)
    """
    counts = np.bincount(labels, minlength=scores.shape[1])
    shares = counts / len(labels)
    centered = scores - scores.mean(axis=0)
    centered = centered - (centered @ shares)[:, None]
    variance = float((np.square(centered) @ counts).sum()) / (len(labels) - 1)
    if variance <= 0:
        return 0.0
    return float(centered[np.arange(len(labels)), labels].sum() / math.sqrt(variance))


def paired(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """How much more often the first of two heads is right, as a share, and its standard error.

    References:
        Q. McNemar, "Note on the Sampling Error of the Difference Between Correlated Proportions or
        Percentages", 1947.

    >>> paired(np.array([True, True, True, False]), np.array([True, False, False, False]))
    (0.5, 0.3535533905932738)
    """
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    return (won - lost) / len(first), math.sqrt(won + lost) / len(first)
