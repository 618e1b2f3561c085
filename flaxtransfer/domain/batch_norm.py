"""BatchNorm statistics of a target without labels, where it is safe to take them."""

from __future__ import annotations

from typing import Literal

from jax.sharding import Mesh

from flaxtransfer.batchnorm import policy
from flaxtransfer.domain.images import Images, dealt, reader, target_logits
from flaxtransfer.domain.reestimation import reestimate
from flaxtransfer.domain.report import BatchNormReport, Candidate
from flaxtransfer.domain.standing import (
    CLEAR,
    Estimate,
    Standing,
    contradiction,
    far,
    one_class,
    standing,
    support,
)  # fmt: skip
from flaxtransfer.masks import Mask, everything
from flaxtransfer.models import Model
from flaxtransfer.shift.batch_statistics import Mixture
from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.types import Variables
from flaxtransfer.weights import Preprocessing

__all__ = ["Guard", "adapt_batch_norm", "batch_norms", "check_guard", "judged"]

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
    """The network with BatchNorm statistics of unlabelled target images.

    You want it where images have changed (contrast, brightness, blur, noise, another scanner) and
    classes are about as common as at the source. It is not for label shift: statistics of a
    target with other class shares remove the very difference that tells classes apart, and
    ``adapt_batch_norm_balanced`` is for that. Nothing is learned, and the weights stay.

    Statistics are measured in training mode: each BatchNorm normalises by its batch, so that the
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
      images: unlabelled, of the target.
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
    >>> model = ft.Model(ft.ResNetConfig(depths=(1, 1, 1, 1), width=2, classes=2))
    >>> variables = model.init(jax.random.key(0))
    >>> images = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), np.uint8)
    >>> preprocessing = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, 16)
    >>> adapted, report = adapt_batch_norm(model, variables, images, preprocessing)
    >>> report.adapted, report.statistics.images, report.statistics.exact
    (True, 64, True)
    """
    check_guard(guard)
    chosen = batch_norms(model, variables, where)
    read = reader(dealt(images, batch_size), batch_size)
    found = reestimate(
        model, variables, read, preprocessing, chosen,
        source_weight=source_weight, mixture=mixture, passes=passes, mesh=mesh,
    )  # fmt: skip
    adapted = {**variables, "batch_stats": found.batch_stats}
    before = after = None
    refusals: list[str] = []
    notes: list[str] = []
    if source is None:
        notes.append("no calibration was given: neither label shift nor confidence was looked at")
    else:
        before, after = (
            standing(target_logits(model, v, read, preprocessing, mesh), source, estimate)
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
            "this network normalises by groups of channels within each image (GroupNorm): it has "
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


def judged(before: Standing, after: Standing, source: Calibration) -> tuple[list[str], list[str]]:
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
    elif (distant := far(shares)) and change <= CLEAR:
        refusals.append(f"{distant}, and the estimated accuracy does not clearly rise")
    elif distant:
        notes.append(f"{distant}: adapt_batch_norm_balanced is made for that")
    if not shares.identifiable:
        notes.append(f"label shift cannot be excluded: {shares.reason}")
    return refusals, notes
