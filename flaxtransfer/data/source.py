"""Data sources.

A source is a data set with random access to labeled images, and the names of its classes. Use
``ArraySource`` for arrays in memory and ``open_source`` for everything that has a name.

``digest`` identifies the contents of images, so that whatever was computed from them can be cached
under that name; ``contents`` does so for each image, so that a run knows its own again.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, SupportsIndex, TypedDict, runtime_checkable

import numpy as np

from flaxtransfer.paths import listing

if TYPE_CHECKING:
    from flaxtransfer.task import Task

_THREADS = 4

_PIECE = 256


class Example(TypedDict):
    """One labeled image: ``image`` is uint8 ``[height, width, channels]``.

    ``label`` is an int, or float32 ``[labels]`` for the tasks multi_label and regression.
    """

    image: np.ndarray
    label: int | np.ndarray


@runtime_checkable
class Source(Protocol):
    """Labeled images with random access; the order never changes.

    Any class with these four members is a source; nothing has to be inherited. It must be
    picklable to be used with worker processes, and safe to read from several threads at once.

    A source of several labels or numbers per image also has the attribute ``task``, the name of one
    of ``task.TASKS``; without it, each image has one class.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, label or target; a class is a position in this tuple."""
        ...

    def __len__(self) -> int:
        """The number of examples."""
        ...

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        """The example at ``index``, in ``0 .. len - 1``."""
        ...

    def labels(self) -> np.ndarray:
        """All labels, without decoding an image.

        int64 ``[examples]`` for classes. float32 ``[examples, outputs]`` for multi_label (0, 1) and
        regression, NaN where a label is missing.
        """
        ...


def task_of_source(source: Source) -> Task:
    """What the labels of a source are: its ``task``, or one class per image.

    Raises:
        ValueError: a task of an unknown name.
    """
    from flaxtransfer.task import task_named  # Here: it imports jax, and help texts need none.

    return task_named(getattr(source, "task", "single_label"))


def position(index: SupportsIndex, length: int) -> int:
    """``index`` as an int inside ``0 .. length - 1``.

    Negative positions are refused: more often than not they come from a mistake in arithmetic.

    >>> position(np.int64(2), 3)
    2
    """
    value = operator.index(index)
    if not 0 <= value < length:
        raise IndexError(f"example {value} does not exist; there are {length} (0 to {length - 1})")
    return value


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Labeled images in memory.

    Float images must lie in 0 .. 1 and are stored as ``round(255 * x)``; scale other ranges
    yourself, since only you know what their black and white are.

    Args:
        images: uint8 or float ``[examples, height, width]`` or ``[..., channels]``.
        labels: integers ``[examples]``, each a position in ``class_names``; numbers
            ``[examples, outputs]`` for the other tasks, NaN where a label is missing.
        class_names: the names of the classes, labels or targets; ``"0"``, ``"1"``, ... up to the
            largest label when left out.
        address: what ``open_source`` opens again, for a source that it made.
        task: what the labels are, a name in ``task.TASKS``.

    Raises:
        TypeError: a dtype that has no fixed meaning as a pixel or a label.
        ValueError: shapes or ranges that do not fit together; all problems are listed at once.

    >>> source = ArraySource(np.zeros((2, 4, 4), np.uint8), [1, 0], ("cat", "dog"))
    >>> len(source), source[0]["image"].shape, source.class_names[source[0]["label"]]
    (2, (4, 4, 1), 'dog')
    >>> both = ArraySource(np.zeros((1, 4, 4), np.uint8), [[1, 0]], task="multi_label")
    >>> both[0]["label"].tolist()
    [1.0, 0.0]
    """

    images: np.ndarray
    targets: np.ndarray
    class_names: tuple[str, ...]
    address: str
    task: str

    def __init__(
        self,
        images: np.ndarray,
        labels: object,
        class_names: tuple[str, ...] | None = None,
        *,
        address: str = "",
        task: str = "single_label",
    ) -> None:
        from flaxtransfer.task import task_named  # See `task_of_source`.

        images, targets = np.asarray(images), np.asarray(labels)
        of_classes = task_named(task).name == "single_label"
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise TypeError(
                f"images must be uint8 (0 to 255) or floats in 0 .. 1, got {images.dtype}"
                + ("; for 16 bits: images / 65535" if images.dtype == np.uint16 else "")
            )
        if of_classes and not np.issubdtype(targets.dtype, np.integer):
            raise TypeError(
                f"labels must be integers, the positions in class_names, got {targets.dtype}; for "
                "other labels give task='multi_label' or task='regression'"
            )
        if isinstance(class_names, str):
            raise TypeError(
                f"class_names must be a tuple of strings, got the string {class_names!r}"
            )
        problems = _array_problems(images, targets, class_names, of_classes)
        if problems:
            raise ValueError("invalid ArraySource: " + "; ".join(problems))
        if not of_classes:
            targets = _checked(targets, task, class_names)
        if class_names is None:
            count = int(targets.max()) + 1 if of_classes else targets.shape[1]
            class_names = tuple(map(str, range(count)))
        if images.dtype != np.uint8:
            images = np.rint(images * 255).astype(np.uint8)
        if images.ndim == 3:
            images = images[..., None]
        # Read-only, so that a transform that works in place cannot change the data set.
        images = images.view()
        images.flags.writeable = False
        object.__setattr__(self, "images", images)
        targets = targets.astype(np.int64 if of_classes else np.float32)
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "class_names", tuple(class_names))
        object.__setattr__(self, "address", address)
        object.__setattr__(self, "task", task)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self.images))
        label = self.targets[index]
        return {"image": self.images[index], "label": label.copy() if label.ndim else int(label)}

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]`` or float32 ``[examples, outputs]``."""
        return self.targets.copy()


def _checked(targets: np.ndarray, task: str, names: tuple[str, ...] | None) -> np.ndarray:
    """Labels that are no classes, float32; see the check of their task."""
    from flaxtransfer.task import task_named

    outputs = len(names) if names is not None else targets.shape[-1]
    try:
        return task_named(task).check(targets, outputs)
    except ValueError as error:
        raise ValueError(f"invalid ArraySource: {error}") from error


def _array_problems(
    images: np.ndarray,
    targets: np.ndarray,
    class_names: tuple[str, ...] | None,
    of_classes: bool,
) -> list[str]:
    problems = []
    if images.ndim not in (3, 4) or 0 in images.shape:
        problems.append(
            "images must have shape [examples, height, width(, channels)] without a 0, got "
            f"{images.shape}"
        )
    elif images.dtype != np.uint8:
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):  # so that a NaN is caught as well
            problems.append(
                f"float images must lie in 0 .. 1, got {low:g} .. {high:g}; divide by the value of "
                "white, or give uint8"
            )
    rows = len(images) if images.ndim else 0
    if not of_classes and (targets.ndim != 2 or len(targets) != rows or not targets.size):
        problems.append(
            f"labels must have shape ({rows}, outputs), one row per image, got {targets.shape}"
        )
    elif of_classes and (targets.ndim != 1 or (images.ndim and len(targets) != len(images))):
        problems.append(
            f"labels must have shape ({len(images)},), one per image, got {targets.shape}"
            if images.ndim
            else f"labels must have shape [examples], got {targets.shape}"
        )
    if class_names is not None and len(set(class_names)) != len(class_names):
        twice = sorted({name for name in class_names if tuple(class_names).count(name) > 1})
        problems.append(f"class names must differ, got twice: {twice}")
    if of_classes and targets.size:
        low, high = int(targets.min()), int(targets.max())
        top = None if class_names is None else len(class_names) - 1
        if low < 0 or (top is not None and high > top):
            limit = ">= 0" if top is None else f"in 0 .. {top} ({top + 1} class names)"
            problems.append(f"labels must be {limit}, got {low} .. {high}")
    return problems


@dataclass(frozen=True)
class UnlabeledImages:
    """Images with a name each, to predict, to diagnose or to adapt to; made by ``open_unlabeled``.

    Args:
        source: the images; its labels mean nothing.
        names: of the images, in their order: paths below the folder, or numbers.
        skipped: files that were left out, each with the reason.
    """

    source: Source
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    @classmethod
    def numbered(cls, source: Source) -> UnlabeledImages:
        """The images of a source, with their positions as names."""
        return cls(source, tuple(map(str, range(len(source)))))

    def positions(self, names: Sequence[str]) -> np.ndarray:
        """Positions of the images with these names, int64.

        Raises:
            ValueError: a name that no image has, or one that is given twice; all are listed.
        """
        place = {name: position for position, name in enumerate(self.names)}
        unknown = [name for name in names if name not in place]
        twice = sorted({name for name in names if names.count(name) > 1})
        if unknown or twice:
            problems = [f"no image is called {listing(unknown)}"] if unknown else []
            problems += [f"given twice: {listing(twice)}"] if twice else []
            raise ValueError(f"{'; '.join(problems)}; there are {listing(self.names, most=3)}")
        return np.array([place[name] for name in names], np.int64)


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
