"""What is known of a model at its source: calibrated probabilities of held-out examples."""

import dataclasses
from typing import Any

import numpy as np
from scipy.special import log_softmax

from flaxtransfer.shift.checks import as_logits, as_probabilities

__all__ = ["Calibration", "logits_of"]

_LEAST = 1e-12
"""Probabilities that are 0 in the file have a logarithm all the same."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """A map from logits to calibrated probabilities, with the validation it was fitted on.

    Every estimate about a target is relative to a source; this is what the others of this room
    take as `source`. They are ``softmax(scale * centred + bias)``, where `centred` are the logits
    less the mean of their row: log-probabilities are as good as logits, for "vector" as well.

    Args:
        method: "none", "temperature", "bias_corrected" or "vector": what was used, which is not
            always what was asked for; `notes` then say why.
        scale: `[K]`, positive; K equal numbers (1 / temperature) but for "vector".
        bias: `[K]`, sums to 0; zeros for "none" and "temperature".
        probabilities: `[n, K]`, calibrated, of the held-out validation examples.
        labels: `[n]`, their classes, int64.
        notes: what a reader has to know: absent classes, a fallback to a simpler map.
        gradient_norm: of the mean negative log-likelihood in scale and bias, where the fit ended;
            None where nothing was minimised.
    """

    method: str
    scale: np.ndarray
    bias: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray
    notes: tuple[str, ...] = ()
    gradient_norm: float | None = None

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
        # Where scales differ, a number added to a row would otherwise change its probabilities.
        centred = found - found.mean(axis=1, keepdims=True)
        return np.exp(log_softmax(centred * self.scale + self.bias, axis=1))


def logits_of(probabilities: Any, name: str = "probabilities") -> np.ndarray:
    """Logits `[n, K]` of probabilities `[n, K]`: their logarithms, where 0 counts as 1e-12.

    The way in for a model that hands out probabilities alone; a softmax undoes it.

    Raises:
        ValueError: they are no probabilities.

    >>> logits_of([[1.0, 0.0]]).round(2).tolist()
    [[0.0, -27.63]]
    """
    return np.log(np.maximum(as_probabilities(probabilities, name), _LEAST))
