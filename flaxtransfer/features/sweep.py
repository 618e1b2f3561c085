"""Linear probes with a cross-validated penalty.

``sweep_head`` compares penalties of logistic regression or ridge on held-out features;
``fit_linear_probe`` fits the head of a network with the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from flaxtransfer.features.inputs import (
    FOLDS,
    blas_threads,
    checked_examples,
    checked_features,
    class_weights,
    folds_with_singletons,
    singleton_classes,
    smallest_class,
    standardization,
)
from flaxtransfer.features.logistic import (
    LogisticPath,
    left_singular_vectors,
    logistic_path,
)
from flaxtransfer.features.ridge import STRENGTHS as RIDGE_STRENGTHS
from flaxtransfer.features.ridge import (
    Split,
    checked_strengths,
    cross_validate,
    ridge_path,
    ridge_splits,
)
from flaxtransfer.paths import listing

__all__ = [
    "HeadSweep",
    "LinearProbe",
    "fit_label_probes",
    "fit_linear_probe",
    "fit_target_probe",
    "sweep_head",
]


Kind = Literal["logistic", "ridge"]
KINDS = get_args(Kind)
"""What a linear head can be fitted by."""

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
    features: Any,
    labels: Any,
    classes: int,
    *,
    kind: Kind = "logistic",
    folds: int = FOLDS,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> LinearProbe:
    """Linear probe: a head solved to its optimum, with a cross-validated penalty.

    Use it as the head that a frozen network ends with, or to start fine-tuning with a head that
    fits the features, so that the first gradients do not distort them (LP-FT). Features are
    standardized for the fit, and the head is converted back to the original features: a network
    with this head gives the fitted logits.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more. The
            only example of a class is never held out; if every class has only one, the
            strength is fixed.
        classes: number of classes.
        kind: "logistic", multinomial logistic regression; or "ridge", least squares on targets of
            -1 and 1 in closed form, whose scores are made logits by the factor that fits the
            held-out examples best.
        folds: of the cross-validation.
        seed: of the folds.
        groups: ``[examples]``, such as patients, each of which is held out as a whole. Where each
            class is in one group, none can be, and the strength is fixed.

    Raises:
        ValueError: another kind, a class without examples, and as ``logistic_path``.
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
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(map(repr, KINDS))}, got {kind!r}")
    _, label, _ = checked_examples(features, labels, classes)
    begin = f"{'logistic' if kind == 'logistic' else 'ridge'} regression on {len(label)} examples"
    alone = _why_alone(label, folds, seed, groups)
    scaling = standardization(features)
    strength, accuracy, scale = _ONE_SHOT_STRENGTH, 0.0, 1.0
    if kind == "logistic" and not alone:
        swept = sweep_head(
            features, label, folds=folds, seeds=(seed,), classes=classes, groups=groups
        )
        kernel, bias = swept.kernel, swept.bias
        strength, accuracy = swept.strength, swept.accuracy
    elif kind == "logistic":
        path = logistic_path(scaling(features), label, strength, classes=classes)
        kernel, bias = scaling.undo(path.kernels[0], path.biases[0])
    else:
        matrix = scaling(np.asarray(features, np.float64))
        if not alone:
            found = cross_validate(
                matrix, label, classes=classes, folds=folds, seed=seed, groups=groups
            )
            strength, accuracy, scale = found.strength, found.accuracy, found.scale
        solved = ridge_path(matrix, label, [strength], classes=classes)
        kernel, bias = scaling.undo(scale * solved.kernel, scale * solved.bias)
    end = (
        f"strength {strength:g}, because {alone}"
        if alone
        else f"strength {strength:.3g}; held-out accuracy {100 * accuracy:.1f} %{_by(groups)}"
    )
    return LinearProbe(kernel, bias, f"{begin}, {end}")


def _by(groups: Sequence[Any] | None) -> str:
    return "" if groups is None else f", {len(set(groups))} groups held out whole"


def _why_alone(label: np.ndarray, folds: int, seed: int, groups: Sequence[Any] | None) -> str:
    """Why nothing can be held out; "" where it can."""
    if np.bincount(label).max() == 1:
        return "each class has one example"
    if groups is None:
        return ""
    held_out = folds_with_singletons(label, min(folds, len(set(groups))), seed, groups) >= 0
    return "" if held_out.any() else "no group can be held out without its class"


def fit_label_probes(
    features: Any,
    labels: np.ndarray,
    names: Sequence[str] = (),
    *,
    kind: Kind = "logistic",
    groups: Sequence[Any] | None = None,
) -> LinearProbe:
    """The head of several independent labels: a linear probe of each, as ``fit_linear_probe``.

    Each is fitted to the examples that know its label. A label of which all have one value says how
    frequent it is, by Laplace's rule, and the text names it.

    Args:
        features: ``[examples, features]``, finite.
        labels: float ``[examples, labels]``: 0, 1, or NaN where nobody knows.
        names: of the labels, for the text.
        kind, groups: see ``fit_linear_probe``.

    Returns:
        Kernel ``[features, labels]`` and bias, whose outputs are logits for the sigmoid.

    >>> labels = np.array([[0.0, 1.0], [1.0, 1.0]] * 20)
    >>> random = np.random.default_rng(0)
    >>> head = fit_label_probes(random.normal(size=(40, 8)) + 4 * labels[:, :1], labels)
    >>> head.kernel.shape, head.text.split(";")[-1]
    ((8, 2), ' one value alone: 1')
    """
    matrix = np.asarray(features)
    kernel = np.zeros((matrix.shape[1], labels.shape[1]))
    bias = np.zeros(labels.shape[1])
    alone, accuracies = [], []
    for k in range(labels.shape[1]):
        known = ~np.isnan(labels[:, k])
        positive = labels[known, k].astype(np.int64)
        counts = np.bincount(positive, minlength=2)
        if counts.min() == 0:
            bias[k] = np.log((counts[1] + 1) / (counts[0] + 1))
            alone.append(names[k] if names else str(k))
            continue
        own = None if groups is None else np.asarray(groups)[known].tolist()
        head = fit_linear_probe(matrix[known], positive, 2, kind=kind, groups=own)
        kernel[:, k], bias[k] = (part[..., 1] - part[..., 0] for part in (head.kernel, head.bias))
        right = (matrix[known] @ kernel[:, k] + bias[k] > 0) == positive
        accuracies.append(right.mean())
    text = f"{kind} regression of {labels.shape[1]} labels on {len(labels)} examples"
    if accuracies:
        text += f", {100 * np.mean(accuracies):.1f} % of the known labels fitted"
    if alone:
        text += f"; one value alone: {listing(alone)}"
    return LinearProbe(kernel, bias, text + _by(groups))


def fit_target_probe(
    features: Any,
    labels: np.ndarray,
    *,
    folds: int = FOLDS,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> LinearProbe:
    """The head of a regression: ridge with a cross-validated penalty for each target.

    Args:
        features: ``[examples, features]``, finite.
        labels: float ``[examples, targets]``, best standardized; NaN where nobody knows.
        folds: of the cross-validation; with fewer than three known examples of a target, or one
            group alone, its strength is fixed.
        seed: of the folds.
        groups: ``[examples]``, such as patients, each of which is held out as a whole.

    Returns:
        Kernel ``[features, targets]`` and bias, for the original features.

    >>> random = np.random.default_rng(0)
    >>> features = random.normal(size=(60, 4))
    >>> head = fit_target_probe(features, features[:, :1] - 2 * features[:, 1:2])
    >>> head.kernel.round(2)[:2, 0].tolist()
    [1.0, -2.0]
    """
    scaling = standardization(features)
    matrix = scaling(np.asarray(features, np.float64))
    kernel, bias = np.zeros((matrix.shape[1], labels.shape[1])), np.zeros(labels.shape[1])
    explained = []
    for k in range(labels.shape[1]):
        known = ~np.isnan(labels[:, k])
        x, y = matrix[known], labels[known, k].astype(np.float64)
        strength = _ONE_SHOT_STRENGTH
        own = None if groups is None else np.asarray(groups)[known].tolist()
        units = len(y) if own is None else len(set(own))
        if len(y) >= 3 and units >= 2:
            errors = _target_errors(x, y, min(folds, units), seed, own)
            strength = RIDGE_STRENGTHS[int(np.flatnonzero(errors == errors.min())[-1])]
            explained.append(1 - errors.min() / max(float(y.var()), 1e-12))
        with blas_threads(x):
            values, left = left_singular_vectors(x - x.mean(axis=0))
            coordinates = left.T @ (y - y.mean()) / (values + strength)
            kernel[:, k] = (x - x.mean(axis=0)).T @ (left @ coordinates)
        bias[k] = y.mean() - x.mean(axis=0) @ kernel[:, k]
    kernel, bias = scaling.undo(kernel, bias)
    text = f"ridge regression of {labels.shape[1]} targets on {len(labels)} examples"
    if explained:
        text += f"; held-out R2 {np.mean(explained):.3f}{_by(groups)}"
    return LinearProbe(kernel, bias, text)


def _target_errors(
    x: np.ndarray, y: np.ndarray, folds: int, seed: int, groups: Sequence[Any] | None
) -> np.ndarray:
    """Mean squared held-out error of each strength, float64 ``[strengths]``."""
    fold_of = folds_with_singletons(np.zeros(len(y), np.int64), folds, seed, groups)
    errors = np.zeros(len(RIDGE_STRENGTHS))
    with blas_threads(x):
        for fold in range(int(fold_of.max()) + 1):
            out = fold_of == fold
            center, mean = x[~out].mean(axis=0), y[~out].mean()
            rest = x[~out] - center
            values, left = left_singular_vectors(rest)
            coordinates = ((x[out] - center) @ rest.T) @ left
            projected = left.T @ (y[~out] - mean)
            shrunk = projected[:, None] / (values[:, None] + np.array(RIDGE_STRENGTHS))
            errors += np.square(coordinates @ shrunk + mean - y[out, None]).sum(axis=0)
    return errors / len(y)


@dataclass(frozen=True)
class HeadSweep:
    """Held-out accuracy and loss of each strength, and the head with the best one.

    Args:
        kind: logistic regression or ridge.
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
    groups: Sequence[Any] | None = None,
) -> HeadSweep:
    """Cross-validates the penalty of a linear head, and refits with the best one on all examples.

    Use it for the head of a frozen network. With ``"logistic"`` all strengths, folds and seeds are
    solved to the optimum by one compiled program, with ``"ridge"`` all strengths of a fold in
    closed form.

    Features are standardized on all given examples, held-out ones included, because this uses no
    labels. Keep a test set out of ``features``: the accuracy of the best strength is the best of
    many.

    Args:
        features: ``[examples, features]``, finite.
        labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more, some
            with two.
        kind: of head. Logistic regression gives probabilities; ridge is faster.
        strengths: penalties above 0. Default: half decades for standardized features.
        folds: 2 or more. A class with fewer examples is held out in as many folds as it has; the
            only example of a class is never held out, which the notes say.
        seeds: one partition into folds per seed.
        rule: choose the strength with the smallest mean loss ("loss") or the largest mean accuracy
            ("accuracy"), of equal ones the largest; or the largest strength whose mean loss is
            within one standard error of the smallest ("one_standard_error").
        standardize: whether to standardize; if not, the penalty is in the units of the features.
        classes: number of classes; default: the largest label plus 1.
        groups: ``[examples]``, such as patients, each of which is held out as a whole.

    Raises:
        ValueError: as ``logistic_path`` and ``ridge_path``; no class with two examples, no group
            that can be held out without its class; folds,
            seeds, kind or rule out of range.
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
    matrix, label, number = checked_examples(matrix, labels, classes)
    smallest_class(label)
    if single := singleton_classes(label):
        notes.append(f"Classes {single} have one example, which is never held out.")
    if groups is not None:
        folds = min(folds, len(set(groups)))
    fold_of = [folds_with_singletons(label, folds, seed, groups) for seed in seeds]
    if min(each.max() for each in fold_of) < 0:
        raise ValueError("no group can be held out without its class; give no groups")
    if kind == "ridge":
        checked_strengths(len(label), tried.tolist())
        splits = [split for each in fold_of for split in ridge_splits(matrix, label, number, each)]
        accuracies, losses = _ridge(splits, label, number, tried)
    else:
        path, accuracies, losses, more = _logistic(matrix, label, number, tried, fold_of)
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


def _ridge(
    splits: Sequence[Split], label: np.ndarray, number: int, tried: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out accuracies and squared errors ``[strengths, splits]``."""
    accuracies, losses = (np.empty((len(tried), len(splits))) for _ in range(2))
    for n, split in enumerate(splits):
        own = label[split.out]
        targets = np.where(own[:, None] == np.arange(number), 1.0, -1.0)
        for k, strength in enumerate(tried):
            scores = split.scores(strength)
            accuracies[k, n] = (scores.argmax(axis=1) == own).mean()
            losses[k, n] = np.square(scores - targets).mean()
    return accuracies, losses


def _logistic(
    matrix: np.ndarray,
    label: np.ndarray,
    number: int,
    tried: np.ndarray,
    fold_of: Sequence[np.ndarray],
) -> tuple[LogisticPath, np.ndarray, np.ndarray, list[str]]:
    """All fits, held-out accuracies and losses ``[strengths, splits]``, and notes."""
    notes = []
    held_out = np.concatenate([each == np.arange(each.max() + 1)[:, None] for each in fold_of])
    # The refit on all examples is one more row here: cheaper than a program of its own.
    weights = np.stack([np.ones(len(label)), *(class_weights(label, ~out) for out in held_out)])
    path = logistic_path(
        matrix,
        label,
        np.repeat(tried, len(weights)).tolist(),
        weights=np.tile(weights, (len(tried), 1)),
        classes=number,
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
    if kind not in KINDS:
        problems.append(f"kind must be 'logistic' or 'ridge', got {kind!r}")
    if rule not in ("loss", "accuracy", "one_standard_error"):
        problems.append(f"rule must be 'loss', 'accuracy' or 'one_standard_error', got {rule!r}")
    if folds < 2:
        problems.append(f"folds must be >= 2, got {folds}")
    if not len(seeds) or min(seeds) < 0:
        problems.append(f"seeds must be >= 0, one or more, got {list(seeds)}")
    if problems:
        raise ValueError("; ".join(problems))
