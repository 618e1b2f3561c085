"""Input pipeline.

Batches from a source. Order, augmentation and sharding are pure functions of seed and step, so that
the position in the data is the step number. Use ``train_batches`` for training and
``batches_in_order`` for evaluation; ``data.loader`` puts both together.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

import grain
import numpy as np

from flaxtransfer.data.source import Source
from flaxtransfer.data.transforms import Transform, is_random


class Batch(TypedDict, total=False):
    """A batch of examples; ``weight`` is there in evaluation only."""

    image: np.ndarray  # uint8 [batch, height, width, channels]
    label: np.ndarray  # int32 [batch], or float32 [batch, outputs]
    index: np.ndarray  # int64 [batch], the positions in the source; -1 for padding
    weight: np.ndarray  # float32 [batch], 1 for an example, 0 for padding


DEFAULT_THREADS = min(4, os.cpu_count() or 1)
"""Each thread works on a whole batch, and so costs a batch of memory."""


def train_batches(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    transform: Transform,
    seed: int,
    start_step: int = 0,
    num_threads: int = DEFAULT_THREADS,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    classes: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Endless shuffled, augmented batches, starting with that of ``start_step``.

    Batch k depends on ``seed`` and k alone, not on threads, workers, shards or on where the
    iteration started, so that the data position of a run is its step number. Every epoch has a new
    order, and batches cross the borders of epochs: a set that is smaller than a batch is repeated
    within it.

    Args:
        source: where the examples come from.
        indices: the positions to train on; one given twice is seen twice per epoch.
        batch_size: rows of the whole batch, over all shards.
        transform: maps an image and a generator to uint8 ``[height, width, channels]`` of one size.
        seed: 0 or more.
        start_step: the step whose batch comes first.
        num_threads: threads that make batches ahead; each holds one batch. 0 makes them on demand.
        workers: processes that make batches ahead, for when the threads are too slow; each takes
            seconds to start and a copy of the source. The script then needs the usual ``if __name__
            == "__main__":``.
        shard: (index, count): rows ``index * batch_size / count`` onwards of each batch. The shards
            of a batch, one after the other, are the unsharded batch.
        classes: integers ``[examples]``, of ``indices``, where each class is to be seen as often as
            every other; see ``Order``.

    Returns:
        An iterator over dicts of ``image``, ``label`` and ``index``; its ``close()`` ends threads
        and workers.

    Raises:
        ValueError: numbers out of range (all are listed), or images that do not fit together.
        ChildProcessError: a worker was killed.
        TypeError: the transform does not return uint8 ``[height, width, channels]``.
    """
    _check(source, indices, batch_size, shard, seed, start_step, num_threads, workers)
    dataset = train_dataset(
        source,
        indices,
        batch_size=batch_size,
        transform=transform,
        seed=seed,
        shard=shard,
        classes=classes,
    )
    return _iterate(dataset[start_step:], num_threads, workers)


def train_dataset(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    transform: Transform,
    seed: int,
    shard: tuple[int, int] = (0, 1),
    classes: np.ndarray | None = None,
) -> grain.MapDataset:
    """The batches of ``train_batches`` with random access: item k is the batch of step k.

    >>> from flaxtransfer.data import ArraySource, ResizeCrop
    >>> source = ArraySource(np.zeros((6, 8, 8), np.uint8), [0, 1, 2, 0, 1, 2])
    >>> batches = train_dataset(
    ...     source, range(6), batch_size=4, transform=ResizeCrop(8, 8), seed=0)
    >>> sorted([*batches[0]["index"].tolist(), *batches[1]["index"].tolist()[:2]])
    [0, 1, 2, 3, 4, 5]
    """
    _check(source, indices, batch_size, shard, seed)
    order_seed, draw_seed = seeds(seed)
    ids = grain.MapDataset.source(np.asarray(indices, np.int64))
    dataset = (
        Shuffled(ids, Order(len(ids), order_seed, classes))
        .repeat()
        .map(Load(source))
        # Before the shards are cut, where the generator depends on the place in the run alone.
        .random_map(Augment(transform, first_of(source, indices, transform)[0]), seed=draw_seed)
    )
    return Rows(dataset, batch_size, shard).batch(batch_size // shard[1], drop_remainder=True)


def batches_in_order(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    transform: Transform | None = None,
    num_threads: int = DEFAULT_THREADS,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Every example once, in the order of ``indices``; the last batch is padded.

    Padding has ``weight`` 0, ``index`` -1, label 0 and black pixels, so that all batches have one
    shape: multiply by ``weight`` in every sum, and divide by the sum of ``weight``.

    Args:
        source: where the examples come from; ``cached(source, transform)`` for repeated evaluation.
        indices: the positions to evaluate; one given twice comes twice.
        batch_size: rows of the whole batch, over all shards.
        transform: deterministic; none when the source's images have their final form.
        num_threads: see ``train_batches``.
        shard: see ``train_batches``; every shard has the same number of batches.

    Returns:
        An iterator over dicts of ``image``, ``label``, ``index`` and ``weight``.

    Raises:
        ValueError: numbers out of range (all are listed), a random transform, or images that do not
            fit together.
        TypeError: the transform does not return uint8 ``[height, width, channels]``.

    >>> from flaxtransfer.data import ArraySource
    >>> source = ArraySource(np.zeros((3, 8, 8), np.uint8), [0, 1, 2])
    >>> [(b["index"].tolist(), b["weight"].tolist())
    ...  for b in batches_in_order(source, [2, 0, 1], batch_size=2)]
    [([2, 0], [1.0, 1.0]), ([1, -1], [1.0, 0.0])]
    """
    _check(source, indices, batch_size, shard, num_threads=num_threads)
    if transform is not None and is_random(transform):
        raise ValueError(
            f"the transform of an evaluation must be deterministic, got {transform!r}; use "
            "evaluation_transform(preprocessing)"
        )
    ids = np.asarray(indices, np.int64)
    padded = np.full(math.ceil(len(ids) / batch_size) * batch_size, -1, np.int64)
    padded[: len(ids)] = ids
    shape, label = first_of(source, indices, transform)
    make = Evaluate(Load(source), Augment(transform, shape), np.zeros_like(label))
    dataset = Rows(grain.MapDataset.source(padded).map(make), batch_size, shard)
    return _iterate(dataset.batch(batch_size // shard[1]), num_threads, workers=0)


def _iterate(dataset: grain.MapDataset, num_threads: int, workers: int) -> Iterator[Batch]:
    # The buffer counts batches; grain's default of 500 would fill the memory.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    batches = dataset.to_iter_dataset(options)
    if workers:
        from absl import flags

        # Grain reads its flags in the workers; without absl's own main they are not parsed.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=workers)
        batches = batches.mp_prefetch(processes, worker_init_fn=_end_with_parent)
    return _closing(batches)


def _end_with_parent(index: int, count: int) -> None:
    """Ends a worker as soon as its parent has ended, even if that was killed.

    Grain tells its workers to end; a parent that is killed tells nobody, and they would wait and
    hold their memory for ever.
    """
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None  # A worker has one.

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _closing(batches: grain.IterDataset) -> Iterator[Batch]:
    iterator = iter(batches)
    try:
        yield from iterator
    except RuntimeError as error:
        ended = re.search(r"Worker process was terminated .* exit code (-?\d+)", str(error))
        if ended is None:
            raise
        raise ChildProcessError(
            f"a process that decodes images (--workers) has ended with code {ended[1]}, as when "
            "it is killed for want of memory; use fewer workers, or 0 for threads"
        ) from error
    finally:
        iterator.close()


def _check(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    batch_size: int,
    shard: tuple[int, int],
    seed: int = 0,
    start_step: int = 0,
    num_threads: int = 0,
    workers: int = 0,
) -> None:
    problems = []
    ids = np.asarray(indices)
    if ids.ndim != 1 or not len(ids):
        problems.append(f"indices must be one or more positions, got shape {ids.shape}")
    elif not np.issubdtype(ids.dtype, np.integer):
        problems.append(f"indices must be integers, got {ids.dtype}")
    elif ids.min() < 0 or ids.max() >= len(source):
        problems.append(
            f"indices must be in 0 .. {len(source) - 1} (the source has {len(source)} examples), "
            f"got {ids.min()} .. {ids.max()}"
        )
    if batch_size < 1:
        problems.append(f"batch_size must be >= 1, got {batch_size}")
    index, count = shard
    if not 0 <= index < count:
        problems.append(f"shard must be (index, count) with 0 <= index < count, got {shard}")
    elif batch_size % count:
        problems.append(
            f"batch_size must be a multiple of the {count} shards, got {batch_size}; the next one "
            f"is {math.ceil(batch_size / count) * count}"
        )
    for name, value in (
        ("seed", seed),
        ("start_step", start_step),
        ("num_threads", num_threads),
        ("workers", workers),
    ):
        if value < 0:
            problems.append(f"{name} must be >= 0, got {value}")
    if problems:
        raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class FixedView:
    """A fixed augmented version of every image: a random transform with fixed random numbers.

    Use it with ``batches_in_order``, whose generator depends on the example alone: the same seed
    and view give the same pixels in every run, on any number of threads.

    Args:
        transform: the random transform.
        seed: of the random numbers.
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


def training_rows(
    count: int, *, batch_size: int, seed: int, step: int, order: Order | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The examples of which batch ``step`` of ``train_batches`` is made, without making it.

    Returns:
        For each row its example, as a position in the indices that training was given, and how
        often it was seen before; both int64 ``[batch_size]``.

    >>> rows, passes = training_rows(3, batch_size=4, seed=0, step=0)
    >>> sorted(rows[:3].tolist()), passes.tolist()
    ([0, 1, 2], [0, 0, 0, 1])
    """
    passes, places = np.divmod(step * batch_size + np.arange(batch_size), count)
    order = order or Order(count, seeds(seed)[0])
    found = [[each[places[passes == n]] for each in order(int(n))] for n in np.unique(passes)]
    rows, seen = (np.concatenate(each) for each in zip(*found, strict=True))
    return rows, seen


class Order:
    """Which example comes when, a pure function of seed and epoch.

    Args:
        count: examples.
        seed: of the order.
        classes: integers ``[count]``; by default every example comes once an epoch. With classes,
            an epoch of as many examples has each class as often as every other, to one example,
            and over all epochs exactly so; within a class all examples come in turn.

    >>> rows, seen = Order(5, 0, np.array([0, 0, 0, 0, 1]))(0)
    >>> np.bincount(rows == 4).tolist(), sorted(seen[rows == 4].tolist())
    ([2, 3], [0, 1, 2])
    """

    def __init__(self, count: int, seed: int, classes: np.ndarray | None = None) -> None:
        self._count, self._seed = count, seed
        labels = np.zeros(0) if classes is None else np.asarray(classes)
        self._members = [np.flatnonzero(labels == one) for one in np.unique(labels)]
        # Asked for once per example, by threads that may be at the end of an epoch or behind it.
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of an epoch, and how often each was seen before; int64 ``[count]``."""
        found = self._kept.get(epoch)
        if found is None:
            found = self._made(epoch)
            self._kept = {epoch: found, **dict(list(self._kept.items())[:3])}
        return found

    def _made(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        number = len(self._members)
        if number < 2:
            return permutation(self._seed, epoch, self._count), np.full(self._count, epoch)
        rows, seen = [], []
        for place, members in enumerate(self._members):
            # The floors of (n + place) / number over all places sum to n (Hermite's identity).
            first, end = ((n * self._count + place) // number for n in (epoch, epoch + 1))
            times, own = np.divmod(np.arange(first, end), len(members))
            for time in np.unique(times):
                order = permutation(self._seed, int(time), len(members), 1 + place)
                rows.append(members[order[own[times == time]]])
            seen.append(times)
        mixed = permutation(self._seed, epoch, self._count)
        return np.concatenate(rows)[mixed], np.concatenate(seen)[mixed]


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int, stream: int = 0) -> np.ndarray:
    """A random order, int64 ``[count]``.

    >>> sorted(permutation(0, 1, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Raw generator output, unlike ``permutation``, is the same in every release of NumPy.
    entropy = [seed, epoch, stream] if stream else [seed, epoch]
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False  # shared by all callers
    return order


def seeds(seed: int) -> tuple[int, int]:
    """Seeds of the order and of the augmentation, hashed so that they are independent.

    >>> len(set(seeds(0)) | set(seeds(1)))
    4
    """
    order, augmentation = np.random.SeedSequence(seed).generate_state(2).tolist()
    return order, augmentation


class Shuffled(grain.MapDataset):  # type: ignore[misc]  # untyped library
    """A new order in every epoch, a pure function of seed and epoch.

    Grain's own shuffle computes each position alone, by walking a cycle of 65536 until it finds
    one that exists: for forty examples, a millisecond each. A whole permutation costs nothing for
    small sets, and for a million examples a tenth of a second per epoch.
    """

    def __init__(self, parent: grain.MapDataset, order: Order) -> None:
        super().__init__(parent)
        self._order = order

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[int(self._order(epoch)[0][place])]


class Rows(grain.MapDataset):  # type: ignore[misc]  # untyped library
    """The rows of one shard, in order, out of every ``batch_size`` elements."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, shard: tuple[int, int]) -> None:
        super().__init__(parent)
        self._batch_size = batch_size
        self._shard_size = batch_size // shard[1]
        self._first = shard[0] * self._shard_size

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * self._shard_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._shard_size)
        return self._parent[batch * self._batch_size + self._first + row]


def label_dtype(dimensions: int) -> Any:
    """Of the labels in a batch: int32 for classes, float32 for several labels per example."""
    return np.int32 if dimensions == 0 else np.float32


@dataclass(frozen=True)
class Load:
    """Maps the position of an example to the example."""

    source: Source = field(repr=False)  # Grain asks for it, and of a folder it holds all names.

    def __call__(self, index: np.int64) -> Batch:
        example = self.source[index]
        # Scalars of the final dtype, which are stacked to the batch.
        return {
            "image": example["image"],
            "label": np.asarray(example["label"], label_dtype(np.ndim(example["label"]))),
            "index": np.asarray(index, np.int64),
        }


@dataclass(frozen=True)
class Augment:
    """Applies the transform and checks that all results have one shape."""

    transform: Transform | None
    shape: tuple[int, ...]

    def __call__(self, example: Batch, rng: np.random.Generator) -> Batch:
        image = transformed(example["image"], self.transform, rng)
        if image.shape != self.shape:
            raise ValueError(
                f"all images of a batch must have one shape, got {list(image.shape)} for example "
                f"{int(example['index'])} and {list(self.shape)} for the first; "
                + (
                    "give a transform, such as evaluation_transform(preprocessing)"
                    if self.transform is None
                    else f"{self.transform!r} keeps different sizes"
                )
            )
        return {**example, "image": image}


@dataclass(frozen=True)
class Evaluate:
    """Maps the position of an example to the example with its weight, and -1 to padding."""

    load: Load
    augment: Augment
    padding: np.ndarray

    def __call__(self, index: np.int64) -> Batch:
        if index < 0:
            example: Batch = {
                "image": np.zeros(self.augment.shape, np.uint8),
                "label": self.padding,
                "index": np.asarray(-1, np.int64),
            }
        else:
            example = self.augment(self.load(index), np.random.default_rng(int(index)))
        return {**example, "weight": np.asarray(index >= 0, np.float32)}


def transformed(
    image: np.ndarray, transform: Transform | None, rng: np.random.Generator
) -> np.ndarray:
    """The transform's result, which must be uint8 ``[height, width, channels]``."""
    if transform is not None:
        image = transform(image, rng)
    dtype, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
    if dtype != np.uint8 or len(shape) != 3:
        raise TypeError(
            "a transform must return uint8 [height, width, channels], got "
            f"{dtype} {list(shape)} from {transform!r}; values are normalized on the device, by "
            "normalize()"
        )
    return image


def first_of(
    source: Source, indices: Sequence[int] | np.ndarray, transform: Transform | None
) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape of the first transformed example, which all others must have, and its label."""
    first = Load(source)(np.int64(indices[0]))
    return transformed(first["image"], transform, np.random.default_rng(0)).shape, first["label"]
