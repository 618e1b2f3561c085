"""When two training steps are the same program, so that it is compiled once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flaxtransfer.groups import FROZEN, Group
from flaxtransfer.models import Model
from flaxtransfer.optimizers import Scaled
from flaxtransfer.paths import flatten
from flaxtransfer.training.phases import Phase
from flaxtransfer.weights import Preprocessing


@dataclass(frozen=True, eq=False)
class Program:
    """All that a compiled training step depends on, besides its arguments.

    Args:
      model: the network.
      phase: resolved.
      preprocessing: whose mean and deviation the images are normalised by.
      start: segment that the batches enter at; None for images.
    """

    model: Model
    phase: Phase = field(repr=False)
    preprocessing: Preprocessing
    start: str | None

    @cached_property
    def identity(self) -> Hashable | None:
        """What equal programs have in common; None where that cannot be told from outside.

        A function of somebody else's may read what has changed since it was compiled, and a
        transformation of optax shows none of its numbers. Such a phase is compiled for itself.
        """
        phase = self.phase
        groups = tuple(sorted(phase.groups.items()))
        if not (_of(phase.loss, "flaxtransfer") and all(_is_plain(g) for _, g in groups)):
            return None
        labels = tuple(flatten(phase.labels).items())
        preprocessing = (self.preprocessing.mean, self.preprocessing.std)
        identity = (
            self.model, labels, groups, phase.batch_norm_policy(), phase.clip, phase.ema,
            phase.loss, preprocessing, self.start,
        )  # fmt: skip
        try:
            hash(identity)
        except TypeError:
            return None
        return identity

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program) or self.identity is None:
            return self is other
        return self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)


def _is_plain(group: Any) -> bool:
    """Whether a group is all numbers, masks, and functions of optax."""
    if not isinstance(group, Group):
        return group is FROZEN
    rate = group.learning_rate
    while isinstance(rate, Scaled):
        rate = rate.schedule
    return _of(group.optimizer, "optax") and (not callable(rate) or _of(rate, "optax"))


def _of(function: Any, package: str) -> bool:
    """Whether a function, or the class of a callable value, is a package's own."""
    module = getattr(function, "__module__", "")
    return str(module).split(".")[0] == package
