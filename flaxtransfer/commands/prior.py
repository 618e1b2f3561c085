"""Predictions of a run for images in which classes are differently common than in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from flaxtransfer.paths import suggest
from flaxtransfer.shift.calibration.calibrating import calibrate
from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.prevalence.correction import adjust_prior
from flaxtransfer.shift.prevalence.guarded_correction import correct_prior
from flaxtransfer.training.run_folder import validation_of

__all__ = ["Known", "adjusted", "given_prior", "known_of"]

_FEWEST_VALIDATION = 5
"""Validation examples a class, on average: with fewer, not even a temperature is known."""


@dataclass(frozen=True, eq=False)
class Known:
    """What a finished run knows of its validation examples.

    Args:
      calibration: of its network, fitted on them.
      features: float [examples, channels], what its head saw of them; None where the run is older
        than runs that keep them.
    """

    calibration: Calibration
    features: np.ndarray | None


def known_of(run: Path) -> Known:
    """The calibration of a finished run's network, on its validation examples, and their features.

    Raises:
      FileNotFoundError: the run keeps none, or has not finished.
      ValueError: they are too few.
    """
    found = validation_of(run)
    count, classes = found.logits.shape
    if count < _FEWEST_VALIDATION * classes:
        raise ValueError(
            f"the run in {run} has {count} validation examples, and a correction of the prior needs"
            f" {_FEWEST_VALIDATION * classes} for its {classes} classes; train with more of them"
        )
    return Known(calibrate(found.logits, found.labels), found.features)


def given_prior(shares: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """Class shares as they are typed; None where none are.

    Args:
      shares: "0.2", "0.8", or "dark=0.2", "bright=0.8".
      names: of the run's classes.

    Raises:
      ValueError: other classes, another number of them, numbers that are no shares.

    >>> given_prior(["bright=0.8", "dark=0.2"], ["dark", "bright"])
    array([0.2, 0.8])
    """
    if not shares:
        return None
    pairs = [share.rpartition("=") for share in shares]
    if any(sign for _, sign, _ in pairs):
        given = {name: value for name, _, value in pairs}
        problems = [f"no class {n!r}{suggest(n, names)}" for n in given if n not in names]
        if missing := [name for name in names if name not in given]:
            problems.append(f"no share for {', '.join(map(repr, missing))}")
        if len(given) < len(pairs):
            problems.append("a class is named twice")
        if problems:
            raise ValueError(f"--prior: {'; '.join(problems)}")
        shares = [given[name] for name in names]
    if len(shares) != len(names):
        raise ValueError(
            f"--prior has {len(shares)} numbers, and the run has {len(names)} classes: "
            + ", ".join(names)
        )
    try:
        found = np.array([float(share) for share in shares])
    except ValueError:
        raise ValueError(f"--prior: shares are numbers, not {' '.join(shares)}") from None
    if not (found >= 0).all() or abs(found.sum() - 1) > 1e-3:
        raise ValueError(
            f"--prior: shares are 0 or more and sum to 1; {' '.join(shares)} sum to "
            f"{found.sum():.6g}"
        )
    return found / found.sum()


def adjusted(
    logits: np.ndarray,
    features: np.ndarray,
    known: Known,
    prior: np.ndarray | None,
    names: Sequence[str],
    console: Console,
) -> np.ndarray:
    """Corrected probabilities ``[images, classes]``; what was done goes to ``console``.

    Args:
      logits: ``[images, classes]``.
      features: ``[images, channels]``, what the head saw of the same images.
      known: of the run.
      prior: class shares; None to estimate them.
      names: of the classes.
      console: for notes.

    Raises:
      ValueError: the prior is to be estimated, and there is a reason against it.
    """
    source = known.calibration
    calibrated = source.apply(logits)
    if prior is not None:
        corrected = adjust_prior(calibrated, prior, source_prior=source.prior)
        lines = [f"prior as given, {_calibrated(source)}"]
        lines += [f"{n}: {p:.3f} -> {q:.3f}" for n, p, q in zip(names, source.prior, prior,
                                                                strict=True)]  # fmt: skip
    else:
        both = None
        if known.features is not None:
            # In the precision that the run kept, so that rounding is no difference.
            both = known.features, features.astype(known.features.dtype)
        found = correct_prior(logits, source, features=both)
        if not found.adjusted or found.prevalence is None:
            raise ValueError(
                f"the prior is not adjusted: {'; '.join(found.refusals)}; without --adjust-prior "
                "predictions are for classes as common as in the validation examples, and --prior "
                "takes known shares"
            )
        corrected, shares = found.probabilities, found.prevalence
        lines = [f"prior by {shares.method} on {len(logits)} images, {_calibrated(source)}"]
        lines += [
            f"{name}: {p:.3f} -> {q:.3f} ({low:.3f} to {high:.3f} at {shares.level:.0%})"
            for name, p, q, low, high in zip(
                names, shares.source, shares.estimate, shares.low, shares.high, strict=True
            )
        ]
    changed = int((corrected.argmax(1) != calibrated.argmax(1)).sum())
    lines.append(f"{changed} of {len(logits)} predictions changed")
    for line in (*source.notes, *lines):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return corrected


def _calibrated(source: Calibration) -> str:
    method = source.method.replace("_", "-")
    return f"relative to {len(source.labels)} validation examples ({method} calibration)"
