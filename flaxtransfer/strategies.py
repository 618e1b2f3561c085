"""Ways of adapting a pre-trained network, as plans that can be printed, changed and composed."""

from __future__ import annotations

import optax

from flaxtransfer.labels import label, rest
from flaxtransfer.masks import everything, head
from flaxtransfer.optimizers import FROZEN, Group
from flaxtransfer.training.phases import Phase, Plan
from flaxtransfer.types import Params


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
      Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
      Out-of-Distribution", 2022.
    """
    phases = []
    if head_steps:
        phases.append(
            Phase(
                labels=label(params, {"head": head(), "backbone": rest()}),
                groups={
                    "head": _adamw(head_learning_rate, head_steps, weight_decay),
                    "backbone": FROZEN,
                },
                steps=head_steps,
                name="head",
                patience=patience,
            )
        )
    if fine_tune_steps:
        phases.append(
            Phase(
                labels=label(params, {"head": head(), "backbone": rest()}),
                groups={
                    "head": _adamw(learning_rate, fine_tune_steps, weight_decay),
                    "backbone": _adamw(learning_rate, fine_tune_steps, weight_decay),
                },
                steps=fine_tune_steps,
                name="fine-tune",
                clip=1.0,
                patience=patience,
            )
        )
    return Plan(phases)


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
    """
    phase = Phase(
        labels=label(params, {"all": everything()}),
        groups={"all": _adamw(learning_rate, steps, weight_decay)},
        steps=steps,
        name="from scratch",
        clip=1.0,
        patience=patience,
    )
    return Plan([phase])


def _adamw(peak: float, steps: int, weight_decay: float) -> Group:
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)
    return Group(optax.adamw, schedule, weight_decay=weight_decay)
