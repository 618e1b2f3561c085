"""Recipes whose learning rates are measured on the images first; the measurement is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import rest
from flaxtransfer.masks import Mask, batch_norm
from flaxtransfer.optimizers import scaled
from flaxtransfer.paths import listing, suggest
from flaxtransfer.strategies.recipes import By, adamw, check_measured, units
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.types import Params

__all__ = ["curvature_rates", "curvature_scaled", "gradient_scaled"]


def curvature_scaled(
    params: Params,
    *,
    curvature: Mapping[str, float],
    examples: int,
    prior_precision: float | None = None,
    by: By = "segment",
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Everything, each part at a rate that follows from how sharply the likelihood bends there.

    Use it in place of a guessed decay of rates from layer to layer, where a few hundred images can
    be spared a backward pass each. A parameter on which predictions depend strongly has a narrow
    posterior and moves in small steps. It measures at the start and knows nothing of what happens
    later; where the curvatures of the parts are alike it is full fine-tuning.

    The rate of a part is ``learning_rate * sqrt(smallest / precision)``, with the precision
    ``examples * curvature + prior_precision``: the standard deviation of a Gaussian posterior, in
    proportion to the widest. (The square root, because Adam's steps have the length of the rate; a
    plain gradient step would want the inverse itself.)

    Args:
      params: nested dict of parameters or their shapes.
      curvature: mean Fisher diagonal of each part, by its name ("stem", "layer1", ...); measured
        with a head that fits, see ``analysis.curvature``.
      examples: how many images the likelihood is of.
      prior_precision: of the weights around their start; by default the geometric mean of
        ``examples * curvature`` over the parts, so that no part runs away from the others.
      by: "segment" or "block".
      steps: optimizer steps, from a linear probe on.
      learning_rate: peak rate of the part with the widest posterior.
      head_learning_rate: peak rate of the head, which is a probe at the start.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    Raises:
      ValueError: a part without curvature, or a curvature of no part; numbers out of range.

    References:
      S. Amari, "Natural Gradient Works Efficiently in Learning", 1998. J. Kirkpatrick et al.,
      "Overcoming Catastrophic Forgetting in Neural Networks", 2017 (the Fisher diagonal as the
      precision of pre-trained weights).
    """
    parts = units(params, by)
    body = {name: mask for name, mask in parts.items() if name != "head"}
    measured = _for(body, curvature, "curvature")
    rates = curvature_rates(measured, examples, prior_precision)
    return _scaled_plan(
        parts, rates, learning_rate, head_learning_rate, weight_decay, steps, patience
    )


def curvature_rates(
    curvature: Mapping[str, float], examples: int, prior_precision: float | None = None
) -> dict[str, float]:
    """The factors of ``curvature_scaled``, the largest of which is 1.

    >>> curvature_rates({"stem": 8.0, "layer1": 0.0}, examples=1, prior_precision=1.0)
    {'stem': 0.3333333333333333, 'layer1': 1.0}
    """
    if examples < 1:
        raise ValueError(f"examples is {examples}, wanted 1 or more")
    sums = {name: examples * value for name, value in curvature.items()}
    if bad := {name: curvature[name] for name, value in sums.items() if not 0 <= value < np.inf}:
        raise ValueError(f"curvatures are finite and not negative, not {bad}")
    if prior_precision is None:
        positive = [value for value in sums.values() if value > 0]
        prior_precision = float(np.exp(np.mean(np.log(positive)))) if positive else 1.0
    if not prior_precision > 0:
        raise ValueError(f"prior_precision is a number above 0, not {prior_precision}")
    precision = {name: value + prior_precision for name, value in sums.items()}
    widest = min(precision.values())
    return {name: float(np.sqrt(widest / value)) for name, value in precision.items()}


def gradient_scaled(
    params: Params,
    *,
    gradients: Mapping[str, float],
    batch_norms: bool = True,
    by: By = "segment",
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Everything, each part at a rate in proportion to its relative gradient norm ("Auto-RGN").

    Use it where a shift is expected to touch part of the network and nobody knows which: parts
    that fit the new images already hardly move. The ratios are measured once, before the first
    step, so that the optimizer keeps its moments; they say where the loss pulls, not where
    following it generalises.

    Args:
      params: nested dict of parameters or their shapes.
      gradients: norm of the gradient over norm of the weights of each part, by its name; measured
        with a head that fits, see ``analysis.gradients``.
      batch_norms: whether BatchNorms move, and use batch statistics.
      by: "segment" or "block".
      steps: optimizer steps, from a linear probe on.
      learning_rate: peak rate of the part with the largest ratio.
      head_learning_rate: peak rate of the head, which is a probe at the start.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    Raises:
      ValueError: a part without a ratio, or a ratio of no part; ratios that are negative or all 0.

    References:
      Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.
    """
    parts = units(params, by)
    if not batch_norms:
        parts = {name: mask - batch_norm() for name, mask in parts.items()}
    body = {name: mask for name, mask in parts.items() if name != "head"}
    measured = _for(body, gradients, "gradients")
    check_measured(measured, "gradients")
    largest = max(measured.values())
    rates = {name: value / largest for name, value in measured.items()}
    return _scaled_plan(
        parts, rates, learning_rate, head_learning_rate, weight_decay, steps, patience,
        leftovers=not batch_norms,
    )  # fmt: skip


def _for(
    parts: Mapping[str, Mask], measured: Mapping[str, float], argument: str
) -> dict[str, float]:
    """The measurements of these parts, complete; that of the head is of no use here."""
    missing = [name for name in parts if name not in measured]
    foreign = [name for name in measured if name not in parts and name != "head"]
    problems = [f"{argument} lack {listing(missing)}"] if missing else []
    problems += [f"there is no part {name!r}{suggest(name, parts)}" for name in foreign]
    if problems:
        raise ValueError(f"{'; '.join(problems)}; the parts are {', '.join(parts)}")
    return {name: float(measured[name]) for name in parts}


def _scaled_plan(
    parts: Mapping[str, Mask],
    rates: Mapping[str, float],
    learning_rate: float,
    head_learning_rate: float,
    weight_decay: float,
    steps: int,
    patience: int | None,
    leftovers: bool = False,
) -> Plan:
    top = adamw(learning_rate, weight_decay)
    groups: dict[str, Group | object] = {
        name: adamw(head_learning_rate, weight_decay)
        if name == "head"
        else replace(top, learning_rate=scaled(top.learning_rate, rates[name]))
        # A part that does not move at all is frozen, statistics included.
        if rates[name] > 0
        else FROZEN
        for name in parts
    }
    labels: dict[str, object] = dict(parts)
    if leftovers:
        labels, groups = labels | {"rest": rest()}, groups | {"rest": FROZEN}
    phase = Phase(
        labels, groups, steps=steps, name="fine-tune", probe=True, clip=1.0, patience=patience
    )
    return Plan([phase])
