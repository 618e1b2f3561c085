"""What is known of a model at its source: calibrated probabilities of held-out examples."""

import dataclasses
from typing import Any

import numpy as np
from scipy.special import log_softmax

from flaxtransfer.shift.checks import as_logits

__all__ = ["Calibration"]


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """A map from logits to calibrated probabilities, with the validation it was fitted on.

    Every estimate about a target is relative to a source; this is what the others of this room
    take as `source`. They are ``softmax(scale * logits + bias)``: log-probabilities
    are as good as logits.

    Args:
        method: "none", "temperature", "bias_corrected" or "vector".
        scale: `[K]`, positive; K equal numbers (1 / temperature) but for "vector".
        bias: `[K]`, sums to 0; zeros for "none" and "temperature".
        probabilities: `[n, K]`, calibrated, of the held-out validation examples.
        labels: `[n]`, their classes, int64.
        notes: what a reader has to know: absent classes, a fallback to a simpler map.
    """

    method: str
    scale: np.ndarray
    bias: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """K."""
        return self.probabilities.shape[1]

    @property
    def prior(self) -> np.ndarray:
        """`[K]`, the source's prior: the mean calibrated probability, not the labels' frequency.

        A target that is the source then has exactly this prevalence.
        """
        return self.probabilities.mean(0)

    def apply(self, logits: Any) -> np.ndarray:
        """Calibrated probabilities `[m, K]` of logits or log-probabilities `[m, K]`."""
        found = as_logits(logits, "logits")
        if found.shape[1] != self.classes:
            raise ValueError(
                f"logits have {found.shape[1]} columns, and the calibration {self.classes} classes"
            )
        return np.exp(log_softmax(found * self.scale + self.bias, axis=1))
