"""What each depth of a network already knows: a linear probe on every segment's features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from flaxtransfer.data.normalisation import normalise
from flaxtransfer.features.ridge import ridge_path
from flaxtransfer.features.standardise import standardisation
from flaxtransfer.features.sweep import sweep
from flaxtransfer.models import Model
from flaxtransfer.sharding import make_mesh, place_batch, place_replicated
from flaxtransfer.types import Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["Profile", "SegmentProbe", "probe_profile", "segment_features"]

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


def segment_features(
    model: Model,
    variables: Variables,
    batches: Iterable[Mapping[str, Any]],
    preprocessing: Preprocessing,
    mesh: Mesh | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The output of each segment below the pooling, averaged over the image, in one pass.

    Args:
      model: the network.
      variables: its parameters and statistics; running statistics are used.
      batches: ``image`` uint8 [batch, height, width, channels], ``label``, and ``weight`` 0 where
        an example is padding.
      preprocessing: that belongs to the weights.
      mesh: devices; by default all of them.

    Returns:
      Float32 [examples, channels] by segment, and the labels, int [examples].

    Raises:
      ValueError: no example at all.
    """
    mesh = mesh or make_mesh()
    run, placed = _pooled(model, preprocessing), place_replicated(variables, mesh)
    found: list[dict[str, np.ndarray]] = []
    labels = []
    for batch in batches:
        label = np.asarray(batch["label"])
        keep = np.asarray(batch.get("weight", np.ones(len(label)))) > 0
        maps = run(placed, place_batch(batch["image"], mesh))
        found.append({name: np.asarray(values, np.float32)[keep] for name, values in maps.items()})
        labels.append(label[keep])
    if not sum(map(len, labels)):
        raise ValueError("there are no examples to take features of")
    # A compiled function returns its dict in the order of the alphabet.
    order = [name for name in model.segments if name in found[0]]
    features = {name: np.concatenate([part[name] for part in found]) for name in order}
    return features, np.concatenate(labels)


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
      ValueError: another kind; as ``ridge_path`` and ``sweep``, the segment named.

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
                found = sweep(matrix, labels, standardise=False, rule="accuracy", classes=classes)
                by_fold = found.accuracies[found.best]
                accuracy, spread = found.accuracy, float(by_fold.std(ddof=1))
                strength = found.strength
                notes += [note for note in found.notes if "folds" in note and note not in notes]
        except ValueError as error:
            raise ValueError(f"the features of {name} cannot be probed: {error}") from error
        probes.append(SegmentProbe(name, matrix.shape[1], accuracy, spread, strength))
    return Profile(kind, len(np.asarray(labels)), tuple(probes), tuple(notes))


def _pooled(
    model: Model, preprocessing: Preprocessing
) -> Callable[[Variables, jax.Array], dict[str, jax.Array]]:
    segments = model.segments[: model.segments.index("pool") + 1]

    @jax.jit
    def run(variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
        x, found = normalise(images, preprocessing.mean, preprocessing.std), {}
        for name, following in itertools.pairwise(segments):
            x, _ = model.apply(variables, x, norm="running", start=name, stop=following)
            found[name] = x.mean((1, 2), dtype="float32")
        return found

    return run
