"""Ridge classification: least squares on targets of -1 and 1, in closed form.

``ridge_path`` has every penalty from one decomposition, with exact leave-one-out errors, which rank
penalties. ``cross_validate`` says what a head is worth, on stratified folds. Leave-one-out cannot:
to leave an example out makes its class the rarer one, so that on features without information it is
right less often than a guess. Folds have a trace of the same fault, where a class does not divide
by their number; weights that give each training part the class shares of the whole take it away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special

from flaxtransfer.data.splits import allot, strata_of, unit_numbers
from flaxtransfer.features.inputs import (
    FOLDS,
    blas_threads,
    checked_examples,
    checked_features,
    class_weights,
    folds_with_singletons,
    smallest_class,
)
from flaxtransfer.features.logistic import left_singular_vectors

__all__ = [
    "STRENGTHS",
    "CrossValidation",
    "RidgePath",
    "Split",
    "TargetValidation",
    "checked_strengths",
    "cross_validate",
    "cross_validate_targets",
    "logit_scale",
    "ridge_path",
    "ridge_splits",
    "target_folds",
]


STRENGTHS = tuple(float(value) for value in np.logspace(-3, 6, 19))
"""Penalties for any number of standardized features, half a decade apart."""

_BATCH_SCORES = 2**23
"""Scores held in memory; penalties that make more are computed in batches."""


@dataclass(frozen=True)
class RidgePath:
    """Ridge classifiers of several penalties, with their leave-one-out errors.

    Args:
        strengths: float64 ``[strengths]``.
        errors: mean squared leave-one-out error against targets of -1 and 1, ``[strengths]``.
        accuracies: leave-one-out accuracy, ``[strengths]``. It ranks; as a number it is too low
            where features say little, down to 0 for balanced classes and features of no use:
            ``cross_validate`` has the number.
        best: index of the strength with the smallest error; of equal ones, the largest strength.
        kernel: float64 ``[features, classes]`` of the best strength, refitted on all examples.
        bias: float64 ``[classes]``.
        left_out: leave-one-out scores at the best strength, float64 ``[examples, classes]``.
    """

    strengths: np.ndarray
    errors: np.ndarray
    accuracies: np.ndarray
    best: int
    kernel: np.ndarray
    bias: np.ndarray
    left_out: np.ndarray

    @property
    def strength(self) -> float:
        """The best strength."""
        return float(self.strengths[self.best])

    @property
    def accuracy(self) -> float:
        """Leave-one-out accuracy at the best strength; see ``accuracies``."""
        return float(self.accuracies[self.best])

    def scores(self, features: Any) -> np.ndarray:
        """Class scores ``[examples, classes]``; the largest is the prediction. They are not logits.

        Raises:
            ValueError: another number of features.
        """
        scores: np.ndarray = checked_features(features, len(self.kernel)) @ self.kernel + self.bias
        return scores

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        predicted: np.ndarray = self.scores(features).argmax(axis=1)
        return predicted


def ridge_path(
    features: Any,
    labels: Any,
    strengths: Sequence[float] = STRENGTHS,
    *,
    classes: int | None = None,
) -> RidgePath:
    """Ridge classification, for every penalty at once.

    Use it as a fast baseline and to initialize a head: least squares on targets of -1 and 1 with an
    L2 penalty on the kernel and none on the bias. One eigendecomposition of the smaller Gram matrix
    serves all penalties; leave-one-out errors follow from residuals and leverages, without fitting
    again. Constant and repeated features are harmless: a direction without variance gets no weight.

    Args:
        features: ``[examples, features]``, finite; standardize them, because all have
            the same penalty. Computed in float64.
        labels: integers ``[examples]``, 0 .. classes - 1.
        strengths: penalties, each above 0.
        classes: number of classes; default: the largest label plus 1.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, one class, fewer than three
            examples, strengths that are not above 0.
        TypeError: labels that are not integers.

    References:
        R. Rifkin, R. Lippert, "Notes on Regularized Least Squares", 2007 (all strengths from one
        decomposition). D. M. Allen, "The Relationship Between Variable Selection and Data
        Augmentation and a Method for Prediction", 1974 (leave-one-out by leverage).

    >>> random = np.random.default_rng(0)
    >>> labels = np.arange(40) % 2
    >>> path = ridge_path(random.normal(size=(40, 200)) + 2 * labels[:, None], labels)
    >>> path.accuracy
    1.0
    """
    matrix, label, number = checked_examples(features, labels, classes)
    penalties = checked_strengths(len(matrix), strengths)
    with blas_threads(matrix):
        return _ridge_path(matrix, label, number, penalties)


def _ridge_path(
    matrix: np.ndarray, label: np.ndarray, number: int, penalties: np.ndarray
) -> RidgePath:
    targets = np.where(label[:, None] == np.arange(number), 1.0, -1.0)
    mean, target_mean = matrix.mean(axis=0), targets.mean(axis=0)
    centered, residual = matrix - mean, targets - target_mean

    values, left = left_singular_vectors(centered)
    projected = left.T @ residual
    shrunk = values[:, None] / (values[:, None] + penalties)  # [rank, strengths]
    complement = 1 - 1 / len(matrix) - np.square(left) @ shrunk  # 1 - leverage, same shape

    def loo_errors(chosen: slice | list[int]) -> np.ndarray:
        """Leave-one-out errors, ``[examples, strengths, classes]``."""
        coordinates = (shrunk[:, chosen, None] * projected[:, None]).reshape(len(values), -1)
        fitted = (left @ coordinates).reshape(len(matrix), -1, number)
        found: np.ndarray = (residual[:, None] - fitted) / complement[:, chosen, None]
        return found

    errors, accuracies = np.empty(len(penalties)), np.empty(len(penalties))
    size = max(1, _BATCH_SCORES // targets.size)
    for start in range(0, len(penalties), size):
        part = slice(start, start + size)
        batch_errors = loo_errors(part)
        errors[part] = np.square(batch_errors).mean(axis=(0, 2))
        predicted = (targets[:, None] - batch_errors).argmax(axis=2)
        accuracies[part] = (predicted == label[:, None]).mean(axis=0)
    best = int(np.flatnonzero(errors == errors.min())[np.argmax(penalties[errors == errors.min()])])
    # kernel = X' U (values + strength)^-1 U' Y, in which X' U is V sqrt(values).
    kernel = centered.T @ (left @ (projected / (values[:, None] + penalties[best])))
    left_out = targets - loo_errors([best])[:, 0]
    bias = target_mean - mean @ kernel
    return RidgePath(penalties, errors, accuracies, best, kernel, bias, left_out)


def checked_strengths(count: int, strengths: Sequence[float]) -> np.ndarray:
    """Penalties above 0, float64 ``[strengths]``."""
    penalties = np.asarray(strengths, np.float64)
    if count < 3:
        raise ValueError(f"leave-one-out must have at least 3 examples, got {count}")
    if penalties.ndim != 1 or not penalties.size or not (penalties > 0).all():
        raise ValueError(f"strengths must be > 0, one or more, got {penalties.tolist()}")
    return penalties


FEW = 200
"""With fewer examples the folds are drawn twice: one draw moves the accuracy by a point or two."""


class Split(NamedTuple):
    """Ridge heads of every penalty, fitted without one fold.

    Args:
        out: bool ``[examples]``, which are held out.
        coordinates: float64 ``[held out, rank]``, of the held-out examples in the span of the rest.
        values: float64 ``[rank]``, eigenvalues of the Gram matrix of the rest.
        projected: float64 ``[rank, classes]``, of the targets.
        prior: float64 ``[classes]``, what a head without features says.
    """

    out: np.ndarray
    coordinates: np.ndarray
    values: np.ndarray
    projected: np.ndarray
    prior: np.ndarray

    def scores(self, strength: float) -> np.ndarray:
        """Class scores of the held-out examples, float64 ``[held out, classes]``."""
        shrunk = self.projected / (self.values[:, None] + strength)
        scores: np.ndarray = self.coordinates @ shrunk + self.prior
        return scores


def ridge_splits(
    matrix: np.ndarray,
    label: np.ndarray,
    number: int,
    fold_of: np.ndarray,
    judged: np.ndarray | None = None,
) -> list[Split]:
    """The heads of each fold: every penalty from one decomposition.

    Args:
        matrix: float64 ``[examples, features]``, standardized.
        label: integers ``[examples]``, 0 .. classes - 1.
        number: of classes.
        fold_of: int ``[examples]``; -1 for an example that is never held out.
        judged: what the held-out examples are, if not rows of ``matrix``.
    """
    judged = matrix if judged is None else judged
    with blas_threads(matrix):
        return [
            _split(matrix, judged, label, number, fold_of == fold)
            for fold in range(int(fold_of.max()) + 1)
        ]


def _split(
    matrix: np.ndarray, judged: np.ndarray, label: np.ndarray, number: int, out: np.ndarray
) -> Split:
    rest, targets = matrix[~out], np.where(label[~out, None] == np.arange(number), 1.0, -1)
    weights = class_weights(label, ~out)[~out, None]
    mean = (weights * rest).sum(axis=0) / weights.sum()
    prior = (weights * targets).sum(axis=0) / weights.sum()
    root = np.sqrt(weights)
    centered = root * (rest - mean)
    values, left = left_singular_vectors(centered)
    coordinates = ((judged[out] - mean) @ centered.T) @ left
    return Split(out, coordinates, values, left.T @ (root * (targets - prior)), prior)


@dataclass(frozen=True)
class CrossValidation:
    """A ridge head on examples that it was not fitted on.

    Args:
        strengths: penalties that were tried, float64 ``[strengths]``.
        errors: mean squared held-out error against targets of -1 and 1, ``[strengths]``.
        best: index of the strength with the smallest error; of equal ones, the largest strength.
        right: how often each held-out example was classified rightly, float64 ``[examples]``: 0 or
            1, or a share where the folds were drawn more than once. 0 for the only one of a class.
        scores: held-out class scores at the best strength, in the first draw of folds, float64
            ``[examples, classes]``; they are not logits.
        held_out: bool ``[examples]``.
        scale: what makes logits of scores: the factor at which they fit best, with targets a
            little less than sure.
        loss: mean negative log-likelihood of the held-out examples with these logits, in nats.
        degrees_of_freedom: of the head at the best strength, from 0 to the number of features:
            the trace of the matrix that maps targets to fitted values.
        folds: how many there were.
        repeats: how often they were drawn.
    """

    strengths: np.ndarray
    errors: np.ndarray
    best: int
    right: np.ndarray
    scores: np.ndarray
    held_out: np.ndarray
    scale: float
    loss: float
    degrees_of_freedom: float
    folds: int
    repeats: int

    @property
    def strength(self) -> float:
        """The best strength."""
        return float(self.strengths[self.best])

    @property
    def accuracy(self) -> float:
        """Held-out accuracy at the best strength."""
        return float(self.right.mean())

    @property
    def standard_error(self) -> float:
        """Binomial, of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.right))


def cross_validate(
    features: Any,
    labels: Any,
    *,
    classes: int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    folds: int = FOLDS,
    repeats: int | None = None,
    seed: int = 0,
    judged: Any = None,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> CrossValidation:
    """Held-out accuracy of a ridge head, its penalty chosen by the held-out error.

    Use it to say what a head on frozen features is worth, and to compare features: with one seed
    all have the same folds, so that ``right`` can be compared example by example.

    Args:
        features: ``[examples, features]``, finite; standardize them, because all have the same
            penalty. Computed in float64.
        labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more.
        classes: number of classes; default: the largest label plus 1.
        strengths: penalties, each above 0.
        folds: 2 or more; a class with fewer examples is held out in as many as it has.
        repeats: how often the folds are drawn; by default twice for fewer than 200 examples.
        seed: of the first draw.
        judged: features of the same examples in another state, such as mirrored, of the same shape:
            heads are fitted to ``features`` and judged on these.
        groups: ``[examples]``, such as patients, each of which is held out as a whole.

    Raises:
        ValueError: as ``ridge_path``; folds below 2, groups of another number, one group alone, a
            class without examples, one example of every class.
        TypeError: labels that are not integers.

    References:
        M. Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", 1974.
        J. Platt, "Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized
        Likelihood Methods", 1999 (targets that are less than sure).
        G. I. Austin, I. Pe'er, T. Korem, "Distributional Bias Compromises Leave-One-Out
        Cross-Validation", 2024 (why the training parts keep the shares of the classes).

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> cross_validate(random.normal(size=(40, 8)) + 4 * labels[:, None], labels).accuracy
    1.0
    """
    matrix, label, number = checked_examples(features, labels, classes)
    others = None if judged is None else checked_examples(judged, labels, classes)[0]
    if others is not None and others.shape != matrix.shape:
        raise ValueError(
            f"judged must have the shape of features, {matrix.shape}, got {others.shape}"
        )
    counts = np.bincount(label, minlength=number)
    if missing := np.flatnonzero(counts == 0).tolist():
        raise ValueError(
            f"every class must have an example, classes {missing} have none; renumber the labels"
        )
    smallest_class(label)
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    folds = min(folds, int(counts.max()))
    if groups is not None:
        folds = min(folds, len(set(groups)))
        if folds < 2:
            raise ValueError("there must be 2 groups or more, of which one is held out, got 1")
    repeats = (1 if len(label) >= FEW else 2) if repeats is None else repeats
    tried = checked_strengths(len(label), strengths)
    draws = [
        ridge_splits(
            matrix, label, number, folds_with_singletons(label, folds, seed + n, groups), others
        )
        for n in range(repeats)
    ]
    if not all(draws):
        raise ValueError(
            "there must be a group that can be held out without its class, got each class in one"
        )
    errors = np.zeros(len(tried))
    for split in (split for draw in draws for split in draw):
        targets = np.where(label[split.out, None] == np.arange(number), 1.0, -1.0)
        errors += [np.square(split.scores(strength) - targets).sum() for strength in tried]
    held_out = np.any([split.out for split in draws[0]], axis=0)
    errors /= repeats * held_out.sum() * number
    best = int(np.flatnonzero(errors == errors.min())[np.argmax(tried[errors == errors.min()])])
    drawn = np.zeros((repeats, len(label), number))
    for scores, draw in zip(drawn, draws, strict=True):
        for split in draw:
            scores[split.out] = split.scores(tried[best])
    right = ((drawn.argmax(axis=2) == label) & held_out).mean(axis=0)
    scale, loss = logit_scale(
        drawn[:, held_out].reshape(-1, number), np.tile(label[held_out], repeats)
    )
    freedom = [float((s.values / (s.values + tried[best])).sum()) for s in draws[0]]
    return CrossValidation(
        tried,
        errors,
        best,
        right,
        drawn[0],
        held_out,
        scale,
        loss,
        float(np.mean(freedom)),
        folds,
        repeats,
    )


def logit_scale(scores: np.ndarray, label: np.ndarray) -> tuple[float, float]:
    """The factor at which scores are the best logits, and their mean loss in nats.

    Where every example is right, no factor is too large. So an example less than sure is asked
    for: one in n + 2 is taken to be of another class.
    """
    doubt = 1 / (len(label) + 2)
    own = np.arange(len(label)), label

    def losses(power: float) -> tuple[float, float]:
        log_probs = scipy.special.log_softmax(math.exp(power) * scores, axis=1)
        right = -float(log_probs[own].mean())
        wrong = (-float(log_probs.sum(axis=1).mean()) - right) / (scores.shape[1] - 1)
        return (1 - doubt) * right + doubt * wrong, right

    found = scipy.optimize.minimize_scalar(
        lambda power: losses(power)[0], bounds=(-5, 5), method="bounded"
    )
    return math.exp(float(found.x)), losses(float(found.x))[1]


@dataclass(frozen=True)
class TargetValidation:
    """Ridge regressions of several targets on examples that they were not fitted on.

    Args:
        strengths: the penalty of each target with the smallest held-out error; of equal ones the
            largest. Float64 ``[targets]``.
        scores: held-out predictions, float64 ``[examples, targets]``.
        shared: the same with one penalty for all targets, that of the smallest sum of errors in
            variances of the targets. Many targets with a penalty each look as if something were
            learned where nothing is: the penalty of each is chosen on the same examples.
        degrees_of_freedom: of the head, the mean over targets and folds; see ``CrossValidation``.
    """

    strengths: np.ndarray
    scores: np.ndarray
    shared: np.ndarray
    degrees_of_freedom: float


def target_folds(
    targets: np.ndarray,
    folds: int = FOLDS,
    seed: int = 0,
    groups: Sequence[Any] | np.ndarray | None = None,
) -> np.ndarray:
    """The fold of each example, int64 ``[examples]``, with alike distributions of every target.

    Args:
        targets: float ``[examples, targets]``, NaN where missing.
        folds: 2 or more; no more than there are groups.
        seed: of the folds.
        groups: ``[examples]``, each of which is in one fold.

    Raises:
        ValueError: one group alone.

    >>> targets = np.array([[0.0], [0.0], [1.0], [1.0]])
    >>> sorted(targets[target_folds(targets, 2) == 0].ravel().tolist())
    [0.0, 1.0]
    """
    units = unit_numbers(groups, len(targets))
    folds = min(folds, int(units.max()) + 1)
    if folds < 2:
        raise ValueError("there must be 2 groups or more, of which one is held out, got 1")
    strata, _ = strata_of(np.asarray(targets, np.float64))
    found = allot(strata, np.full(folds, 1 / folds), units, seed)[units]
    return np.unique(found, return_inverse=True)[1]


def cross_validate_targets(
    features: Any,
    targets: np.ndarray,
    fold_of: np.ndarray,
    *,
    strengths: Sequence[float] = STRENGTHS,
    judged: Any = None,
) -> TargetValidation:
    """Held-out predictions of ridge regressions, each target with a penalty of its own.

    Use it for several labels per image (targets of -1 and 1) and for numbers. Each target is fitted
    to the examples that know it. The intercept is that of all examples, held-out ones too: that of
    the rest would be lower where the held-out values are high, and a head without information would
    look worse than a guess.

    Args:
        features: ``[examples, features]``, finite, standardized.
        targets: float ``[examples, targets]``, NaN where missing.
        fold_of: int ``[examples]``, from ``target_folds``.
        strengths: penalties, each above 0.
        judged: features of the same examples in another state, of which the predictions are;
            penalties are chosen on ``features``.

    Raises:
        ValueError: fewer than three examples, shapes that do not fit, values that are not finite.

    References:
        M. Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", 1974.
        G. I. Austin, I. Pe'er, T. Korem, "Distributional Bias Compromises Leave-One-Out
        Cross-Validation", 2024.

    >>> random = np.random.default_rng(0)
    >>> features = random.normal(size=(60, 4))
    >>> targets = features[:, :1] + 0.01 * random.normal(size=(60, 1))
    >>> found = cross_validate_targets(features, targets, target_folds(targets))
    >>> bool(np.abs(found.scores - targets).max() < 0.1)
    True
    """
    matrix = np.asarray(features, np.float64)
    values = np.asarray(targets, np.float64)
    if matrix.ndim != 2 or values.ndim != 2 or len(matrix) != len(values) or not values.size:
        raise ValueError(
            "features and targets must have shapes [examples, features] and [examples, targets], "
            f"got {matrix.shape} and {values.shape}"
        )
    if wrong := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ValueError(f"features must be finite; {wrong} of {len(matrix)} examples have others")
    tried = checked_strengths(len(matrix), strengths)
    seen = matrix if judged is None else np.asarray(judged, np.float64)
    said = np.empty((len(tried), *values.shape))
    errors, freedom = np.empty((len(tried), values.shape[1])), np.empty(values.shape[1])
    known = ~np.isnan(values)
    # Targets that the same examples know share the decompositions.
    patterns, pattern_of = np.unique(known.T, axis=0, return_inverse=True)
    with blas_threads(matrix):
        for number, rows in enumerate(patterns):
            own = np.flatnonzero(pattern_of.ravel() == number)
            part = _target_scores(matrix, seen, values[:, own], rows, fold_of, tried)
            said[:, :, own], errors[:, own], freedom[own] = part
    # They ascend, so that the last of equal ones is the largest.
    best = len(tried) - 1 - np.argmin(errors[::-1], axis=0)
    spread = np.maximum(np.nanvar(values, axis=0) * known.sum(axis=0), 1e-300)
    together = len(tried) - 1 - int(np.argmin((errors / spread).sum(axis=1)[::-1]))
    scores = np.take_along_axis(said, best[None, None], axis=0)[0]
    return TargetValidation(tried[best], scores, said[together], float(freedom.mean()))


def _target_scores(
    matrix: np.ndarray,
    seen: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    fold_of: np.ndarray,
    tried: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions and errors of each penalty, and degrees of freedom at the best of each target.

    Of targets that ``rows`` know; predictions are of all held-out examples.
    """
    prior = values[rows].mean(axis=0)
    said = np.empty((len(tried), *values.shape))
    errors, freedoms = np.zeros((2, len(tried), values.shape[1]))
    folds = int(fold_of.max()) + 1
    for fold in range(folds):
        out, used = fold_of == fold, rows & (fold_of != fold)
        said[:, out] = prior
        if not used.any():
            continue
        mean = matrix[used].mean(axis=0)
        rest = matrix[used] - mean
        eigenvalues, left = left_singular_vectors(rest)
        projected = left.T @ (values[used] - values[used].mean(axis=0))
        inside = rows & out
        coordinates = ((matrix[inside] - mean) @ rest.T) @ left
        others = coordinates if seen is matrix else ((seen[out] - mean) @ rest.T) @ left
        if seen is matrix and not inside[out].all():
            others = ((matrix[out] - mean) @ rest.T) @ left
        for n, strength in enumerate(tried):
            shrunk = projected / (eigenvalues[:, None] + strength)
            errors[n] += np.square(coordinates @ shrunk + prior - values[inside]).sum(axis=0)
            said[n, out] += others @ shrunk
            freedoms[n] += (eigenvalues / (eigenvalues + strength)).sum() / folds
    best = len(tried) - 1 - np.argmin(errors[::-1], axis=0)
    return said, errors, freedoms[best, np.arange(len(prior))]
