"""LEEP: how well the source's own classes, as they are predicted, tell the target's."""

from typing import Any

import numpy as np

from flaxtransfer.shift.checks import as_probabilities
from flaxtransfer.shift.duplicates import repetition_notes, uncertain
from flaxtransfer.shift.nulls import Transferability, labelled, orders, summary

__all__ = ["leep"]


def leep(
    source_probabilities: Any, labels: Any, *, permutations: int = 199, seed: int = 0
) -> Transferability:
    """Mean log-probability of the labels, told from the source head's probabilities alone.

    Each target class is what its examples look like to the source's head: p(y | z) from joint
    counts, then sum_z p(y | z) p(z | x). You want it for networks whose head you have and whose
    features you do not want to store. It is optimistic, because p(y | z) is counted on the same
    examples that it is judged on: read `excess`. With a poor source head it ranks worse than
    scores of features.

    Args:
        source_probabilities: ``[N, Z]``, of the source's Z classes, for target examples.
        labels: ``[N]``, target class numbers; classes without examples are left out.
        permutations: random deals of the labels.
        seed: of the deals.

    Returns:
        A `Transferability` in nats per example, at most 0.

    Raises:
        ValueError: fewer than 4 examples, one target class, rows that are no probabilities.

    >>> found = leep([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], [0, 0, 1, 1])
    >>> (found.value, found.notes)
    (0.0, ('1 source classes have no mass and were left out',))

    References:
        C. V. Nguyen, T. Hassner, M. Seeger, C. Archambeau, "LEEP: a new measure to evaluate
        transferability of learned representations", 2020.
    """
    given = as_probabilities(source_probabilities, "source probabilities")
    classes, count = labelled(labels, len(given))
    # A class that no example has mass in says nothing; divided by its mass it would be 0 / 0.
    mass = given.sum(0)
    found = given[:, mass > 0]
    shares = found / mass[mass > 0]
    one_hot = np.eye(count)[classes]

    def score(order: np.ndarray) -> float:
        conditional = one_hot[order].T @ shares
        told = (found @ conditional.T)[np.arange(len(found)), classes[order]]
        return float(np.log(np.minimum(told, 1.0)).mean())

    value = score(np.arange(len(found)))
    null = np.array([score(order) for order in orders(len(found), permutations, seed)])
    empty = int((mass == 0).sum())
    notes = repetition_notes(uncertain(given), "uncertain")
    if empty:
        notes += (f"{empty} source classes have no mass and were left out",)
    return Transferability(
        "LEEP", counts=(len(given), given.shape[1], count), unit="nats per example", notes=notes,
        **summary(value, null),
    )  # fmt: skip
