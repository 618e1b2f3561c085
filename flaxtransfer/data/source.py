"""Data sources.

A source is a data set with random access to labeled images, and the names of its classes. Use
``ArraySource`` for arrays in memory and ``open_source`` for everything that has a name.

``digest`` identifies the contents of images, so that whatever was computed from them can be cached
under that name; ``contents`` does so for each image, so that a run knows its own again;
``near_duplicates`` finds images that only look the same.

``measure_levels`` finds black and white of images of more than 8 bits. A source whose files may
have them has two more methods, ``picture(index, measured)`` and ``with_levels(levels)``; one whose
examples belong together (frames of a file, files of a patient) has ``groups()``.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol, SupportsIndex, TypedDict, runtime_checkable

import numpy as np

from flaxtransfer.data.scans import ImageError, Levels, MissingExtra, Picture
from flaxtransfer.paths import listing

if TYPE_CHECKING:
    from flaxtransfer.task import Task

USUAL_COLUMNS = {
    "image": (
        "image", "image_path", "path", "file", "filename", "file_name", "filepath", "file_path",
        "img", "image_file", "image_name", "image_index",
    ),
    "label": (
        "label", "labels", "class", "class_name", "target", "category", "diagnosis",
        "finding_labels",
    ),
    "split": ("split", "subset", "partition"),
    "group": (
        "group", "patient", "patient_id", "patientid", "subject", "subject_id", "scene",
        "scene_id", "slide", "slide_id",
    ),
}  # fmt: skip
"""What the columns of a manifest are usually called, the likeliest first; in lower case, with
underscores for spaces and hyphens. The ids of the images themselves are no paths, and not here."""

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

    It may say more: ``files`` (names of the examples), ``groups()`` (a text for each example; equal
    ones stay in one part of a split), ``splits`` (that the data come with), ``notes`` (what was
    assumed), and ``task``, the name of one of ``task.TASKS``; without it, each image has one class.
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
        notes: what was assumed about them.
    """

    source: Source
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

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


_SIDE = 16

_ALIKE = 0.98
"""Of the gradients of thumbnails, as a cosine. Of crops of photographs it finds 98 % saved again as
JPEG of quality 90, 94 % of quality 50 and all in half the size; of 1.6 million pairs of handwritten
digits it takes 1."""

_FEWEST_IN_COMMON = 50
"""Images whose mean gradient is what they have in common: the anatomy, or a frame."""


def near_duplicates(source: Source, parts: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Pairs of images in different parts that are one image, saved again or in another size.

    The gradients of a small gray thumbnail are compared: a difference hash that keeps their sizes,
    of which most are noise where an image is smooth. What all images have in common, such as the
    anatomy of radiographs, is subtracted first. Mirrored, turned and cropped copies are not found,
    nor are images without any contrast.

    Args:
        source: the images; each is decoded once.
        parts: positions in it, such as ``splits[:3]``.

    Returns:
        Positions of each pair, the one in the earlier part first, in order.

    References:
        N. Krawetz, "Kind of Like That" (difference hash), 2013.

    >>> from flaxtransfer.data import ArraySource
    >>> images = np.random.default_rng(0).integers(0, 200, (4, 32, 32), np.uint8)
    >>> images[3] = images[1] + 20
    >>> near_duplicates(ArraySource(images, [0, 1, 0, 1]), [np.array([0, 1]), np.array([2, 3])])
    [(1, 3)]
    """
    places = np.concatenate(parts).tolist()
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = np.stack(list(pool.map(lambda i: _gradients(source[i]["image"]), places)))
    if len(places) >= _FEWEST_IN_COMMON:
        hashes = _unit(hashes - hashes.mean(axis=0))
    ends = np.cumsum([len(part) for part in parts])
    pairs: list[tuple[int, int]] = []
    for start, end in pairwise((0, *ends.tolist())):
        for first in range(start, end, _PIECE):
            rows = slice(first, min(first + _PIECE, end))
            alike = hashes[rows] @ hashes[end:].T >= _ALIKE
            pairs += [(places[first + i], places[end + j]) for i, j in np.argwhere(alike).tolist()]
    return pairs


def _gradients(image: np.ndarray) -> np.ndarray:
    """The gradients of a thumbnail, of length 1."""
    from PIL import Image  # Here: sources of arrays need no Pillow.

    gray = Image.fromarray(image.mean(axis=-1, dtype=np.float32))
    small = np.asarray(gray.resize((_SIDE, _SIDE), Image.Resampling.HAMMING))
    return _unit(np.concatenate([np.diff(small, axis=axis).ravel() for axis in (0, 1)]))


def _unit(values: np.ndarray) -> np.ndarray:
    """Rows of length 1, or of zeros where nothing but rounding is left."""
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    unit: np.ndarray = np.where(lengths > 1e-3, values / np.maximum(lengths, 1e-3), 0)
    return unit


def _content(source: Source, index: int) -> Content:
    read = getattr(source, "content", None)
    if read is not None:
        data = read(index)
        return Content(len(data), hashlib.sha256(data).hexdigest()[:32])
    image = np.ascontiguousarray(source[index]["image"])
    form = repr((image.shape, image.dtype.str)).encode()
    return Content(image.nbytes, hashlib.sha256(form + image.tobytes()).hexdigest()[:32])


_MOST_FOR_LEVELS = 200
"""Training images whose measurements are looked at, evenly spread over them."""

_PIXELS_FOR_LEVELS = 4096
"""Of each image: 200 such images give percentiles of 0.1 and 99.9 from 800 pixels beyond them."""

PERCENTILES = (0.1, 99.9)

_ALL_LEVELS = 192
"""Of 256 gray levels: 16-bit pictures that keep as many on the whole scale are photographs."""


def with_levels(source: Source, levels: Levels | None) -> Source:
    """The source with black and white for files of more than 8 bits; others stay as they are.

    Args:
        source: any; one that cannot hold such files is returned as it is.
        levels: from ``measure_levels``, or of a preprocessing; None changes nothing.
    """
    change = getattr(source, "with_levels", None)
    if levels is None or not levels.black or change is None:
        return source
    found: Source = change(levels)
    return found


def measure_levels(
    source: Source,
    positions: Sequence[int] | np.ndarray,
    *,
    window: tuple[float, float] | None = None,
    own: Levels | None = None,
) -> Levels | None:
    """Black and white of images of more than 8 bits, measured on training images.

    Black and white are the percentiles 0.1 and 99.9 of each band, and one pair for three colors, so
    that hues stay. 16-bit pictures that use most of their range keep it whole. DICOM files that all
    have a window of their own are shown by it; if some have none, all are measured.

    Args:
        source: of the images.
        positions: of the training images; up to 200 of them are read, evenly spread.
        window: center and width, instead of percentiles.
        own: levels of the weights, which then hold.

    Returns:
        The levels, with a note in one line; None for images of 8 bits.

    Raises:
        ValueError: a window that no image needs, or that leaves out all that was measured; images
            with other bands than others.

    >>> from flaxtransfer.data import ArraySource
    >>> measure_levels(ArraySource(np.zeros((2, 4, 4), np.uint8), [0, 1]), [0, 1]) is None
    True
    """
    places = np.asarray(positions)
    places = places[np.unique(np.linspace(0, len(places) - 1, _MOST_FOR_LEVELS).astype(int))]
    read, found = getattr(source, "picture", None), list[Picture]()
    if read is not None:
        found = _pictures(read, places)
    if not found:
        if window is not None:
            raise ValueError(
                f"the window must be for images of more than 8 bits, and the {len(places)} that "
                "were looked at have 8; leave out --window"
            )
        return None
    names = _names_of(found)
    if window is None and own is None and all(picture.window for picture in found):
        return Levels((), (), note=_note_of_windows(found))
    count = max(picture.values.shape[1] for picture in found)
    bands = [
        np.concatenate([p.values[:, band if p.values.shape[1] > 1 else 0] for p in found])
        for band in range(count)
    ]
    known = [band[np.isfinite(band)] for band in bands]
    if not all(map(len, known)):
        raise ValueError("every band must have measurements, and one has none in any image")
    levels = own if own is not None else _levels_of(known, found, window)
    note = _note_of_levels(levels, known, found, window=window is not None, own=own is not None)
    if missing := 1 - sum(map(len, known)) / sum(map(len, bands)):
        note += f"; {missing:.1%} of the pixels have no measurement and are black"
    nm = levels.wavelengths or found[0].wavelengths
    return replace(levels, names=levels.names or names, wavelengths=nm, note=note)


def _pictures(read: Callable[..., Picture | None], places: np.ndarray) -> list[Picture]:
    """The images of more than 8 bits among these, thinned.

    Raises:
        ImageError: images that cannot be read: the first ten, and how many.
    """

    def look(place: np.int64) -> Picture | ImageError | None:
        try:
            return _thinned(read(int(place), measured=True))
        except MissingExtra:
            raise
        except ImageError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        looked = list(pool.map(look, places))
    if errors := [str(each) for each in looked if isinstance(each, ImageError)]:
        if len(errors) == 1:
            raise ImageError(errors[0])
        raise ImageError(
            f"{len(errors)} of {len(looked)} images cannot be used: {listing(errors, most=10)}"
        )
    return [each for each in looked if isinstance(each, Picture)]


def _thinned(picture: Picture | None) -> Picture | None:
    """The picture with a sample of its pixels, ``[pixels, bands]``, spread evenly."""
    if picture is None:
        return None
    flat = picture.values.reshape(-1, picture.values.shape[2])
    # Steps of the golden section fall into no row or column more often than into others.
    steps = np.arange(min(len(flat), _PIXELS_FOR_LEVELS)) * ((5**0.5 - 1) / 2) % 1
    few = len(flat) <= _PIXELS_FOR_LEVELS
    return replace(picture, values=flat if few else flat[(steps * len(flat)).astype(int)])


def _names_of(found: Sequence[Picture]) -> tuple[str, ...]:
    """The names of the bands, which all that state them must share."""
    stated = {picture.names: None for picture in found if picture.names}
    if len(stated) > 1:
        one, other, *_ = stated
        raise ValueError(
            f"all images must have the same bands in the same order, got {listing(one, most=13)} "
            f"and {listing(other, most=13)}"
        )
    return next(iter(stated), ())


def _levels_of(
    known: Sequence[np.ndarray], found: Sequence[Picture], window: tuple[float, float] | None
) -> Levels:
    """Levels from the measurements of each band."""
    if window is not None:
        levels = Levels.of_window(*window, len(known))
        low, high = min(band.min() for band in known), max(band.max() for band in known)
        if high <= levels.black[0] or low >= levels.white[0]:
            raise ValueError(
                f"the window (center {window[0]:g}, width {window[1]:g}: black "
                f"{levels.black[0]:g}, white {levels.white[0]:g}) must overlap what the images "
                f"measure, got {low:g} .. {high:g}"
            )
        return levels
    # One pair for gray and for three colors, so that hues stay.
    ends = [_ends(band) for band in ([np.concatenate(known)] if len(known) in (1, 3) else known)]
    if len(ends) == 1:
        low, high = ends[0]
        whole = all(p.values.dtype == np.uint16 and not p.window for p in found)
        if whole and (high - low) / 257 >= _ALL_LEVELS:
            ends = [(0.0, 65535.0)]
        ends *= len(known)
    black, white = zip(*ends, strict=True)
    return Levels(black, white)


def _ends(band: np.ndarray) -> tuple[float, float]:
    """Black and white of one band: values that were measured, which no machine rounds otherwise."""
    low = float(np.percentile(band, PERCENTILES[0], method="lower"))
    high = float(np.percentile(band, PERCENTILES[1], method="higher"))
    if low == high:
        low, high = float(band.min()), float(band.max())
    return low, high if high > low else low + 1


def _note_of_windows(found: Sequence[Picture]) -> str:
    flat = sum(len(np.unique(p.own(p.values))) == 1 for p in found if p.own is not None)
    note = "gray levels: each file by its own window, the first where it has several"
    return note + (f"; by it {flat} of {len(found)} images are of a single gray" if flat else "")


def _note_of_levels(
    levels: Levels,
    known: Sequence[np.ndarray],
    found: Sequence[Picture],
    *,
    window: bool,
    own: bool,
) -> str:
    """What black and white are, where they are from, and what another rule would have lost."""
    ends = list(zip(levels.black, levels.white, strict=True))
    names = levels.names or _names_of(found) or tuple(map(str, range(1, len(ends) + 1)))
    if len(set(ends)) == 1:
        text = f"black {ends[0][0]:g} and white {ends[0][1]:g}"
    else:
        pairs = zip(names, ends, strict=True)
        text = "black and white " + listing([f"{n} {b:g} .. {w:g}" for n, (b, w) in pairs], most=13)
    kinds = ", ".join(sorted({p.values.dtype.name for p in found}))
    whole = len(set(ends)) == 1 and ends[0] == (0, 65535) and not window and not own
    source = (
        "as the weights have them"
        if own
        else "as asked for"
        if window
        else "the whole range, of which most is used"
        if whole
        else f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of {len(found)} training images"
    )
    note = f"gray levels: {text} ({kinds}; {source})"
    if all(p.values.dtype == np.uint16 for p in found) and not (whole or own):
        kept = max(int((band.max() - band.min()) // 257) + 1 for band in known)
        note += f"; on a scale to 65535 {kept} of 256 levels would be left" if kept < 128 else ""
    if own or window:
        cut = [
            np.mean((band < low) | (band > high))
            for band, (low, high) in zip(known, ends, strict=False)
        ]
        outside = np.mean(cut)
        note += f"; {outside:.1%} of the pixels are beyond them" if outside else ""
    if any(p.window for p in found):
        note += "; windows of single files are not used"
    return note
