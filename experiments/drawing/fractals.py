"""Colored fractals of random iterated function systems: shape and color both name the class."""

from __future__ import annotations

import colorsys

import numpy as np

from drawing.templates import TEMPLATE_SIZE, TEMPLATES_PER_CLASS, Templates

COLORINGS = 3
"""Classes that share one shape and differ in hue alone, so that color has to be seen."""

WALKERS = 4096
STEPS = 60
BURN_IN = 20


def fractal_templates(classes: int, seed: int) -> Templates:
    """Draws ``classes`` fractal classes: ``classes / COLORINGS`` shapes, each in several hues.

    The templates of one class come from its affine maps perturbed by up to 20 %, as in the paper.

    Args:
      classes: how many classes; a multiple of ``COLORINGS``.
      seed: of the random systems.

    References:
      Kataoka et al., "Pre-training without Natural Images", 2020 (FractalDB).
    """
    if classes % COLORINGS:
        raise ValueError(f"{classes} fractal classes do not divide by {COLORINGS} colorings")
    random = np.random.default_rng(seed)
    planes, names, palettes = [], [], []
    for shape in range(classes // COLORINGS):
        drawn = _draw_shape(random)
        first, second = random.uniform(0, 1), random.uniform(0.1, 0.25)
        for coloring in range(COLORINGS):
            hue = first + coloring / COLORINGS
            pair = [colorsys.hsv_to_rgb(h % 1, 0.85, 1.0) for h in (hue, hue + second)]
            planes.append(drawn)
            names.append(f"fractal {shape} coloring {coloring}")
            palettes.append(pair)
    return Templates(np.stack(planes), tuple(names), np.asarray(palettes, np.float32))


def _draw_shape(random: np.random.Generator) -> np.ndarray:
    """Templates of one random system; systems that fill too little of the picture are redrawn."""
    while True:
        maps = _random_maps(random)
        first = _attractor(maps, random)
        if first is not None and (first[..., 0] > 40).mean() > 0.2:
            break
    drawn = [first]
    while len(drawn) < TEMPLATES_PER_CLASS:
        perturbed = _attractor(maps * random.uniform(0.8, 1.2, maps.shape), random)
        if perturbed is not None and (perturbed[..., 0] > 40).mean() > 0.15:
            drawn.append(perturbed)
        elif random.uniform() < 0.05:
            drawn.append(first)
    return np.stack(drawn)


def _random_maps(random: np.random.Generator) -> np.ndarray:
    """Affine maps ``[maps, 2, 3]``, each contracting by its largest singular value."""
    count = random.integers(2, 7)
    maps = random.uniform(-1, 1, (count, 2, 3))
    for affine in maps:
        largest = np.linalg.norm(affine[:, :2], 2)
        affine[:, :2] *= random.uniform(0.35, 0.85) / largest
    return maps


def _attractor(maps: np.ndarray, random: np.random.Generator) -> np.ndarray | None:
    """The chaos game: uint8 ``[TEMPLATE_SIZE, TEMPLATE_SIZE, 2]`` of density and last map taken."""
    area = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
    points = random.uniform(-1, 1, (WALKERS, 2))
    visited, taken = [], []
    for step in range(STEPS):
        choice = random.choice(len(maps), WALKERS, p=area / area.sum())
        points = np.einsum("nij,nj->ni", maps[choice, :, :2], points) + maps[choice, :, 2]
        if step >= BURN_IN:
            visited.append(points)
            taken.append(choice)
    cloud, last = np.concatenate(visited), np.concatenate(taken)
    low, high = np.percentile(cloud, [1, 99], axis=0)
    extent = float(np.max(high - low))
    if not np.isfinite(extent) or extent < 1e-3:
        return None
    unit = (cloud - (low + high) / 2) / extent * 0.8 + 0.5
    cell = np.floor(unit * TEMPLATE_SIZE).astype(int)
    inside = np.all((cell >= 0) & (cell < TEMPLATE_SIZE), axis=1)
    flat = cell[inside, 0] * TEMPLATE_SIZE + cell[inside, 1]
    cells = TEMPLATE_SIZE**2
    count = np.bincount(flat, minlength=cells)
    mix = np.bincount(flat, weights=last[inside], minlength=cells) / np.maximum(count, 1)
    density = np.log1p(count) / np.log1p(np.percentile(count[count > 0], 95))
    planes = np.stack([np.clip(density, 0, 1), mix / max(len(maps) - 1, 1)], axis=-1)
    return np.rint(255 * planes).astype(np.uint8).reshape(TEMPLATE_SIZE, TEMPLATE_SIZE, 2)
