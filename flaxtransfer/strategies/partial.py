"""Recipes that leave most of the network as it was."""

from __future__ import annotations

from collections.abc import Mapping

from flaxtransfer.groups import FROZEN
from flaxtransfer.labels import rest
from flaxtransfer.masks import Mask, as_mask, batch_norm, everything
from flaxtransfer.strategies.parts import By, adamw, check_measured, fresh, units
from flaxtransfer.training.phases import Phase, Plan
from flaxtransfer.types import Params


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
    images that differ in contrast, colour or noise more than in content. Scale and bias can
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
