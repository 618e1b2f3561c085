"""Inputs of the heads: features of images, their checks, standardization and folds.

``segment_features`` takes the global average pool of each segment's output, in one pass. The checks
of features and labels are those that all heads share; ``standardization`` scales features to mean 0
and standard deviation 1 and can be undone on a fitted head; ``stratified_folds`` is the one
assignment of examples to folds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from threadpoolctl import threadpool_limits

from flaxtransfer.classifier import Classifier
from flaxtransfer.data.splits import allot, unit_numbers
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables, suggest
from flaxtransfer.sharding import make_mesh, map_batches, place_replicated
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = [
    "FOLDS",
    "Standardization",
    "blas_threads",
    "checked_examples",
    "checked_features",
    "class_labels",
    "class_weights",
    "folds_with_singletons",
    "pooled_features",
    "segment_features",
    "singleton_classes",
    "smallest_class",
    "standardization",
    "stratified_folds",
]


def segment_features(
    network: Classifier,
    batches: Iterable[Mapping[str, Any]],
    segments: Sequence[str] | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Global average pool of the output of each segment, with running statistics.

    Use it for heads on a frozen network, at any depth. The network runs once however many segments
    are asked for, and no further than the last of them.

    Args:
        network: from ``ft.transfer``, or made of a model and its weights.
        batches: ``image`` uint8 ``[batch, height, width, channels]``, ``label`` int ``[batch]``,
            and ``weight`` 0 where an example is padding, which is left out.
        segments: names, such as those of ``model.segments``; by default all before the pooling.
            "pool" is the same as the last stage.
        mesh: devices, over which each batch is cut; by default all of them.

    Returns:
        Float32 ``[examples, channels]`` by segment, from the input to the output, and the labels,
        int ``[examples]``, in the order of the batches.

    Raises:
        ValueError: no example at all, no segment, or one that does not exist or has no map; with
            those that do.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4))
    >>> batch = {"image": np.zeros((2, 32, 32, 3), np.uint8), "label": np.array([0, 1])}
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 32, 32)
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> found, labels = segment_features(network, [batch], ["pool"])
    >>> found["pool"].shape, labels.tolist()
    ((2, 32), [0, 1])
    """
    chosen = _chosen(network.model, segments)
    mesh = mesh or make_mesh()
    run = _pooled(network.model.on(mesh), network.preprocessing, chosen)
    placed = place_replicated(network.variables, mesh)
    found: list[tuple[np.ndarray, ...]] = []
    labels = []
    for maps, batch in map_batches(lambda images: run(placed, images), batches, mesh):
        found.append(maps)
        labels.append(batch["label"])
    if not sum(map(len, labels)):
        raise ValueError("there are no examples to take features of")
    features = map(np.concatenate, zip(*found, strict=True))
    return dict(zip(chosen, features, strict=True)), np.concatenate(labels)


def pooled_features(
    network: Classifier, batches: Iterable[Mapping[str, Any]], mesh: Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What the head sees of each image: ``segment_features`` of "pool", by itself.

    Returns:
        Float32 ``[examples, features]`` and int ``[examples]``, in the order of the batches.
    """
    features, labels = segment_features(network, batches, ("pool",), mesh)
    return features["pool"], labels


def _chosen(model: Model, segments: Sequence[str] | None) -> tuple[str, ...]:
    """The segments that were asked for, from the input to the output."""
    known = model.segments[: model.segments.index("pool") + 1]
    if segments is None:
        return known[:-1]
    if isinstance(segments, str):
        raise ValueError(f"segments are a sequence of names, such as ({segments!r},)")
    if unknown := [f"{name!r}{suggest(name, known)}" for name in segments if name not in known]:
        raise ValueError(
            f"no features of {', '.join(unknown)}; the segments that have are {', '.join(known)}"
        )
    if not segments:
        raise ValueError(f"no segment was asked for; there are {', '.join(known)}")
    return tuple(name for name in known if name in segments)


@lru_cache(maxsize=8)
def _pooled(
    model: Model, preprocessing: Preprocessing, chosen: tuple[str, ...]
) -> Callable[[Variables, jax.Array], tuple[jax.Array, ...]]:
    """Compiled: images [batch, height, width, channels] -> float32 features of each segment."""
    last = model.segments.index(chosen[-1]) + 2
    steps = list(itertools.pairwise(model.segments[:last]))
    several = bool(model.config.head_reads) and chosen[-1] == "pool"

    @jax.jit
    def run(variables: Variables, images: jax.Array) -> tuple[jax.Array, ...]:
        images = normalize(images, preprocessing.mean, preprocessing.std)
        x, found = images, []
        for name, following in steps:
            if several and name == "pool":
                # Of several depths, not of the last map; the compiler sees that it is known.
                pooled, _ = model.apply(variables, images, norm="running", stop=following)
                found.append(pooled.astype(jnp.float32))
                break
            x, _ = model.apply(variables, x, norm="running", start=name, stop=following)
            if name in chosen:
                pooled = x if x.ndim == 2 else x.mean((1, 2), dtype=jnp.float32)
                found.append(pooled.astype(jnp.float32))
        return tuple(found)

    return run


_SMALL = 2e9
"""Multiplications, examples x features x the smaller of both, that one thread does in 0.1 s."""


def blas_threads(matrix: np.ndarray) -> AbstractContextManager[Any]:
    """One BLAS thread while heads are solved on a small matrix, all of them on a large one.

    The threads of a product wait for each other, and where another program has the core of one of
    them, they wait for that program: 10 to 50 times as long, measured on two cores that were shared
    (experiments/results/whole_job.md).

    Args:
        matrix: ``[examples, features]``.

    >>> with blas_threads(np.ones((3, 2))):
    ...     (np.ones((2, 3)) @ np.ones((3, 2))).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    small = matrix.size * min(matrix.shape) <= _SMALL
    return threadpool_limits(1, "blas") if small else nullcontext()


def checked_examples(
    features: Any, labels: Any, classes: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Checks features and labels for fitting a classifier.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1, of at least two classes.
        classes: number of classes; default: the largest label plus 1.

    Returns:
        Features in float64, labels, and the number of classes.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, labels out of range, one
            class.
        TypeError: labels that are not integers.

    >>> checked_examples([[0.0], [1.0]], [0, 1])[2]
    2
    """
    label = class_labels(labels)
    matrix = np.asarray(features, np.float64)
    if matrix.ndim != 2 or label.shape != matrix.shape[:1] or not matrix.size:
        raise ValueError(
            "features and labels must have shapes [examples, features] and [examples], got "
            f"{matrix.shape} and {label.shape}"
        )
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"features must be finite; {wrong} of {len(matrix)} examples have others")
    number = int(label.max()) + 1 if classes is None else classes
    if label.min() < 0 or label.max() >= number:
        raise ValueError(
            f"labels must be in 0 .. {number - 1} ({number} classes), got {label.min()} .. "
            f"{label.max()}"
        )
    if (label == label[0]).all():
        raise ValueError(f"there must be at least 2 classes, got only class {label[0]}")
    return matrix, label, number


def class_labels(labels: Any) -> np.ndarray:
    """Labels as an array of integers.

    Raises:
        TypeError: labels that are not integers.
    """
    label = np.asarray(labels)
    if label.size and not np.issubdtype(label.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {label.dtype}")
    return label


def checked_features(features: Any, width: int, dtype: Any = np.float64) -> np.ndarray:
    """Checks features for a fitted head with ``width`` features.

    Returns:
        The features in ``dtype``.

    Raises:
        ValueError: another number of features.
    """
    matrix = np.asarray(features, dtype)
    if matrix.ndim != 2 or matrix.shape[1] != width:
        raise ValueError(f"features must have shape [examples, {width}], got {matrix.shape}")
    return matrix


def singleton_classes(label: np.ndarray) -> list[int]:
    """Classes with a single example, which cannot be both held out and learned from.

    >>> singleton_classes(np.array([0, 0, 3, 1]))
    [1, 3]
    """
    classes, counts = np.unique(label, return_counts=True)
    return [int(each) for each in classes[counts == 1]]


@dataclass(frozen=True)
class Standardization:
    """Mean and scale of each feature, measured on training examples; callable.

    Args:
        mean: float64 ``[features]``.
        scale: float64 ``[features]``, above 0; 1 for constant features.
        constant: indices of the constant features, int64, ascending.
    """

    mean: np.ndarray
    scale: np.ndarray
    constant: np.ndarray

    def __call__(self, features: Any) -> np.ndarray:
        """Standardizes features ``[examples, features]``.

        Computed in float64 and returned in the dtype of ``features``, float32 for integers.

        Raises:
            ValueError: another number of features.
        """
        matrix = checked_features(features, len(self.mean), dtype=None)
        dtype = matrix.dtype if np.issubdtype(matrix.dtype, np.floating) else np.float32
        scaled: np.ndarray = ((matrix - self.mean) / self.scale).astype(dtype)
        return scaled

    def undo(self, kernel: Any, bias: Any) -> tuple[np.ndarray, np.ndarray]:
        """Converts a linear head on standardized features to one on the original features.

        Use it to put a head that was fitted on standardized features onto a network.

        Args:
            kernel: ``[features, classes]``.
            bias: ``[classes]``.

        Returns:
            Kernel and bias, float64.

        >>> fitted = standardization([[0.0, 5.0], [2.0, 5.0]])
        >>> kernel, bias = fitted.undo(np.array([[2.0], [0.0]]), np.array([0.5]))
        >>> (np.array([[3.0, 5.0]]) @ kernel + bias).item()
        4.5
        """
        kernel = np.asarray(kernel, np.float64) / self.scale[:, None]
        return kernel, np.asarray(bias, np.float64) - self.mean @ kernel


def standardization(features: Any) -> Standardization:
    """Standardization: mean and standard deviation of each feature, in float64.

    Measure it on training examples only and apply it to all. The standard deviation is that of the
    examples (divided by n), as in scikit-learn's ``StandardScaler``. A feature that is constant to
    rounding has scale 1: it becomes 0, and a different value on new examples is not blown up.

    Args:
        features: ``[examples, features]``, finite.

    Raises:
        ValueError: another shape, no examples, or values that are not finite.

    >>> fitted = standardization([[0.0, 5.0], [2.0, 5.0]])
    >>> fitted([[3.0, 5.0]]).tolist(), fitted.constant.tolist()
    ([[2.0, 0.0]], [1])
    """
    matrix = np.asarray(features)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"features must have shape [examples, features], got {matrix.shape}")
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"features must be finite; {wrong} of {len(matrix)} examples have others")
    mean = matrix.mean(axis=0, dtype=np.float64)
    deviation = np.sqrt(np.square(matrix - mean).mean(axis=0))
    # The mean is rounded, too: a constant of 0.1 does not have a deviation of exactly 0.
    constant = deviation <= 10 * np.finfo(np.float64).eps * np.abs(mean)
    return Standardization(mean, np.where(constant, 1.0, deviation), np.flatnonzero(constant))


FOLDS = 5
"""Folds of every cross-validation, unless something else is asked for."""


def stratified_folds(labels: Any, folds: int, seed: int = 0) -> np.ndarray:
    """Stratified k-fold cross-validation: the fold of each example.

    Folds differ by at most one example, in total and within every class.

    Args:
        labels: integers ``[examples]``.
        folds: number of folds.
        seed: of the assignment.

    Returns:
        The fold in which each example is held out, int64 ``[examples]``.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels of another shape; a class with fewer examples than folds.

    >>> np.bincount(stratified_folds([0, 0, 0, 1, 1, 1, 1], 3)).tolist()
    [3, 2, 2]
    """
    label = class_labels(labels)
    if label.ndim != 1 or not label.size:
        raise ValueError(f"labels must have shape [examples], one or more, got {label.shape}")
    names, counts = np.unique(label, return_counts=True)
    if small := {int(c): int(n) for c, n in zip(names, counts, strict=True) if n < folds}:
        raise ValueError(
            f"every class must have at least {folds} examples for {folds} folds, got {small}"
        )
    return _assigned(label, folds, seed)


def _assigned(label: np.ndarray, folds: int, seed: int) -> np.ndarray:
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(label))
    # Class after class is assigned in turn; each starts at the fold where the last one ended.
    assigned = np.empty(len(label), np.int64)
    assigned[np.lexsort([keys, label])] = np.arange(len(label)) % folds
    return assigned


def folds_with_singletons(
    label: np.ndarray, folds: int, seed: int = 0, groups: Sequence[Any] | np.ndarray | None = None
) -> np.ndarray:
    """The fold of each example, with -1 for the only example of a class, which is never held out.

    A class with fewer examples than folds is held out in as many folds as it has examples. With
    groups, such as patients, each is held out as a whole, and a group without which a class would
    not be trained on never is.

    >>> folds_with_singletons(np.array([0, 0, 1, 2, 2]), 2).tolist().count(-1)
    1
    >>> folds_with_singletons(np.array([0, 1, 0, 1]), 2, groups=["a", "a", "b", "b"]).tolist()
    [0, 0, 1, 1]
    """
    if groups is not None:
        return _grouped(label, folds, seed, groups)
    several = ~np.isin(label, singleton_classes(label))
    assigned = np.full(len(label), -1)
    assigned[several] = _assigned(label[several], folds, seed)
    return assigned


def _grouped(
    label: np.ndarray, folds: int, seed: int, groups: Sequence[Any] | np.ndarray
) -> np.ndarray:
    """Folds of whole groups, with about the same shares of the classes."""
    units, classes = unit_numbers(groups, len(label)), np.unique(label)
    one_hot = (label[:, None] == classes).astype(np.float64)
    has = np.zeros((int(units.max()) + 1, len(classes)), bool)
    has[units, np.searchsorted(classes, label)] = True
    fold_of = allot(one_hot, np.full(folds, 1 / folds), units, seed)
    fold_of[has[:, has.sum(axis=0) == 1].any(axis=1)] = -1
    for each in range(len(classes)):
        own = np.flatnonzero(has[:, each])
        # Held out at once, they would leave nothing of the class to train on.
        if len(own) > 1 and len(set(fold_of[own].tolist()) | {-2}) == 2 and fold_of[own[0]] >= 0:
            fold_of[own[0]] = -1
    held = fold_of >= 0
    fold_of[held] = np.unique(fold_of[held], return_inverse=True)[1]  # None of them is empty.
    return np.asarray(fold_of[units])


def smallest_class(label: np.ndarray) -> tuple[int, int]:
    """The smallest class with at least two examples, and its size.

    Raises:
        ValueError: every class has one example.

    >>> smallest_class(np.array([0, 0, 0, 1, 1, 2]))
    (1, 2)
    """
    names, counts = np.unique(label, return_counts=True)
    if (counts == 1).all():
        raise ValueError(
            "every class has one example, so that none can be held out; give at least 2 of a "
            "class, or use nearest_class_mean, which needs only one"
        )
    n = np.where(counts > 1, counts, counts.max() + 1).argmin()
    return int(names[n]), int(counts[n])


def class_weights(label: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Weights with which a part of the examples has the class shares of the whole.

    Args:
        label: integers ``[examples]``, 0 .. classes - 1.
        used: bool ``[examples]``, the part; it has an example of each class.

    Returns:
        Float64 ``[examples]``, 0 outside the part, in sum as many as there are in it.

    >>> class_weights(np.array([0, 0, 1, 1]), np.array([True, False, True, True])).tolist()
    [1.5, 0.0, 0.75, 0.75]
    """
    shares = np.bincount(label) / len(label)
    counts = np.maximum(np.bincount(label[used], minlength=len(shares)), 1)
    weights: np.ndarray = np.where(used, (shares * used.sum() / counts)[label], 0.0)
    return weights
