"""A network in another domain than it was trained for: adapted to unlabelled images, guarded."""

from flaxtransfer.adapt.batch_norm import (
    BatchNormReport,
    Candidate,
    adapt_batch_norm,
    adapt_batch_norm_balanced,
)
from flaxtransfer.adapt.entropy import EntropyReport, minimise_entropy
from flaxtransfer.adapt.scores import Standing

__all__ = [
    "BatchNormReport",
    "Candidate",
    "EntropyReport",
    "Standing",
    "adapt_batch_norm",
    "adapt_batch_norm_balanced",
    "minimise_entropy",
]
