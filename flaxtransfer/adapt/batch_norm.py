"""BatchNorm adaptation to an unlabeled target, with guards.

``adapt_batch_norm`` is for covariate shift; ``adapt_batch_norm_balanced`` also for label shift.
Both refuse, with reasons in a report, where an adaptation would do harm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.adapt.scores import (
    SIGNIFICANT,
    Estimate,
    UnlabeledScores,
    accuracy_change_z,
    conflicting_class_shares,
    exceeds_shift,
    single_class,
    unlabeled_scores,
    unreliable_predictions,
)
from flaxtransfer.adapt.statistics import (
    Images,
    LayerStatistics,
    ReestimatedStatistics,
    TooFewValues,
    image_reader,
    interleave,
    predict_logits,
    reestimate,
)
from flaxtransfer.batchnorm import policy
from flaxtransfer.classifier import Classifier
from flaxtransfer.masks import Mask, everything
from flaxtransfer.models.moments import Mixture, balancing_weights
from flaxtransfer.paths import Variables
from flaxtransfer.shift.calibration import Calibration

__all__ = [
    "BatchNormReport",
    "Candidate",
    "Guard",
    "adapt_batch_norm",
    "adapt_batch_norm_balanced",
    "check_guard_option",
    "check_guards",
    "select_batch_norms",
]


Guard = Literal["refuse", "warn"]
"""Whether a reason against an adaptation keeps the source network, or is only reported."""


def adapt_batch_norm(
    network: Classifier,
    images: Images,
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
    """Adapts BatchNorm statistics to unlabeled target images.

    Use it under covariate shift: images have changed (contrast, brightness, blur, noise, another
    scanner) and classes are about as frequent as in the source. It is not for label shift:
    statistics of a target with other class shares remove the differences between classes; use
    ``adapt_batch_norm_balanced``. Nothing is learned, and the weights do not change.

    Statistics are measured in training mode: each BatchNorm normalizes by its batch, so that the
    next one gets the inputs that it will get later. Up to ``batch_size`` images are one batch, and
    the result is exact: evaluated with running statistics, the network gives the outputs of
    training mode on all images together, in any order. More images are split into several batches,
    which are merged as parts of one sample, and deeper layers depend slightly on the split, unless
    more ``passes`` are given (``reestimate``).

    Guards, if ``source`` is given: nothing is adapted if the estimated accuracy falls
    significantly, if the target seems to have a single class, if class shares are far from the
    source without a significant rise of the estimated accuracy, or if the networks before and after
    disagree about the class shares and the adapted one is much less confident than on the source.
    Without ``source`` only the number of values is checked. No guard is certain: after adaptation
    classes always look balanced.

    Args:
        network: of the source; not changed.
        images: unlabeled, of the target.
        source: calibration of this network on held-out examples of the source.
        source_weight: N, how many target images the statistics of the source are worth, in the
            mixture ``N / (N + n)``; None uses the target alone. The fewer images and the weaker the
            shift, the more: with n = 8, N = 8 or 16.
        mixture: "moments" is exact; "linear" ignores the distance of the means, as in Schneider et
            al.
        where: the BatchNorms, as a mask over parameters; default: all.
        passes: through the network, at most.
        batch_size: of arrays; larger batches need more memory, small ones are noisy.
        guard: "refuse" returns the variables of the source if there is a reason against the
            adaptation, "warn" only reports the reason.
        estimate: estimator of the prevalence of the target; default: maximum likelihood.
        mesh: devices; default: all.

    Returns:
        Variables (the same as given where nothing was adapted), and the report.

    Raises:
        ValueError: no BatchNorm, as in a network with GroupNorm; no images; fewer than 32 values
            per channel; options out of range.
        TypeError: images that are not uint8.

    References:
        Y. Li, N. Wang, J. Shi, J. Liu, X. Hou, "Revisiting Batch Normalization For Practical Domain
        Adaptation", 2016. Z. Nado et al., "Evaluating Prediction-Time Batch Normalization for
        Robustness under Covariate Shift", 2020. S. Schneider et al., "Improving robustness against
        common corruptions by covariate shift adaptation", 2020.

    >>> import jax, numpy as np, flaxtransfer as ft
    >>> model = ft.Model(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> adapted, report = adapt_batch_norm(network, images)
    >>> report.adapted, report.statistics.images, report.statistics.exact
    (True, 64, True)
    """
    check_guard_option(guard)
    variables = network.variables
    chosen = select_batch_norms(network, where)
    read = image_reader(interleave(images, batch_size), batch_size)
    found = reestimate(
        network,
        read,
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
        notes.append("without a calibration, label shift and confidence are not checked")
    else:
        before, after = (
            unlabeled_scores(
                predict_logits(network.with_variables(v), read, mesh), source, estimate
            )
            for v in (variables, adapted)
        )
        refusals, notes = check_guards(before, after, source)
    accepted = not refusals or guard == "warn"
    candidates = (
        Candidate("source", before, None),
        Candidate("target statistics", after, found.effective_images),
    )
    report = BatchNormReport(
        accepted, tuple(refusals), tuple(notes), found, candidates, candidates[accepted].name
    )
    return (adapted if accepted else variables), report


def adapt_batch_norm_balanced(
    network: Classifier,
    images: Images,
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
    """Adapts BatchNorm statistics to a target with other class shares.

    Use it where images *and* class shares have changed. Each round predicts with the best network
    so far, estimates the prevalence, weights every image by p_s(x) / p_t(x), which is the posterior
    mean of p / q, and takes weighted statistics: classes then count as much as in the source. It
    returns the candidate with the highest estimated accuracy (average thresholded confidence), the
    source included.

    Predictions still have the prior of the source: correct them with the estimated prevalence. It
    cannot work if a class is missing, because no weight can replace it, nor if all predictions are
    unreliable: both are refused, and the statistics of the source stay. Confidence can be misled:
    it also rises, round by round, on images of no class at all.

    Args:
        network: of the source; not changed.
        images: unlabeled, of the target.
        source: calibration of this network on held-out examples of the source.
        rounds: of predicting and weighting, 1 or more; it stops early if nothing improves.
        source_weight: N of the mixture ``N / (N + n)``, with n the effective number of images.
        mixture: "moments" or "linear", as in ``adapt_batch_norm``.
        where: the BatchNorms, as a mask over parameters; default: all.
        batch_size: of arrays.
        guard: "refuse" keeps the statistics of the source if there is a reason against new ones;
            "warn" reports it and returns the best of the balanced networks.
        estimate: estimator of the prevalence; default: maximum likelihood.
        mesh: devices; default: all.

    Returns:
        Variables, and the report with all candidates.

    Raises:
        ValueError: as ``adapt_batch_norm``; fewer than one round.

    >>> import jax, numpy as np, flaxtransfer as ft
    >>> model = ft.Model(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> network = ft.Classifier(model, model.init(jax.random.key(0)), preprocessing)
    >>> labels = np.arange(64) % 2
    >>> source = ft.shift.calibrate(labels[:, None] * [-1.0, 1.0], labels)
    >>> adapted, report = adapt_batch_norm_balanced(
    ...     network, images, source, rounds=1)
    >>> [candidate.name for candidate in report.candidates]
    ['source', 'target statistics', 'balanced, round 1']
    """
    check_guard_option(guard)
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")
    variables = network.variables
    chosen = select_batch_norms(network, where)
    read = image_reader(interleave(images, batch_size), batch_size)

    def balanced_network(name: str, weights: np.ndarray | None = None) -> _Network:
        found = reestimate(
            network,
            read,
            chosen,
            weights=weights,
            source_weight=source_weight,
            mixture=mixture,
            mesh=mesh,
        )
        adapted = {**variables, "batch_stats": found.batch_stats}
        return _Network(name, adapted, found, scores_of(adapted))

    def scores_of(of: Variables) -> UnlabeledScores:
        return unlabeled_scores(
            predict_logits(network.with_variables(of), read, mesh), source, estimate
        )

    networks = [
        _Network("source", variables, None, scores_of(variables)),
        balanced_network("target statistics"),
    ]
    plain = networks[1].statistics
    assert plain is not None
    notes: list[str] = []
    # The better of the two gives the weights of the first round.
    last = _best(networks)
    for number in range(1, rounds + 1):
        shares = last.scores.prevalence
        if not shares.identifiable:
            notes.append(f"round {number} was skipped: {shares.reason}")
            break
        weights = balancing_weights(last.scores.probabilities, source.prior, shares.estimate)
        try:
            balanced = balanced_network(f"balanced, round {number}", weights)
        except TooFewValues as error:
            notes.append(f"round {number} was skipped: {error}")
            break
        networks.append(balanced)
        if number > 1 and balanced.scores.accuracy < last.scores.accuracy:
            break
        last = balanced
    best = _best(networks)
    refusals = _refusals(best, source)
    if refusals:
        best = networks[0] if guard == "refuse" else _best(networks[2:] or networks[1:])
    candidates = tuple(
        Candidate(one.name, one.scores, one.statistics.effective_images if one.statistics else None)
        for one in networks
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
class Candidate:
    """A network that was considered.

    Args:
        name: "source", "target statistics", "balanced, round 1".
        scores: on the target; None without a calibration.
        effective_images: effective sample size behind its statistics (Kish); None for the source.
    """

    name: str
    scores: UnlabeledScores | None
    effective_images: float | None


@dataclass(frozen=True, eq=False)
class BatchNormReport:
    """Report of a BatchNorm adaptation.

    Args:
        adapted: whether the returned variables have new statistics.
        refusals: reasons against the adaptation; with ``guard="warn"`` they are only reported.
        notes: remarks, in sentences.
        statistics: the measured statistics, also if they were refused.
        candidates: the networks that were considered, the source first.
        chosen: name of the returned one.
    """

    adapted: bool
    refusals: tuple[str, ...]
    notes: tuple[str, ...]
    statistics: ReestimatedStatistics
    candidates: tuple[Candidate, ...]
    chosen: str

    @property
    def before(self) -> UnlabeledScores | None:
        """Scores of the source network."""
        return self.candidates[0].scores

    @property
    def after(self) -> UnlabeledScores | None:
        """Scores of the returned network."""
        return next(c.scores for c in self.candidates if c.name == self.chosen)

    @property
    def farthest(self) -> LayerStatistics:
        """The BatchNorm whose statistics changed most."""
        return max(self.statistics.layers, key=lambda layer: layer.distance)

    def __str__(self) -> str:
        found = self.statistics
        lines = [
            f"BatchNorm statistics of {found.images} target images, "
            f"{100 * found.share:.0f} % source; {found.passes} "
            f"pass{'' if found.passes == 1 else 'es'}{'' if found.exact else ', not exact'}; "
            f"largest change at {self.farthest.path}: {self.farthest.distance:.2f} standard "
            "deviations"
        ]
        for one in self.candidates:
            if one.scores is not None:
                mark = " (returned)" if one.name == self.chosen else ""
                lines.append(f"{one.name}{mark}: {one.scores}")
        word = "reason against it" if self.adapted else "not adapted"
        lines += [f"{word}: {reason}" for reason in self.refusals]
        return "\n".join([*lines, *self.notes])


def select_batch_norms(network: Classifier, where: Mask | str | None) -> frozenset[str]:
    """Paths of the BatchNorms to adapt.

    Raises:
        ValueError: there are none, or the mask selects none.
    """
    if network.model.config.norm == "group":
        raise ValueError(
            "this network normalizes groups of channels within each image (GroupNorm): it has no "
            "running statistics, so that there is nothing to adapt"
        )
    chosen = policy(network.params, everything() if where is None else where)
    if not chosen:
        raise ValueError(f"{where!r} selects no BatchNorm, so that there is nothing to adapt")
    return chosen


def check_guard_option(guard: str) -> None:
    """Raises a ValueError for an unknown ``guard``."""
    if guard not in ("refuse", "warn"):
        raise ValueError(f"guard must be 'refuse' or 'warn', got {guard!r}")


def check_guards(
    before: UnlabeledScores, after: UnlabeledScores, source: Calibration
) -> tuple[list[str], list[str]]:
    """Reasons against the statistics of the target, and notes.

    Args:
        before: scores of the source network on the target.
        after: scores of the adapted network.
        source: calibration of the source network.
    """
    if reason := conflicting_class_shares(before, after, source):
        return [reason], []
    change = accuracy_change_z(before, after)
    # The network with the higher estimated accuracy estimates the class shares better.
    shares = (before if before.accuracy >= after.accuracy else after).prevalence
    refusals: list[str] = []
    notes: list[str] = []
    if change < -SIGNIFICANT:
        refusals.append(
            f"the estimated accuracy falls from {100 * before.accuracy:.1f} to "
            f"{100 * after.accuracy:.1f} %"
        )
    if single := single_class(shares):
        refusals.append(single)
    elif (distant := exceeds_shift(shares)) and change <= SIGNIFICANT:
        refusals.append(f"{distant}, and the estimated accuracy does not rise significantly")
    elif distant:
        notes.append(f"{distant}: use adapt_batch_norm_balanced")
    if not shares.identifiable:
        notes.append(f"label shift cannot be ruled out: {shares.reason}")
    return refusals, notes


@dataclass(frozen=True, eq=False)
class _Network:
    """A candidate; the source has no statistics of the target."""

    name: str
    variables: Variables
    statistics: ReestimatedStatistics | None
    scores: UnlabeledScores


def _best(networks: list[_Network]) -> _Network:
    """The network with the highest estimated accuracy; of equal ones, the first."""
    return max(networks, key=lambda one: one.scores.accuracy)


def _refusals(best: _Network, source: Calibration) -> list[str]:
    """Reasons against statistics of this target."""
    reasons = []
    if best.statistics is None:
        reasons.append(
            "no new statistics have a higher estimated accuracy than those of the source"
        )
    if single := single_class(best.scores.prevalence):
        reasons.append(single)
    if unreliable := unreliable_predictions(best.scores, source):
        reasons.append(f"{unreliable}, and no other is better: predictions cannot weight images")
    return reasons
