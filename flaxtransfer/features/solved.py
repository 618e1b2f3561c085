"""A head at its optimum on frozen features, for features as the network gives them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flaxtransfer.features.checks import examples
from flaxtransfer.features.logistic import logistic_path
from flaxtransfer.features.standardise import standardisation
from flaxtransfer.features.sweep import sweep_head

__all__ = ["SolvedHead", "solved_head"]

_STRENGTH_OF_ONE = 10.0
"""Penalty on standardised features where nothing can be held out to choose it by."""


class SolvedHead(NamedTuple):
    """A linear head.

    Args:
      kernel: float64 ``[features, classes]``.
      bias: float64 ``[classes]``.
      text: how it was found, for a person.
    """

    kernel: np.ndarray
    bias: np.ndarray
    text: str


def solved_head(
    features: Any, labels: Any, classes: int, *, folds: int = 5, seed: int = 0
) -> SolvedHead:
    """Multinomial logistic regression to the optimum, its strength chosen by folds.

    Use it to begin fine-tuning with a head that fits the features, so that the first gradients do
    not distort them. Features are standardised for the fit, and the head is turned back into one
    for features as they were given: a network with it gives the fitted head's logits.

    Args:
      features: ``[examples, features]``, finite.
      labels: integers ``[examples]``, 0 .. classes - 1, each class with an example or more. The
        only example of a class is never held out; where every class has one alone, the strength
        is a fixed one.
      classes: how many there are.
      folds: by which the strength is chosen; fewer where a class has fewer examples.
      seed: of the folds.

    Raises:
      ValueError: a class without examples, and as ``logistic_path``.
      TypeError: labels that are no integers.

    References:
      A. Kumar et al., "Fine-Tuning Can Distort Pretrained Features and Underperform
      Out-of-Distribution", 2022 (a solved head before fine-tuning).

    >>> labels = np.arange(40) % 2
    >>> random = np.random.default_rng(0)
    >>> head = solved_head(random.normal(size=(40, 8)) + 4 * labels[:, None], labels, 2)
    >>> head.kernel.shape, head.text.split(",")[0]
    ((8, 2), 'logistic regression on 40 examples')
    """
    _, label, _ = examples(features, labels, classes)
    begin = f"logistic regression on {len(label)} examples"
    counts = np.bincount(label, minlength=classes)
    if counts.max() > 1:
        found = sweep_head(features, label, folds=folds, seeds=(seed,), classes=classes)
        text = (
            f"{begin}, strength {found.strength:.3g}; {100 * found.accuracy:.1f} % of those held "
            "out are right"
        )
        return SolvedHead(found.kernel, found.bias, text)
    scaling = standardisation(features)
    path = logistic_path(scaling(features), label, _STRENGTH_OF_ONE, classes=classes)
    kernel, bias = scaling.undo(path.kernels[0], path.biases[0])
    return SolvedHead(
        kernel, bias, f"{begin}, strength {_STRENGTH_OF_ONE:g}, for each class has but one example"
    )
