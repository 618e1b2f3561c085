"""One example on its way into a batch: loaded, transformed, and checked against the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from flaxtransfer.data.source import Source
from flaxtransfer.data.steps import Transform


class Batch(TypedDict, total=False):
    """``batch`` examples side by side; ``weight`` is there in evaluation only."""

    image: np.ndarray  # uint8 [batch, height, width, channels]
    label: np.ndarray  # int32 [batch]
    index: np.ndarray  # int64 [batch], the positions in the source; -1 for padding
    weight: np.ndarray  # float32 [batch], 1 for an example, 0 for padding


@dataclass(frozen=True)
class Load:
    """The position of an example to the example."""

    source: Source

    def __call__(self, index: np.int64) -> Batch:
        example = self.source[index]
        # Scalars of the final dtype: the batch is their stack.
        return {
            "image": example["image"],
            "label": np.asarray(example["label"], np.int32),
            "index": np.asarray(index, np.int64),
        }


@dataclass(frozen=True)
class Augment:
    """The transform, and the check that its results fit into one batch."""

    transform: Transform | None
    shape: tuple[int, ...]

    def __call__(self, example: Batch, rng: np.random.Generator) -> Batch:
        image = transformed(example["image"], self.transform, rng)
        if image.shape != self.shape:
            raise ValueError(
                f"example {int(example['index'])} has become {list(image.shape)}, the first one "
                f"{list(self.shape)}: a batch needs one size; "
                + (
                    "give a transform, such as evaluation_transform(preprocessing)"
                    if self.transform is None
                    else f"{self.transform!r} keeps different sizes"
                )
            )
        return {**example, "image": image}


@dataclass(frozen=True)
class Evaluate:
    """The position of an example to the example with its weight; -1 to padding."""

    load: Load
    augment: Augment

    def __call__(self, index: np.int64) -> Batch:
        if index < 0:
            example: Batch = {
                "image": np.zeros(self.augment.shape, np.uint8),
                "label": np.asarray(0, np.int32),
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
            f"{transform!r} made {dtype} {list(shape)} of an image, wanted uint8 [height, width, "
            "channels]; the values are normalised on the device, by normalise()"
        )
    return image


def first_shape(
    source: Source, indices: Sequence[int] | np.ndarray, transform: Transform | None
) -> tuple[int, ...]:
    """The shape that all examples must have: that of the first."""
    first = source[indices[0]]["image"]
    return transformed(first, transform, np.random.default_rng(0)).shape
