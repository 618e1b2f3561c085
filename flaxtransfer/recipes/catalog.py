"""The recipes, one function each: first those that leave the network as it is.

A recipe is a function of the parameters that returns a ``Plan``, with ``@recipe`` above it: that
puts it into ``RECIPES`` and writes down the arguments that it shares with the others.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from flaxtransfer.groups import FROZEN
from flaxtransfer.labels import rest
from flaxtransfer.masks import Mask, batch_norm, everything
from flaxtransfer.models.layout import By
from flaxtransfer.optimizers import scaled
from flaxtransfer.paths import Params
from flaxtransfer.recipes.parts import (
    RECIPES,
    Groups,
    Labels,
    adamw,
    below_head,
    check_decay,
    check_measured,
    chosen_part,
    curvature_rates,
    fresh,
    head_and_backbone,
    measured_below_head,
    one_phase,
    recipe,
    scaled_groups,
    units,
)
from flaxtransfer.training.plan import Phase, Plan

__all__ = [
    "RECIPES",
    "batch_norm_only",
    "curvature_scaled",
    "depth_head",
    "depths_head",
    "discriminative",
    "early_layers",
    "feature_extraction",
    "from_scratch",
    "full_fine_tuning",
    "gradient_scaled",
    "head_then_fine_tune",
    "high_rate_fine_tuning",
    "l2_sp",
    "linear_probe_then_fine_tune",
    "progressive_unfreezing",
    "solved_head",
    "surgical",
]


@recipe
def solved_head(params: Params, *, kind: Literal["ridge", "logistic"] = "ridge") -> Plan:
    """A head that is solved and not trained: closed form, its penalty by cross-validation.

    Use it first: it costs one pass over the images, at equal labels it is often better than a head
    trained for some hundred steps, and what costs more has to beat it. It sees the images without
    augmentation.

    Args:
        kind: "ridge", least squares in closed form; or "logistic" regression to its optimum, which
            takes longer and knows probabilities better.

    References:
        R. Rifkin, R. Lippert, "Notes on Regularized Least Squares", 2007. S. Kornblith, J. Shlens,
        Q. V. Le, "Do Better ImageNet Models Transfer Better?", 2019 (logistic regression on
        features).
    """
    parts = head_and_backbone(params, adamw(3e-3, 0.0), FROZEN)
    return one_phase(*parts, 0, None, "head", clip=None, probe=kind)


@recipe
def depth_head(
    params: Params, *, segment: str, kind: Literal["ridge", "logistic"] = "ridge"
) -> Plan:
    """A solved head on an earlier output of the network; what follows that output is dropped.

    Use it where images differ from those of the pre-training in kind: color, texture and fine
    detail are known in the early segments and lost in the late ones, so that the last is often the
    wrong one to read. The network is cheaper in use, too. Which segment knows most is found in one
    pass, by cross-validation (``probe_profile``); the command line does so by itself.

    Args:
        segment: Name of the segment that the head reads, as in ``model.segments``.
        kind: Of head, see ``solved_head``.

    References:
        G. Alain, Y. Bengio, "Understanding Intermediate Layers Using Linear Classifier Probes",
        2016. A. Royer, C. Lampert, "A Flexible Selection Scheme for Minimum-Effort Transfer
        Learning", 2020 (an intermediate or early layer is often the best).
    """
    return replace(solved_head(params, kind=kind), ends_at=segment)


@recipe
def depths_head(
    params: Params, *, segments: Sequence[str], kind: Literal["ridge", "logistic"] = "ridge"
) -> Plan:
    """A solved head on several outputs of the network; what follows the last of them is dropped.

    Use it where images differ from those of the pre-training in kind and no depth knows all of it:
    a hue is known early, a shape late. Which segments is found in one pass: the one that knows most
    by cross-validation, then one after the other whose features gain a standard error on the same
    images (``greedy_depths``); the command line does so by itself. Often that is one segment, and
    the head that of ``depth_head``. Where it is several, the weights can be exported as safetensors
    and StableHLO alone.

    Args:
        segments: Names of the segments that the head reads, as in ``model.segments``.
        kind: Of head, see ``solved_head``.

    References:
        U. Evci, V. Dumoulin, H. Larochelle, M. C. Mozer, "Head2Toe: Utilizing Intermediate
        Representations for Better Transfer Learning", 2022 (single features of all depths; here
        they are chosen by whole segments).
    """
    if isinstance(segments, str) or not segments:
        raise ValueError(f"segments must be names of segments, got {segments!r}")
    several = tuple(segments) if len(segments) > 1 else segments[0]
    return replace(solved_head(params, kind=kind), ends_at=several)


@recipe
def feature_extraction(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Feature extraction: the head alone, on the network as it is.

    Use it with very few labels of images like those of the pre-training, as the baseline that
    costlier recipes have to beat, and where one network serves several heads. It cannot do more
    than the features do: where images differ from the pre-training in kind, a probe stays behind.

    Args:
        learning_rate: Peak rate of the head.

    References:
        J. Donahue et al., "DeCAF: A Deep Convolutional Activation Feature for Generic Visual
        Recognition", 2014.
    """
    parts = head_and_backbone(params, adamw(learning_rate, weight_decay), FROZEN)
    return one_phase(*parts, steps, patience, "head", clip=None)


@recipe
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
        learning_rate: Peak rate of scales and biases.
        weight_decay: Decoupled, on the head's kernel.
        statistics: Whether BatchNorm uses, and updates, batch statistics; without it the running
            ones of the pre-training stay, in training too.

    References:
        J. Frankle, D. J. Schwab, A. S. Morcos, "Training BatchNorm and Only BatchNorm: On the
        Expressive Power of Random Features in CNNs", 2021.
    """
    labels: Labels = {"head": fresh(params), "batch norm": batch_norm(), "rest": rest()}
    on_head, on_norms = adamw(head_learning_rate, weight_decay), adamw(learning_rate, 0.0)
    groups: Groups = {"head": on_head, "batch norm": on_norms, "rest": FROZEN}
    norm = {everything(): "batch" if statistics else "running"}
    return one_phase(labels, groups, steps, patience, "batch norm", norm=norm)


@recipe
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
    head that starts at random would send large gradients into the network and distort good
    features; fitting it first avoids that. It is not for images on which those carry nothing.

    Args:
        head_steps: Optimizer steps of the first phase; 0 leaves it out.
        fine_tune_steps: Optimizer steps of the second; 0 leaves it out.
        head_learning_rate: Peak rate of the head alone.
        learning_rate: Peak rate of everything, after a warm-up of a tenth of the phase.

    Raises:
        ValueError: Both phases are left out.

    References:
        A. Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution", 2022.
    """
    phases: list[Phase] = []
    if head_steps:
        parts = head_and_backbone(params, adamw(head_learning_rate, weight_decay), FROZEN)
        phases += one_phase(*parts, head_steps, patience, "head", clip=None).phases
    if fine_tune_steps:
        both = adamw(learning_rate, weight_decay)
        parts = head_and_backbone(params, both, both)
        phases += one_phase(*parts, fine_tune_steps, patience).phases
    return Plan(phases)


@recipe
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
        steps: Optimizer steps after the probe.
        head_learning_rate: Peak rate of the head, which has come a long way already.

    References:
        A. Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
        Out-of-Distribution", 2022.
    """
    on_head, on_backbone = (adamw(r, weight_decay) for r in (head_learning_rate, learning_rate))
    return one_phase(
        *head_and_backbone(params, on_head, on_backbone), steps, patience, probe="logistic"
    )


@recipe
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
    begin_at: str | None = None,
    stop_after: int | None = 1,
    min_gain: float = 0.0,
    min_z: float = 0.0,
    patience: int | None = None,
) -> Plan:
    """The head, then one part more at a time, for as long as validation gains.

    Use it with a validation set and some hundred labels, where nobody knows how deep the network
    has to change: it finds out, and a part that did not help is undone. Each part keeps its
    optimizer moments when the next one joins, and has a label of its own, so that it begins with
    a bias correction of its own. It costs as many phases as there are parts, and a small
    validation set decides by luck (see ``min_gain`` and ``min_z``). Phases have to be long enough
    for what moves to settle: otherwise more of its training passes for a gain of the next part.

    Args:
        by: "segment" unfreezes stage by stage, "block" residual block by block.
        steps: Optimizer steps of each phase.
        learning_rate: Peak rate of the uppermost part below the head.
        decay: Factor of the rate for each part that joins later, in (0, 1].
        down_to: Last part that may be unfrozen, by its name in the plan; by default the first part
            of the network.
        begin_at: The part that joins the head first, such as the one behind which the classes are
            lost; then follow the parts above it, one after another up to the head, and at last
            those below it. By default the uppermost part.
        stop_after: Phases in a row without gain after which the plan ends; None tries all parts.
        min_gain: Validation accuracy, as a share, that each phase has to earn.
        min_z: Standard errors of the paired difference that the gain has to exceed (``ft.Plan``). 2
            asks for proof, which takes thousands of validation images where each part gains little;
            with a few hundred the plan ends too early, which costs more than a part too many.
        patience: Evaluations without improvement that end a phase.

    Raises:
        ValueError: Numbers out of range, a part that there is not, leaves of no known family.

    References:
        J. Howard, S. Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018
        (gradual unfreezing).
    """
    check_decay(decay)
    parts = units(params, by)
    below = below_head(parts)[::-1]
    if down_to is not None:
        if down_to not in below:
            raise ValueError(f"no part {down_to!r} below the head; there are {', '.join(below)}")
        below = below[: below.index(down_to) + 1]
    if begin_at is not None:
        if begin_at not in below:
            raise ValueError(f"no part {begin_at!r} to begin at; there are {', '.join(below)}")
        place = below.index(begin_at)
        below = [*below[place::-1], *below[place + 1 :]]
    top = adamw(learning_rate, weight_decay)
    labels: Labels = {}
    groups: Groups = {}
    phases: list[Phase] = []
    for depth, name in enumerate(["head", *below]):
        group = replace(top, learning_rate=scaled(top.learning_rate, decay ** (depth - 1)))
        labels[name] = parts[name]
        groups[name] = group if depth else adamw(head_learning_rate, weight_decay)
        both = labels | {"frozen": rest()}, groups | {"frozen": FROZEN}
        phases += one_phase(*both, steps, patience, f"+ {name}" if depth else name).phases
    return Plan(phases, patience=stop_after, min_gain=min_gain, min_z=min_z)


@recipe
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
    """Layer-wise learning-rate decay: everything, at rates that shrink toward the input.

    Use it in place of full fine-tuning with some hundred to some thousand labels: the early,
    general features stay nearly where they were. It fits badly where the first layers are what
    has to change, as for images of another sensor.

    Args:
        learning_rate: Peak rate of the head.
        decay: Factor of the rate for each segment or block further down, in (0, 1].

    Raises:
        ValueError: A decay outside (0, 1], leaves of no known family.

    References:
        J. Howard, S. Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018.
    """
    check_decay(decay)
    parts = units(params, by)
    top = adamw(learning_rate, weight_decay)
    groups = {
        name: replace(top, learning_rate=scaled(top.learning_rate, decay**distance))
        for distance, name in reversed(list(enumerate(reversed(parts))))
    }
    return one_phase(parts, groups, steps, patience)


@recipe
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
    proportion to the widest. (The square root, because Adam's steps have the length of the rate.)

    Args:
        curvature: Mean Fisher diagonal of each part, by its name; measured with a head that fits,
            see ``analysis.curvature``.
        examples: How many images the likelihood is of.
        prior_precision: Of the weights around their start; by default the geometric mean of
            ``examples * curvature`` over the parts, so that no part runs away from the others.
        steps: Optimizer steps, from a linear probe on.
        learning_rate: Peak rate of the part with the widest posterior.
        head_learning_rate: Peak rate of the head, which is a probe at the start.

    Raises:
        ValueError: A part without curvature, or a curvature of no part; numbers out of range.

    References:
        S. Amari, "Natural Gradient Works Efficiently in Learning", 1998. J. Kirkpatrick et al.,
        "Overcoming Catastrophic Forgetting in Neural Networks", 2017 (the Fisher diagonal as the
        precision of pre-trained weights).
    """
    parts = units(params, by)
    measured = measured_below_head(parts, curvature, "curvature")
    rates = curvature_rates(measured, examples, prior_precision)
    groups = scaled_groups(parts, rates, learning_rate, head_learning_rate, weight_decay)
    return one_phase(parts, groups, steps, patience, probe="logistic")


@recipe
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
        gradients: Norm of the gradient over norm of the weights of each part, by its name; measured
            with a head that fits, see ``analysis.gradients``.
        batch_norms: Whether BatchNorms move, and use batch statistics.
        steps: Optimizer steps, from a linear probe on.
        learning_rate: Peak rate of the part with the largest ratio.
        head_learning_rate: Peak rate of the head, which is a probe at the start.

    Raises:
        ValueError: A part without a ratio, or a ratio of no part; ratios negative or all 0.

    References:
        Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.
    """
    parts = units(params, by)
    measured = measured_below_head(parts, gradients, "gradients")
    check_measured(measured, "gradients")
    largest = max(measured.values())
    rates = {name: value / largest for name, value in measured.items()}
    groups = scaled_groups(parts, rates, learning_rate, head_learning_rate, weight_decay)
    if batch_norms:
        return one_phase(parts, groups, steps, patience, probe="logistic")
    labels = {name: mask - batch_norm() for name, mask in parts.items()} | {"rest": rest()}
    return one_phase(labels, groups | {"rest": FROZEN}, steps, patience, probe="logistic")


@recipe
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
    """Surgical fine-tuning: one part of the network and the head; by default the first layers.

    Use it when you know what has changed: noise, blur or another sensor ask for the first layers,
    other objects for the last ones. Where nothing is known, relative gradient norms can choose the
    part; it is a guess that validation should confirm.

    Args:
        part: Which leaves move beside the head; by default the stem and the first stage, or what
            ``gradients`` say.
        gradients: Norm of the gradient over norm of the weights of each part, by its name; the part
            with the largest moves. See ``analysis.gradients``.
        batch_norms: Whether the BatchNorms inside the part move, and use batch statistics.
        learning_rate: Peak rate of the part.

    Raises:
        ValueError: Both a part and gradients; gradients of no part, negative, infinite or all 0.

    References:
        Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.
    """
    chosen = chosen_part(params, part, gradients, by) - fresh(params)
    moving = chosen if batch_norms else chosen - batch_norm()
    labels: Labels = {"head": fresh(params), "part": moving, "rest": rest()}
    on_head, on_part = (adamw(r, weight_decay) for r in (head_learning_rate, learning_rate))
    groups: Groups = {"head": on_head, "part": on_part, "rest": FROZEN}
    return one_phase(labels, groups, steps, patience, "surgery")


@recipe
def early_layers(
    params: Params,
    *,
    stages: int = 1,
    steps: int = 300,
    learning_rate: float = 3e-3,
    head_learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """The first segments and the head, at a high rate; what is between them stays.

    Use it where classes differ in what the first layers do not let through: fine texture, another
    sensor's noise. Late layers cannot bring back what early ones have lost, and at the low rates of
    fine-tuning the early ones do not move enough to matter.

    Args:
        stages: How many stages move beside the stem.
        learning_rate: Peak rate of the first segments, ten times that of fine-tuning.

    Raises:
        ValueError: More stages than there are, or fewer than 0; leaves of no known family.

    References:
        Y. Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", 2023.
    """
    parts = units(params)
    below = below_head(parts)
    if not 0 <= stages < len(below):
        raise ValueError(f"stages must be from 0 to {len(below) - 1}, got {stages}")
    early = functools.reduce(operator.or_, (parts[name] for name in below[: stages + 1]))
    labels: Labels = {"head": parts["head"], "early": early, "rest": rest()}
    on_head, on_early = (adamw(r, weight_decay) for r in (head_learning_rate, learning_rate))
    groups: Groups = {"head": on_head, "early": on_early, "rest": FROZEN}
    return one_phase(labels, groups, steps, patience, "early layers")


@recipe
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
    """L2-SP: everything, pulled back toward the pre-trained weights; the head toward zero.

    Use it with few labels where full fine-tuning overfits: the penalty says that the pre-trained
    weights are the best guess, where ordinary decay says that zero is. It does not help where the
    pre-training is of no use.

    Args:
        strength: Of the pull, an L2 penalty on the distance (added to the gradient).
        head_decay: Decoupled, on the head's kernel.

    References:
        X. Li, Y. Grandvalet, F. Davoine, "Explicit Inductive Bias for Transfer Learning with
        Convolutional Networks", 2018.
    """
    on_backbone = replace(adamw(learning_rate, strength), decay_toward="start")
    parts = head_and_backbone(params, adamw(head_learning_rate, head_decay), on_backbone)
    return one_phase(*parts, steps, patience)


@recipe
def full_fine_tuning(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-4,
    head_learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Full fine-tuning: everything at one low rate, the new head at a higher one.

    Use it with some thousand labels and more, or where images are unlike those of the
    pre-training. With a few dozen labels it overfits before it gains, and a head that starts at
    random disturbs the features first (see ``head_then_fine_tune``).

    References:
        P. Agrawal, R. Girshick, J. Malik, "Analyzing the Performance of Multilayer Neural Networks
        for Object Recognition", 2014.
    """
    on_head, on_backbone = (adamw(r, weight_decay) for r in (head_learning_rate, learning_rate))
    return one_phase(*head_and_backbone(params, on_head, on_backbone), steps, patience)


@recipe
def high_rate_fine_tuning(
    params: Params,
    *,
    steps: int = 300,
    learning_rate: float = 3e-3,
    head_learning_rate: float = 3e-3,
    weight_decay: float = 1e-2,
    patience: int | None = None,
) -> Plan:
    """Full fine-tuning at ten times the usual rate: the start matters, its features need not stay.

    Use it far from the pre-training with clean labels, where the usual rate does not move the
    network far enough. It forgets what it does not need, and wrong labels are learned as fast as
    right ones: where some are wrong, or the images are near to the pre-training, take the low rate.

    References:
        H. Li et al., "Rethinking the Hyperparameters for Fine-Tuning", 2020 (the best rate depends
        on the distance of the domains).
    """
    return full_fine_tuning(
        params,
        steps=steps,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        weight_decay=weight_decay,
        patience=patience,
    )


@recipe
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
        learning_rate: Peak rate, after a warm-up of a tenth of the steps.

    References:
        K. He, R. Girshick, P. Dollár, "Rethinking ImageNet Pre-training", 2019.
    """
    del params  # Everything is everything; the signature is that of all recipes.
    groups = {"all": adamw(learning_rate, weight_decay)}
    return one_phase({"all": everything()}, groups, steps, patience, "from scratch")
