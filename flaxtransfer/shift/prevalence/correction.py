"""Predictions under another prevalence, by Bayes' rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_prior, as_probabilities
from flaxtransfer.shift.prevalence.prevalence import Prevalence

__all__ = ["adjust_prior"]


def adjust_prior(
    probabilities: Any,
    prevalence: Prevalence | Any,
    *,
    source_prior: Any = None,
    force: bool = False,
) -> np.ndarray:
    """Calibrated probabilities as they are where the classes are differently common.

    ``f_k q_k / p_k``, made to sum to 1: right if the classes look the same as at the source and are
    only more or less common. Where the inputs themselves have changed it does harm: calibrate, and
    look at the diagnosis first. The most probable class changes only where it was in doubt.

    Args:
        probabilities: `[m, K]`, calibrated at the source.
        prevalence: an estimate, which knows its source prior, or the target's prior `[K]`.
        source_prior: `[K]`, the prior that `probabilities` are right for; has to be given with a
            prior, and not with an estimate.
        force: take an estimate that the data do not determine.

    Returns:
        `[m, K]`, float64. Classes of prevalence 0 get exactly 0.

    Raises:
        ValueError: an estimate that is not identifiable; a source prior that is missing or given
            twice; a class that the source never has and the target does; a row that only classes
            without prevalence could explain.

    >>> adjust_prior([[0.5, 0.5]], [0.9, 0.1], source_prior=[0.5, 0.5])
    array([[0.9, 0.1]])

    References:
        M. Saerens, P. Latinne, C. Decaestecker, "Adjusting the outputs of a classifier to new a
        priori probabilities: a simple procedure", 2002.
    """
    found = as_probabilities(probabilities, "probabilities")
    classes = found.shape[1]
    if isinstance(prevalence, Prevalence):
        if not prevalence.identifiable and not force:
            raise ValueError(
                f"the target does not determine its prevalence: {prevalence.reason}; a correction "
                "by it would be arbitrary (force=True makes it all the same)"
            )
        if source_prior is not None:
            raise ValueError("a Prevalence has its source prior; source_prior is for plain arrays")
        target, source_prior = prevalence.estimate, prevalence.source
    elif source_prior is None:
        raise ValueError(
            "source_prior is missing: a target's prior corrects relative to the source's, "
            "Calibration.prior"
        )
    else:
        target = prevalence
    q = as_prior(target, "the target's prior", classes=classes)
    p = as_prior(source_prior, "the source's prior", classes=classes)
    new = np.flatnonzero((p == 0) & (q > 0))
    if len(new):
        raise ValueError(
            f"the source's prior of classes {new.tolist()} is 0 and the target's is not: a model "
            "that has never seen a class cannot be corrected to see it"
        )
    with np.errstate(divide="ignore"):
        scores = np.log(found) + np.log(np.where(q > 0, q / np.where(p > 0, p, 1), 0))
    top = scores.max(1, keepdims=True)
    lost = np.isneginf(top[:, 0])
    if lost.any():
        raise ValueError(
            f"{int(lost.sum())} rows, first row {int(np.argmax(lost))}, hold nothing but classes "
            f"whose prevalence is 0, {np.flatnonzero(q == 0).tolist()[:10]}; a floor under the "
            "prevalence, as 1e-6, keeps them possible"
        )
    weighted = np.exp(scores - top)
    return weighted / weighted.sum(1, keepdims=True)
