"""Progress through a plan, and the decision whether the next phase begins.

``prepared`` and ``check_feed`` fit plan and network to the data before anything is computed.
``Progress`` is the part of a checkpoint that is not an array. ``decide`` applies the rule of a plan
to what validation has shown, by a paired test on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flaxtransfer.classifier import Classifier, ending_at
from flaxtransfer.data.loader import DataLoaders
from flaxtransfer.metrics import Draws
from flaxtransfer.training.plan import Phase, Plan

SAMPLES = 200
"""Bootstrap samples of the validation set: the standard error of a gain is then known to 5 %."""


@dataclass(frozen=True)
class Progress:
    """A phase, how far it has come, and how validation has gone.

    Args:
        phase: index of the phase.
        phase_start: step of the run at which the phase began.
        phase_step: steps done in the phase.
        best: best validation score of the run so far, or None before any.
        best_step: the step that had it first.
        without_improvement: validations of this phase since its own best.
        phase_best: best validation score of this phase, or None.
        best_before: ``best`` when the phase began.
        unhelpful: phases in a row, up to the one before this, that did not better ``best``.
        examples: of the validation set; 0 before any validation.
        hits: which of them the best of this phase got right, as bits in hexadecimal, or None.
        hits_before: the same of the best when the phase began.
        draws: where the metric is no mean of truths, its value for the best of this phase, and on
            each bootstrap sample of the validation set; larger is better.
        draws_before: the same of the best when the phase began.
    """

    phase: int = 0
    phase_start: int = 0
    phase_step: int = 0
    best: float | None = None
    best_step: int | None = None
    without_improvement: int = 0
    phase_best: float | None = None
    best_before: float | None = None
    unhelpful: int = 0
    examples: int = 0
    hits: str | None = None
    hits_before: str | None = None
    draws: Sequence[float] = ()
    draws_before: Sequence[float] = ()

    @property
    def step(self) -> int:
        """Step of the run."""
        return self.phase_start + self.phase_step

    def out_of_patience(self, phase: Phase) -> bool:
        """Whether the phase ends because validation has not improved for long enough."""
        return phase.patience is not None and self.without_improvement >= phase.patience

    @property
    def helped(self) -> bool:
        """Whether the phase has bettered the run's validation score; the first one always has."""
        if self.best_before is None:
            return True
        return self.best is not None and self.best > self.best_before

    def next_phase(self) -> Progress:
        """The position before the first step of the next phase."""
        return Progress(
            phase=self.phase + 1,
            phase_start=self.step,
            best=self.best,
            best_step=self.best_step,
            best_before=self.best,
            unhelpful=0 if self.helped else self.unhelpful + 1,
            examples=self.examples,
            hits_before=self.hits if self.helped else self.hits_before,
            draws_before=self.draws if self.helped else self.draws_before,
        )

    def validated(self, score: float, evidence: np.ndarray | Draws) -> Progress:
        """The position after a validation: its score, and what two states are compared by.

        Args:
            score: what it is ranked by.
            evidence: bool [examples], what it got right; or draws of a metric that is no such mean.
        """
        improved = self.phase_best is None or score > self.phase_best
        first = self.best is None or score > self.best
        after = replace(
            self,
            best=score if first else self.best,
            best_step=self.step if first else self.best_step,
            phase_best=score if improved else self.phase_best,
            examples=evidence.examples if isinstance(evidence, Draws) else len(evidence),
            without_improvement=0 if improved else self.without_improvement + 1,
        )
        if not improved:
            return after
        if isinstance(evidence, Draws):
            return replace(after, draws=(evidence.value, *evidence.samples))
        return replace(after, hits=bits(evidence))


def bits(correct: np.ndarray) -> str:
    """Bool [examples] as a hexadecimal number, which fits into the record of a checkpoint.

    >>> bits(np.array([True, False, True]))
    'a0'
    """
    return np.packbits(correct).tobytes().hex()


@dataclass(frozen=True)
class Decision:
    """What follows the end of a phase.

    Args:
        goes_on: whether another phase begins.
        evidence: the numbers behind it, for the metrics; empty where nothing was decided.
        text: the same for a person; empty for the first phase, which is compared with nothing.
    """

    goes_on: bool
    evidence: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two states on the same validation images.

    Args:
        before: images that the earlier state gets right.
        won: images that only the later one gets right.
        lost: images that only the earlier one does.
        examples: all images.
    """

    before: int
    won: int
    lost: int
    examples: int

    @classmethod
    def of(cls, before: str, after: str, examples: int) -> Comparison:
        """Compares two records of what was right; see ``position.bits``."""
        old, new = int(before, 16), int(after, 16)
        won, lost = (new & ~old).bit_count(), (old & ~new).bit_count()
        return cls(old.bit_count(), won, lost, examples)

    def gain(self, min_z: float = 0.0) -> float:
        """Accuracy gained, as a share, less ``min_z`` of its standard errors.

        >>> Comparison(before=80, won=9, lost=1, examples=100).gain()
        0.08
        >>> Comparison(before=80, won=4, lost=0, examples=100).gain(min_z=2.0)
        0.0
        """
        return (self.won - self.lost - min_z * math.sqrt(self.won + self.lost)) / self.examples

    @property
    def z(self) -> float:
        """The gain in its standard errors; 0 where the two states agree on every image."""
        return (self.won - self.lost) / math.sqrt(max(1, self.won + self.lost))

    def to_json(self) -> dict[str, float | int]:
        """What a metrics file holds of it."""
        return {
            "accuracy_before": self.before / self.examples,
            "accuracy": (self.before + self.won - self.lost) / self.examples,
            "won": self.won,
            "lost": self.lost,
            "examples": self.examples,
            "z": self.z,
        }

    def __str__(self) -> str:
        found = self.to_json()
        return (
            f"validation accuracy {100 * found['accuracy']:.2f} %, before it "
            f"{100 * found['accuracy_before']:.2f} %; {self.won} images won and {self.lost} lost "
            f"of {self.examples} (z {self.z:.1f})"
        )


@dataclass(frozen=True)
class Gain:
    """Two states on the same validation images, by a metric that is no mean of truths.

    Args:
        before: the metric of the earlier state; larger is better.
        after: of the later one.
        error: standard error of the difference, over bootstrap samples of the images; 0 without.
        examples: all images.
    """

    before: float
    after: float
    error: float
    examples: int

    @classmethod
    def of(cls, before: Sequence[float], after: Sequence[float], examples: int) -> Gain:
        """Compares two records of draws; see ``Progress.draws``."""
        paired = np.subtract(after[1:], before[1:])
        known = paired[~np.isnan(paired)]
        error = float(known.std(ddof=1)) if len(known) > 1 else 0.0
        return cls(before[0], after[0], error, examples)

    def gain(self, min_z: float = 0.0) -> float:
        """What was gained, less ``min_z`` of its standard errors.

        >>> round(Gain(0.5, 0.75, 0.1, 100).gain(min_z=2.0), 3)
        0.05
        """
        return self.after - self.before - min_z * self.error

    @property
    def z(self) -> float:
        """The gain in its standard errors; 0 where there are none."""
        return (self.after - self.before) / self.error if self.error else 0.0

    def to_json(self) -> dict[str, float | int]:
        """What a metrics file holds of it."""
        return {
            "metric_before": self.before,
            "metric": self.after,
            "error": self.error,
            "examples": self.examples,
            "z": self.z,
        }

    def __str__(self) -> str:
        tested = f" (z {self.z:.1f} over bootstrap samples)" if self.error else ""
        return (
            f"validation metric (larger is better) {self.after:.4f}, before it {self.before:.4f}, "
            f"on {self.examples} images{tested}"
        )


def _compared(
    hits: tuple[str | None, str | None], draws: tuple[Sequence[float], Sequence[float]], count: int
) -> Comparison | Gain | None:
    """The two states, before and after, by what is known of both; None where that is nothing."""
    if hits[0] is not None and hits[1] is not None:
        return Comparison.of(hits[0], hits[1], count)
    return Gain.of(*draws, count) if draws[0] and draws[1] else None


def score(plan: Plan, position: Progress, evidence: np.ndarray | Draws) -> float:
    """What validations of one phase, and of different phases, are ranked by.

    In the first phase it is the metric itself, such as the accuracy; from then on the score that
    has to be beaten plus the gain over it on the same images, less what ``Plan.min_gain`` and
    ``Plan.min_z`` ask for. So a state is the best of the run exactly when its phase has helped, and
    only one has to be kept.
    """
    compared: Comparison | Gain | None
    if isinstance(evidence, Draws):
        value, here = evidence.value, (evidence.value, *evidence.samples)
        draws = (position.draws_before, here)
        compared = _compared((None, None), draws, evidence.examples)
    else:
        value, hits = float(evidence.mean()), (position.hits_before, bits(evidence))
        compared = _compared(hits, ((), ()), len(evidence))
    if position.best_before is None or compared is None:
        return value
    return position.best_before + compared.gain(plan.min_z) - plan.min_gain


def decide(plan: Plan, position: Progress) -> Decision:
    """Applies the plan's rule at the end of a phase."""
    names = [phase.name for phase in plan.phases]
    here, following = names[position.phase], names[position.phase + 1 : position.phase + 2]
    unhelpful = 0 if position.helped else position.unhelpful + 1
    goes_on = bool(following) and (plan.patience is None or unhelpful < plan.patience)
    if position.best is None or len(names) == 1:
        return Decision(goes_on)
    evidence: dict[str, Any] = {
        "phase": here,
        "score": position.phase_best,
        "score_before": position.best_before,
        "kept": position.helped,
        "next": following[0] if goes_on else None,
    }
    if position.hits is None and not position.draws:
        return Decision(goes_on, evidence)
    compared = _compared(
        (position.hits_before, position.hits),
        (position.draws_before, position.draws),
        position.examples,
    )
    if compared is None:
        name = "metric" if position.draws else "accuracy"
        return Decision(goes_on, evidence | {name: position.phase_best})
    evidence |= compared.to_json()
    text = f"phase {here!r} {'is kept' if position.helped else 'is undone'}: {compared}"
    if following and not goes_on:
        text += f"; {following[0]!r} is not begun"
    return Decision(goes_on, evidence, text)


def prepared(network: Classifier, plan: Plan, data: DataLoaders) -> tuple[Classifier, Plan]:
    """Network and plan for these data: cut, resolved, losses bound, targets standardized.

    Raises:
        ValueError: rules or losses that do not fit, or a regression whose training targets the
            batches do not show.
    """
    labels = None if data.examples is None else data.examples.labels
    network = ending_at(network, plan.ends_at)
    if labels is not None:
        network = replace(network, task=network.task.fitted(labels))
    elif network.task.standardizes and network.task.units is None:
        raise ValueError(
            f"the task {network.task.name} must know mean and scale of its targets, which these "
            "batches do not show; make them with ft.loaders, or give task.with_units(Units(...))"
        )
    plan = plan.bind(network.task.name, data.class_names, labels)
    return network, plan.resolve(network.params, data.steps_per_epoch)


def check_feed(plan: Plan, feed: DataLoaders) -> None:
    """Refuses rules that the data cannot answer, before anything is computed.

    Raises:
        ValueError: patience without a validation set, recalibration or a probe without a pass over
            the training images, a batch that cannot be divided into the parts of a phase, larger
            images than there are; all in one text.
    """
    problems = []
    if feed.validation is None:
        impatient = [f"phase {p.name!r}" for p in plan.phases if p.patience is not None]
        impatient += ["the plan"] if plan.patience is not None else []
        if impatient:
            problems.append(
                f"patience needs a validation set, and there is none; it is asked for by "
                f"{', '.join(impatient)}"
            )
    if feed.calibration is None:
        problems += [
            f"phase {phase.name!r} {what}, but the feed has no pass over the training images "
            "(Feed.calibration)"
            for phase in plan.phases
            for what, asked in (
                ("recalibrates", phase.recalibrate is not None),
                ("begins with a probe", phase.probe),
            )
            if asked
        ]
    side = feed.preprocessing.size
    problems += [
        f"image_size of phase {phase.name!r} must be at most that of the batches, {side} px, got "
        f"{phase.image_size}"
        for phase in plan.phases
        if phase.image_size is not None and phase.image_size > side
    ]
    if feed.examples is not None:
        size = feed.examples.batch_size
        problems += [
            f"accumulate of phase {phase.name!r} must divide the batch size {size}, got "
            f"{phase.accumulate}"
            for phase in plan.phases
            if size % phase.accumulate
        ]
    if problems:
        raise ValueError("; ".join(problems))
