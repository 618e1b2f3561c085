"""Recipes of several phases."""

from __future__ import annotations

from dataclasses import replace

from flaxtransfer.groups import FROZEN
from flaxtransfer.labels import rest
from flaxtransfer.optimizers import scaled
from flaxtransfer.strategies.parts import By, adamw, fresh, units
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
