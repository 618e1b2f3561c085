"""Heads with a strength chosen by cross-validation.

Examples that are held out: stratified folds.

A head on features with a strength chosen by cross-validation: one call, one compiled program.

A head at its optimum on frozen features, for features as the network gives them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from flaxtransfer.features.checks import class_labels, examples, matching, singles, standardization
from flaxtransfer.features.logistic import LogisticPath, logistic_path
from flaxtransfer.features.ridge import STRENGTHS as RIDGE_STRENGTHS
from flaxtransfer.features.ridge import ridge_path

__all__ = [
    "HeadSweep",
    "LinearProbe",
    "deal",
    "fit_linear_probe",
    "rarest",
    "stratified_folds",
    "sweep_head",
]


def stratified_folds(labels: Any, folds: int, seed: int = 0) -> np.ndarray:
    """The fold in which each example is held out, int64 ``[examples]``.

    Folds differ by at most one example, in all and within every class.

    Raises:
      TypeError: labels that are no integers.
      ValueError: labels of another shape; a class with fewer examples than folds.

    >>> np.bincount(stratified_folds([0, 0, 0, 1, 1, 1, 1], 3)).tolist()
    [3, 2, 2]
    """
    label = class_labels(labels)
    if label.ndim != 1 or not label.size:
        raise ValueError(f"labels have shape {label.shape}, wanted [examples], one or more")
    names, counts = np.unique(label, return_counts=True)
    if small := {int(c): int(n) for c, n in zip(names, counts, strict=True) if n < folds}:
        raise ValueError(f"{folds} folds want as many examples of each class; there are {small}")
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    keys = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(len(label))
    # Class after class is dealt out in turn, the next where the last one ended.
    dealt = np.empty(len(label), np.int64)
    dealt[np.lexsort([keys, label])] = np.arange(len(label)) % folds
    return dealt


def deal(label: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """As ``stratified_folds``, but -1 for the only example of a class, which is never held out.

    >>> deal(np.array([0, 0, 1, 2, 2]), 2).tolist().count(-1)
    1
    """
    several = ~np.isin(label, singles(label))
    dealt = np.full(len(label), -1)
    dealt[several] = stratified_folds(label[several], folds, seed)
    return dealt


def rarest(label: np.ndarray) -> tuple[int, int]:
    """Of the classes with several examples the one with the fewest, and how many: most folds.

    Raises:
      ValueError: every class has one example.

    >>> rarest(np.array([0, 0, 0, 1, 1, 2]))
    (1, 2)
    """
    names, counts = np.unique(label, return_counts=True)
    if (counts == 1).all():
        raise ValueError(
            "every class has one example, so that none can be held out; give two or more, or fit "
            "nearest_class_mean, which needs no more"
        )
    n = np.where(counts > 1, counts, counts.max() + 1).argmin()
    return int(names[n]), int(counts[n])


Kind = Literal["logistic", "ridge"]
Rule = Literal["loss", "accuracy", "one_standard_error"]

STRENGTHS = tuple(float(value) for value in np.logspace(-2, 5.5, 16))
"""Strengths of logistic regression on standardized features, half a decade apart."""

_TOLERANCE = 1e-6
"""In float32: moves a held-out loss by a thousandth of itself, where folds differ by a tenth."""


@dataclass(frozen=True)
class HeadSweep:
    """What each strength is worth on examples that were held out, and the head of the best.

    Args:
      kind: logistic regression by folds, or ridge by exact leave-one-out.
      strengths: float64, ascending, ``[strengths]``.
      accuracies: on held-out examples, ``[strengths, splits]``; folds of the first seed first.
      losses: likewise, the negative log-likelihood in nats; for ridge, the squared error.
      rule: how the best was chosen.
      best: its index.
      kernel: of the head that was refitted on all examples, for features as they were given
        (standardization included), float64 ``[features, classes]``.
      bias: float64 ``[classes]``.
      notes: what a reader of the table should know, in sentences.
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
        """Held-out accuracy at the best strength; chosen among all, so slightly too high."""
        return float(self.accuracies[self.best].mean())

    def scores(self, features: Any) -> np.ndarray:
        """``[examples, classes]``, the largest of which is the prediction; logistic: logits.

        Raises:
          ValueError: another number of features.
        """
        return matching(features, len(self.kernel)) @ self.kernel + self.bias

    def predict(self, features: Any) -> np.ndarray:
        """Classes, int64 ``[examples]``."""
        return self.scores(features).argmax(axis=1)

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
    """Tries every strength on held-out examples, and refits the best on all.

    Use it for the head of a frozen network. With ``"logistic"`` all strengths, folds and seeds are
    solved to the optimum by one compiled program; with ``"ridge"`` each example is left out once,
    in closed form, and neither folds nor seeds are needed.

    Standardization is by all examples that are given, held-out ones included: it sees no labels.
    Keep a test set out of ``features`` altogether: the accuracy of the best strength is that of the
    best of many.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more, some
        with two.
      kind: of head. Logistic regression gives probabilities; ridge is faster.
      strengths: penalties above 0. Default: half decades that suit standardized features.
      folds: 2 or more. A class with fewer examples lowers it; the only example of a class is
        never held out. Both are said in the notes.
      seeds: one partition into folds for each.
      rule: the best is that of the smallest mean loss or the largest mean accuracy, the largest
        strength of equals; or the largest strength whose mean loss is within one standard error of
        the smallest, which wants folds.
      standardize: whether to; if not, the penalty is by the features' own units.
      classes: how many there are; by default as many as the labels say.

    Raises:
      ValueError: as ``logistic_path`` and ``ridge_path``; no class with two examples and logistic
        regression; folds, seeds, kind or rule out of range.
      TypeError: labels that are no integers.

    References:
      R. Kohavi, "A Study of Cross-Validation and Bootstrap for Accuracy Estimation and Model
      Selection", 1995 (stratified folds). L. Breiman et al., "Classification and Regression Trees",
      1984 (one standard error).

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
        notes.append(f"{len(scaling.constant)} of {matrix.shape[1]} features do not vary.")
    if kind == "ridge":
        out = ridge_path(matrix, labels, tried.tolist(), classes=classes)
        accuracies, losses = out.accuracies[:, None], out.errors[:, None]
        notes.append("Each example was left out once; folds and seeds were not used.")
        if single := singles(np.asarray(labels)):
            notes.append(f"Classes {single} have one example, which is wrong when left out.")
    else:
        path, accuracies, losses, said = _validated(matrix, labels, tried, folds, seeds, classes)
        notes.extend(said)
    best = _best(accuracies, losses, rule)
    if len(tried) > 1 and best in (0, len(tried) - 1):
        side = "smaller" if best == 0 else "larger"
        notes.append(f"The best strength is the last on its side; try {side} ones.")
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


def _validated(
    matrix: np.ndarray,
    labels: Any,
    tried: np.ndarray,
    folds: int,
    seeds: Sequence[int],
    classes: int | None,
) -> tuple[LogisticPath, np.ndarray, np.ndarray, list[str]]:
    """All fits, held-out accuracies and losses ``[strengths, splits]``, what to tell about them."""
    notes = []
    matrix, label, _ = examples(matrix, labels, classes)
    name, most = rarest(label)
    if single := singles(label):
        notes.append(f"Classes {single} have one example, which is never held out.")
    if most < folds:
        notes.append(f"{most} folds, not {folds}: class {name} has {most} examples.")
        folds = most
    held_out = np.concatenate(
        [deal(label, folds, seed) == np.arange(folds)[:, None] for seed in seeds]
    )
    # One more that holds nothing out costs less here than a program and a rotation of its own.
    weights = np.concatenate([np.ones((1, len(label)), bool), ~held_out])
    path = logistic_path(
        matrix,
        label,
        np.repeat(tried, len(weights)).tolist(),
        weights=np.tile(weights, (len(tried), 1)),
        classes=classes,
        tolerance=_TOLERANCE if jax.dtypes.canonicalize_dtype(float) == np.float32 else None,
    )
    if late := int((~path.converged).sum()):
        notes.append(
            f"{late} of {len(path.strengths)} fits did not converge; the largest gap to an optimum "
            f"is {path.gaps.max():.1e} of the loss."
        )
    logits = path.logits - path.logits.max(axis=2, keepdims=True)
    own = np.take_along_axis(logits, label[None, :, None], axis=2)[:, :, 0]
    losses = np.log(np.exp(logits).sum(axis=2)) - own
    correct = logits.argmax(axis=2) == label

    def mean(values: np.ndarray) -> np.ndarray:
        by_fit = values.reshape(len(tried), len(weights), -1)[:, 1:]
        return (by_fit * held_out).sum(axis=2, dtype=np.float64) / held_out.sum(axis=1)

    return path, mean(correct), mean(losses), notes


def _best(accuracies: np.ndarray, losses: np.ndarray, rule: Rule) -> int:
    """Strengths ascend, so the last that qualifies is the largest."""
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
        problems.append(f"kind is {kind!r}, wanted 'logistic' or 'ridge'")
    if rule not in ("loss", "accuracy", "one_standard_error"):
        problems.append(f"rule is {rule!r}, wanted 'loss', 'accuracy' or 'one_standard_error'")
    if kind == "ridge" and rule == "one_standard_error":
        problems.append("rule 'one_standard_error' wants folds, and ridge leaves single ones out")
    if folds < 2:
        problems.append(f"folds is {folds}, wanted 2 or more")
    if not len(seeds) or min(seeds) < 0:
        problems.append(f"seeds is {list(seeds)}, wanted one or more, 0 or greater")
    if problems:
        raise ValueError("; ".join(problems))


_STRENGTH_OF_ONE = 10.0
"""Penalty on standardized features where nothing can be held out to choose it by."""


class LinearProbe(NamedTuple):
    """A linear head.

    Args:
      kernel: float64 ``[features, classes]``.
      bias: float64 ``[classes]``.
      text: how it was found, for a person.
    """

    kernel: np.ndarray
    bias: np.ndarray
    text: str


def fit_linear_probe(
    features: Any, labels: Any, classes: int, *, folds: int = 5, seed: int = 0
) -> LinearProbe:
    """Multinomial logistic regression to the optimum, its strength chosen by folds.

    Use it to begin fine-tuning with a head that fits the features, so that the first gradients do
    not distort them. Features are standardized for the fit, and the head is turned back into one
    for features as they were given: a network with it gives the fitted head's logits.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more. The
        only example of a class is never held out; where every class has one alone, the strength
        is a fixed one.
      classes: how many there are.
      folds: by which the strength is chosen; fewer where a class has fewer examples.
      seed: of the folds.

    Raises:
      ValueError: a class without examples, and as ``logistic_path``.
      TypeError: labels that are no integers.

    References:
      A. Kumar et al., "Fine-Tuning Can Distort Pretrained Features and Underperform
      Out-of-Distribution", 2022 (a solved head before fine-tuning).

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> head = fit_linear_probe(random.normal(size=(40, 8)) + 4 * labels[:, None], labels, 2)
    >>> head.kernel.shape, head.text.split(",")[0]
    ((8, 2), 'logistic regression on 40 examples')
    """
    _, label, _ = examples(features, labels, classes)
    begin = f"logistic regression on {len(label)} examples"
    counts = np.bincount(label, minlength=classes)
    if counts.max() > 1:
        found = sweep_head(features, label, folds=folds, seeds=(seed,), classes=classes)
        text = (
            f"{begin}, strength {found.strength:.3g}; {100 * found.accuracy:.1f} % of those held "
            "out are right"
        )
        return LinearProbe(found.kernel, found.bias, text)
    scaling = standardization(features)
    path = logistic_path(scaling(features), label, _STRENGTH_OF_ONE, classes=classes)
    kernel, bias = scaling.undo(path.kernels[0], path.biases[0])
    return LinearProbe(
        kernel, bias, f"{begin}, strength {_STRENGTH_OF_ONE:g}, for each class has but one example"
    )
