"""Data loaders: batches for training and validation as pure functions of the step number.

``cached`` keeps decoded images of a source in memory, for whoever passes over them again.
``band_preprocessing`` and ``band_patches`` measure mean, standard deviation and samples of each
band on training images, to adapt a network for RGB to images with other bands.
"""

from __future__ import annotations

import itertools
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np

from flaxtransfer.data.pipeline import (
    FixedView,
    Order,
    batches_in_order,
    seeds,
    train_batches,
    training_rows,
)
from flaxtransfer.data.scans import Levels, Picture
from flaxtransfer.data.source import (
    Example,
    Source,
    digest,
    measure_levels,
    position,
    task_of_source,
    with_levels,
)
from flaxtransfer.data.splits import Split, Splits, check_classes, groups_of, subsample
from flaxtransfer.data.transforms import (
    Transform,
    evaluation_transform,
    flip_keeps_labels,
    is_random,
    training_transform,
)
from flaxtransfer.distributed import share
from flaxtransfer.models.band_init import common_scale
from flaxtransfer.weights.preprocessing import Preprocessing

Batch = Mapping[str, Any]
"""``image`` uint8 [batch, height, width, 3], ``label`` int [batch] or float [batch, outputs],
``index`` int [batch] of the example in its source, and for evaluation ``weight`` float [batch], 0
where it is padding."""


_MOST_FOR_BANDS = 2000
"""More images hardly change a mean over all their pixels."""

_BAND_BATCH = 64

DEFAULT_BUDGET = 256 * 2**20
"""Bytes of pixels that ``cached`` holds."""

MOST_FOR_STATISTICS = 2048
"""Training images for BatchNorm statistics that are measured again and again: a mean over them has
a standard error of 2 % of the deviation, even where each image counts as one number."""


@dataclass(frozen=True)
class IndexedExamples:
    """The examples behind a feed, for whoever wants to remember what became of each of them.

    Args:
        labels: of the training examples, int [examples] or float [examples, outputs].
        validation_labels: of the validation examples, likewise, which may be none.
        batch_size: rows of a training batch.
        rows: of batch k, for each row: which training example, and in which pass over them.
        view: every training example once, in order, in version k of its augmentation, which never
            changes; padded, with ``weight``.
        random: whether augmentation draws at all; if not, there is one version.
        fingerprint: what the pixels of the training and of the validation examples depend on, as
            short texts and digests. Reads every image.
    """

    labels: np.ndarray
    validation_labels: np.ndarray
    batch_size: int
    rows: Callable[[int], tuple[np.ndarray, np.ndarray]]
    view: Callable[[int], Iterable[Batch]]
    random: bool
    fingerprint: Callable[[], tuple[Mapping[str, str], Mapping[str, str]]]


@dataclass(frozen=True)
class DataLoaders:
    """Batches for training and validation, and how to normalize them.

    The position in the data is the step number and nothing else, which makes exact resume, and
    the same order on any number of devices, a property of the feed.

    Args:
        train: ``train(k)`` yields batch k, k+1, ... for ever; batch k is always the same.
        steps_per_epoch: optimizer steps in one pass over the training examples.
        validation: yields every validation example once, or None where there are none.
        preprocessing: that belongs to the weights; its mean and std normalize on the device.
        class_names: what the labels 0, 1, ... mean.
        calibration: yields every training example once, without augmentation, for measuring
            BatchNorm statistics; or None where there is no such pass.
        calibration_sample: yields a fixed random sample of them, enough for statistics; None where
            there is no such pass.
        examples: the examples one by one, or None where they cannot be told apart; without them no
            activations are cached.
        start: the segment that ``image`` enters, where batches hold activations instead of pixels.
        settings: what else decides what a batch holds (its size, the seed of the order, the
            augmentation), as JSON; a resumed run must have the same.
        record: makes the record of which examples are in which part, for the run folder; reads
            each of them, and calls its argument with how many it has read. None where the examples
            cannot be told apart: such a run is resumed on trust, and says so.
        groups: gives what each example of ``calibration`` belongs to, such as a patient, in that
            order; None, or a function that gives None, where each is one by itself.
    """

    train: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int
    validation: Callable[[], Iterable[Batch]] | None
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    calibration: Callable[[], Iterable[Batch]] | None = None
    calibration_sample: Callable[[], Iterable[Batch]] | None = None
    examples: IndexedExamples | None = None
    start: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    record: Callable[[Callable[[int], object] | None], Split] | None = None
    groups: Callable[[], Sequence[str] | None] | None = None


def loaders(
    source: Source,
    splits: Splits,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    transform: Transform | None = None,
    seed: int = 0,
    workers: int = 0,
    balanced: bool = False,
) -> DataLoaders:
    """The batches of a data source; in a run over several processes, this one's rows of each.

    Args:
        source: labeled images; the same in every process.
        splits: positions of the examples to train and to validate on, from ``stratified_split``;
            the run folder keeps them together with those to test on.
        preprocessing: that belongs to the weights.
        batch_size: examples a step, over all devices of all processes.
        transform: augmentation of training images; by default the usual one, with mirror images
            where the class names do not speak against them.
        seed: of order and augmentation.
        workers: processes that decode; 0 uses threads.
        balanced: whether training sees each class as often as every other: rare examples come more
            often, and an epoch still has as many. Validation is as it is.

    Raises:
        ValueError: no training example, or labels that no class can have; ``balanced`` for labels
            that are not one class each.
    """
    train, validation = splits.train, splits.val
    if not len(train):
        raise ValueError("splits.train must hold at least one example, got none")
    labels = source.labels()
    used = np.concatenate([train, validation])
    if labels.ndim == 1:
        files = getattr(source, "files", None)
        names = [files[i] if files else f"example {i}" for i in used.tolist()]
        check_classes(labels[used], len(source.class_names), names)
    if balanced and labels.ndim != 1:
        raise ValueError("`balanced` must be False for images with several labels or values each")
    classes = labels[train] if balanced else None
    order = Order(len(train), seeds(seed)[0], classes)
    source = with_levels(source, Levels.of(preprocessing))
    _warn_of_levels(source, train)
    channels = len(preprocessing.mean)
    if transform is None:
        flip = flip_keeps_labels(source.class_names)
        transform = training_transform(preprocessing, flip=flip, channels=channels)
    augmentation: Transform = transform
    plain = evaluation_transform(preprocessing, channels=channels)

    def training(start: int) -> Iterator[Batch]:
        return train_batches(
            source,
            train,
            batch_size=batch_size,
            transform=augmentation,
            seed=seed,
            start_step=start,
            workers=workers,
            shard=share(),
            classes=classes,
        )

    def once(positions: np.ndarray, form: Transform = plain) -> Iterable[Batch]:
        return _own_rows(source, positions, batch_size, form)

    def fingerprint() -> tuple[Mapping[str, str], Mapping[str, str]]:
        drawn = f"{augmentation!r}, seed {seed}" if is_random(augmentation) else f"{augmentation!r}"
        return (
            {"images": digest(source, train), "augmentation": drawn},
            {"images": digest(source, validation), "augmentation": f"{plain!r}"},
        )

    def groups() -> Sequence[str] | None:
        every = groups_of(source)
        return None if every is None else [every[i] for i in train.tolist()]

    examples = IndexedExamples(
        labels=labels[train],
        validation_labels=labels[validation],
        batch_size=batch_size,
        rows=lambda k: training_rows(
            len(train), batch_size=batch_size, seed=seed, step=k, order=order
        ),
        view=lambda k: once(train, FixedView(augmentation, seed, k)),
        random=is_random(augmentation),
        fingerprint=fingerprint,
    )

    return DataLoaders(
        train=training,
        steps_per_epoch=-(-len(train) // batch_size),
        validation=(lambda: once(validation)) if len(validation) else None,
        preprocessing=preprocessing,
        class_names=tuple(source.class_names),
        calibration=lambda: once(train),
        calibration_sample=lambda: once(subsample(train, MOST_FOR_STATISTICS)),
        examples=examples,
        settings={
            "batch_size": batch_size,
            "order_seed": seed,
            **({"balanced": True} if balanced else {}),
            # A function prints with its place in memory, which is another one in each process.
            "augmentation": re.sub(r" at 0x[0-9a-f]+", "", repr(augmentation)),
        },
        record=lambda progress: Split.of(source, splits, read=True, progress=progress),
        groups=groups,
    )


_FEW = 8
"""Images that are looked at for a warning."""


def _warn_of_levels(source: Source, train: np.ndarray) -> None:
    """Warns of images of more than 8 bits for which nothing says what is black and white."""
    if getattr(source, "levels", None) is not None:
        return
    few = np.unique(np.linspace(0, len(train) - 1, _FEW).astype(int))
    try:
        found = measure_levels(source, train[few])
    except (ValueError, OSError):
        return  # Whoever reads all of them says so.
    if found is not None and found.black and set(found.white) != {65535.0}:
        warnings.warn(
            f"{found.note}: give measure_levels(source, splits.train).into(preprocessing) as the "
            "preprocessing",
            stacklevel=3,
        )


def eval_batches(
    source: Source, positions: np.ndarray, preprocessing: Preprocessing, *, batch_size: int = 64
) -> Iterable[Batch]:
    """Every example at ``positions`` once, prepared as the weights want it; for ``evaluate``.

    The last batch is padded, and the network computes the padding, too: large batches cost few
    examples more than they save. In a run over several processes each gets its own rows.
    """
    transform = evaluation_transform(preprocessing, channels=len(preprocessing.mean))
    source = with_levels(source, Levels.of(preprocessing))
    return _own_rows(source, positions, batch_size, transform)


def _own_rows(
    source: Source, positions: np.ndarray, batch_size: int, transform: Transform
) -> Iterable[Batch]:
    """The rows of this process, of ``batches_in_order``."""
    number, count = share()
    whole = -(-batch_size // count) * count
    return batches_in_order(
        source, positions, batch_size=whole, transform=transform, shard=(number, count)
    )


@contextmanager
def reading(feed: DataLoaders, step: int) -> Iterator[Iterator[Batch]]:
    """Batches from ``step`` on; ends the threads that read ahead, where there are any."""
    batches = feed.train(step)
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


@contextmanager
def sample(feed: DataLoaders) -> Iterator[Iterable[Batch]]:
    """Training images for statistics: a fixed sample, or else the first batches."""
    passes = feed.calibration_sample or feed.calibration
    if passes is not None:
        yield passes()
        return
    with reading(feed, 0) as batches:
        yield itertools.islice(batches, feed.steps_per_epoch)


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

    @property
    def task(self) -> str:
        """What the labels are, as the source says."""
        return task_of_source(self._source).name

    def labels(self) -> np.ndarray:
        """All labels, as the source has them."""
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

    def picture(self, index: SupportsIndex, /, *, measured: bool = False) -> Picture | None:
        """The image as its file holds it; see ``measure_levels``."""
        read = getattr(self._source, "picture", None)
        found: Picture | None = None if read is None else read(index, measured=measured)
        return found

    def with_levels(self, levels: Levels) -> CachedSource:
        """A new cache of the images with this black and white."""
        source = with_levels(self._source, levels)
        same = source is self._source
        return self if same else CachedSource(source, self._transform, self._budget)

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


def band_preprocessing(
    preprocessing: Preprocessing, source: Source, positions: np.ndarray, bands: int
) -> Preprocessing:
    """The weights' preprocessing for the bands of the data, in the scale that the stem expects.

    The statistics of the weights are those of red, green and blue in photographs; other bands have
    none. Over all pixels of the training images, each band gets mean 0, and all bands get the same
    contrast: the root mean square of their deviations, divided by the ``common_scale`` of the
    weights' own std. One gray band is therefore divided by that scale and nothing else, as in
    replication; ``transfer`` adds what is left per channel of the stem. All of that comes before
    the adapter, which therefore folds exactly into the stem. A constant band is only centered.

    Args:
        preprocessing: of the weights; size, resize and interpolation are kept.
        source: labeled images of ``bands`` bands; those of more than 8 bits with ``with_levels``,
            whose black and white are then part of the result.
        positions: of the training images; at most 2000 of them are read, drawn evenly.
        bands: how many bands the images have.

    Raises:
        ValueError: no images, or images with another number of bands.

    >>> from flaxtransfer.data import ArraySource
    >>> images = np.stack([np.full((4, 8, 8), 51), np.arange(256).reshape(4, 8, 8)], -1)
    >>> source = ArraySource(images.astype(np.uint8), [0, 1, 0, 1])
    >>> plain = Preprocessing((0.5,) * 3, (0.25,) * 3, 8, 8)
    >>> found = band_preprocessing(plain, source, np.arange(4), 2)
    >>> [round(value, 3) for value in (*found.mean, *found.std)]
    [0.2, 0.5, 0.25, 0.25]
    """
    counts = np.zeros((bands, 256), np.int64)
    transform = evaluation_transform(preprocessing, channels=bands)
    chosen = subsample(np.asarray(positions), _MOST_FOR_BANDS)
    _check_bands(source, chosen, bands)
    for batch in batches_in_order(source, chosen, batch_size=_BAND_BATCH, transform=transform):
        images = batch["image"][batch["weight"] > 0]
        for band in range(bands):
            # Integers: the result depends neither on the order nor on the batches.
            counts[band] += np.bincount(images[..., band].ravel(), minlength=256)
    values = np.arange(256) / 255
    fractions = counts / counts.sum(axis=1, keepdims=True)
    mean = fractions @ values
    std = np.sqrt(np.maximum((fractions * np.square(values - mean[:, None])).sum(axis=1), 0))
    varied, scale = std >= 1e-9, common_scale(preprocessing.std)
    contrast = np.sqrt(np.square(std[varied]).mean()) if varied.any() else 1.0
    divisors = np.where(varied, std * (scale / contrast), scale)
    found = preprocessing.of_other_bands(mean.tolist(), divisors.tolist())
    levels = getattr(source, "levels", None)
    return found if levels is None else levels.into(found)


def band_patches(
    preprocessing: Preprocessing,
    source: Source,
    positions: np.ndarray,
    *,
    side: int = 4,
    most: int = 20_000,
) -> np.ndarray:
    """Patch means of normalized training images, for ``transfer(..., patches=...)``.

    Args:
        preprocessing: from ``band_preprocessing``.
        source: labeled images with as many bands as the preprocessing.
        positions: of the training images.
        side: of a square patch, in px of the network's input; patches are less noisy than pixels.
        most: how many patches to take, from images drawn evenly from the positions.

    Returns:
        float64 ``[patches, bands]``.
    """
    bands, side = len(preprocessing.mean), min(side, preprocessing.size)
    across = preprocessing.size // side
    chosen = subsample(np.asarray(positions), max(1, most // across**2))
    _check_bands(source, chosen, bands)
    transform = evaluation_transform(preprocessing, channels=bands)
    found = []
    for batch in batches_in_order(source, chosen, batch_size=_BAND_BATCH, transform=transform):
        images = batch["image"][batch["weight"] > 0]
        cut = images[:, : across * side, : across * side]
        squares = cut.reshape(len(cut), across, side, across, side, bands)
        found.append(squares.mean(axis=(2, 4), dtype=np.float64).reshape(-1, bands))
    means, stds = np.array(preprocessing.mean), np.array(preprocessing.std)
    normalized: np.ndarray = (np.concatenate(found) / 255 - means) / stds
    return normalized


def _check_bands(source: Source, positions: np.ndarray, bands: int) -> None:
    if not len(positions):
        raise ValueError("the statistics of bands need training images; there are none")
    shape = source[int(positions[0])]["image"].shape
    if shape[-1] != bands:
        raise ValueError(
            f"images must have {bands} channels, one per band; image {int(positions[0])} has "
            f"{shape[-1]} (shape {list(shape)})"
        )
