"""Probes on the features of a network: by depth, and by number of labels.

``probe_profile`` fits a linear probe on the features of every segment of a network: at which depth
the features of a new data set are separable. ``learning_curve`` says how the error of a probe falls
with the number of labels, and how far it may. Two of its numbers are stable enough to be reported:
the error at the labels at hand, and what half of them would cost. The exponent is fixed, for three
parameters fitted to as many points say nothing. ``error_split`` divides the error into what stays
with other labels and what comes and goes with them, and ``label_suspects`` names examples whose
labels the others contradict. ``greedy_depths`` adds segments that know what the best one does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special

from flaxtransfer.features.inputs import (
    FOLDS,
    blas_threads,
    checked_examples,
    singleton_classes,
    standardization,
    stratified_folds,
)
from flaxtransfer.features.ridge import (
    TargetValidation,
    cross_validate,
    cross_validate_targets,
    logit_scale,
    ridge_splits,
    target_folds,
)
from flaxtransfer.features.sweep import sweep_head
from flaxtransfer.metrics import ACCURACY, METRICS, Draws, Skill, compared
from flaxtransfer.paths import suggest
from flaxtransfer.task import SINGLE_LABEL, Task, Units, mean_loss

__all__ = [
    "Addition",
    "DepthSet",
    "ErrorSplit",
    "JudgedOutputs",
    "LabelSuspects",
    "LearningCurve",
    "Outputs",
    "Profile",
    "SegmentProbe",
    "error_split",
    "greedy_depths",
    "label_suspects",
    "learning_curve",
    "probe_profile",
]


Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class SegmentProbe:
    """Linear probe on one segment.

    Args:
        segment: name of the segment whose output is probed.
        features: channels, averaged over the image.
        skill: on held-out examples, at the best strength: accuracy, for classes.
        standard_error: of the skill, binomial or by the bootstrap; segments closer than this are
            equal.
        loss: mean negative log-likelihood of the held-out examples, in nats. Ridge has no
            probabilities: its scores are used as logits at the best temperature. Of numbers, the
            squared error in variances.
        strength: the penalty with the smallest held-out loss; of several outputs, the median.
    """

    segment: str
    features: int
    skill: float
    standard_error: float
    loss: float
    strength: float


@dataclass(frozen=True)
class Profile:
    """Linear probes of all segments, from the input to the output.

    Args:
        kind: of probe.
        examples: number of examples.
        guess: skill of a probe without information: for classes, the fraction of the largest.
        probes: one per segment.
        seconds: time taken, without that for the features.
        notes: remarks on the data, in sentences.
        measure: what the skill is of.
    """

    kind: Kind
    examples: int
    guess: float
    probes: tuple[SegmentProbe, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    measure: Skill = ACCURACY

    @property
    def best(self) -> SegmentProbe:
        """The probe with the most skill."""
        return max(self.probes, key=lambda probe: probe.skill)

    def __str__(self) -> str:
        classes, text = self.measure is ACCURACY, self.measure.text
        shown = [text(probe.skill, probe.standard_error) for probe in self.probes]
        wide = max(14, len(self.measure.name), *map(len, shown))
        unit = "nats" if classes else "loss"
        head = f"{'segment':<8} {'features':>8} {self.measure.name:>{wide}} {unit:>7} "
        lines = [f"{head}{'strength':>9}"]
        for probe, skill in zip(self.probes, shown, strict=True):
            lines.append(
                f"{probe.segment:<8} {probe.features:>8} {skill:>{wide}} {probe.loss:>7.3f} "
                f"{probe.strength:>9.3g}"
            )
        last = f"{self.kind} on {self.examples} examples, each held out once"
        last += f"; {'largest class' if classes else 'a guess'} {text(self.guess)}"
        last += f"; {self.seconds:.1f} s"
        return "\n".join([*lines, last, *self.notes])


def probe_profile(
    features: Mapping[str, Any],
    labels: Any,
    *,
    kind: Kind = "ridge",
    classes: int | None = None,
    task: Task = SINGLE_LABEL,
    groups: Sequence[Any] | None = None,
) -> Profile:
    """Linear probe on the features of each segment, evaluated on held-out examples.

    Where the accuracy stops rising, later segments add nothing for these images; where it falls,
    they are specific to the pre-training task, and an earlier cut or deeper unfreezing is worth a
    trial.

    Args:
        features: by segment, ``[examples, channels]``; see ``segment_features``.
        labels: integers ``[examples]``. Classes without examples are ignored. The only example of a
            class counts as wrong with ridge and is never held out with logistic regression. For
            other tasks float ``[examples, outputs]``, NaN where missing.
        kind: "ridge" is in closed form; "logistic" is slower, and for classes alone. Both use the
            same stratified folds.
        classes: number of classes; default: the largest label plus 1.
        task: what the labels are; skill is by its metric that ranks, and for classes accuracy.
        groups: ``[examples]``, such as patients, each of which is held out as a whole.

    Raises:
        ValueError: no segment, another kind, one class, one example of every class, or features
            that are not finite or of another shape; the text names the segment. No output with two
            values.
        TypeError: labels that are not integers.

    References:
        G. Alain, Y. Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes",
        2016.

    >>> labels = np.arange(30) % 3
    >>> noise = np.random.default_rng(0).normal(size=(30, 4))
    >>> profile = probe_profile({"stem": noise, "pool": noise + 9 * np.eye(4)[labels]}, labels)
    >>> profile.best.segment, profile.best.skill
    ('pool', 1.0)
    """
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind must be 'ridge' or 'logistic', got {kind!r}")
    if not features:
        raise ValueError("features must have at least one segment, got none")
    began = time.perf_counter()
    if task.name != SINGLE_LABEL.name:
        return _profile_of_outputs(features, np.asarray(labels), kind, task, groups, began)
    probes, notes = [], []
    for name, values in features.items():
        try:
            matrix, label, number = checked_examples(values, labels, classes)
            present, label, counts = np.unique(label, return_inverse=True, return_counts=True)
            scaled = standardization(matrix)(matrix)
            if kind == "ridge":
                out = cross_validate(scaled, label, groups=groups)
                accuracy, loss, strength = out.accuracy, out.loss, out.strength
            else:
                swept = sweep_head(scaled, label, standardize=False, groups=groups)
                accuracy, strength = swept.accuracy, swept.strength
                loss = float(swept.losses[swept.best].mean())
        except ValueError as error:
            raise ValueError(f"the features of {name} cannot be probed: {error}") from error
        standard_error = math.sqrt(accuracy * (1 - accuracy) / len(label))
        probes.append(SegmentProbe(name, matrix.shape[1], accuracy, standard_error, loss, strength))
    if len(present) < number:
        notes.append(f"{number - len(present)} of {number} classes have no example.")
    if single := singleton_classes(label):
        how = "counts as wrong" if kind == "ridge" else "is never held out"
        notes.append(f"{len(single)} classes have one example, which {how}.")
    seconds, guess = time.perf_counter() - began, float(counts.max() / len(label))
    return Profile(kind, len(label), guess, tuple(probes), seconds, tuple(notes))


def _profile_of_outputs(
    features: Mapping[str, Any],
    labels: np.ndarray,
    kind: Kind,
    task: Task,
    groups: Sequence[Any] | None,
    began: float,
) -> Profile:
    """The profile of several labels per image, or of numbers."""
    if kind != "ridge":
        raise ValueError(f"kind must be 'ridge' for the task {task.name}, got {kind!r}")
    outputs = Outputs.of(labels, task, groups)
    probes = []
    for name, values in features.items():
        try:
            found = outputs.head(values)
        except ValueError as error:
            raise ValueError(f"the features of {name} cannot be probed: {error}") from error
        probes.append(
            SegmentProbe(
                name,
                np.asarray(values).shape[1],
                found.judged.value,
                found.standard_error,
                found.loss,
                float(np.median(found.solved.strengths)),
            )
        )
    notes = []
    if left := labels.shape[1] - outputs.values.shape[1]:
        notes.append(f"{left} of {labels.shape[1]} outputs have one value alone, and are left out.")
    measure = outputs.measure
    return Profile(
        kind, len(labels), measure.of_guess, tuple(probes), time.perf_counter() - began,
        tuple(notes), measure,
    )  # fmt: skip


@dataclass(frozen=True)
class Addition:
    """A segment that was tried beside others.

    Args:
        segment: its name.
        gain: in skill, on the same held-out examples.
        error: standard error of the gain.
        skill: of the head that reads this one, too.
    """

    segment: str
    gain: float
    error: float
    skill: float


@dataclass(frozen=True)
class DepthSet:
    """Segments that a head reads, one added after the other.

    Args:
        segments: in the order in which they were added.
        tried: of each round the one that gained most; the last of them was not added, unless
            nothing was left.
        measure: what the skill is of.
    """

    segments: tuple[str, ...]
    tried: tuple[Addition, ...]
    measure: Skill = ACCURACY

    def __str__(self) -> str:
        lines = []
        for number, one in enumerate(self.tried, start=1):
            added = number < len(self.segments)
            lines.append(
                f"{one.segment} beside {', '.join(self.segments[:number])}: {100 * one.gain:+.1f} "
                f"± {100 * one.error:.1f} points to {self.measure.text(one.skill)} (threshold: 1 "
                f"standard error): {'added' if added else 'left out'}"
            )
        return "\n".join([*lines, f"the head reads {', '.join(self.segments)}"])


def greedy_depths(
    features: Mapping[str, Any],
    labels: Any,
    *,
    task: Task = SINGLE_LABEL,
    groups: Sequence[Any] | None = None,
    first: str | None = None,
    seed: int = 0,
) -> DepthSet:
    """Segments whose features know together what none of them knows alone.

    It begins with the best segment, and adds the one that gains most for as long as the gain is
    above one standard error on the same held-out examples. One ridge head reads all: with one
    penalty for all, segments that say nothing cost more than they bring, so that few are added.

    Args:
        features: by segment, ``[examples, channels]``; see ``segment_features``.
        labels: as for ``probe_profile``.
        task: what the labels are.
        groups: ``[examples]``, such as patients, each of which is held out as a whole.
        first: segment to begin with; by default the one with the most skill.
        seed: of the folds.

    Raises:
        ValueError: as ``probe_profile``; no such segment.

    References:
        U. Evci, V. Dumoulin, H. Larochelle, M. C. Mozer, "Head2Toe: Utilizing Intermediate
        Representations for Better Transfer Learning", 2022.
        A. W. Whitney, "A Direct Method of Nonparametric Measurement Selection", 1971 (greedy
        forward selection).

    >>> labels = np.arange(80) % 4
    >>> noise = np.random.default_rng(0).normal(size=(3, 80, 4))
    >>> parts = {"stem": noise[0], "middle": noise[1], "deep": noise[2]}
    >>> parts["stem"][:, 0] += 9 * (labels % 2)
    >>> parts["deep"][:, 0] += 9 * (labels // 2)
    >>> sorted(greedy_depths(parts, labels).segments)
    ['deep', 'stem']
    """
    if not features:
        raise ValueError("features must have at least one segment, got none")
    if first is not None and first not in features:
        raise ValueError(
            f"first must be one of {', '.join(features)}, got {first!r}{suggest(first, features)}"
        )
    judge = _judge_of(labels, task, groups, seed)

    def judged(names: Sequence[str]) -> np.ndarray | Draws:
        try:
            return judge(np.concatenate([np.asarray(features[name]) for name in names], axis=1))
        except ValueError as error:
            raise ValueError(
                f"the features of {', '.join(names)} cannot be probed: {error}"
            ) from error

    alone = {name: judged([name]) for name in ([first] if first else features)}
    chosen = [max(alone, key=lambda name: _skill(alone[name]))]
    best, tried = alone[chosen[0]], []
    while rest := [name for name in features if name not in chosen]:
        found = {name: judged([*chosen, name]) for name in rest}
        name = max(found, key=lambda one: _skill(found[one]))
        gain, error = compared(found[name], best)
        tried.append(Addition(name, gain, error, _skill(found[name])))
        if gain <= error:
            break
        chosen.append(name)
        best = found[name]
    measure = ACCURACY
    if task.name != SINGLE_LABEL.name:
        measure = Outputs.of(np.asarray(labels), task, groups, seed).measure
    return DepthSet(tuple(chosen), tuple(tried), measure)


def _skill(judged: np.ndarray | Draws) -> float:
    return judged.value if isinstance(judged, Draws) else float(judged.mean())


def _judge_of(
    labels: Any, task: Task, groups: Sequence[Any] | None, seed: int
) -> Callable[[np.ndarray], np.ndarray | Draws]:
    """Features in, what a ridge head on them gets right of each held-out example out."""
    if task.name != SINGLE_LABEL.name:
        outputs = Outputs.of(np.asarray(labels), task, groups, seed)
        return lambda matrix: outputs.head(matrix).judged

    def of_classes(matrix: np.ndarray) -> np.ndarray:
        checked, label, _ = checked_examples(matrix, labels)
        label = np.unique(label, return_inverse=True)[1]
        scaled = standardization(checked)(np.asarray(checked, np.float64))
        found = cross_validate(scaled, label, groups=groups, seed=seed)
        right: np.ndarray = (found.scores.argmax(axis=1) == label) & found.held_out
        return right

    return of_classes


class JudgedOutputs(NamedTuple):
    """A ridge head on held-out examples, see ``Outputs.head``.

    Args:
        solved: its scores and penalties.
        targets: that it was fitted to: -1 and 1, or standard deviations; NaN where missing.
        predictions: probabilities, or values in the units of the data.
        judged: the skill, with its bootstrap.
        loss: the task's, of the held-out examples.
    """

    solved: TargetValidation
    targets: np.ndarray
    predictions: np.ndarray
    judged: Draws
    loss: float

    @property
    def standard_error(self) -> float:
        """Of the skill."""
        return float(np.nanstd(self.judged.samples, ddof=1))


@dataclass(frozen=True, eq=False)
class Outputs:
    """Several labels per image, or numbers, and how ridge heads of them are judged.

    Args:
        values: float ``[examples, outputs]`` in the units of the data, NaN where missing; each
            output has two different values.
        kept: the places of these outputs among all, int ``[outputs]``.
        task: with units, for numbers.
        measure: the metric that ranks the task, as a skill.
        fold_of: int ``[examples]``.
        groups: ``[examples]``, held out as a whole; or None.
    """

    values: np.ndarray
    kept: np.ndarray
    task: Task
    measure: Skill
    fold_of: np.ndarray
    groups: np.ndarray | None

    @classmethod
    def of(
        cls, values: np.ndarray, task: Task, groups: Sequence[Any] | None = None, seed: int = 0
    ) -> Outputs:
        """Leaves out the outputs of which all examples have one value.

        Raises:
            ValueError: no output has two; one group alone.
        """
        values = np.asarray(values, np.float64)
        known = ~np.isnan(values)
        low = np.where(known, values, np.inf).min(axis=0)
        high = np.where(known, values, -np.inf).max(axis=0)
        kept = np.flatnonzero(low < high)
        if not len(kept):
            raise ValueError(
                "there must be a label or target with two different values, got one value of each"
            )
        values = values[:, kept]
        if task.standardizes:
            task = task.with_units(Units.of(values))
        measure = Skill.of(task.rank or METRICS[task.name][task.ranking], values)
        own = None if groups is None else np.asarray(groups)
        return cls(values, kept, task, measure, target_folds(values, FOLDS, seed, groups), own)

    def part(self, rows: np.ndarray) -> Outputs:
        """Some of the examples, in the same folds."""
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, values=self.values[rows], fold_of=self.fold_of[rows], groups=groups)

    def head(self, features: Any, others: Any = None) -> JudgedOutputs:
        """A ridge head on features, each output with a penalty of its own.

        Args:
            features: ``[examples, features]``, finite; they are standardized.
            others: the same of the images in another state, of which the predictions are.
        """
        scaling = standardization(features)
        matrix = scaling(np.asarray(features, np.float64))
        judged = None if others is None else scaling(np.asarray(others, np.float64))
        targets = 2 * self.values - 1
        if self.task.standardizes:
            targets = np.asarray(self.task.targets(self.values), np.float64)
        solved = cross_validate_targets(matrix, targets, self.fold_of, judged=judged)
        outputs = solved.scores if self.task.standardizes else self._logits(solved.scores)
        predictions = self.task.probabilities(outputs)
        draws = self.measure.judged(predictions, self.values, self.groups)
        assert isinstance(draws, Draws)  # of a metric that is no mean of truths
        loss = mean_loss(self.task.loss, outputs, self.task.targets(self.values))
        return JudgedOutputs(solved, targets, predictions, draws, loss)

    def _logits(self, scores: np.ndarray) -> np.ndarray:
        """Of held-out scores, each label by the factor that fits its examples."""
        logits = np.empty_like(scores)
        for k in range(scores.shape[1]):
            known = ~np.isnan(self.values[:, k])
            both = np.stack([-scores[known, k], scores[known, k]], axis=1)
            factor, _ = logit_scale(both, self.values[known, k].astype(np.int64))
            logits[:, k] = 2 * factor * scores[:, k]
        return logits


FARTHEST = 4
"""Beyond this many times the labels at hand nothing is said."""

_PARTS = (8, 4, 2)
"""Into how many parts of equal size the labels are divided."""

_LEAST = 3
"""Examples of each class in a part, of which some are held out."""

_MISFIT = 0.015
"""Standard error of the law itself for each doubling beyond the labels at hand: that of 63 curves
of heads, fitted at a sixteenth, an eighth and a fourth, and judged at the whole."""


@dataclass(frozen=True)
class LearningCurve:
    """Held-out error of a head by number of labels, with the law ``floor + slope / sqrt(labels)``.

    Args:
        sizes: numbers of labels, ascending; the last is what there is.
        errors: mean held-out error at each size, over parts of the labels.
        deviations: standard deviation of the error between the parts; 0 for the whole.
        floor: error with labels without end, 0 or more.
        slope: how much of the error goes with the labels, 0 or more.
        covariance: of floor and slope, ``[[..], [..]]``.

    >>> none = (0.0, 0.0)
    >>> curve = LearningCurve((100, 400), (0.3, 0.2), none, 0.1, 2.0, (none, none))
    >>> curve.error_at(1600)[0], curve.labels_for(0.02)
    (0.15000000000000002, 225)
    """

    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    deviations: tuple[float, ...]
    floor: float
    slope: float
    covariance: tuple[tuple[float, float], tuple[float, float]]

    @property
    def labels(self) -> int:
        """The labels at hand."""
        return self.sizes[-1]

    @property
    def error(self) -> float:
        """The error with the labels at hand, by the law."""
        return self.floor + self.slope / math.sqrt(self.labels)

    @property
    def cost_of_half(self) -> float:
        """Error that would be added if there were half as many labels."""
        return self.slope * (math.sqrt(2) - 1) / math.sqrt(self.labels)

    @property
    def fits(self) -> bool:
        """Whether the law describes the curve: no point is off by more than 3 points of accuracy,
        or two standard deviations between parts.
        """
        law = [self.floor + self.slope / math.sqrt(n) for n in self.sizes]
        bounds = [max(0.03, 2 * deviation) for deviation in self.deviations]
        pairs = zip(law, self.errors, bounds, strict=True)
        return all(abs(here - error) <= bound for here, error, bound in pairs)

    def error_at(self, labels: int) -> tuple[float, float, float]:
        """The error expected with so many labels, and an interval of 90 %.

        Raises:
            ValueError: more than four times the labels at hand, or none.
        """
        if not 0 < labels <= FARTHEST * self.labels:
            raise ValueError(
                f"labels must be from 1 to {FARTHEST} times the {self.labels} at hand, got {labels}"
            )
        direction = np.array([1, 1 / math.sqrt(labels)])
        variance = float(direction @ np.array(self.covariance) @ direction)
        doublings = abs(math.log2(labels / self.labels))
        error = self.floor + self.slope / math.sqrt(labels)
        half = 1.645 * math.sqrt(max(variance, 0.0) + (_MISFIT * doublings) ** 2)
        return error, max(error - half, 0.0), min(error + half, 1.0)

    def gain(self, labels: int) -> tuple[float, float]:
        """How much lower the error is with so many labels than with those at hand; standard error.

        Raises:
            ValueError: as ``error_at``.
        """
        lower = self.error - self.error_at(labels)[0]
        share = 1 / math.sqrt(self.labels) - 1 / math.sqrt(labels)
        doublings = abs(math.log2(labels / self.labels))
        return lower, math.hypot(share * math.sqrt(self.covariance[1][1]), _MISFIT * doublings)

    def labels_for(self, gain: float) -> int | None:
        """How many more labels lower the error by ``gain``; None beyond four times those at hand.

        Raises:
            ValueError: a gain that is not above 0.
        """
        if not gain > 0:
            raise ValueError(f"gain must be > 0, got {gain}")
        rest = self.slope / math.sqrt(self.labels) - gain
        if rest <= 0 or (self.slope / rest) ** 2 > FARTHEST * self.labels:
            return None
        return math.ceil(round((self.slope / rest) ** 2, 6)) - self.labels

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "sizes": list(self.sizes),
            "errors": list(self.errors),
            "deviations": list(self.deviations),
            "floor": self.floor,
            "slope": self.slope,
            "cost_of_half": self.cost_of_half,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        lines = [f"{'labels':>8} {'error':>14}"]
        for size, error, deviation in zip(self.sizes, self.errors, self.deviations, strict=True):
            spread = f" ± {100 * deviation:.1f}" if deviation else ""
            lines.append(f"{size:>8} {100 * error:.1f}{spread} %".rstrip())
        if not self.fits:
            return "\n".join([*lines, "no law fits: nothing is said about more labels"])
        for times in (2, FARTHEST):
            error, low, high = self.error_at(times * self.labels)
            text = f"{100 * error:.1f} ({100 * low:.1f} .. {100 * high:.1f}) %"
            lines.append(f"{times * self.labels:>8} {text}, expected")
        lines.append(f"half the labels would cost {100 * self.cost_of_half:.1f} points")
        return "\n".join(lines)


def learning_curve(
    features: Any, labels: Any, *, classes: int | None = None, seed: int = 0
) -> LearningCurve:
    """Learning curve of a ridge head on features, from the labels at hand alone.

    The labels are divided into eight, four and two parts, stratified, and each part is judged by
    its own folds; so all labels take part in each size.

    Args:
        features: ``[examples, features]``, finite, standardized.
        labels: integers ``[examples]``, 0 .. classes - 1.
        classes: number of classes; default: the largest label plus 1.
        seed: of the parts and folds.

    Raises:
        ValueError: fewer than 6 examples of a class, with which there is only one size; and as
            ``cross_validate``.
        TypeError: labels that are not integers.

    References:
        D. Hoiem, T. Gupta, Z. Li, M. Shlapentokh-Rothman, "Learning Curves for Analysis of Deep
        Networks", 2021 (a fixed exponent of one half, and which numbers are stable).
        R. Mahmood et al., "How Much More Data Do I Need? Estimating Requirements for Downstream
        Tasks", 2022 (why not to look far).

    >>> labels = np.arange(200) % 4
    >>> random = np.random.default_rng(0)
    >>> curve = learning_curve(random.normal(size=(200, 30)) + np.eye(30)[labels], labels)
    >>> curve.sizes, curve.errors[0] > curve.errors[-1]
    ((25, 50, 100, 200), True)
    """
    matrix, label, number = checked_examples(features, labels, classes)
    smallest = int(np.bincount(label, minlength=number).min())
    if smallest < 2 * _LEAST:
        raise ValueError(
            f"a learning curve needs at least {2 * _LEAST} examples of each class, got {smallest}"
        )
    sizes, errors, deviations = [], [], []
    for parts in (*(parts for parts in _PARTS if smallest >= _LEAST * parts), 1):
        part_of = stratified_folds(label, parts, seed) if parts > 1 else np.zeros(len(label), int)
        found = [
            1 - cross_validate(matrix[chosen], label[chosen], classes=number, seed=seed).accuracy
            for chosen in (part_of == part for part in range(parts))
        ]
        sizes.append(round(len(label) / parts))
        errors.append(float(np.mean(found)))
        deviations.append(float(np.std(found, ddof=1)) if parts > 1 else 0.0)
    floor, slope, covariance = _law(np.array(sizes), np.array(errors), len(label))
    return LearningCurve(tuple(sizes), tuple(errors), tuple(deviations), floor, slope, covariance)


def _law(
    sizes: np.ndarray, errors: np.ndarray, labels: int
) -> tuple[float, float, tuple[tuple[float, float], tuple[float, float]]]:
    """Floor and slope by weighted least squares, both 0 or more, and their covariance.

    The mean error of all parts of one size is of all labels, whatever the size.
    """
    error = np.clip(errors, 0.5 / labels, 1 - 0.5 / labels)
    weights = np.sqrt(labels / (error * (1 - error)))
    design = np.stack([np.ones(len(sizes)), 1 / np.sqrt(sizes)], axis=1) * weights[:, None]
    (floor, slope), _ = scipy.optimize.nnls(design, errors * weights)
    (a, b), (c, d) = np.linalg.inv(design.T @ design)
    return float(floor), float(slope), ((float(a), float(b)), (float(c), float(d)))


@dataclass(frozen=True)
class ErrorSplit:
    """The error of a head, divided by what would change it.

    Args:
        bias: share of examples that the vote of all heads has wrong: more labels of the same kind
            would not mend them, other features might.
        variance: how often a single head differs from the vote: more labels would lower it.
        error: of a single head.
        draws: heads, each fitted to one half of the labels.
        examples: that were judged.
    """

    bias: float
    variance: float
    error: float
    draws: int
    examples: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)


def error_split(
    features: Any, labels: Any, *, classes: int | None = None, draws: int = 20, seed: int = 0
) -> ErrorSplit:
    """Bias and variance of a ridge head, by heads on random halves of the labels.

    Each half has the shares of the classes, and each head is judged on the examples that it has not
    seen. The vote of all heads that have not seen an example is what one head would say on average.
    The penalty is that which folds of all labels choose.

    Args:
        features: ``[examples, features]``, finite, standardized.
        labels: integers ``[examples]``, 0 .. classes - 1.
        classes: number of classes; default: the largest label plus 1.
        draws: pairs of halves make two heads each; even, 4 or more.
        seed: of the halves.

    Raises:
        ValueError: draws that are odd or fewer than 4, a class with fewer than 2 examples; and as
            ``cross_validate``.
        TypeError: labels that are not integers.

    References:
        P. Domingos, "A Unified Bias-Variance Decomposition for Zero-One and Squared Loss", 2000.

    >>> labels = np.arange(60) % 3
    >>> split = error_split(np.eye(3)[labels], labels)
    >>> split.bias, split.variance
    (0.0, 0.0)
    """
    if draws < 4 or draws % 2:
        raise ValueError(f"`draws` must be even and >= 4, got {draws}")
    matrix, label, number = checked_examples(features, labels, classes)
    counts = np.bincount(label, minlength=number)
    if counts.min() < 2:
        raise ValueError(
            f"every class must have 2 examples to be halved, got {int(counts.min())} of class "
            f"{int(counts.argmin())}"
        )
    strength = cross_validate(matrix, label, classes=number, seed=seed).strength
    votes = np.zeros((len(label), number), int)
    predicted = []
    with blas_threads(matrix):
        for draw in range(draws // 2):
            halves = stratified_folds(label, 2, seed + draw)
            said = np.zeros(len(label), int)
            for split in ridge_splits(matrix, label, number, halves):
                said[split.out] = split.scores(strength).argmax(axis=1)
            votes[np.arange(len(label)), said] += 1
            predicted.append(said)
    every = np.array(predicted)
    vote = votes.argmax(axis=1)
    return ErrorSplit(
        float((vote != label).mean()),
        float((every != vote).mean()),
        float((every != label).mean()),
        draws,
        len(label),
    )


@dataclass(frozen=True, eq=False)
class LabelSuspects:
    """Examples whose labels are contradicted by a head that has not seen them.

    Args:
        rows: of the suspects, int ``[suspects]``, the most contradicted first.
        labels: that they have, int ``[suspects]``.
        instead: what the head says with confidence, int ``[suspects]``.
        margins: by how much the head finds that more probable, ``[suspects]``.
        agreement: share of each class whose held-out prediction is its label, ``[classes]``.
        examples: how many were looked at.
    """

    rows: np.ndarray
    labels: np.ndarray
    instead: np.ndarray
    margins: np.ndarray
    agreement: np.ndarray
    examples: int

    @property
    def share(self) -> float:
        """Suspects among the examples."""
        return len(self.rows) / self.examples

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "examples": self.examples,
            "rows": self.rows.tolist(),
            "labels": self.labels.tolist(),
            "instead": self.instead.tolist(),
            "margins": [round(float(margin), 4) for margin in self.margins],
            "agreement": [round(float(share), 4) for share in self.agreement],
        }


def label_suspects(
    features: Any,
    labels: Any,
    *,
    classes: int | None = None,
    groups: Any = None,
    seed: int = 0,
) -> LabelSuspects:
    """Labels that may be wrong: those that a held-out head contradicts with confidence.

    An example is a suspect if another class than its label is the most probable one, and the head
    is confident of it: it is ten times as probable as the label (strong evidence, by Jeffreys), or
    twice, and as probable as that class is on average where it is the label (Northcutt et al.).
    Where features say little no head is confident, and there are few suspects. A hard example is a
    suspect, too: look before you change a label.

    Args:
        features: ``[examples, features]``, finite, standardized.
        labels: integers ``[examples]``, 0 .. classes - 1.
        classes: number of classes; default: the largest label plus 1.
        groups: ``[examples]``, held out as a whole.
        seed: of the folds.

    Raises:
        ValueError: as ``cross_validate``.
        TypeError: labels that are not integers.

    References:
        C. Northcutt, L. Jiang, I. Chuang, "Confident Learning: Estimating Uncertainty in Dataset
        Labels", 2021. H. Jeffreys, "Theory of Probability", 1961 (a scale of odds).

    >>> labels = np.arange(60) % 3
    >>> features = np.eye(3)[labels]
    >>> labels[7] = 0
    >>> found = label_suspects(features, labels)
    >>> found.rows.tolist(), found.instead.tolist()
    ([7], [1])
    """
    matrix, label, number = checked_examples(features, labels, classes)
    found = cross_validate(matrix, label, classes=number, seed=seed, groups=groups)
    sure = scipy.special.softmax(found.scale * found.scores, axis=1)
    judged = np.flatnonzero(found.held_out)
    mine, sure = label[judged], sure[judged]
    said = sure.argmax(axis=1)
    threshold = np.array(
        [sure[mine == one, one].mean() if (mine == one).any() else 1.0 for one in range(number)]
    )
    every = np.arange(len(judged))
    most, of_label = sure[every, said], sure[every, mine]
    confident = (most >= _STRONG * of_label) | (
        (most >= _WEAK * of_label) & (most >= threshold[said])
    )
    margins = most - of_label
    rows = np.flatnonzero(confident & (said != mine))
    rows = rows[np.argsort(-margins[rows], kind="stable")]
    agreement = [float((said == mine)[mine == one].mean()) for one in range(number)]
    return LabelSuspects(
        judged[rows], mine[rows], said[rows], margins[rows], np.array(agreement), len(judged)
    )


_STRONG, _WEAK = 10.0, 2.0
"""How much more probable than the label another class has to be, by itself and with the average."""
