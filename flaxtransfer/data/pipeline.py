"""Batches from a source: order, augmentation and sharding are pure functions of seed and step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from flaxtransfer.data.elements import Augment, Batch, Evaluate, Load, first_shape
from flaxtransfer.data.ordering import Rows, Shuffled, seeds
from flaxtransfer.data.source import Source
from flaxtransfer.data.steps import Transform, is_random

# Threads work on whole batches, so that each one beyond the first costs a batch of memory.
DEFAULT_THREADS = min(4, os.cpu_count() or 1)


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
) -> Iterator[Batch]:
    """Shuffled, augmented batches without end, beginning with that of ``start_step``.

    Batch k depends on ``seed`` and k alone, not on threads, workers, shards or on where the
    iteration began, so that a run's data position is its step number. Every epoch has an order of
    its own, and batches cross the borders of epochs: a set that is smaller than a batch is simply
    repeated within it.

    Args:
      source: where the examples come from.
      indices: the positions to train on; one given twice is seen twice an epoch.
      batch_size: of the whole batch, over all shards.
      transform: maps an image and a generator to uint8 ``[height, width, channels]`` of one size.
      seed: 0 or more.
      start_step: the step whose batch comes first.
      num_threads: threads that make batches ahead; each holds one batch. 0 makes them when asked.
      workers: processes that make batches ahead, for when the threads are too slow; each takes
        seconds to start and a copy of the source. The script then needs the usual
        ``if __name__ == "__main__":``.
      shard: (index, count): rows ``index * batch_size / count`` onwards of each batch. The shards
        of a batch, one after the other, are the unsharded batch.

    Returns:
      An iterator over dicts of ``image``, ``label`` and ``index``; its ``close()`` ends threads and
      workers.

    Raises:
      ValueError: numbers out of range (all are listed), or images that do not fit together.
      TypeError: the transform does not return uint8 ``[height, width, channels]``.
    """
    _check(source, indices, batch_size, shard, seed, start_step, num_threads, workers)
    dataset = train_dataset(
        source, indices, batch_size=batch_size, transform=transform, seed=seed, shard=shard
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
        Shuffled(ids, order_seed)
        .repeat()
        .map(Load(source))
        # Before the shards are cut, where the generator depends on the place in the run alone.
        .random_map(Augment(transform, first_shape(source, indices, transform)), seed=draw_seed)
    )
    return Rows(dataset, batch_size, shard).batch(batch_size // shard[1], drop_remainder=True)


def eval_batches(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    transform: Transform | None = None,
    num_threads: int = DEFAULT_THREADS,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Every example once, in the order of ``indices``; the last batch is filled up.

    Filling has ``weight`` 0, ``index`` -1, label 0 and black pixels, so that all batches have one
    shape: multiply by ``weight`` in every sum, and divide by its sum.

    Args:
      source: where the examples come from; ``cached(source, transform)`` for repeated evaluation.
      indices: the positions to evaluate; one given twice comes twice.
      batch_size: of the whole batch, over all shards.
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
    ...  for b in eval_batches(source, [2, 0, 1], batch_size=2)]
    [([2, 0], [1.0, 1.0]), ([1, -1], [1.0, 0.0])]
    """
    _check(source, indices, batch_size, shard, num_threads=num_threads)
    if transform is not None and is_random(transform):
        raise ValueError(
            f"{transform!r} is random; evaluation takes a deterministic transform, such as "
            "evaluation_transform(preprocessing)"
        )
    ids = np.asarray(indices, np.int64)
    padded = np.full(math.ceil(len(ids) / batch_size) * batch_size, -1, np.int64)
    padded[: len(ids)] = ids
    make = Evaluate(Load(source), Augment(transform, first_shape(source, indices, transform)))
    dataset = Rows(grain.MapDataset.source(padded).map(make), batch_size, shard)
    return _iterate(dataset.batch(batch_size // shard[1]), num_threads, workers=0)


def _iterate(dataset: grain.MapDataset, num_threads: int, workers: int) -> Iterator[Batch]:
    # The buffer counts batches; grain's default of 500 would fill the memory.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    batches = dataset.to_iter_dataset(options)
    if workers:
        from absl import flags

        # Grain reads its flags in the workers; outside of absl's own main nobody parses them.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return _closing(batches)


def _closing(batches: grain.IterDataset) -> Iterator[Batch]:
    iterator = iter(batches)
    try:
        yield from iterator
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
        problems.append(f"indices have shape {ids.shape}, wanted one or more positions")
    elif not np.issubdtype(ids.dtype, np.integer):
        problems.append(f"indices are {ids.dtype}, wanted integers")
    elif ids.min() < 0 or ids.max() >= len(source):
        problems.append(
            f"indices span {ids.min()} .. {ids.max()}, but the source has {len(source)} examples"
        )
    if batch_size < 1:
        problems.append(f"batch_size is {batch_size}, wanted 1 or more")
    index, count = shard
    if not 0 <= index < count:
        problems.append(f"shard is {shard}, wanted (index, count) with 0 <= index < count")
    elif batch_size % count:
        problems.append(
            f"batch_size {batch_size} cannot be shared by {count} shards; the next multiple is "
            f"{math.ceil(batch_size / count) * count}"
        )
    for name, value in (
        ("seed", seed),
        ("start_step", start_step),
        ("num_threads", num_threads),
        ("workers", workers),
    ):
        if value < 0:
            problems.append(f"{name} is {value}, wanted 0 or more")
    if problems:
        raise ValueError("; ".join(problems))
