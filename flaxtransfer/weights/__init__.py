"""Pre-trained weights with what belongs to them: strict in, strict out."""

from flaxtransfer.weights.load import load
from flaxtransfer.weights.locations import card
from flaxtransfer.weights.preprocessing import IMAGENET, Preprocessing, normalised, pixels
from flaxtransfer.weights.pretrained import Checkpoint
from flaxtransfer.weights.save import save

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
