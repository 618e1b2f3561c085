"""Affine maps of logits by maximum likelihood: one scale or K, with biases or without."""

import dataclasses
from typing import Literal

import numpy as np

from flaxtransfer.shift.calibration.newton import Minimum, minimise

__all__ = ["Scaling", "fit_scaling"]

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
    """``softmax(scale * centred logits + bias)`` at the maximum of its likelihood.

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


def fit_scaling(centred: np.ndarray, labels: np.ndarray, form: Form) -> Scaling:
    """Minimises the mean negative log-likelihood, which is convex in scale and bias.

    Args:
        centred: logits `[n, K]` whose rows have mean 0.
        labels: `[n]`.
        form: "temperature" has one scale, "bias_corrected" one scale and K biases, "vector" K of
            each.
    """
    classes = centred.shape[1]
    # In this unit the search starts where the softmax is neither flat nor saturated, whatever the
    # size of the logits.
    unit = float(np.sqrt(np.mean(centred**2))) or 1.0
    likelihood = _Likelihood(centred / unit, labels, form)
    scales = classes if form == "vector" else 1
    biases = 0 if form == "temperature" else classes
    count = scales + biases
    start = np.zeros(count)
    start[:scales] = 1
    lower, upper = np.full(count, -np.inf), np.full(count, np.inf)
    lower[:scales], upper[:scales] = SMALLEST_SCALE, LARGEST_SCALE * unit
    units = np.ones(count)
    units[:scales] = unit
    found: Minimum = minimise(likelihood.at, start, lower=lower, upper=upper, units=units)
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
