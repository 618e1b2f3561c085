"""Gratings of three orientations, and what a network that tells them apart is asked here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import flaxtransfer as ft
from flaxtransfer.adapt.statistics import image_reader, predict_logits
from flaxtransfer.shift.calibration import Calibration

SIZE = 32
CONFIG = ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=8, classes=3)
PREPROCESSING = ft.Preprocessing((0.5,) * 3, (0.25,) * 3, SIZE, SIZE)


def gratings(labels: np.ndarray, seed: int) -> np.ndarray:
    """uint8 [images, 32, 32, 3]: orientation is the class, phase and noise are drawn.

    All values are multiples of 4, so that a quarter of the contrast is still in whole numbers.
    """
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    angles = np.pi * (labels / 3 + random.normal(0, 0.03, len(labels)))
    along = np.cos(angles)[:, None, None] * columns + np.sin(angles)[:, None, None] * rows
    wave = np.sin(2 * np.pi * along / 8 + random.uniform(0, 2 * np.pi, (len(labels), 1, 1)))
    pixels = 128 + 50 * wave + random.normal(0, 15, wave.shape)
    gray = 4 * np.clip(pixels / 4, 0, 63).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=-1)


def faint(images: np.ndarray) -> np.ndarray:
    """A quarter of the contrast around the same gray; nothing is lost."""
    return (images // 4 + 96).astype(np.uint8)


def draw(shares: tuple[float, ...], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of these class shares, and their labels."""
    labels = np.random.default_rng([7, seed]).choice(3, count, p=shares)
    return gratings(labels, seed), labels


@dataclass(frozen=True)
class Trained:
    """A network of random features with its optimal head, and its calibration."""

    model: ft.Model
    variables: ft.models.Variables
    source: Calibration
    train: np.ndarray

    def logits(self, variables: ft.models.Variables, images: np.ndarray) -> np.ndarray:
        return predict_logits(
            ft.Classifier(self.model, variables, PREPROCESSING), image_reader(images, len(images))
        )

    def accuracy(
        self, variables: ft.models.Variables, images: np.ndarray, labels: np.ndarray
    ) -> float:
        return float((self.logits(variables, images).argmax(1) == labels).mean())
