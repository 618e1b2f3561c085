"""What happens to one image on its way into a batch: small steps, composed; uint8 in, uint8 out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from flaxtransfer.data.geometry import check_image, check_interpolation, resize_crop


class Transform(Protocol):
    """A function of an image and a random generator; any callable of that form will do.

    All randomness comes from the generator, so that an example's augmentation depends on nothing
    but the seed and its place in the run.
    """

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        """Maps uint8 ``[height, width, channels]`` to uint8 ``[size, size, channels]``."""
        ...


def is_random(transform: Transform) -> bool:
    """Whether a transform says that it draws random numbers.

    >>> is_random(Channels())
    False
    """
    return getattr(transform, "random", False)


@dataclass(frozen=True)
class Compose:
    """The steps one after the other; all draw from the same generator, in order."""

    steps: tuple[Transform, ...]

    @property
    def random(self) -> bool:
        """Whether any step is random."""
        return any(is_random(step) for step in self.steps)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        for step in self.steps:
            image = step(image, rng)
        return image


@dataclass(frozen=True)
class ResizeCrop:
    """Shortest side to ``resize`` px, then the central square of ``size`` px."""

    size: int
    resize: int
    interpolation: str = "bilinear"

    random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(self)

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        del rng  # evaluation draws nothing
        return resize_crop(image, self.size, self.resize, self.interpolation)


@dataclass(frozen=True)
class Channels:
    """Gray replicated to the three channels of RGB; an image with ``count`` of them is left alone.

    Nothing else is converted: a gray image is no image of 13 bands.
    """

    count: int = 3

    random: ClassVar[bool] = False

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        del rng  # nothing is drawn
        check_image(image)
        if image.shape[2] == self.count:
            return image
        if image.shape[2] == 1 and self.count == 3:
            return np.broadcast_to(image, (*image.shape[:2], self.count))
        raise ValueError(
            f"an image of shape {list(image.shape)} has {image.shape[2]} channels, the network "
            f"wants {self.count}; only gray can be replicated, and only to 3"
            + (f"; transfer with bands={image.shape[2]} (--bands)" if self.count == 3 else "")
        )


def check_sizes(step: object, problems: Sequence[str] = ()) -> None:
    """Raises ValueError for a step's problems: those given, and those of its sizes."""
    problems = list(problems)
    size, resize = getattr(step, "size", 1), getattr(step, "resize", None)
    if size < 1:
        problems.append(f"size is {size}, wanted 1 or more px")
    if resize is not None and resize < size:
        problems.append(f"resize is {resize} px, less than the crop's size of {size} px")
    if problems:
        raise ValueError(f"{type(step).__name__}: " + "; ".join(problems))
    check_interpolation(getattr(step, "interpolation", "bilinear"))
