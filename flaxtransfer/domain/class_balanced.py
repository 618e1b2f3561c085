"""BatchNorm statistics of a target with other class shares, as if it had those of the source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from flaxtransfer.domain.batch_norm import Guard, batch_norms, check_guard
from flaxtransfer.domain.images import Images, dealt, reader, target_logits
from flaxtransfer.domain.reestimation import Reestimated, TooFewValues, reestimate
from flaxtransfer.domain.report import BatchNormReport, Candidate
from flaxtransfer.domain.standing import Estimate, Standing, one_class, standing, weak
from flaxtransfer.masks import Mask
from flaxtransfer.models import Model
from flaxtransfer.shift.batch_statistics import Mixture, balancing_weights
from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.types import Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["adapt_batch_norm_balanced"]


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
      images: unlabelled, of the target.
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
    >>> model = ft.Model(ft.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
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
    read = reader(dealt(images, batch_size), batch_size)

    def network(name: str, weights: np.ndarray | None = None) -> _Network:
        found = reestimate(
            model, variables, read, preprocessing, chosen,
            weights=weights, source_weight=source_weight, mixture=mixture, mesh=mesh,
        )  # fmt: skip
        adapted = {**variables, "batch_stats": found.batch_stats}
        return _Network(name, adapted, found, stands(adapted))

    def stands(of: Variables) -> Standing:
        return standing(target_logits(model, of, read, preprocessing, mesh), source, estimate)

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
    standing: Standing


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
    if little := weak(best.standing, source):
        reasons.append(f"{little}, and no other is surer: predictions cannot weigh images")
    return reasons
