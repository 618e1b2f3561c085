"""A network in another domain than it was trained for: adapted to unlabelled images, guarded."""

from flaxtransfer.domain.batch_norm import adapt_batch_norm
from flaxtransfer.domain.class_balanced import adapt_batch_norm_balanced
from flaxtransfer.domain.entropy import EntropyReport, minimise_entropy
from flaxtransfer.domain.report import BatchNormReport, Candidate
from flaxtransfer.domain.standing import Standing

__all__ = [
    "BatchNormReport",
    "Candidate",
    "EntropyReport",
    "Standing",
    "adapt_batch_norm",
    "adapt_batch_norm_balanced",
    "minimise_entropy",
]
