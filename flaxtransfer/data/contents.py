"""A short name for the contents of images, which any changed pixel changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from flaxtransfer.data.source import Source

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
