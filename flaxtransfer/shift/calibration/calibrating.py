"""Calibrates a model on held-out examples, by the largest map that they determine."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from flaxtransfer.shift.calibration.calibration import Calibration
from flaxtransfer.shift.calibration.scaling import (
    ABSENT_PENALTY,
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Scaling,
    fit_scaling,
)
from flaxtransfer.shift.checks import as_labels, as_logits

__all__ = ["CalibrationMethod", "calibrate"]

CalibrationMethod = Literal["none", "temperature", "bias_corrected", "vector"]

_EXAMPLES_PER_CLASS = 10
"""On average; with fewer, biases follow the noise of the labels' frequencies."""

_TOLERANCE = 1e-8


def calibrate(
    logits: Any, labels: Any, *, method: CalibrationMethod = "bias_corrected"
) -> Calibration:
    """Fits the map from a model's logits to calibrated probabilities.

    You want it before anything that reads probabilities as such: prevalence, prior correction,
    accuracy without labels. The examples must be held out from training and come from the source;
    it is no adaptation to a target. Estimating prevalence wants "bias_corrected": a temperature
    alone leaves the mean probability of a class away from its frequency.

    The maps are nested, and data too poor for one get the next smaller, with a note: fewer than
    10 examples a class on average have no biases; where classes can be separated without an error,
    the likelihood grows for ever and "vector" becomes "bias_corrected", that "temperature". Where
    every example is right, no temperature has the largest likelihood either; the one is taken with
    which the mean confidence is (n + 1) / (n + 2), Laplace's rule of succession. A class without
    examples keeps a finite bias by a penalty of 1e-3 / 2 times the square of its distance from the
    mean bias of the others. Scales lie between 1e-6 (for logits of root mean square 1) and 1000.

    Args:
        logits: `[n, K]`, logits or log-probabilities, of numpy or JAX; probabilities go through
            `logits_of` first.
        labels: `[n]`, classes from 0 to K - 1.
        method: "none" leaves probabilities as they are; "temperature" has one scale;
            "bias_corrected" one scale and K biases; "vector" K of each.

    Returns:
        The map, the validation examples' calibrated probabilities, the gradient norm that was
        reached (1e-8 or a note), notes.

    Raises:
        ValueError: logits or labels are broken, the method is unknown, or there is one class
            alone.

    >>> found = calibrate([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [0, 1, 1], method="temperature")
    >>> found.probabilities[:, 0].round(4).tolist()  # two of three are right, and so sure it is
    [0.6667, 0.6667, 0.3333]

    References:
        A. Alexandari, A. Kundaje, A. Shrikumar, "Maximum likelihood with bias-corrected calibration
        is hard-to-beat at label shift adaptation", 2020.
        C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On calibration of modern neural networks", 2017.
    """
    found = as_logits(logits, "logits")
    classes = found.shape[1]
    known = as_labels(labels, "labels", count=len(found), classes=classes)
    if method not in get_args(CalibrationMethod):
        names = ", ".join(repr(name) for name in get_args(CalibrationMethod))
        raise ValueError(f"method is {method!r}; there are {names}")
    counts = np.bincount(known, minlength=classes)
    if method != "none" and (counts > 0).sum() < 2:
        raise ValueError(
            f"all {len(known)} labels are class {known[0]}: one class calibrates nothing; validate "
            "on examples of at least two, or use method='none'"
        )
    centred = found - found.mean(axis=1, keepdims=True)
    fit, used, notes = _fit(centred, known, method)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        notes.append(_about_absent(absent, used))
    if (found >= 0).all() and np.allclose(found.sum(1), 1, atol=1e-3):
        notes.append(
            "every row of the logits is non-negative and sums to 1: if these are probabilities, "
            "give logits_of(probabilities)"
        )
    notes.extend(_about_scale(fit, used))
    return Calibration(
        method=used,
        scale=fit.scale,
        bias=fit.bias,
        probabilities=np.exp(log_softmax(centred * fit.scale + fit.bias, axis=1)),
        labels=known,
        notes=tuple(notes),
        gradient_norm=None if np.isnan(fit.gradient_norm) else fit.gradient_norm,
    )


def _fit(
    centred: np.ndarray, labels: np.ndarray, method: CalibrationMethod
) -> tuple[Scaling, CalibrationMethod, list[str]]:
    """The fit, the method it belongs to, and why that is not the one asked for."""
    count, classes = centred.shape
    notes: list[str] = []
    if method == "none":
        return _given(1.0, classes), "none", notes
    if method != "temperature" and count < _EXAMPLES_PER_CLASS * classes:
        notes.append(
            f"{count} validation examples are fewer than {_EXAMPLES_PER_CLASS} for each of "
            f"{classes} classes: calibrated by a temperature alone"
        )
        method = "temperature"
    if method == "vector" and classes == 2:
        # Two scales enter as their sum alone; equal ones are the same map.
        return fit_scaling(centred, labels, "bias_corrected"), "vector", notes
    if method == "vector":
        fit = fit_scaling(centred, labels, "vector")
        if not fit.undetermined:
            return fit, "vector", notes
        notes.append(
            f"the validation examples do not determine the scales of class(es) "
            f"{_listed(fit.undetermined)}, as some class is separated without an error: calibrated "
            "by one scale and biases"
        )
        method = "bias_corrected"
    if method == "bias_corrected":
        fit = fit_scaling(centred, labels, "bias_corrected")
        if not fit.undetermined:
            return fit, "bias_corrected", notes
        notes.append(
            "the validation examples do not determine scale and biases (the classes are separated "
            "without an error): calibrated by a temperature alone"
        )
    wrong = (centred.argmax(1) != labels).sum()
    fit = fit_scaling(centred, labels, "temperature")
    if wrong or not fit.undetermined:
        return fit, "temperature", notes
    notes.append(
        f"all {count} validation examples are right, and say only that errors are rare: the "
        "temperature gives them the mean confidence (n + 1) / (n + 2); treat what follows from it "
        "with care, or validate on more and harder examples"
    )
    return _given(_succession(centred), classes), "temperature", notes


def _succession(centred: np.ndarray) -> float:
    """The scale at which the mean confidence is (n + 1) / (n + 2), as far as there is one."""
    count = len(centred)
    wanted = (count + 1) / (count + 2)

    def excess(log_scale: float) -> float:
        return float(softmax(np.exp(log_scale) * centred, axis=1).max(1).mean()) - wanted

    unit = float(np.sqrt(np.mean(centred**2)))
    low, high = np.log(SMALLEST_SCALE / unit), np.log(LARGEST_SCALE)
    if excess(high) <= 0:
        return LARGEST_SCALE
    return float(np.exp(brentq(excess, low, high, xtol=1e-12)))


def _given(scale: float, classes: int) -> Scaling:
    return Scaling(np.full(classes, scale), np.zeros(classes), float("nan"), (), ())


def _listed(classes: Sequence[int]) -> str:
    return ", ".join(str(k) for k in classes[:10]) + (", ..." if len(classes) > 10 else "")


def _about_absent(absent: np.ndarray, method: CalibrationMethod) -> str:
    text = f"no validation example of {len(absent)} class(es): {_listed(absent.tolist())}"
    if method in ("bias_corrected", "vector"):
        text += f"; a penalty of {ABSENT_PENALTY:g} holds their bias, not data"
    return text


def _about_scale(fit: Scaling, method: CalibrationMethod) -> list[str]:
    notes = []
    low = [k for k, bound in fit.bounds if bound < LARGEST_SCALE]
    high = [k for k, bound in fit.bounds if bound >= LARGEST_SCALE]
    each = method == "vector" and len(fit.scale) > 2
    if low:
        which = f" of class(es) {_listed(low)}" if each else ""
        notes.append(
            f"the scale{which} is at its lower bound: the classes with the larger logits are not "
            "the more frequent ones here"
        )
    if high:
        which = f" of class(es) {_listed(high)}" if each else ""
        notes.append(
            f"the scale{which} is at its upper bound, {LARGEST_SCALE:g}: are these logits?"
        )
    if fit.gradient_norm > _TOLERANCE:
        notes.append(
            f"the fit ended at a gradient norm of {fit.gradient_norm:.1e}, above {_TOLERANCE:g}"
        )
    return notes
