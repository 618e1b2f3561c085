"""Pre-trained weights with what belongs to them: strict in, strict out."""

from flaxtransfer.weights.checkpoint import Checkpoint
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.measured import normalised, pixels
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing
from flaxtransfer.weights.saving import save
from flaxtransfer.weights.shipped import card

__all__ = [
    "IMAGENET",
    "Checkpoint",
    "Preprocessing",
    "card",
    "load",
    "normalised",
    "pixels",
    "save",
]
