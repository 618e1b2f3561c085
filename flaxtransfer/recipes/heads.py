"""Recipes in which the network stays as it is and a head learns to read it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from flaxtransfer.groups import FROZEN
from flaxtransfer.paths import Params
from flaxtransfer.recipes.parts import adamw, head_and_backbone, one_phase, recipe
from flaxtransfer.training.plan import Plan

__all__ = ["depth_head", "feature_extraction", "solved_head"]


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
