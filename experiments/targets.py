"""Generated targets with one known difficulty each, for the advisor and for the claims.

    python experiments/targets.py --out targets.png      # a sheet of examples, seconds

What decides a class is known: a shape (digits, polygons, counts), a hue, a place in a photograph,
a direction of a grating that is coarse or as fine as the pixels, or one of eight 3x3 textures. The
images are 32 px, uint8 RGB. A seed gives the same images everywhere; training and test images of
one seed never share a drawn number, a photograph's crop or a digit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.ndimage
import tyro
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

SIZE = 32


@dataclass(frozen=True)
class Target:
    """Labelled images.

    Args:
        images: uint8 [images, 32, 32, 3].
        labels: int64 [images].
        classes: how many.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int


def draw(name: str, per_class: int, seed: int, *, test: bool = False) -> Target:
    """Images of a target, as many of each class.

    Args:
        name: one of FAMILIES.
        per_class: images of each class.
        seed: of the draw.
        test: test images, which are disjoint from training images of any seed.
    """
    maker, classes = FAMILIES[name]
    random = np.random.default_rng([seed, int(test), sorted(FAMILIES).index(name)])
    labels = random.permutation(np.repeat(np.arange(classes), per_class))
    images = maker(labels, random, test)
    if name == "digits, noisy labels" and not test:
        redrawn = random.random(len(labels)) < 0.4
        labels = np.where(redrawn, random.integers(0, classes, len(labels)), labels)
    return Target(np.clip(images, 0, 255).astype(np.uint8), labels, classes)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Digits at 32 px, their labels, and which are for tests: two fifths, whatever the seed."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    large = scipy.ndimage.zoom(found.images[order] * 15.9, (1, 3, 3), order=1)
    large = np.pad(large, ((0, 0), (4, 4), (4, 4)))
    return large, found.target[order], np.arange(len(order)) < 0.4 * len(order)


def _of_digits(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    images, digits, tests = _digits()
    chosen = np.empty(len(labels), int)
    for digit in range(10):
        pool = np.flatnonzero((digits == digit) & (tests == test))
        wanted = labels == digit
        replace = wanted.sum() > len(pool)
        chosen[wanted] = random.choice(pool, wanted.sum(), replace=replace)
    return _rgb(images[chosen])


def _shifted(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """Inverted, at 45 % of the contrast, under noise."""
    images = 255 - _of_digits(labels, random, test)
    return 70 + 0.45 * images + random.normal(0, 45, (*images.shape[:3], 1))


def _photographs(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """Which quarter of which photograph a crop is from; rows for tests lie below the others."""
    photographs = load_sample_images().images
    crops = []
    for label in labels:
        photograph = photographs[label // 4]
        height, width = photograph.shape[0] // 2, photograph.shape[1] // 2
        top = (label % 4) // 2 * height
        left = (label % 4) % 2 * width
        split = int(0.6 * height)
        low, high = (split, height - SIZE) if test else (0, split - SIZE)
        y, x = top + random.integers(low, high), left + random.integers(0, width - SIZE)
        crops.append(photograph[y : y + SIZE, x : x + SIZE])
    return np.stack(crops).astype(float)


def photograph_strips(per_class: int, seed: int, *, test: bool = False, size: int = 64) -> Target:
    """Which quarter of which photograph a crop is from; tests have every second strip of 80 px.

    For networks that need larger crops than those of the target "photographs", of the same classes.

    Args:
        per_class: images of each class.
        seed: of the draw.
        test: test images.
        size: side of a crop in px, up to 80.
    """
    random = np.random.default_rng([seed, int(test), size])
    labels = random.permutation(np.repeat(np.arange(8), per_class))
    photographs, crops = load_sample_images().images, []
    for label in labels:
        photograph = photographs[label // 4]
        height, width = photograph.shape[0] // 2, photograph.shape[1] // 2
        strip = 2 * random.integers(0, width // 160) + int(test)
        y = (label % 4) // 2 * height + random.integers(0, height - size + 1)
        x = (label % 4) % 2 * width + 80 * strip + random.integers(0, 80 - size + 1)
        crops.append(photograph[y : y + size, x : x + size])
    return Target(np.stack(crops), labels, 8)


def _gratings(
    labels: np.ndarray,
    random: np.random.Generator,
    periods: tuple[float, float],
    contrast: tuple[float, float],
    background: float,
) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    count = (len(labels), 1, 1)
    angle = np.pi * labels[:, None, None] / 6
    period = random.uniform(*periods, count)
    phase = random.uniform(0, 2 * np.pi, count)
    along = np.cos(angle) * columns + np.sin(angle) * rows
    wave = random.uniform(*contrast, count) * np.sin(2 * np.pi * along / period + phase)
    return _rgb(128 + wave + _slow(len(labels), random, background) + _noise(wave.shape, random))


def _coarse(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    return _gratings(labels, random, (8.0, 16.0), (30.0, 60.0), 20.0)


def _fine(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    return _gratings(labels, random, (2.2, 3.0), (8.0, 16.0), 40.0)


def _micro(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """Sparse noise through one of eight 3x3 kernels of -1 and 1."""
    kernels = np.random.default_rng(5).choice([-1.0, 1.0], (8, 3, 3))
    shape = (len(labels), SIZE, SIZE)
    points = (random.random(shape) < 0.15) * random.choice([-1.0, 1.0], shape)
    texture = np.stack(
        [
            scipy.ndimage.convolve(one, kernels[label], mode="wrap")
            for one, label in zip(points, labels, strict=True)
        ]
    )
    texture *= random.uniform(10, 18, (len(labels), 1, 1))
    return _rgb(128 + texture + _slow(len(labels), random, 40.0) + _noise(shape, random))


def _colors(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """The hue of a blob, of eight; its brightness is drawn."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    center = random.uniform(8, 24, (2, len(labels), 1, 1))
    radius = random.uniform(4, 8, (len(labels), 1, 1))
    inside = np.hypot(rows - center[0], columns - center[1]) < radius
    turn = 2 * np.pi * (labels / 8 + random.normal(0, 0.012, len(labels)))
    hue = np.stack([np.cos(turn - shift) for shift in (0, 2 * np.pi / 3, 4 * np.pi / 3)], axis=-1)
    color = random.uniform(90, 170, (len(labels), 1)) + 60 * hue
    ground = random.uniform(60, 200, (len(labels), 1, 1, 1))
    images = np.where(inside[..., None], color[:, None, None], ground)
    return images + random.normal(0, 8, images.shape)


def _counts(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """One to six dots."""

    def one(drawing: ImageDraw.ImageDraw, label: int) -> None:
        for _ in range(label + 1):
            x, y, r = *random.uniform(12, 116, 2), random.uniform(5, 11)
            drawing.ellipse((x - r, y - r, x + r, y + r), fill=255)

    return _drawn(labels, random, one)


def _polygons(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """The outline of a polygon of three to eight corners."""

    def one(drawing: ImageDraw.ImageDraw, label: int) -> None:
        corners, radius = label + 3, random.uniform(26, 46)
        turns = 2 * np.pi * (np.arange(corners) / corners + random.random())
        x, y = random.uniform(50, 78, 2)
        points = [(x + radius * np.cos(turn), y + radius * np.sin(turn)) for turn in turns]
        drawing.polygon(points, outline=255, width=6)

    return _drawn(labels, random, one)


def _drawn(
    labels: np.ndarray,
    random: np.random.Generator,
    one: Callable[[ImageDraw.ImageDraw, int], None],
) -> np.ndarray:
    """Drawings at four times the size, reduced; ground and ink are drawn too."""
    images = []
    for label in labels:
        picture = Image.new("L", (4 * SIZE, 4 * SIZE))
        one(ImageDraw.Draw(picture), int(label))
        ink = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX)) / 255
        ground, contrast = random.uniform(30, 90), random.uniform(80, 150)
        images.append(ground + contrast * ink)
    found = np.stack(images)
    return _rgb(found + _noise(found.shape, random))


def _random_labels(labels: np.ndarray, random: np.random.Generator, test: bool) -> np.ndarray:
    """Photographs that have nothing to do with their labels."""
    return _photographs(random.integers(0, 8, len(labels)), random, test)


def _slow(count: int, random: np.random.Generator, deviation: float) -> np.ndarray:
    """A background without fine detail, [images, 32, 32]."""
    coarse = random.normal(0, deviation, (count, 4, 4))
    found: np.ndarray = scipy.ndimage.zoom(coarse, (1, SIZE / 4, SIZE / 4), order=3)
    return found


def _noise(shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    return random.normal(0, 4, shape)


def _rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=-1)


Maker = Callable[[np.ndarray, np.random.Generator, bool], np.ndarray]

FAMILIES: dict[str, tuple[Maker, int]] = {
    "digits": (_of_digits, 10),
    "digits, noisy labels": (_of_digits, 10),
    "digits, shifted": (_shifted, 10),
    "photographs": (_photographs, 8),
    "coarse gratings": (_coarse, 6),
    "fine gratings": (_fine, 6),
    "micro-textures": (_micro, 8),
    "colors": (_colors, 8),
    "counts": (_counts, 6),
    "polygons": (_polygons, 6),
    "random labels": (_random_labels, 4),
}
"""Targets by name: how images are made, and the number of classes."""


@dataclass(frozen=True)
class Sheet:
    """A sheet with a row of examples of each target.

    Args:
        out: file of the picture.
        seed: of the draw.
    """

    out: Path = Path("targets.png")
    seed: int = 0


def main(options: Sheet) -> None:
    rows = []
    for name in FAMILIES:
        target = draw(name, 2, options.seed)
        order = np.argsort(target.labels, kind="stable")
        chosen = target.images[order[np.arange(8) % len(order)]]
        rows.append(np.concatenate(list(chosen), axis=1))
        print(f"{name:<22} {target.classes} classes")
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(options.out)


if __name__ == "__main__":
    main(tyro.cli(Sheet))
