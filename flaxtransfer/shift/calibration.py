"""Calibration: temperature scaling, bias-corrected temperature scaling and vector scaling.

``calibrate`` fits an affine map of logits on held-out examples of the source by maximum likelihood
and returns a ``Calibration``: the map together with the calibrated validation examples, which every
other estimator of this room takes as its ``source``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from flaxtransfer.shift.checks import as_labels, as_logits, as_probabilities
from flaxtransfer.shift.optimize import Minimum, minimize

__all__ = [
    "Calibration",
    "CalibrationMethod",
    "Scaling",
    "calibrate",
    "fit_scaling",
    "logits_of",
]

_MIN_PROBABILITY = 1e-12
"""Smaller probabilities, 0 included, are raised to this before the logarithm."""

Form = Literal["temperature", "bias_corrected", "vector"]

LARGEST_SCALE = 1e3

SMALLEST_SCALE = 1e-6
"""For logits with a root mean square of 1; a constant prediction to six digits."""

ABSENT_PENALTY = 1e-3
"""Half of it times the square of (bias of an absent class - mean bias of the others) is added to
the mean loss. Without it that bias would decrease without bound."""

_DIVERGING_STEP = 1e-3
"""In logits: a Newton step is of the order of 1 where the likelihood has no maximum, and close to
0 at a maximum."""

_DENSE_PARAMETERS = 2500
"""Up to here a dense Hessian (50 MB) is at least as fast as Hessian-vector products."""

CalibrationMethod = Literal["none", "temperature", "bias_corrected", "vector"]

_EXAMPLES_PER_CLASS = 10
"""On average; with fewer, biases fit the noise of the label frequencies."""

_TOLERANCE = 1e-8


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration map of logits, with the validation examples that it was fitted on.

    Every estimate on a target is relative to a source; this is the ``source`` argument of the other
    estimators. The map is ``softmax(scale * centered + bias)``, where ``centered`` are the logits
    minus the mean of their row, so that log-probabilities can be used in place of logits.

    Args:
        method: The method used: "none", "temperature", "bias_corrected" or "vector". Where it is
            simpler than the method asked for, ``notes`` say why.
        scale: ``[K]``, positive; K equal numbers (1 / temperature) except for "vector".
        bias: ``[K]``, of sum 0; zeros for "none" and "temperature".
        probabilities: ``[n, K]``, calibrated, of the held-out validation examples.
        labels: ``[n]``, their classes, int64.
        notes: What the reader must know: absent classes, a fallback to a simpler map.
        gradient_norm: Gradient norm of the mean negative log-likelihood in scale and bias at the
            end of the fit; None where nothing was fitted.
    """

    method: str
    scale: np.ndarray
    bias: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = ()
    gradient_norm: float | None = None

    @property
    def classes(self) -> int:
        """Number of classes, K."""
        return int(self.probabilities.shape[1])

    @property
    def prior(self) -> np.ndarray:
        """Source prior ``[K]``: the mean calibrated probability, not the label frequency.

        A target identical to the source then has exactly this prevalence.
        """
        prior: np.ndarray = self.probabilities.mean(0)
        return prior

    def apply(self, logits: Any) -> np.ndarray:
        """Calibrated probabilities ``[m, K]`` of logits or log-probabilities ``[m, K]``.

        Raises:
            ValueError: Logits that are not finite, or of another number of classes.
        """
        found = as_logits(logits, "logits")
        if found.shape[1] != self.classes:
            raise ValueError(
                f"logits must have one column per class, {self.classes}, got {found.shape[1]}"
            )
        # With a scale per class, a constant added to a row would otherwise change the result.
        centered = found - found.mean(axis=1, keepdims=True)
        calibrated: np.ndarray = np.exp(log_softmax(centered * self.scale + self.bias, axis=1))
        return calibrated


def calibrate(
    logits: Any, labels: Any, *, method: CalibrationMethod = "bias_corrected"
) -> Calibration:
    """Temperature, bias-corrected and vector scaling of logits by maximum likelihood.

    Use it before anything that needs calibrated probabilities: prevalence, prior correction,
    accuracy without labels. The examples must be held out from training and come from the source;
    it is not an adaptation to a target. For prevalence use "bias_corrected": temperature scaling
    alone leaves the mean probability of a class different from its frequency.

    The methods are nested. Data that do not determine one get the next simpler one, with a note:
    fewer than 10 examples per class on average allow no biases; where classes are separated without
    an error, the likelihood has no maximum and "vector" becomes "bias_corrected", and that becomes
    "temperature". Where every example is predicted correctly, no temperature maximizes the
    likelihood; the one with a mean confidence of (n + 1) / (n + 2) is used (Laplace's rule of
    succession). The bias of a class without examples is kept finite by a penalty of 1e-3 / 2 times
    its squared distance from the mean bias of the others. Scales lie between 1e-6 (for logits with
    a root mean square of 1) and 1000.

    Args:
        logits: ``[n, K]``, logits or log-probabilities, NumPy or JAX; convert probabilities with
            ``logits_of`` first.
        labels: ``[n]``, classes from 0 to K - 1.
        method: "none" leaves probabilities unchanged; "temperature" has one scale;
            "bias_corrected" one scale and K biases; "vector" K scales and K biases.

    Returns:
        The map, the calibrated probabilities of the validation examples, the final gradient norm
        (at most 1e-8, or a note says otherwise), and notes.

    Raises:
        ValueError: Invalid logits or labels, an unknown method, or labels of one class only.

    >>> found = calibrate([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [0, 1, 1], method="temperature")
    >>> found.probabilities[:, 0].round(4).tolist()  # 2 of 3 are correct, and so is the confidence
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
        raise ValueError(f"method must be one of {names}, got {method!r}")
    counts = np.bincount(known, minlength=classes)
    if method != "none" and (counts > 0).sum() < 2:
        raise ValueError(
            f"labels must have >= 2 classes, got {len(known)} labels of class {known[0]}; use "
            "validation examples of several classes, or method='none'"
        )
    centered = found - found.mean(axis=1, keepdims=True)
    fit, used, notes = _fit(centered, known, method)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        notes.append(_absent_note(absent, used))
    if (found >= 0).all() and np.allclose(found.sum(1), 1, atol=1e-3):
        notes.append(
            "every row of the logits is non-negative and sums to 1: if these are probabilities, "
            "pass logits_of(probabilities)"
        )
    notes.extend(_scale_notes(fit, used))
    return Calibration(
        method=used,
        scale=fit.scale,
        bias=fit.bias,
        probabilities=np.exp(log_softmax(centered * fit.scale + fit.bias, axis=1)),
        labels=known,
        notes=tuple(notes),
        gradient_norm=None if np.isnan(fit.gradient_norm) else fit.gradient_norm,
    )


def logits_of(probabilities: Any, name: str = "probabilities") -> np.ndarray:
    """Logits ``[n, K]`` of probabilities ``[n, K]``: their logarithms, with 0 replaced by 1e-12.

    Use it for a model that returns probabilities only; a softmax is the inverse.

    Raises:
        ValueError: The array does not hold probabilities.

    >>> logits_of([[1.0, 0.0]]).round(2).tolist()
    [[0.0, -27.63]]
    """
    logits: np.ndarray = np.log(np.maximum(as_probabilities(probabilities, name), _MIN_PROBABILITY))
    return logits


def fit_scaling(centered: np.ndarray, labels: np.ndarray, form: Form) -> Scaling:
    """Scale and bias that minimize the mean negative log-likelihood, which is convex in both.

    Args:
        centered: Logits ``[n, K]`` whose rows have mean 0.
        labels: ``[n]``.
        form: "temperature" has one scale, "bias_corrected" one scale and K biases, "vector" K
            scales and K biases.
    """
    classes = centered.shape[1]
    # In this unit the softmax is neither flat nor saturated at the start, whatever the size of the
    # logits.
    unit = float(np.sqrt(np.mean(centered**2))) or 1.0
    likelihood = _Likelihood(centered / unit, labels, form)
    scales = classes if form == "vector" else 1
    biases = 0 if form == "temperature" else classes
    count = scales + biases
    start = np.zeros(count)
    start[:scales] = 1
    lower, upper = np.full(count, -np.inf), np.full(count, np.inf)
    lower[:scales], upper[:scales] = SMALLEST_SCALE, LARGEST_SCALE * unit
    units = np.ones(count)
    units[:scales] = unit
    found: Minimum = minimize(likelihood.at, start, lower=lower, upper=upper, units=units)
    scale, bias = likelihood.expand(found.point)
    steps = np.abs(likelihood.expand(found.step))
    ends = np.flatnonzero((found.point[:scales] <= lower[0]) | (found.point[:scales] >= upper[0]))
    return Scaling(
        scale=np.minimum(scale / unit, LARGEST_SCALE),
        bias=bias - bias.mean(),
        gradient_norm=found.gradient_norm,
        undetermined=tuple(np.flatnonzero(np.maximum(*steps) > _DIVERGING_STEP).tolist()),
        bounds=tuple((int(k), float(found.point[k] / unit)) for k in ends),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """Maximum-likelihood fit of ``softmax(scale * centered logits + bias)``.

    Args:
        scale: ``[K]``.
        bias: ``[K]``, of sum 0.
        gradient_norm: Of the mean negative log-likelihood, penalty included, in scale and bias.
        undetermined: Classes whose scale or bias has no maximum-likelihood value; every class where
            one scale for all has none.
        bounds: Classes whose scale ended at a bound, with the bound.
    """

    scale: np.ndarray
    bias: np.ndarray
    gradient_norm: float
    undetermined: tuple[int, ...]
    bounds: tuple[tuple[int, float], ...]


class _Likelihood:
    """The mean negative log-likelihood as a function of the parameters of a form."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray, form: Form) -> None:
        count, classes = logits.shape
        self.logits, self.labels, self.form = logits, labels, form
        self.rows = np.arange(count)
        self.frequency = np.bincount(labels, minlength=classes) / count
        observed = logits[self.rows, labels]
        self.moments = np.bincount(labels, weights=observed, minlength=classes) / count
        present = self.frequency > 0
        # Each row compares one absent class with the mean of the present ones.
        missing = np.flatnonzero(~present) if form != "temperature" else np.arange(0)
        self.absent = np.tile(-(present / present.sum()), (len(missing), 1))
        self.absent[np.arange(len(missing)), missing] = 1

    def expand(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales ``[K]`` and biases ``[K]`` from the parameter vector."""
        classes = self.logits.shape[1]
        if self.form == "vector":
            return parameters[:classes], parameters[classes:]
        bias = parameters[1:] if self.form == "bias_corrected" else np.zeros(classes)
        return np.full(classes, parameters[0]), bias

    def reduce(self, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        """Transpose of ``expand``."""
        if self.form == "vector":
            return np.concatenate([scales, biases])
        total = scales.sum(keepdims=True)
        return np.concatenate([total, biases]) if self.form == "bias_corrected" else total

    def at(self, parameters: np.ndarray) -> _Point:
        return _Point(self, parameters)


class _Point:
    """Value, gradient and curvature at one parameter vector."""

    def __init__(self, likelihood: _Likelihood, parameters: np.ndarray) -> None:
        self.of = likelihood
        scale, bias = likelihood.expand(parameters)
        scores = likelihood.logits * scale + bias
        scores -= scores.max(axis=1, keepdims=True)
        observed = scores[likelihood.rows, likelihood.labels]
        # In place: there may be a thousand classes.
        self.probabilities = np.exp(scores, out=scores)
        totals = self.probabilities.sum(1)
        self.probabilities /= totals[:, None]
        self.distances = likelihood.absent @ bias
        self.value = float(np.mean(np.log(totals) - observed))
        self.value += ABSENT_PENALTY / 2 * float(self.distances @ self.distances)
        count = len(totals)
        self.mean = self.probabilities.mean(0)
        moments = np.einsum("ik,ik->k", self.probabilities, likelihood.logits) / count
        self.gradient = likelihood.reduce(
            moments - likelihood.moments,
            self.mean
            - likelihood.frequency
            + ABSENT_PENALTY * likelihood.absent.T @ self.distances,
        )

    def hessian_product(self, direction: np.ndarray) -> np.ndarray:
        of = self.of
        scale, bias = of.expand(direction)
        change = of.logits * scale + bias
        change -= np.einsum("ik,ik->i", self.probabilities, change)[:, None]
        change *= self.probabilities
        count = len(change)
        biases = change.sum(0) / count + ABSENT_PENALTY * of.absent.T @ (of.absent @ bias)
        # A constant added to all biases changes nothing; this term fixes it at 0.
        biases += bias.mean()
        return of.reduce(np.einsum("ik,ik->k", change, of.logits) / count, biases)

    def hessian(self) -> np.ndarray | None:
        of, p, logits = self.of, self.probabilities, self.of.logits
        count, classes = logits.shape
        if of.form == "temperature":
            return self.hessian_product(np.ones(1))[:, None]
        if len(self.gradient) > _DENSE_PARAMETERS:
            return None
        biases = np.diag(self.mean) - p.T @ p / count
        biases += ABSENT_PENALTY * of.absent.T @ of.absent + 1 / classes
        if of.form == "bias_corrected":
            first = np.zeros(1 + classes)
            first[0] = 1
            first = self.hessian_product(first)
            return np.block([[first[:1, None], first[None, 1:]], [first[1:, None], biases]])
        weighted = p * logits
        mixed = np.diag(weighted.mean(0)) - weighted.T @ p / count
        squares = np.einsum("ik,ik->k", weighted, logits) / count
        scales = np.diag(squares) - weighted.T @ weighted / count
        return np.block([[scales, mixed], [mixed.T, biases]])

    def diagonal(self) -> np.ndarray:
        of, p, count = self.of, self.probabilities, len(self.of.rows)
        spread = p * (1 - p)
        biases = spread.sum(0) / count + ABSENT_PENALTY * (of.absent**2).sum(0)
        if of.form == "vector":
            scales = np.einsum("ik,ik->k", spread, of.logits**2) / count
        else:
            first = np.zeros(1 + len(biases) * (of.form == "bias_corrected"))
            first[0] = 1
            scales = np.zeros_like(biases)
            scales[0] = self.hessian_product(first)[0]
        return of.reduce(scales, biases)


def _fit(
    centered: np.ndarray, labels: np.ndarray, method: CalibrationMethod
) -> tuple[Scaling, CalibrationMethod, list[str]]:
    """The fit, the method it belongs to, and notes on a simpler method than the one asked for."""
    count, classes = centered.shape
    notes: list[str] = []
    if method == "none":
        return _fixed_scaling(1.0, classes), "none", notes
    if method != "temperature" and count < _EXAMPLES_PER_CLASS * classes:
        notes.append(
            f"{count} validation examples are fewer than {_EXAMPLES_PER_CLASS} for each of "
            f"{classes} classes: calibrated by temperature scaling"
        )
        method = "temperature"
    if method == "vector" and classes == 2:
        # For 2 classes only the sum of the scales matters; equal ones are the same map.
        return fit_scaling(centered, labels, "bias_corrected"), "vector", notes
    if method == "vector":
        fit = fit_scaling(centered, labels, "vector")
        if not fit.undetermined:
            return fit, "vector", notes
        notes.append(
            f"the validation examples do not determine the scales of class(es) "
            f"{_list_classes(fit.undetermined)}, because a class is separated without an error: "
            "calibrated by one scale and biases"
        )
        method = "bias_corrected"
    if method == "bias_corrected":
        fit = fit_scaling(centered, labels, "bias_corrected")
        if not fit.undetermined:
            return fit, "bias_corrected", notes
        notes.append(
            "the validation examples do not determine scale and biases (the classes are separated "
            "without an error): calibrated by temperature scaling"
        )
    wrong = (centered.argmax(1) != labels).sum()
    fit = fit_scaling(centered, labels, "temperature")
    if wrong or not fit.undetermined:
        return fit, "temperature", notes
    notes.append(
        f"all {count} validation examples are predicted correctly and show only that errors are "
        "rare: the temperature gives them a mean confidence of (n + 1) / (n + 2); use the results "
        "with care, or validate on more and harder examples"
    )
    return _fixed_scaling(_laplace_scale(centered), classes), "temperature", notes


def _laplace_scale(centered: np.ndarray) -> float:
    """The scale with a mean confidence of (n + 1) / (n + 2), or the largest one."""
    count = len(centered)
    target = (count + 1) / (count + 2)

    def excess(log_scale: float) -> float:
        return float(softmax(np.exp(log_scale) * centered, axis=1).max(1).mean()) - target

    unit = float(np.sqrt(np.mean(centered**2)))
    low, high = np.log(SMALLEST_SCALE / unit), np.log(LARGEST_SCALE)
    if excess(high) <= 0:
        return LARGEST_SCALE
    return float(np.exp(brentq(excess, low, high, xtol=1e-12)))


def _fixed_scaling(scale: float, classes: int) -> Scaling:
    return Scaling(np.full(classes, scale), np.zeros(classes), float("nan"), (), ())


def _list_classes(classes: Sequence[int]) -> str:
    return ", ".join(str(k) for k in classes[:10]) + (", ..." if len(classes) > 10 else "")


def _absent_note(absent: np.ndarray, method: CalibrationMethod) -> str:
    text = f"no validation example of {len(absent)} class(es): {_list_classes(absent.tolist())}"
    if method in ("bias_corrected", "vector"):
        text += f"; their bias comes from a penalty of {ABSENT_PENALTY:g}, not from data"
    return text


def _scale_notes(fit: Scaling, method: CalibrationMethod) -> list[str]:
    notes = []
    low = [k for k, bound in fit.bounds if bound < LARGEST_SCALE]
    high = [k for k, bound in fit.bounds if bound >= LARGEST_SCALE]
    each = method == "vector" and len(fit.scale) > 2
    if low:
        which = f" of class(es) {_list_classes(low)}" if each else ""
        notes.append(
            f"the scale{which} is at its lower bound: classes with larger logits are not more "
            "frequent in these labels"
        )
    if high:
        which = f" of class(es) {_list_classes(high)}" if each else ""
        notes.append(
            f"the scale{which} is at its upper bound, {LARGEST_SCALE:g}: are these logits?"
        )
    if fit.gradient_norm > _TOLERANCE:
        notes.append(
            f"the fit ended at a gradient norm of {fit.gradient_norm:.1e}, above {_TOLERANCE:g}"
        )
    return notes
