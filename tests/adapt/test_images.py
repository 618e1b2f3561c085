"""Batches of unlabeled images: padded for all devices, weighed in their order."""

import jax
import numpy as np
import pytest

from flaxtransfer.adapt.statistics import image_reader, weighted_reader

IMAGES = np.arange(5, dtype=np.uint8)[:, None, None, None]


def seen(read):
    """Values of the images that count, with their weights, and the sizes of the batches."""
    batches = list(read())
    real = [
        (int(image[0, 0, 0]), float(weight))
        for batch in batches
        for image, weight in zip(batch["image"], batch["weight"], strict=True)
        if weight > 0
    ]
    return real, [len(batch["image"]) for batch in batches]


@pytest.mark.parametrize(
    ("devices", "size", "sizes"),
    [(1, 2, [2, 2, 2]), (1, 9, [5]), (2, 3, [4, 4]), (3, 4, [6]), (8, 2, [8])],
)
def test_batches_are_whole_on_every_device(monkeypatch, devices, size, sizes):
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    assert seen(image_reader(IMAGES, size)) == ([(n, 1.0) for n in range(5)], sizes)


def test_weights_follow_the_images_from_batch_to_batch():
    # Padding in the middle has no weight and takes none.
    parts = [
        {"image": IMAGES[[0, 1, 1]], "weight": np.array([1, 1, 0])},
        {"image": IMAGES[[2, 3]]},
        {"image": IMAGES[[4, 4]], "weight": np.array([0, 1])},
    ]
    weights = np.array([0.5, 2, 3, 0.25, 7])
    read = weighted_reader(image_reader(lambda: iter(parts), 9), weights)
    for _ in range(2):
        assert seen(read) == (list(enumerate(weights.tolist())), [3, 2, 2])
