"""Proof, leaf by leaf, that what was frozen did not move."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from flaxtransfer.optimizers import frozen
from flaxtransfer.paths import flatten
from flaxtransfer.training.phases import Phase
from flaxtransfer.training.state import State


@dataclass(frozen=True)
class Audit:
    """The frozen leaves and frozen BatchNorm statistics of one phase, at its start and end.

    Args:
      phase: the phase's name.
      leaves: how many were compared.
      moved: paths of those that are not bit for bit what they were.
    """

    phase: str
    leaves: int
    moved: tuple[str, ...]

    def __str__(self) -> str:
        if self.moved:
            return f"{self.phase}: {len(self.moved)} frozen leaves MOVED: {', '.join(self.moved)}"
        return f"{self.phase}: all {self.leaves} frozen leaves are bit-identical to their start"


def frozen_digests(state: State, phase: Phase) -> dict[str, str]:
    """SHA-256 of shape, dtype and bytes of every leaf that ``phase`` may not move."""
    digests = {
        f"params/{path}": digest(leaf)
        for path, leaf in flatten(frozen(state.params, phase.labels, phase.groups)).items()
    }
    norm = phase.batch_norm_policy()
    for path, leaf in flatten(state.batch_stats).items():
        module = path.rpartition("/")[0]
        if norm == "running" or (norm != "batch" and module not in norm):
            digests[f"batch_stats/{path}"] = digest(leaf)
    return digests


def compare(phase: Phase, before: Mapping[str, str], after: Mapping[str, str]) -> Audit:
    """Compares the digests of a phase's start and end."""
    moved = sorted(path for path in before if before[path] != after.get(path))
    return Audit(phase.name, len(before), tuple(moved))


def digest(leaf: Any) -> str:
    """SHA-256 over dtype, shape and bytes: equal exactly when the arrays are bit-identical."""
    array = np.asarray(jax.device_get(leaf))
    header = f"{array.dtype} {array.shape} ".encode()
    return hashlib.sha256(header + array.tobytes()).hexdigest()
