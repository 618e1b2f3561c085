"""What training reads batches from: pure functions of the step number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flaxtransfer.data import Source, eval_batches, train_batches
from flaxtransfer.data.transforms import (
    Transform,
    evaluation_transform,
    flip_keeps_labels,
    training_transform,
)
from flaxtransfer.weights import Preprocessing

Batch = Mapping[str, Any]
"""``image`` uint8 [batch, height, width, 3], ``label`` int [batch], and for evaluation ``weight``
float [batch], 0 where an example is padding."""


@dataclass(frozen=True)
class Feed:
    """Batches for training and validation, and how to normalise them.

    The position in the data is the step number and nothing else, which makes exact resume, and
    the same order on any number of devices, a property of the feed.

    Args:
      train: ``train(k)`` yields batch k, k+1, ... for ever; batch k is always the same.
      steps_per_epoch: optimizer steps in one pass over the training examples.
      validation: yields every validation example once, or None where there are none.
      preprocessing: that belongs to the weights; its mean and std normalise on the device.
      class_names: what the labels 0, 1, ... mean.
      calibration: yields every training example once, without augmentation, for measuring
        BatchNorm statistics; or None where there is no such pass.
    """

    train: Callable[[int], Iterator[Batch]]
    steps_per_epoch: int
    validation: Callable[[], Iterable[Batch]] | None
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    calibration: Callable[[], Iterable[Batch]] | None = None


def source_feed(
    source: Source,
    train: np.ndarray,
    validation: np.ndarray,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    transform: Transform | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Feed:
    """The batches of a data source.

    Args:
      source: labelled images.
      train: positions of the training examples.
      validation: positions of the validation examples; may be empty.
      preprocessing: that belongs to the weights.
      batch_size: examples a step, over all devices.
      transform: augmentation of training images; by default the usual one, with mirror images
        where the class names do not speak against them.
      seed: of order and augmentation.
      workers: processes that decode; 0 uses threads.

    Raises:
      ValueError: no training example.
    """
    channels = len(preprocessing.mean)
    if transform is None:
        flip = flip_keeps_labels(source.class_names)
        transform = training_transform(preprocessing, flip=flip, channels=channels)
    plain = evaluation_transform(preprocessing, channels=channels)

    def training(start: int) -> Iterator[Batch]:
        return train_batches(
            source, train, batch_size=batch_size, transform=transform, seed=seed,
            start_step=start, workers=workers,
        )  # fmt: skip

    def once(positions: np.ndarray) -> Iterable[Batch]:
        return eval_batches(source, positions, batch_size=batch_size, transform=plain)

    return Feed(
        train=training,
        steps_per_epoch=-(-len(train) // batch_size),
        validation=(lambda: once(validation)) if len(validation) else None,
        preprocessing=preprocessing,
        class_names=tuple(source.class_names),
        calibration=lambda: once(train),
    )


def held_out(
    source: Source, positions: np.ndarray, preprocessing: Preprocessing, *, batch_size: int = 256
) -> Iterable[Batch]:
    """Every example at ``positions`` once, prepared as the weights want it; for ``evaluate``."""
    transform = evaluation_transform(preprocessing, channels=len(preprocessing.mean))
    return eval_batches(source, positions, batch_size=batch_size, transform=transform)
