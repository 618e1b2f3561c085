"""A source whose decoded images stay in memory, and digests of contents.

A short name for the contents of images, which any changed pixel changes.

A source whose images stay in memory once they have been decoded and transformed.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, SupportsIndex

import numpy as np

from flaxtransfer.data.source import Example, Source, position
from flaxtransfer.data.transforms import Transform, is_random

_THREADS = 4


def digest(source: Source, indices: Sequence[int] | np.ndarray) -> str:
    """SHA-256 over the images at ``indices``, in their order; labels have no part in it.

    A source that can say cheaply what its images are made of has a method ``content(index)`` that
    returns those bytes (the file, say), and no image is decoded for it.

    >>> from flaxtransfer.data import ArraySource
    >>> images = np.zeros((3, 4, 4), np.uint8)
    >>> before = digest(ArraySource(images, [0, 1, 1]), [0, 2])
    >>> images[2, 3, 3] = 1
    >>> digest(ArraySource(images, [0, 1, 1]), [0, 2]) == before
    False
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(partial(_of_one, source), np.asarray(indices).tolist())
        return hashlib.sha256(b"".join(parts)).hexdigest()


def _of_one(source: Source, index: int) -> bytes:
    content = getattr(source, "content", None)
    if content is not None:
        return hashlib.sha256(content(index)).digest()
    image = np.ascontiguousarray(source[index]["image"])
    return hashlib.sha256(repr((image.shape, image.dtype.str)).encode() + image.tobytes()).digest()


DEFAULT_BUDGET = 256 * 2**20


class CachedSource:
    """A source that remembers images up to a budget; made by ``cached``."""

    def __init__(self, source: Source, transform: Transform | None, budget: int) -> None:
        self._source = source
        self._transform = transform
        self._budget = budget
        self._examples: dict[int, Example] = {}
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, as the source has them."""
        return self._source.class_names

    @property
    def nbytes(self) -> int:
        """Bytes of pixels held now; never more than the budget."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._source)

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]``."""
        return self._source.labels()

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self._source))
        known = self._examples.get(index)
        if known is not None:
            return known.copy()
        example = self._source[index]
        image = example["image"]
        if self._transform is not None:
            image = self._transform(image, _no_randomness())
        image = np.ascontiguousarray(image)
        with self._lock:
            if index not in self._examples and self._nbytes + image.nbytes <= self._budget:
                # A copy that is our own and read-only: batches are stacked from it for ever.
                image = image.copy()
                image.flags.writeable = False
                self._examples[index] = {"image": image, "label": example["label"]}
                self._nbytes += image.nbytes
        return {"image": image, "label": example["label"]}

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a memory of its own instead of being sent this one.
        return self.__dict__ | {"_examples": {}, "_nbytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def cached(
    source: Source, transform: Transform | None = None, *, budget: int = DEFAULT_BUDGET
) -> CachedSource:
    """Remembers decoded images, or those that a deterministic transform made of them.

    With the evaluation's transform, every evaluation after the first costs no image work (then
    give ``eval_batches`` this source and no transform); without a transform, it spares training
    the decoding of small images. What does not fit the budget is made anew each time.

    Args:
      source: where the images come from.
      transform: applied once before an image is remembered; must not be random.
      budget: bytes of pixels to hold at most, in each process that uses the source.

    Returns:
      A source of the same length, labels and class names.

    Raises:
      ValueError: the transform is random, or the budget negative.

    >>> from flaxtransfer.data import ArraySource, ResizeCrop, cached
    >>> source = ArraySource(np.zeros((3, 8, 8), np.uint8), [0, 1, 1])
    >>> small = cached(source, ResizeCrop(size=4, resize=4), budget=20)
    >>> [small[index]["image"].shape for index in (0, 1)], small.nbytes
    ([(4, 4, 1), (4, 4, 1)], 16)
    """
    if budget < 0:
        raise ValueError(f"budget is {budget} bytes, wanted 0 or more")
    if transform is not None and is_random(transform):
        raise ValueError(
            f"{transform!r} is random: its result must not be remembered. Give a deterministic "
            "transform here and the random one to train_batches"
        )
    return CachedSource(source, transform, budget)


def _no_randomness() -> np.random.Generator:
    # For callables that draw without saying so: the same numbers for every image and run.
    return np.random.Generator(np.random.PCG64(0))
