"""Linear probes with a cross-validated penalty.

``sweep_head`` compares penalties of logistic regression or ridge on held-out features;
``fit_linear_probe`` fits the head of a network with the best one. ``stratified_folds`` are the
folds of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from flaxtransfer.features.checks import (
    checked_examples,
    checked_features,
    class_labels,
    singleton_classes,
    standardization,
)
from flaxtransfer.features.logistic import LogisticPath, logistic_path
from flaxtransfer.features.ridge import STRENGTHS as RIDGE_STRENGTHS
from flaxtransfer.features.ridge import ridge_path

__all__ = [
    "HeadSweep",
    "LinearProbe",
    "fit_linear_probe",
    "folds_with_singletons",
    "smallest_class",
    "stratified_folds",
    "sweep_head",
]


Kind = Literal["logistic", "ridge"]
Rule = Literal["loss", "accuracy", "one_standard_error"]

STRENGTHS = tuple(float(value) for value in np.logspace(-2, 5.5, 16))
"""Penalties of logistic regression on standardized features, half a decade apart."""

_TOLERANCE = 1e-6
"""In float32: changes a held-out loss by a thousandth, where folds differ by a tenth."""

_ONE_SHOT_STRENGTH = 10.0
"""Penalty on standardized features if every class has one example, so that none is held out."""


class LinearProbe(NamedTuple):
    """A linear head.

    Args:
        kernel: float64 ``[features, classes]``.
        bias: float64 ``[classes]``.
        text: how it was fitted, in one line.
    """

    kernel: np.ndarray
    bias: np.ndarray
    text: str


def fit_linear_probe(
    features: Any, labels: Any, classes: int, *, folds: int = 5, seed: int = 0
) -> LinearProbe:
    """Linear probe: logistic regression to the optimum, with a cross-validated penalty.

    Use it to start fine-tuning with a head that fits the features, so that the first gradients do
    not distort them (LP-FT). Features are standardized for the fit, and the head is converted back
    to the original features: a network with this head gives the fitted logits.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more. The
            only example of a class is never held out; if every class has only one, the
            strength is fixed.
        classes: number of classes.
        folds: of the cross-validation; fewer if a class has fewer examples.
        seed: of the folds.

    Raises:
        ValueError: a class without examples, and as ``logistic_path``.
        TypeError: labels that are not integers.

    References:
        A. Kumar et al., "Fine-Tuning Can Distort Pretrained Features and Underperform
        Out-of-Distribution", 2022 (a fitted head before fine-tuning).

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> head = fit_linear_probe(random.normal(size=(40, 8)) + 4 * labels[:, None], labels, 2)
    >>> head.kernel.shape, head.text.split(",")[0]
    ((8, 2), 'logistic regression on 40 examples')
    """
    _, label, _ = checked_examples(features, labels, classes)
    begin = f"logistic regression on {len(label)} examples"
    counts = np.bincount(label, minlength=classes)
    if counts.max() > 1:
        found = sweep_head(features, label, folds=folds, seeds=(seed,), classes=classes)
        accuracy = f"held-out accuracy {100 * found.accuracy:.1f} %"
        text = f"{begin}, strength {found.strength:.3g}; {accuracy}"
        return LinearProbe(found.kernel, found.bias, text)
    scaling = standardization(features)
    path = logistic_path(scaling(features), label, _ONE_SHOT_STRENGTH, classes=classes)
    kernel, bias = scaling.undo(path.kernels[0], path.biases[0])
    return LinearProbe(
        kernel,
        bias,
        f"{begin}, strength {_ONE_SHOT_STRENGTH:g}, because each class has one example",
    )


@dataclass(frozen=True)
class HeadSweep:
    """Held-out accuracy and loss of each strength, and the head with the best one.

    Args:
        kind: logistic regression with folds, or ridge with exact leave-one-out.
        strengths: float64, ascending, ``[strengths]``.
        accuracies: on held-out examples, ``[strengths, splits]``; folds of the first seed first.
        losses: likewise, the negative log-likelihood in nats; for ridge, the squared error.
        rule: how the best was chosen.
        best: index of the best strength.
        kernel: of the head refitted on all examples, for the original features (standardization is
            folded in), float64 ``[features, classes]``.
        bias: float64 ``[classes]``.
        notes: remarks on the data and the fits, in sentences.
    """

    kind: Kind
    strengths: np.ndarray
    accuracies: np.ndarray
    losses: np.ndarray
    rule: Rule
    best: int
    kernel: np.ndarray
    bias: np.ndarray
    notes: tuple[str, ...]

    @property
    def strength(self) -> float:
        """The best strength."""
        return float(self.strengths[self.best])

    @property
    def accuracy(self) -> float:
        """Held-out accuracy at the best strength; chosen on it, so slightly too high."""
        return float(self.accuracies[self.best].mean())

    def scores(self, features: Any) -> np.ndarray:
        """Class scores ``[examples, classes]``; the largest is the prediction. Logistic: logits.

        Raises:
            ValueError: another number of features.
        """
        scores: np.ndarray = checked_features(features, len(self.kernel)) @ self.kernel + self.bias
        return scores

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        predicted: np.ndarray = self.scores(features).argmax(axis=1)
        return predicted

    def __str__(self) -> str:
        loss = "nats" if self.kind == "logistic" else "squared error"
        lines = [f"  {'strength':>10}  {'accuracy':^15}  {loss:^17}"]
        for n, strength in enumerate(self.strengths):
            accuracy = _mean_and_deviation(self.accuracies[n], 3)
            cells = f"{strength:>10.4g}  {accuracy:<15}  {_mean_and_deviation(self.losses[n], 4)}"
            lines.append(f"{'*' if n == self.best else ' '} {cells}".rstrip())
        return "\n".join([*lines, *self.notes])


def sweep_head(
    features: Any,
    labels: Any,
    kind: Kind = "logistic",
    *,
    strengths: Sequence[float] | None = None,
    folds: int = 5,
    seeds: Sequence[int] = (0,),
    rule: Rule = "loss",
    standardize: bool = True,
    classes: int | None = None,
) -> HeadSweep:
    """Cross-validates the penalty of a linear head, and refits with the best one on all examples.

    Use it for the head of a frozen network. With ``"logistic"`` all strengths, folds and seeds are
    solved to the optimum by one compiled program; with ``"ridge"`` each example is left out once,
    in closed form, and neither folds nor seeds are needed.

    Features are standardized on all given examples, held-out ones included, because this uses no
    labels. Keep a test set out of ``features``: the accuracy of the best strength is the best of
    many.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more, some
            with two.
        kind: of head. Logistic regression gives probabilities; ridge is faster.
        strengths: penalties above 0. Default: half decades for standardized features.
        folds: 2 or more. A class with fewer examples lowers it; the only example of a class is
            never held out. The notes report both.
        seeds: one partition into folds per seed.
        rule: choose the strength with the smallest mean loss ("loss") or the largest mean accuracy
            ("accuracy"), of equal ones the largest; or the largest strength whose mean loss is
            within one standard error of the smallest ("one_standard_error", with folds only).
        standardize: whether to standardize; if not, the penalty is in the units of the features.
        classes: number of classes; default: the largest label plus 1.

    Raises:
        ValueError: as ``logistic_path`` and ``ridge_path``; no class with two examples and logistic
            regression; folds, seeds, kind or rule out of range.
        TypeError: labels that are not integers.

    References:
        R. Kohavi, "A Study of Cross-Validation and Bootstrap for Accuracy Estimation and Model
        Selection", 1995 (stratified folds). L. Breiman et al., "Classification and Regression
        Trees", 1984 (one standard error).

    >>> random = np.random.default_rng(0)
    >>> labels = np.arange(60) % 3
    >>> features = random.normal(size=(60, 20)) + 3 * np.eye(20)[labels]
    >>> found = sweep_head(features, labels, strengths=[1, 10, 100], folds=3)
    >>> found.accuracies.shape, found.accuracy > 0.8
    ((3, 3), True)
    """
    _check_choices(kind, rule, folds, seeds)
    given = (
        (STRENGTHS if kind == "logistic" else RIDGE_STRENGTHS) if strengths is None else strengths
    )
    tried = np.sort(np.asarray(given, np.float64), axis=None)
    scaling = standardization(features)
    matrix = scaling(features) if standardize else np.asarray(features)
    notes = []
    if len(scaling.constant):
        notes.append(f"{len(scaling.constant)} of {matrix.shape[1]} features are constant.")
    if kind == "ridge":
        out = ridge_path(matrix, labels, tried.tolist(), classes=classes)
        accuracies, losses = out.accuracies[:, None], out.errors[:, None]
        notes.append("Each example was left out once; folds and seeds were not used.")
        if single := singleton_classes(np.asarray(labels)):
            notes.append(f"Classes {single} have one example, which counts as wrong.")
    else:
        path, accuracies, losses, more = _cross_validate(
            matrix, labels, tried, folds, seeds, classes
        )
        notes.extend(more)
    best = _best(accuracies, losses, rule)
    if len(tried) > 1 and best in (0, len(tried) - 1):
        side = "smaller" if best == 0 else "larger"
        notes.append(f"The best strength is at the end of the range; try {side} ones.")
    if kind == "ridge":
        refit = ridge_path(matrix, labels, [tried[best]], classes=classes)
        kernel, bias = refit.kernel, refit.bias
    else:
        # The first fit of each strength is on all examples.
        fit = best * (len(path.strengths) // len(tried))
        kernel, bias = path.kernels[fit], path.biases[fit]
    if standardize:
        kernel, bias = scaling.undo(kernel, bias)
    kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    return HeadSweep(kind, tried, accuracies, losses, rule, best, kernel, bias, tuple(notes))


def _cross_validate(
    matrix: np.ndarray,
    labels: Any,
    tried: np.ndarray,
    folds: int,
    seeds: Sequence[int],
    classes: int | None,
) -> tuple[LogisticPath, np.ndarray, np.ndarray, list[str]]:
    """All fits, held-out accuracies and losses ``[strengths, splits]``, and notes."""
    notes = []
    matrix, label, _ = checked_examples(matrix, labels, classes)
    name, most = smallest_class(label)
    if single := singleton_classes(label):
        notes.append(f"Classes {single} have one example, which is never held out.")
    if most < folds:
        notes.append(f"{most} folds, not {folds}: class {name} has {most} examples.")
        folds = most
    held_out = np.concatenate(
        [folds_with_singletons(label, folds, seed) == np.arange(folds)[:, None] for seed in seeds]
    )
    # The refit on all examples is one more row here: cheaper than a program of its own.
    weights = np.concatenate([np.ones((1, len(label)), bool), ~held_out])
    path = logistic_path(
        matrix,
        label,
        np.repeat(tried, len(weights)).tolist(),
        weights=np.tile(weights, (len(tried), 1)),
        classes=classes,
        tolerance=_TOLERANCE if jax.dtypes.canonicalize_dtype(float) == np.float32 else None,
    )
    if unfinished := int((~path.converged).sum()):
        notes.append(
            f"{unfinished} of {len(path.strengths)} fits did not converge; the largest gap to an "
            f"optimum is {path.gaps.max():.1e} of the loss."
        )
    logits = path.logits - path.logits.max(axis=2, keepdims=True)
    own = np.take_along_axis(logits, label[None, :, None], axis=2)[:, :, 0]
    losses = np.log(np.exp(logits).sum(axis=2)) - own
    correct = logits.argmax(axis=2) == label

    def mean(values: np.ndarray) -> np.ndarray:
        by_fit = values.reshape(len(tried), len(weights), -1)[:, 1:]
        sums: np.ndarray = (by_fit * held_out).sum(axis=2, dtype=np.float64)
        means: np.ndarray = sums / held_out.sum(axis=1)
        return means

    return path, mean(correct), mean(losses), notes


def _best(accuracies: np.ndarray, losses: np.ndarray, rule: Rule) -> int:
    """Index of the best strength; they ascend, so that the last that qualifies is the largest."""
    if rule == "accuracy":
        mean = accuracies.mean(axis=1)
        return int(np.flatnonzero(mean == mean.max())[-1])
    mean = losses.mean(axis=1)
    bound = mean.min()
    if rule == "one_standard_error" and losses.shape[1] > 1:
        bound += losses[mean.argmin()].std(ddof=1) / np.sqrt(losses.shape[1])
    return int(np.flatnonzero(mean <= bound)[-1])


def _mean_and_deviation(values: np.ndarray, digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def _check_choices(kind: str, rule: str, folds: int, seeds: Sequence[int]) -> None:
    problems = []
    if kind not in ("logistic", "ridge"):
        problems.append(f"kind must be 'logistic' or 'ridge', got {kind!r}")
    if rule not in ("loss", "accuracy", "one_standard_error"):
        problems.append(f"rule must be 'loss', 'accuracy' or 'one_standard_error', got {rule!r}")
    if kind == "ridge" and rule == "one_standard_error":
        problems.append("rule 'one_standard_error' needs folds; ridge leaves out single examples")
    if folds < 2:
        problems.append(f"folds must be >= 2, got {folds}")
    if not len(seeds) or min(seeds) < 0:
        problems.append(f"seeds must be >= 0, one or more, got {list(seeds)}")
    if problems:
        raise ValueError("; ".join(problems))


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
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(label))
    # Class after class is assigned in turn; each starts at the fold where the last one ended.
    assigned = np.empty(len(label), np.int64)
    assigned[np.lexsort([keys, label])] = np.arange(len(label)) % folds
    return assigned


def folds_with_singletons(label: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """``stratified_folds`` with -1 for the only example of a class, which is never held out.

    >>> folds_with_singletons(np.array([0, 0, 1, 2, 2]), 2).tolist().count(-1)
    1
    """
    several = ~np.isin(label, singleton_classes(label))
    assigned = np.full(len(label), -1)
    assigned[several] = stratified_folds(label[several], folds, seed)
    return assigned


def smallest_class(label: np.ndarray) -> tuple[int, int]:
    """The smallest class with at least two examples, and its size, which limits the folds.

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
