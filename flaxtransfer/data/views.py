"""A fixed number of augmented versions of each image, in place of new ones in every epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flaxtransfer.data.steps import Transform


@dataclass(frozen=True)
class FixedView:
    """One version of every image: what a random transform makes of it with draws that never change.

    For ``eval_batches``, whose generator depends on the example alone: the same seed and view give
    the same pixels in every run, on any number of threads.

    Args:
      transform: the random transform.
      seed: of the draws.
      view: number of the version, 0 or more; versions are independent of each other.

    >>> noise = lambda image, rng: image + rng.integers(0, 99, image.shape, dtype=np.uint8)
    >>> image, example = np.zeros((2, 2, 1), np.uint8), 7
    >>> views = [FixedView(noise, 0, k)(image, np.random.default_rng(example)) for k in (0, 1, 0)]
    >>> bool((views[0] == views[2]).all()), bool((views[0] == views[1]).all())
    (True, False)
    """

    transform: Transform
    seed: int
    view: int

    random: ClassVar[bool] = False

    def __call__(self, image: np.ndarray, rng: np.random.Generator, /) -> np.ndarray:
        own = np.random.default_rng([self.seed, self.view, int(rng.integers(2**63))])
        return self.transform(image, own)
