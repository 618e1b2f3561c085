"""Recipes: ways of adapting a pre-trained network, as plans.

Recipes: ways of adapting a pre-trained network, as plans.

What the recipes are made of: an optimizer with its schedule, and the parts of a network.

Recipes that leave most of the network as it was.

Recipes in which everything moves.

Recipes of several phases.

Recipes whose learning rates are measured on the images first; the measurement is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import optax

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.labels import rest
from flaxtransfer.masks import (
    Mask,
    adapter,
    as_mask,
    batch_norm,
    everything,
    glob,
    head,
    segment_or_empty,
    stage,
    stem,
)
from flaxtransfer.optimizers import scaled
from flaxtransfer.paths import flatten, listing, segment_of, segment_position, suggest
from flaxtransfer.schedules import WarmupCosine
from flaxtransfer.training.plan import Phase, Plan
from flaxtransfer.types import Params

__all__ = [
    "By",
    "adamw",
    "batch_norm_only",
    "check_measured",
    "curvature_rates",
    "curvature_scaled",
    "discriminative",
    "feature_extraction",
    "fresh",
    "from_scratch",
    "full_fine_tuning",
    "gradient_scaled",
    "head_then_fine_tune",
    "l2_sp",
    "linear_probe_then_fine_tune",
    "progressive_unfreezing",
    "surgical",
    "units",
]


By = Literal["segment", "block"]


def adamw(peak: float, weight_decay: float) -> Group:
    """AdamW that warms up for a tenth of its phase and follows a cosine to 0."""
    return Group(optax.adamw, WarmupCosine(peak), weight_decay=weight_decay)


def fresh(params: Params) -> Mask:
    """What no pre-training has seen: the head, and the input adapter where there is one."""
    adapted = any(segment_or_empty(path) == "adapter" for path in flatten(params))
    return head() | adapter() if adapted else head()


def units(params: Params, by: By = "segment") -> dict[str, Mask]:
    """The parts of a ResNet from the input to the output, the head last, each with its mask.

    An input adapter is as new as the head, and belongs to that part.

    Raises:
      ValueError: leaves that are no ResNet's, or another ``by``.
    """
    if by not in ("segment", "block"):
        raise ValueError(f"by is 'segment' or 'block', not {by!r}")
    paths = list(flatten(params))
    if foreign := [path for path in paths if not segment_or_empty(path)]:
        raise ValueError(
            f"no segment of a ResNet has these leaves: {listing(foreign)}; for other networks "
            "write the phases with masks"
        )
    found: dict[str, Mask] = {}
    for path in sorted(paths, key=lambda path: _position(path, by)):
        segment = segment_of(path)
        block = path.split("/")[1]
        if segment in ("adapter", "head"):
            continue
        if by == "block" and segment.startswith("layer"):
            found.setdefault(f"{segment}/{block}", glob(f"{segment}/{block}/**"))
        elif segment.startswith("layer"):
            found.setdefault(segment, stage(int(segment.removeprefix("layer"))))
        else:
            found.setdefault(segment, stem())
    return found | {"head": fresh(params)}


def check_measured(measured: Mapping[str, float], argument: str) -> None:
    """Refuses what no measurement can be, before it decides which leaves move.

    Comparisons with NaN are all false: unchecked, it would freeze a part or choose one by its
    place in the order, without a word.

    Raises:
      ValueError: numbers that are negative or not finite, or nothing above 0.
    """
    values = list(measured.values())
    if not all(0 <= value < np.inf for value in values) or not any(values):
        raise ValueError(f"{argument} are finite, not negative and not all 0: {dict(measured)}")


def _position(path: str, by: By) -> tuple[tuple[int, int], int]:
    segment = segment_of(path)
    block = path.split("/")[1]
    inside = by == "block" and segment.startswith("layer")
    return segment_position(segment), int(block) if inside else 0


def feature_extraction(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """The head alone, on the network as it is.

    Use it with very few labels of images like those of the pre-training, as the baseline that
    anything dearer has to beat, and where one network serves several heads. It cannot do more than
    the features do: where images differ from the pre-training in kind, a probe stays behind.

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps.
      learning_rate: peak rate of the head.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    References:
      J. Donahue et al., "DeCAF: A Deep Convolutional Activation Feature for Generic Visual
      Recognition", 2014.
    """
    phase = Phase(
        labels={"head": fresh(params), "backbone": rest()},
        groups={"head": adamw(learning_rate, weight_decay), "backbone": FROZEN},
        steps=steps,
        name="head",
        patience=patience,
    )
    return Plan([phase])


def batch_norm_only(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-3,
    head_learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    statistics: bool = True,
    patience: int | None = None,
) -> Plan:
    """BatchNorm's scales and biases, and the head.

    Use it where a few thousand numbers have to suffice: for many tasks on one network, and for
    images that differ in contrast, color or noise more than in content. Scale and bias can
    switch channels on and off, which goes far; they cannot make new features.

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps.
      learning_rate: peak rate of scales and biases.
      head_learning_rate: peak rate of the head.
      weight_decay: decoupled, on the head's kernel.
      statistics: whether BatchNorm uses, and updates, batch statistics; without it the running
        ones of the pre-training stay, in training too.
      patience: evaluations without improvement that end training; needs a validation set.

    References:
      J. Frankle, D. J. Schwab, A. S. Morcos, "Training BatchNorm and Only BatchNorm: On the
      Expressive Power of Random Features in CNNs", 2021.
    """
    phase = Phase(
        labels={"head": fresh(params), "batch norm": batch_norm(), "rest": rest()},
        groups={
            "head": adamw(head_learning_rate, weight_decay),
            "batch norm": adamw(learning_rate, 0.0),
            "rest": FROZEN,
        },
        steps=steps,
        name="batch norm",
        norm={everything(): "batch" if statistics else "running"},
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def surgical(
    params: Params,
    *,
    part: Mask | str | None = None,
    gradients: Mapping[str, float] | None = None,
    by: By = "segment",
    batch_norms: bool = True,
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """One part of the network and the head; by default the first layers.

    Use it when you know what has changed: noise, blur or another sensor ask for the first layers,
    other objects for the last ones. Where nothing is known, relative gradient norms can choose the
    part; it is a guess that validation should confirm.

    Args:
      params: nested dict of parameters or their shapes.
      part: which leaves move beside the head; by default the stem and the first stage, or what
        ``gradients`` say.
      gradients: norm of the gradient over norm of the weights of each part, by its name ("stem",
        "layer1", ...); the part with the largest moves. See ``analysis.gradients``.
      by: of which parts the gradients are: "segment" or "block".
      batch_norms: whether the BatchNorms inside the part move, and use batch statistics.
      steps: optimizer steps.
      learning_rate: peak rate of the part.
      head_learning_rate: peak rate of the head.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    Raises:
      ValueError: both a part and gradients, gradients of a part that there is not, that are
        negative, not finite or all 0.

    References:
      Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.
    """
    chosen = _part(params, part, gradients, by) - fresh(params)
    phase = Phase(
        labels={
            "head": fresh(params),
            "part": chosen if batch_norms else chosen - batch_norm(),
            "rest": rest(),
        },
        groups={
            "head": adamw(head_learning_rate, weight_decay),
            "part": adamw(learning_rate, weight_decay),
            "rest": FROZEN,
        },
        steps=steps,
        name="surgery",
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def _part(
    params: Params, part: Mask | str | None, gradients: Mapping[str, float] | None, by: By
) -> Mask:
    if gradients is None:
        return as_mask("stem() | stage(1)" if part is None else part)
    if part is not None:
        raise ValueError(f"give a part or gradients that choose one, not both: {part!r}")
    parts = units(params, by)
    body = {name: value for name, value in gradients.items() if name != "head"}
    unknown = [name for name in body if name not in parts]
    if unknown or not body:
        raise ValueError(
            f"gradients are of parts of the network, not {unknown or 'empty'}; there are "
            f"{', '.join(name for name in parts if name != 'head')}"
        )
    check_measured(body, "gradients")
    return parts[max(body, key=lambda name: body[name])]


def full_fine_tuning(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Everything at one low rate, the new head at a higher one.

    Use it with some thousand labels and more, or where images are unlike those of the
    pre-training. With a few dozen labels it overfits before it gains, and a head that starts at
    random disturbs the features first (see ``head_then_fine_tune``).

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps.
      learning_rate: peak rate of everything but the head.
      head_learning_rate: peak rate of the head.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    References:
      P. Agrawal, R. Girshick, J. Malik, "Analyzing the Performance of Multilayer Neural Networks
      for Object Recognition", 2014.
    """
    phase = Phase(
        labels={"head": fresh(params), "backbone": rest()},
        groups={
            "head": adamw(head_learning_rate, weight_decay),
            "backbone": adamw(learning_rate, weight_decay),
        },
        steps=steps,
        name="fine-tune",
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def discriminative(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-3,
    decay: float = 0.4,
    by: By = "segment",
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Everything, at learning rates that shrink from the head toward the input.

    Use it in place of full fine-tuning with some hundred to some thousand labels: the early,
    general features stay nearly where they were. It fits badly where the first layers are what
    has to change, as for images of another sensor.

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps.
      learning_rate: peak rate of the head.
      decay: factor of the rate for each segment or block further down, in (0, 1].
      by: "segment" or "block".
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    Raises:
      ValueError: a decay outside (0, 1], leaves that are no ResNet's.

    References:
      J. Howard, S. Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is a factor in (0, 1], not {decay!r}")
    parts = units(params, by)
    top = adamw(learning_rate, weight_decay)
    distance = {name: len(parts) - 1 - number for number, name in enumerate(parts)}
    groups = {
        name: replace(top, learning_rate=scaled(top.learning_rate, decay ** distance[name]))
        for name in parts
    }
    phase = Phase(parts, groups, steps=steps, name="fine-tune", clip=1.0, patience=patience)
    return Plan([phase])


def l2_sp(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-3,
    strength: float = 1e-2,
    head_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Everything, pulled back toward the pre-trained weights; the head toward zero.

    Use it with few labels where full fine-tuning overfits: the penalty says that the pre-trained
    weights are the best guess, where ordinary decay says that zero is. It does not help where the
    pre-training is of no use.

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps.
      learning_rate: peak rate of everything but the head.
      head_learning_rate: peak rate of the head.
      strength: of the pull, an L2 penalty on the distance (added to the gradient).
      head_decay: decoupled, on the head's kernel.
      patience: evaluations without improvement that end training; needs a validation set.

    References:
      X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with
      Convolutional Networks", 2018.
    """
    backbone = replace(adamw(learning_rate, strength), decay_toward="start")
    phase = Phase(
        labels={"head": fresh(params), "backbone": rest()},
        groups={"head": adamw(head_learning_rate, head_decay), "backbone": backbone},
        steps=steps,
        name="fine-tune",
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def from_scratch(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Everything from random weights: the control that says what the pre-training was worth.

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps.
      learning_rate: peak rate, after a warm-up of a tenth of the steps.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    References:
      K. He, R. Girshick, P. Dollár, "Rethinking ImageNet Pre-training", 2019.
    """
    del params  # Everything is everything; the signature is that of all recipes.
    phase = Phase(
        labels={"all": everything()},
        groups={"all": adamw(learning_rate, weight_decay)},
        steps=steps,
        name="from scratch",
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def head_then_fine_tune(
    params: Params,
    *,
    head_steps: int = 100,
    fine_tune_steps: int = 200,
    head_learning_rate: float = 3e-3,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """First the new head on the frozen network, then everything at a lower rate.

    Use it when the classes are new and the images not too far from those of the pre-training. A
    head that starts at random would send large gradients into the network and distort features
    that were good; fitting it first avoids that. It is not for a few images so unlike the
    pre-training that frozen features carry nothing.

    Args:
      params: nested dict of parameters or their shapes.
      head_steps: optimizer steps of the first phase; 0 leaves it out.
      fine_tune_steps: optimizer steps of the second; 0 leaves it out.
      head_learning_rate: peak rate of the head alone.
      learning_rate: peak rate of everything, after a warm-up of a tenth of the phase.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end a phase; needs a validation set.

    Raises:
      ValueError: both phases are left out.

    References:
      A. Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
      Out-of-Distribution", 2022.
    """
    labels = {"head": fresh(params), "backbone": rest()}
    phases = []
    if head_steps:
        groups = {"head": adamw(head_learning_rate, weight_decay), "backbone": FROZEN}
        phases.append(Phase(labels, groups, steps=head_steps, name="head", patience=patience))
    if fine_tune_steps:
        everything_moves = adamw(learning_rate, weight_decay)
        phases.append(
            Phase(
                labels,
                groups={"head": everything_moves, "backbone": everything_moves},
                steps=fine_tune_steps,
                name="fine-tune",
                clip=1.0,
                patience=patience,
            )
        )
    return Plan(phases)


def linear_probe_then_fine_tune(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-4,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """A linear probe, solved to its optimum in seconds, and then everything from there.

    Use it wherever ``head_then_fine_tune`` fits: the head is not trained for some steps but is the
    best there is on the frozen features, its strength chosen by cross-validation, so that the
    first gradients of the rest are small. It sees the images without augmentation. Where frozen
    features carry nothing, a probe is no better a start than any.

    Args:
      params: nested dict of parameters or their shapes.
      steps: optimizer steps after the probe.
      learning_rate: peak rate of everything but the head.
      head_learning_rate: peak rate of the head, which has come a long way already.
      weight_decay: decoupled, on kernels.
      patience: evaluations without improvement that end training; needs a validation set.

    References:
      A. Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
      Out-of-Distribution", 2022.
    """
    phase = Phase(
        labels={"head": fresh(params), "backbone": rest()},
        groups={
            "head": adamw(head_learning_rate, weight_decay),
            "backbone": adamw(learning_rate, weight_decay),
        },
        steps=steps,
        name="fine-tune",
        probe=True,
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def progressive_unfreezing(
    params: Params,
    *,
    by: By = "segment",
    steps: int = 100,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-3,
    decay: float = 0.75,
    weight_decay: float = 1e-2,
    down_to: str | None = None,
    stop_after: int | None = 1,
    min_gain: float = 0.0,
    min_z: float = 0.0,
    patience: int | None = None,
) -> Plan:
    """The head, then one part more at a time from the top, for as long as validation gains.

    Use it with a validation set and some hundred labels, where nobody knows how deep the network
    has to change: it finds out, and a part that did not help is undone. Each part keeps its
    optimizer moments when the next one joins, and has a label of its own, so that it begins with
    a bias correction of its own. It costs as many phases as there are parts, and a small
    validation set decides by luck (see ``min_gain`` and ``min_z``). Phases have to be long enough
    for what moves to settle: where the head has not, more of its training passes for a gain of the
    next part.

    Args:
      params: nested dict of parameters or their shapes.
      by: "segment" unfreezes stage by stage, "block" residual block by block.
      steps: optimizer steps of each phase.
      learning_rate: peak rate of the uppermost part below the head.
      head_learning_rate: peak rate of the head.
      decay: factor of the rate for each part further down, in (0, 1].
      weight_decay: decoupled, on kernels.
      down_to: last part that may be unfrozen ("layer3", "layer3/0"); by default the first of all.
      stop_after: phases in a row without gain after which the plan ends; None tries all parts.
      min_gain: validation accuracy, as a share, that each phase has to earn.
      min_z: standard errors of the paired difference that the gain has to exceed (``ft.Plan``). 2
        asks for proof, which takes thousands of validation images where each part gains a little;
        with a few hundred the plan then ends too early, and that costs more than a part too many.
      patience: evaluations without improvement that end a phase.

    Raises:
      ValueError: numbers out of range, a part that there is not, leaves that are no ResNet's.

    References:
      J. Howard, S. Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018
      (gradual unfreezing).
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay is a factor in (0, 1], not {decay!r}")
    parts = units(params, by)
    below = [name for name in reversed(parts) if name != "head"]
    if down_to is not None:
        if down_to not in below:
            raise ValueError(f"no part {down_to!r} below the head; there are {', '.join(below)}")
        below = below[: below.index(down_to) + 1]
    top = adamw(learning_rate, weight_decay)
    groups = {"head": adamw(head_learning_rate, weight_decay)}
    labels = {"head": parts["head"]}
    phases = []
    for depth, name in enumerate(["head", *below]):
        if name != "head":
            labels = labels | {name: parts[name]}
            rate = scaled(top.learning_rate, decay ** (depth - 1))
            groups = groups | {name: replace(top, learning_rate=rate)}
        phases.append(
            Phase(
                labels | {"frozen": rest()},
                groups | {"frozen": FROZEN},
                steps=steps,
                name="head" if name == "head" else f"+ {name}",
                clip=1.0,
                patience=patience,
            )
        )
    return Plan(phases, patience=stop_after, min_gain=min_gain, min_z=min_z)


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
    following it generalizes.

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
        parts,
        rates,
        learning_rate,
        head_learning_rate,
        weight_decay,
        steps,
        patience,
        leftovers=not batch_norms,
    )


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


RECIPES: dict[str, Callable[..., Plan]] = {
    recipe.__name__: recipe
    for recipe in (
        feature_extraction,
        batch_norm_only,
        head_then_fine_tune,
        linear_probe_then_fine_tune,
        progressive_unfreezing,
        discriminative,
        curvature_scaled,
        gradient_scaled,
        surgical,
        l2_sp,
        full_fine_tuning,
        from_scratch,
    )
}
"""The recipes by name, those that move least first."""
