"""What each depth of a network already knows: a linear probe on every segment's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flaxtransfer.features.ridge import ridge_path
from flaxtransfer.features.standardise import standardisation
from flaxtransfer.features.sweep import sweep_head

__all__ = ["Profile", "SegmentProbe", "probe_profile"]

Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class SegmentProbe:
    """One depth.

    Args:
      segment: whose output is probed.
      features: channels, after averaging over the image.
      accuracy: on examples that were held out, at the best strength.
      spread: standard deviation over folds; 0 with ridge, which leaves out one by one.
      strength: the best of those tried.
    """

    segment: str
    features: int
    accuracy: float
    spread: float
    strength: float


@dataclass(frozen=True)
class Profile:
    """A probe for each segment, from the input to the output.

    Args:
      kind: of probe.
      examples: how many there were.
      probes: one a segment.
      notes: what a reader should know.
    """

    kind: Kind
    examples: int
    probes: tuple[SegmentProbe, ...]
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> SegmentProbe:
        """The segment that knows most."""
        return max(self.probes, key=lambda probe: probe.accuracy)

    def __str__(self) -> str:
        lines = [f"{'segment':<8} {'features':>8} {'accuracy':>14} {'strength':>9}"]
        for probe in self.probes:
            spread = f" ± {100 * probe.spread:.1f}" if probe.spread else ""
            accuracy = f"{100 * probe.accuracy:.1f}{spread} %"
            lines.append(
                f"{probe.segment:<8} {probe.features:>8} {accuracy:>14} {probe.strength:>9.3g}"
            )
        return "\n".join([*lines, *self.notes])


def probe_profile(
    features: Mapping[str, Any],
    labels: Any,
    *,
    kind: Kind = "ridge",
    classes: int | None = None,
) -> Profile:
    """A probe on each segment's features, on examples that were held out.

    Where the curve stops rising the network has nothing more to say about these images; where it
    falls, later segments belong to the task of the pre-training, and an earlier cut or deeper
    unfreezing is worth a trial.

    Args:
      features: by segment, ``[examples, channels]``; see ``segment_features``.
      labels: integers ``[examples]``.
      kind: "ridge" leaves out one by one, in closed form; "logistic" uses folds, and is slower.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: another kind; as ``ridge_path`` and ``sweep_head``, the segment named.

    References:
      G. Alain, Y. Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes", 2016.

    >>> labels = np.arange(30) % 3
    >>> noise = np.random.default_rng(0).normal(size=(30, 4))
    >>> profile = probe_profile({"stem": noise, "layer1": noise + 9 * np.eye(4)[labels]}, labels)
    >>> profile.best.segment, profile.best.accuracy
    ('layer1', 1.0)
    """
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind is 'ridge' or 'logistic', not {kind!r}")
    probes, notes = [], []
    for name, values in features.items():
        try:
            matrix = standardisation(values)(values)
            if kind == "ridge":
                path = ridge_path(matrix, labels, classes=classes)
                accuracy, spread, strength = path.accuracy, 0.0, path.strength
            else:
                found = sweep_head(
                    matrix, labels, standardise=False, rule="accuracy", classes=classes
                )
                by_fold = found.accuracies[found.best]
                accuracy, spread = found.accuracy, float(by_fold.std(ddof=1))
                strength = found.strength
                notes += [note for note in found.notes if "folds" in note and note not in notes]
        except ValueError as error:
            raise ValueError(f"the features of {name} cannot be probed: {error}") from error
        probes.append(SegmentProbe(name, matrix.shape[1], accuracy, spread, strength))
    return Profile(kind, len(np.asarray(labels)), tuple(probes), tuple(notes))
