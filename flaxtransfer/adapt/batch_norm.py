"""Adapt BatchNorm statistics to an unlabeled target, guarded.

What an adaptation did, or why it did nothing, as a person reads it.

BatchNorm statistics of a target without labels, where it is safe to take them.

BatchNorm statistics of a target with other class shares, as if it had those of the source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.adapt.scores import (
    CLEAR,
    Estimate,
    UnlabeledScores,
    contradiction,
    exceeds_shift,
    is_weak,
    one_class,
    support,
    unlabeled_scores,
)
from flaxtransfer.adapt.statistics import (
    Images,
    LayerStatistics,
    Reestimated,
    TooFewValues,
    interleave,
    reader,
    reestimate,
    target_logits,
)
from flaxtransfer.batchnorm import policy
from flaxtransfer.masks import Mask, everything
from flaxtransfer.models.model import Model
from flaxtransfer.models.moments import Mixture, balancing_weights
from flaxtransfer.shift.calibration import Calibration
from flaxtransfer.types import Variables
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "BatchNormReport",
    "Candidate",
    "Guard",
    "adapt_batch_norm",
    "adapt_batch_norm_balanced",
    "batch_norms",
    "check_guard",
    "judged",
]


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network that was considered.

    Args:
      name: "source", "target statistics", "balanced, round 1".
      standing: on the target; None where no calibration was given.
      effective_images: behind its statistics, by Kish's formula; None for the source.
    """

    name: str
    unlabeled_scores: UnlabeledScores | None
    effective_images: float | None


@dataclass(frozen=True, eq=False)
class BatchNormReport:
    """How BatchNorm statistics were adapted.

    Args:
      adapted: whether the variables that came back have new statistics.
      refusals: why not; with ``guard="warn"``, what would have been a reason.
      notes: what a person should know.
      statistics: what was measured, also where it was refused.
      candidates: the networks that were considered, the source's first.
      chosen: the name of the one that came back.
    """

    adapted: bool
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    statistics: Reestimated
    candidates: tuple[Candidate, ...]
    chosen: str

    @property
    def before(self) -> UnlabeledScores | None:
        """Of the source's network."""
        return self.candidates[0].standing

    @property
    def after(self) -> UnlabeledScores | None:
        """Of the network that came back."""
        return next(c.standing for c in self.candidates if c.name == self.chosen)

    @property
    def farthest(self) -> LayerStatistics:
        """The BatchNorm whose statistics moved most."""
        return max(self.statistics.layers, key=lambda layer: layer.distance)

    def __str__(self) -> str:
        found = self.statistics
        lines = [
            f"BatchNorm statistics of {found.images} target images, "
            f"{100 * found.share:.0f} % source; {found.passes} "
            f"pass{'' if found.passes == 1 else 'es'}{'' if found.exact else ', not exact'}; "
            f"farthest at {self.farthest.path}: {self.farthest.distance:.2f} standard deviations"
        ]
        for one in self.candidates:
            if one.standing is not None:
                mark = " (returned)" if one.name == self.chosen else ""
                lines.append(f"{one.name}{mark}: {one.standing}")
        word = "reason against it" if self.adapted else "not adapted"
        lines += [f"{word}: {reason}" for reason in self.refusals]
        return "\n".join([*lines, *self.notes])


Guard = Literal["refuse", "warn"]
"""Whether a reason against an adaptation keeps the source's network, or is only reported."""


def adapt_batch_norm(
    model: Model,
    variables: Variables,
    images: Images,
    preprocessing: Preprocessing,
    *,
    source: Calibration | None = None,
    source_weight: float | None = None,
    mixture: Mixture = "moments",
    where: Mask | str | None = None,
    passes: int = 1,
    batch_size: int = 256,
    guard: Guard = "refuse",
    estimate: Estimate | None = None,
    mesh: Mesh | None = None,
) -> tuple[Variables, BatchNormReport]:
    """The network with BatchNorm statistics of unlabeled target images.

    You want it where images have changed (contrast, brightness, blur, noise, another scanner) and
    classes are about as common as at the source. It is not for label shift: statistics of a
    target with other class shares remove the very difference that tells classes apart, and
    ``adapt_batch_norm_balanced`` is for that. Nothing is learned, and the weights stay.

    Statistics are measured in training mode: each BatchNorm normalizes by its batch, so that the
    next one sees what it will see. Up to ``batch_size`` images are one batch, and the result is
    exact: evaluated with running statistics, the network gives the outputs of training mode on
    all images together, in any order. With more, images are dealt out to batches, which are merged
    as parts of one sample, and deeper layers depend a little on which image met which, unless
    more ``passes`` are given (``reestimate``).

    Guards, with ``source`` given: nothing is adapted where the estimated accuracy clearly falls,
    where one class is all there is, where class shares are far from the source's without a clear
    rise of the estimated accuracy, and where the networks before and after contradict each other
    about the classes and the adapted one is not nearly as sure as at the source. Without it only
    the number of values is guarded. No guard is sure: after adaptation classes look balanced,
    whatever they are.

    Args:
      model: the network.
      variables: the source's; not changed.
      images: unlabeled, of the target.
      preprocessing: that belongs to the weights.
      source: calibration of this network on held-out examples of the source.
      source_weight: N, how many target images the source's statistics are worth, in the mixture
        N / (N + n); None takes the target alone. The fewer images and the weaker the shift, the
        more: with n = 8, N = 8 or 16.
      mixture: "moments" is exact, "linear" leaves out the distance of the means, as Schneider et
        al. do.
      where: the BatchNorms, as a mask over parameters; by default all.
      passes: through the network at most.
      batch_size: of arrays; larger ones need more memory, and small ones are noisy.
      guard: "refuse" returns the source's variables where there is a reason against it, "warn"
        only reports the reason.
      estimate: of the target's prevalence; by default maximum likelihood.
      mesh: devices; by default all of them.

    Returns:
      Variables (the same as given where nothing was adapted), and the report.

    Raises:
      ValueError: no BatchNorm, as in a network of GroupNorms; no image; fewer than 32 values in a
        channel; options out of range.
      TypeError: images that are not uint8.

    References:
      Y. Li, N. Wang, J. Shi, J. Liu, X. Hou, "Revisiting Batch Normalization For Practical Domain
      Adaptation", 2016. Z. Nado et al., "Evaluating Prediction-Time Batch Normalization for
      Robustness under Covariate Shift", 2020. S. Schneider et al., "Improving robustness against
      common corruptions by covariate shift adaptation", 2020.

    >>> import jax, numpy as np, flaxtransfer as ft
    >>> model = ft.Model(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> variables = model.init(jax.random.key(0))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> adapted, report = adapt_batch_norm(model, variables, images, preprocessing)
    >>> report.adapted, report.statistics.images, report.statistics.exact
    (True, 64, True)
    """
    check_guard(guard)
    chosen = batch_norms(model, variables, where)
    read = reader(interleave(images, batch_size), batch_size)
    found = reestimate(
        model,
        variables,
        read,
        preprocessing,
        chosen,
        source_weight=source_weight,
        mixture=mixture,
        passes=passes,
        mesh=mesh,
    )
    adapted = {**variables, "batch_stats": found.batch_stats}
    before = after = None
    refusals: list[str] = []
    notes: list[str] = []
    if source is None:
        notes.append("no calibration was given: neither label shift nor confidence was looked at")
    else:
        before, after = (
            unlabeled_scores(target_logits(model, v, read, preprocessing, mesh), source, estimate)
            for v in (variables, adapted)
        )
        refusals, notes = judged(before, after, source)
    takes = not refusals or guard == "warn"
    candidates = (
        Candidate("source", before, None),
        Candidate("target statistics", after, found.effective_images),
    )
    report = BatchNormReport(
        takes, tuple(refusals), tuple(notes), found, candidates, candidates[takes].name
    )
    return (adapted if takes else variables), report


def batch_norms(model: Model, variables: Variables, where: Mask | str | None) -> frozenset[str]:
    """Paths of the BatchNorms to adapt.

    Raises:
      ValueError: there are none, or the mask touches none.
    """
    if model.config.norm == "group":
        raise ValueError(
            "this network normalizes by groups of channels within each image (GroupNorm): it has "
            "no statistics of a domain, and there is nothing to adapt"
        )
    chosen = policy(variables["params"], everything() if where is None else where)
    if not chosen:
        raise ValueError(f"{where!r} touches no BatchNorm, so there is nothing to adapt")
    return chosen


def check_guard(guard: str) -> None:
    """Raises a ValueError unless it is one."""
    if guard not in ("refuse", "warn"):
        raise ValueError(f"guard is 'refuse' or 'warn', not {guard!r}")


def judged(
    before: UnlabeledScores, after: UnlabeledScores, source: Calibration
) -> tuple[list[str], list[str]]:
    """Reasons against statistics of the target, and notes.

    Args:
      before: the source's network on the target.
      after: the adapted one.
      source: calibration of the first.
    """
    if reason := contradiction(before, after, source):
        return [reason], []
    change = support(before, after)
    # Whose predictions are better founded says more about the classes.
    shares = (before if before.accuracy >= after.accuracy else after).prevalence
    refusals: list[str] = []
    notes: list[str] = []
    if change < -CLEAR:
        refusals.append(
            f"the estimated accuracy falls from {100 * before.accuracy:.1f} to "
            f"{100 * after.accuracy:.1f} %"
        )
    if single := one_class(shares):
        refusals.append(single)
    elif (distant := exceeds_shift(shares)) and change <= CLEAR:
        refusals.append(f"{distant}, and the estimated accuracy does not clearly rise")
    elif distant:
        notes.append(f"{distant}: adapt_batch_norm_balanced is made for that")
    if not shares.identifiable:
        notes.append(f"label shift cannot be excluded: {shares.reason}")
    return refusals, notes


def adapt_batch_norm_balanced(
    model: Model,
    variables: Variables,
    images: Images,
    preprocessing: Preprocessing,
    source: Calibration,
    *,
    rounds: int = 4,
    source_weight: float | None = None,
    mixture: Mixture = "moments",
    where: Mask | str | None = None,
    batch_size: int = 256,
    guard: Guard = "refuse",
    estimate: Estimate | None = None,
    mesh: Mesh | None = None,
) -> tuple[Variables, BatchNormReport]:
    """The network with target statistics in which classes count as much as at the source.

    You want it where images *and* class shares have changed. Each round predicts with the best
    network so far, estimates the prevalence, weighs every image by p_s(x) / p_t(x), which is the
    posterior mean of p / q, and takes weighted statistics. It ends with the best supported of all
    networks met on the way, the source's among them: the one of highest estimated accuracy
    (average thresholded confidence).

    Predictions still have the prior of the source: correct them by the estimated prevalence
    afterwards. It cannot work where a class is missing, for no weight makes up for that, nor where
    no network says anything about the images: both are refused, and the source's statistics stay.
    Confidence can be fooled: it also rises, round by round, on images that are of no class at all.

    Args:
      model: the network.
      variables: the source's; not changed.
      images: unlabeled, of the target.
      preprocessing: that belongs to the weights.
      source: calibration of this network on held-out examples of the source.
      rounds: of predicting and weighing, 1 or more; it ends earlier where nothing improves.
      source_weight: N of the mixture N / (N + n), with n the effective number of images.
      mixture: "moments" or "linear", as in ``adapt_batch_norm``.
      where: the BatchNorms, as a mask over parameters; by default all.
      batch_size: of arrays.
      guard: "refuse" keeps the source's statistics where there is a reason against new ones;
        "warn" reports it and returns the best supported of the balanced networks.
      estimate: of the prevalence; by default maximum likelihood.
      mesh: devices; by default all of them.

    Returns:
      Variables, and the report with every network that was met.

    Raises:
      ValueError: as ``adapt_batch_norm``; fewer than one round.

    >>> import jax, numpy as np, flaxtransfer as ft
    >>> model = ft.Model(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> variables = model.init(jax.random.key(0))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> labels = np.arange(64) % 2
    >>> source = ft.shift.calibrate(labels[:, None] * [-1.0, 1.0], labels)
    >>> adapted, report = adapt_batch_norm_balanced(
    ...     model, variables, images, preprocessing, source, rounds=1)
    >>> [candidate.name for candidate in report.candidates]
    ['source', 'target statistics', 'balanced, round 1']
    """
    check_guard(guard)
    if rounds < 1:
        raise ValueError(f"rounds is 1 or more, not {rounds}")
    chosen = batch_norms(model, variables, where)
    read = reader(interleave(images, batch_size), batch_size)

    def network(name: str, weights: np.ndarray | None = None) -> _Network:
        found = reestimate(
            model,
            variables,
            read,
            preprocessing,
            chosen,
            weights=weights,
            source_weight=source_weight,
            mixture=mixture,
            mesh=mesh,
        )
        adapted = {**variables, "batch_stats": found.batch_stats}
        return _Network(name, adapted, found, stands(adapted))

    def stands(of: Variables) -> UnlabeledScores:
        return unlabeled_scores(
            target_logits(model, of, read, preprocessing, mesh), source, estimate
        )

    met = [_Network("source", variables, None, stands(variables)), network("target statistics")]
    plain = met[1].statistics
    assert plain is not None
    notes: list[str] = []
    # Whichever of the two predicts better says what to weigh by first.
    last = _best(met)
    for number in range(1, rounds + 1):
        shares = last.standing.prevalence
        if not shares.identifiable:
            notes.append(f"round {number} was not taken: {shares.reason}")
            break
        weights = balancing_weights(last.standing.probabilities, source.prior, shares.estimate)
        try:
            balanced = network(f"balanced, round {number}", weights)
        except TooFewValues as error:
            notes.append(f"round {number} was not taken: {error}")
            break
        met.append(balanced)
        if number > 1 and balanced.standing.accuracy < last.standing.accuracy:
            break
        last = balanced
    best = _best(met)
    refusals = _reasons(best, source)
    if refusals:
        best = met[0] if guard == "refuse" else _best(met[2:] or met[1:])
    candidates = tuple(
        Candidate(
            one.name, one.standing, one.statistics.effective_images if one.statistics else None
        )
        for one in met
    )
    report = BatchNormReport(
        best.statistics is not None,
        tuple(refusals),
        tuple(notes),
        best.statistics or plain,
        candidates,
        best.name,
    )
    return best.variables, report


@dataclass(frozen=True, eq=False)
class _Network:
    """One of those met on the way; the source's has no statistics of the target."""

    name: str
    variables: Variables
    statistics: Reestimated | None
    unlabeled_scores: UnlabeledScores


def _best(met: list[_Network]) -> _Network:
    """Of highest estimated accuracy; the earlier one where they are equal."""
    return max(met, key=lambda one: one.standing.accuracy)


def _reasons(best: _Network, source: Calibration) -> list[str]:
    """Why no statistics should be taken from this target."""
    reasons = []
    if best.statistics is None:
        reasons.append("no new statistics are better supported than those of the source")
    if single := one_class(best.standing.prevalence):
        reasons.append(single)
    if little := is_weak(best.standing, source):
        reasons.append(f"{little}, and no other is surer: predictions cannot weigh images")
    return reasons
