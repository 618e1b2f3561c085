"""Calibration: temperature, vector and matrix scaling by maximum likelihood.

What is known of a model at its source: calibrated probabilities of held-out examples.

Affine maps of logits by maximum likelihood: one scale or K, with biases or without.

Calibrates a model on held-out examples, by the largest map that they determine.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from flaxtransfer.shift.checks import as_labels, as_logits, as_probabilities
from flaxtransfer.shift.optimize import Minimum, minimize

__all__ = ["Calibration", "CalibrationMethod", "Scaling", "calibrate", "fit_scaling", "logits_of"]


_LEAST = 1e-12
"""Probabilities that are 0 in the file have a logarithm all the same."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """A map from logits to calibrated probabilities, with the validation it was fitted on.

    Every estimate about a target is relative to a source; this is what the others of this room
    take as `source`. They are ``softmax(scale * centered + bias)``, where `centered` are the logits
    less the mean of their row: log-probabilities are as good as logits, for "vector" as well.

    Args:
        method: "none", "temperature", "bias_corrected" or "vector": what was used, which is not
            always what was asked for; `notes` then say why.
        scale: `[K]`, positive; K equal numbers (1 / temperature) but for "vector".
        bias: `[K]`, sums to 0; zeros for "none" and "temperature".
        probabilities: `[n, K]`, calibrated, of the held-out validation examples.
        labels: `[n]`, their classes, int64.
        notes: what a reader has to know: absent classes, a fallback to a simpler map.
        gradient_norm: of the mean negative log-likelihood in scale and bias, where the fit ended;
            None where nothing was minimized.
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
        """K."""
        return self.probabilities.shape[1]

    @property
    def prior(self) -> np.ndarray:
        """`[K]`, the source's prior: the mean calibrated probability, not the labels' frequency.

        A target that is the source then has exactly this prevalence.
        """
        return self.probabilities.mean(0)

    def apply(self, logits: Any) -> np.ndarray:
        """Calibrated probabilities `[m, K]` of logits or log-probabilities `[m, K]`."""
        found = as_logits(logits, "logits")
        if found.shape[1] != self.classes:
            raise ValueError(
                f"logits have {found.shape[1]} columns, and the calibration {self.classes} classes"
            )
        # Where scales differ, a number added to a row would otherwise change its probabilities.
        centered = found - found.mean(axis=1, keepdims=True)
        return np.exp(log_softmax(centered * self.scale + self.bias, axis=1))


def logits_of(probabilities: Any, name: str = "probabilities") -> np.ndarray:
    """Logits `[n, K]` of probabilities `[n, K]`: their logarithms, where 0 counts as 1e-12.

    The way in for a model that hands out probabilities alone; a softmax undoes it.

    Raises:
        ValueError: they are no probabilities.

    >>> logits_of([[1.0, 0.0]]).round(2).tolist()
    [[0.0, -27.63]]
    """
    return np.log(np.maximum(as_probabilities(probabilities, name), _LEAST))


Form = Literal["temperature", "bias_corrected", "vector"]

LARGEST_SCALE = 1e3
SMALLEST_SCALE = 1e-6
"""Of logits whose root mean square is 1: no information, to six digits."""

ABSENT_PENALTY = 1e-3
"""Half of it times the square of an absent class's bias, from the mean bias of the others, joins
the mean loss. Without it the bias would fall for ever."""

_STILL_MOVING = 1e-3
"""In units of a logit: a Newton step is of the order of 1 where the likelihood grows for ever, and
next to nothing at a maximum."""

_DENSE_PARAMETERS = 2500
"""Up to here a dense Hessian is at least as fast as products with it, and 50 MB."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """``softmax(scale * centered logits + bias)`` at the maximum of its likelihood.

    Args:
        scale: `[K]`.
        bias: `[K]`, sum 0.
        gradient_norm: of the mean negative log-likelihood, penalty included, in scale and bias.
        undetermined: classes whose scale or bias has no maximum to arrive at; with one scale for
            all, every class where that is the scale.
        bounds: classes whose scale ended at a bound, with the bound.
    """

    scale: np.ndarray
    bias: np.ndarray
    gradient_norm: float
    undetermined: tuple[int, ...]
    bounds: tuple[tuple[int, float], ...]


def fit_scaling(centered: np.ndarray, labels: np.ndarray, form: Form) -> Scaling:
    """Minimizes the mean negative log-likelihood, which is convex in scale and bias.

    Args:
        centered: logits `[n, K]` whose rows have mean 0.
        labels: `[n]`.
        form: "temperature" has one scale, "bias_corrected" one scale and K biases, "vector" K of
            each.
    """
    classes = centered.shape[1]
    # In this unit the search starts where the softmax is neither flat nor saturated, whatever the
    # size of the logits.
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
    moves = np.abs(likelihood.expand(found.step))
    ends = np.flatnonzero((found.point[:scales] <= lower[0]) | (found.point[:scales] >= upper[0]))
    return Scaling(
        scale=np.minimum(scale / unit, LARGEST_SCALE),
        bias=bias - bias.mean(),
        gradient_norm=found.gradient_norm,
        undetermined=tuple(np.flatnonzero(np.maximum(*moves) > _STILL_MOVING).tolist()),
        bounds=tuple((int(k), float(found.point[k] / unit)) for k in ends),
    )


class _Likelihood:
    """The mean negative log-likelihood as a function of a form's parameters."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray, form: Form) -> None:
        count, classes = logits.shape
        self.logits, self.labels, self.form = logits, labels, form
        self.rows = np.arange(count)
        self.frequency = np.bincount(labels, minlength=classes) / count
        observed = logits[self.rows, labels]
        self.moments = np.bincount(labels, weights=observed, minlength=classes) / count
        present = self.frequency > 0
        # Each row measures one absent class against the mean of those that are there.
        missing = np.flatnonzero(~present) if form != "temperature" else np.arange(0)
        self.absent = np.tile(-(present / present.sum()), (len(missing), 1))
        self.absent[np.arange(len(missing)), missing] = 1

    def expand(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scales `[K]` and biases `[K]`."""
        classes = self.logits.shape[1]
        if self.form == "vector":
            return parameters[:classes], parameters[classes:]
        bias = parameters[1:] if self.form == "bias_corrected" else np.zeros(classes)
        return np.full(classes, parameters[0]), bias

    def reduce(self, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
        """The transpose of `expand`."""
        if self.form == "vector":
            return np.concatenate([scales, biases])
        total = scales.sum(keepdims=True)
        return np.concatenate([total, biases]) if self.form == "bias_corrected" else total

    def at(self, parameters: np.ndarray) -> "_Point":
        return _Point(self, parameters)


class _Point:
    """Value, gradient and curvature at one choice of the parameters."""

    def __init__(self, likelihood: _Likelihood, parameters: np.ndarray) -> None:
        self.of = likelihood
        scale, bias = likelihood.expand(parameters)
        scores = likelihood.logits * scale + bias
        scores -= scores.max(axis=1, keepdims=True)
        observed = scores[likelihood.rows, likelihood.labels]
        # In place, as there may be a thousand classes.
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

    def times(self, direction: np.ndarray) -> np.ndarray:
        of = self.of
        scale, bias = of.expand(direction)
        change = of.logits * scale + bias
        change -= np.einsum("ik,ik->i", self.probabilities, change)[:, None]
        change *= self.probabilities
        count = len(change)
        biases = change.sum(0) / count + ABSENT_PENALTY * of.absent.T @ (of.absent @ bias)
        # Adding one number to all biases changes nothing; here it costs, and stays 0.
        biases += bias.mean()
        return of.reduce(np.einsum("ik,ik->k", change, of.logits) / count, biases)

    def hessian(self) -> np.ndarray | None:
        of, p, logits = self.of, self.probabilities, self.of.logits
        count, classes = logits.shape
        if of.form == "temperature":
            return self.times(np.ones(1))[:, None]
        if len(self.gradient) > _DENSE_PARAMETERS:
            return None
        biases = np.diag(self.mean) - p.T @ p / count
        biases += ABSENT_PENALTY * of.absent.T @ of.absent + 1 / classes
        if of.form == "bias_corrected":
            first = np.zeros(1 + classes)
            first[0] = 1
            first = self.times(first)
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
            scales[0] = self.times(first)[0]
        return of.reduce(scales, biases)


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
    centered = found - found.mean(axis=1, keepdims=True)
    fit, used, notes = _fit(centered, known, method)
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
        probabilities=np.exp(log_softmax(centered * fit.scale + fit.bias, axis=1)),
        labels=known,
        notes=tuple(notes),
        gradient_norm=None if np.isnan(fit.gradient_norm) else fit.gradient_norm,
    )


def _fit(
    centered: np.ndarray, labels: np.ndarray, method: CalibrationMethod
) -> tuple[Scaling, CalibrationMethod, list[str]]:
    """The fit, the method it belongs to, and why that is not the one asked for."""
    count, classes = centered.shape
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
        return fit_scaling(centered, labels, "bias_corrected"), "vector", notes
    if method == "vector":
        fit = fit_scaling(centered, labels, "vector")
        if not fit.undetermined:
            return fit, "vector", notes
        notes.append(
            f"the validation examples do not determine the scales of class(es) "
            f"{_listed(fit.undetermined)}, as some class is separated without an error: calibrated "
            "by one scale and biases"
        )
        method = "bias_corrected"
    if method == "bias_corrected":
        fit = fit_scaling(centered, labels, "bias_corrected")
        if not fit.undetermined:
            return fit, "bias_corrected", notes
        notes.append(
            "the validation examples do not determine scale and biases (the classes are separated "
            "without an error): calibrated by a temperature alone"
        )
    wrong = (centered.argmax(1) != labels).sum()
    fit = fit_scaling(centered, labels, "temperature")
    if wrong or not fit.undetermined:
        return fit, "temperature", notes
    notes.append(
        f"all {count} validation examples are right, and say only that errors are rare: the "
        "temperature gives them the mean confidence (n + 1) / (n + 2); treat what follows from it "
        "with care, or validate on more and harder examples"
    )
    return _given(_succession(centered), classes), "temperature", notes


def _succession(centered: np.ndarray) -> float:
    """The scale at which the mean confidence is (n + 1) / (n + 2), as far as there is one."""
    count = len(centered)
    wanted = (count + 1) / (count + 2)

    def excess(log_scale: float) -> float:
        return float(softmax(np.exp(log_scale) * centered, axis=1).max(1).mean()) - wanted

    unit = float(np.sqrt(np.mean(centered**2)))
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
