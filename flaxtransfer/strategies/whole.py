"""Recipes in which everything moves."""

from __future__ import annotations

from dataclasses import replace

from flaxtransfer.labels import rest
from flaxtransfer.masks import everything
from flaxtransfer.optimizers import scaled
from flaxtransfer.strategies.parts import By, adamw, fresh, units
from flaxtransfer.training.phases import Phase, Plan
from flaxtransfer.types import Params


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
