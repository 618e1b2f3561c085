"""Image cache.

``cached`` keeps decoded images of a source in memory. ``digest`` identifies the contents of
images, so that whatever was computed from them can be cached under that name; ``contents`` does so
for each image, so that a run knows its own again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from flaxtransfer.data.source import Example, Source, position
from flaxtransfer.data.transforms import Transform, is_random

DEFAULT_BUDGET = 256 * 2**20

_THREADS = 4

_PIECE = 256


class CachedSource:
    """A source that keeps images in memory, up to a budget; made by ``cached``."""

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
                # A read-only copy of our own: batches are stacked from it for ever.
                image = image.copy()
                image.flags.writeable = False
                self._examples[index] = {"image": image, "label": example["label"]}
                self._nbytes += image.nbytes
        return {"image": image, "label": example["label"]}

    def __getstate__(self) -> dict[str, Any]:
        # A worker process fills a cache of its own instead of being sent this one.
        return self.__dict__ | {"_examples": {}, "_nbytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def cached(
    source: Source, transform: Transform | None = None, *, budget: int = DEFAULT_BUDGET
) -> CachedSource:
    """Caches decoded images, or the results of a deterministic transform, in memory.

    Use it with the evaluation transform, so that every evaluation after the first costs no image
    work (then give ``batches_in_order`` this source and no transform); or without a transform, so
    that training does not decode small images again. Images beyond the budget are made anew each
    time. It is not for random transforms.

    Args:
        source: where the images come from.
        transform: applied once before an image is cached; must not be random.
        budget: bytes of pixels to hold at most, per process that uses the source.

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
        raise ValueError(f"budget must be >= 0 bytes, got {budget}")
    if transform is not None and is_random(transform):
        raise ValueError(
            f"the transform of a cache must be deterministic, got {transform!r}; give the random "
            "one to train_batches"
        )
    return CachedSource(source, transform, budget)


def _no_randomness() -> np.random.Generator:
    # For callables that draw without declaring it: the same numbers for every image and run.
    return np.random.Generator(np.random.PCG64(0))


class Content(NamedTuple):
    """What identifies one image: bytes, and the first 128 bits of SHA-256 in hexadecimal."""

    size: int
    sha256: str


def contents(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    progress: Callable[[int], object] | None = None,
) -> list[Content]:
    """Sizes and digests of the images at ``indices``, in their order; labels are left out.

    A source may have a method ``content(index)`` that returns the bytes that an image is made from
    (the file, for example); then no image is decoded.

    Args:
        source: the images.
        indices: positions in it.
        progress: called with the number of images that were read so far.

    Raises:
        OSError, ValueError: an image cannot be read.

    >>> from flaxtransfer.data import ArraySource
    >>> images = np.zeros((3, 4, 4), np.uint8)
    >>> before = contents(ArraySource(images, [0, 1, 1]), [0, 2])
    >>> images[2, 3, 3] = 1
    >>> after = contents(ArraySource(images, [0, 1, 1]), [0, 2])
    >>> after[0] == before[0], after[1] == before[1], after[0].size
    (True, False, 16)
    """
    places = np.asarray(indices).tolist()
    found: list[Content] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        # In pieces, so that an interruption does not wait for all that was handed out.
        for start in range(0, len(places), _PIECE):
            found += pool.map(partial(_content, source), places[start : start + _PIECE])
            if progress is not None:
                progress(len(found))
    return found


def digest(source: Source, indices: Sequence[int] | np.ndarray) -> str:
    """SHA-256 of the images at ``indices``, in their order; see ``contents``."""
    parts = (content.sha256 for content in contents(source, indices))
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _content(source: Source, index: int) -> Content:
    read = getattr(source, "content", None)
    if read is not None:
        data = read(index)
        return Content(len(data), hashlib.sha256(data).hexdigest()[:32])
    image = np.ascontiguousarray(source[index]["image"])
    form = repr((image.shape, image.dtype.str)).encode()
    return Content(image.nbytes, hashlib.sha256(form + image.tobytes()).hexdigest()[:32])
