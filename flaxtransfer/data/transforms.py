"""The transforms that belong to a checkpoint's preprocessing, for evaluation and for training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

from flaxtransfer.data.augmentation import HorizontalFlip, Jitter, RandomAffine, RandomResizedCrop
from flaxtransfer.data.steps import Channels, Compose, ResizeCrop, Transform


class Geometry(Protocol):
    """The part of a checkpoint's preprocessing that concerns pixels' places."""

    @property
    def size(self) -> int:
        """Side of the network's input in px."""
        ...

    @property
    def resize(self) -> int:
        """What the shortest side is resized to before the central crop, in px."""
        ...

    @property
    def interpolation(self) -> str:
        """Name of the resampling."""
        ...


def evaluation_transform(preprocessing: Geometry, *, channels: int = 3) -> Compose:
    """The deterministic transform that belongs to the weights.

    Args:
      preprocessing: a checkpoint's ``Preprocessing``, or anything with its ``size``, ``resize``
        and ``interpolation``.
      channels: of the network's input.

    Returns:
      Maps any image to uint8 ``[size, size, channels]``.
    """
    p = preprocessing
    return Compose((ResizeCrop(p.size, p.resize, p.interpolation), Channels(channels)))


def training_transform(
    preprocessing: Geometry,
    *,
    geometry: Literal["affine", "crop", "none"] = "affine",
    flip: bool = False,
    jitter: bool = False,
    channels: int = 3,
) -> Compose:
    """A usual augmentation around the weights' preprocessing; compose your own for another.

    Args:
      preprocessing: see ``evaluation_transform``.
      geometry: ``"affine"`` for ``RandomAffine``, ``"crop"`` for ``RandomResizedCrop``, each with
        its defaults; ``"none"`` for the evaluation's.
      flip: whether images may be mirrored; ``flip_keeps_labels`` has an opinion on that.
      jitter: whether brightness and contrast vary.
      channels: of the network's input.

    Returns:
      Maps any image to uint8 ``[size, size, channels]``.
    """
    p = preprocessing
    choices: dict[str, Transform] = {
        "affine": RandomAffine(p.size, p.resize, p.interpolation),
        "crop": RandomResizedCrop(p.size, p.interpolation),
        "none": ResizeCrop(p.size, p.resize, p.interpolation),
    }
    if geometry not in choices:
        raise ValueError(f"unknown geometry {geometry!r}; known: {', '.join(choices)}")
    steps: list[Transform] = [choices[geometry]]
    if flip:
        steps.append(HorizontalFlip())
    if jitter:
        steps.append(Jitter())
    # Last, so that gray is processed as one channel.
    return Compose((*steps, Channels(channels)))


_SIDES = re.compile(r"(?i)(^|[^a-z])(left|right|clockwise|counterclockwise)([^a-z]|$)")
_NUMBERS = {"zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"}


def flip_keeps_labels(class_names: Sequence[str]) -> bool:
    """Whether a mirror image probably keeps its label, going by the names of the classes.

    False as soon as most classes look like glyphs (a single character or number, or a number
    word), or any name speaks of a side. It is a guess for a default, not knowledge: organs,
    traffic signs and handedness do not show in names.

    >>> flip_keeps_labels(["cat", "dog"]), flip_keeps_labels(["0", "1"])
    (True, False)
    >>> flip_keeps_labels(["left lung", "heart"])
    False
    """
    glyphs = [n for n in class_names if len(n) == 1 or n.isdigit() or n.lower() in _NUMBERS]
    sides = any(_SIDES.search(name) for name in class_names)
    return not sides and 2 * len(glyphs) <= len(class_names)
