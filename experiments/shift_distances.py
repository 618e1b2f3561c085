"""What distances and scores say where nothing is the matter: raw, and beside their nulls.

    OMP_NUM_THREADS=1 python experiments/shift_distances.py        # ten seconds on one CPU core

Every row is measured twice, without and with something to be found: two Gaussian samples of one
distribution, then with the second shifted by 0.3 standard deviations in every eighth feature;
representations that are independent, then that share a quarter of their variance; labels at random,
then with a center for each class. The usual numbers stand beside those that are calibrated, the
p-value in brackets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tyro

from flaxtransfer.analysis import (
    debiased_cka,
    frechet_distance,
    h_score,
    leep,
    logme,
    proxy_a_distance,
    sliced_wasserstein,
)
from flaxtransfer.shift import NullCalibrated

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Distances:
    """What to measure.

    Args:
      permutations: of every null.
      classes: of the labeled examples.
      seed: of all that is drawn.
    """

    permutations: int = 99
    classes: int = 5
    seed: int = 0


def main(config: Distances) -> None:
    print(
        "| number | N, D | usual: nothing, something | value | null | excess (p): nothing "
        "| excess (p): something |"
    )
    print("|---|---|---|---|---|---|---|")
    two = [
        ("Frechet", frechet_distance, unknown, ((200, 64), (100, 512), (200, 2048))),
        ("Frechet, shrunk", shrunk, unknown, ((200, 64), (100, 512))),
        ("sliced Wasserstein-2", sliced_wasserstein, unknown, ((200, 64), (100, 512))),
        ("proxy A", proxy_a_distance, learned_error, ((200, 64), (100, 512))),
    ]
    for name, measure, usual, shapes in two:
        for shape in shapes:
            row(config, name, measure, usual, [samples(config, *shape, s) for s in (0.0, 0.3)])
    for shape in ((1000, 64), (100, 512), (50, 2048)):
        pairs = [representations(config, *shape, s) for s in (0.0, 0.5)]
        row(config, "CKA", debiased_cka, biased_cka, pairs)
    scores = [
        ("LogME", logme, incomplete_logme, ((500, 64), (200, 512), (50, 2048))),
        ("H-score", h_score, saturated, ((500, 64), (200, 512), (100, 2048))),
        ("LEEP", leep, unknown, ((500, 64), (200, 512))),
    ]
    for name, score, usual, shapes in scores:
        for shape in shapes:
            pairs = [labeled(config, *shape, s, name == "LEEP") for s in (0.0, 1.0)]
            row(config, name, score, usual, pairs)


def row(
    config: Distances,
    name: str,
    measure: Callable[..., NullCalibrated],
    usual: Callable[[Any, Any], float | None],
    pairs: list[Pair],
) -> None:
    nothing, something = (measure(*pair, permutations=config.permutations) for pair in pairs)
    raw = [usual(*pair) for pair in pairs]
    told = "as value" if None in raw else ", ".join(f"{value:.3f}" for value in raw)
    print(
        f"| {name} | {len(pairs[0][0])}, {pairs[0][0].shape[1]} | {told} "
        f"| {nothing.value:.3f}, {something.value:.3f} "
        f"| {nothing.null_mean:.3f} ± {nothing.null_sd:.3f} "
        f"| {nothing.excess:+.3f} ({nothing.p:.2f}) | {something.excess:+.3f} ({something.p:.2f}) |"
    )


def samples(config: Distances, count: int, width: int, shift: float) -> Pair:
    random = np.random.default_rng(config.seed)
    moved = shift * (np.arange(width) % 8 == 0)
    return random.normal(size=(count, width)), random.normal(size=(count, width)) + moved


def representations(config: Distances, count: int, width: int, shared: float) -> Pair:
    first, second = samples(config, count, width, 0.0)
    return first, shared * first + np.sqrt(1 - shared**2) * second


def labeled(config: Distances, count: int, width: int, strength: float, head: bool) -> Pair:
    random = np.random.default_rng(config.seed)
    labels = np.arange(count) % config.classes
    # As far apart in one width as in another.
    centers = 8 * strength * random.normal(size=(config.classes, width)) / np.sqrt(width)
    features = random.normal(size=(count, width)) + centers[labels]
    if not head:
        return features, labels
    powers = np.exp(features - features.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True), labels


def shrunk(source: np.ndarray, target: np.ndarray, permutations: int) -> NullCalibrated:
    return frechet_distance(source, target, shrinkage=True, permutations=permutations)


def unknown(first: np.ndarray, second: np.ndarray) -> None:
    """There is no other usual number than the value."""
    del first, second


def learned_error(source: np.ndarray, target: np.ndarray) -> float:
    """The proxy A-distance of the examples that the classifier was fitted on."""
    rows = np.c_[np.concatenate([source, target]), np.ones(len(source) + len(target))]
    sides = np.repeat([-1.0, 1.0], [len(source), len(target)])
    weights = np.linalg.lstsq(rows, sides, rcond=None)[0]
    return 2 * (1 - 2 * ((rows @ weights > 0) != (sides > 0)).mean())


def biased_cka(x: np.ndarray, y: np.ndarray) -> float:
    k, others = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    return float((k * others).sum() / np.sqrt((k * k).sum() * (others * others).sum()))


def incomplete_logme(features: np.ndarray, labels: np.ndarray) -> float:
    """LogME without the (D - rank) / 2 log(alpha) of weights that no example sees."""
    count, width = features.shape
    left, scale, _ = np.linalg.svd(features, full_matrices=False)
    squares, values = scale**2, []
    for label in np.unique(labels):
        target = (labels == label) * 1.0
        inner = left.T @ target
        alpha = beta = 1.0
        for _ in range(11):
            gamma = (squares / (squares + alpha / beta)).sum()
            weights = beta * scale * inner / (alpha + beta * squares)
            error = ((target - left @ (scale * weights)) ** 2).sum()
            alpha, beta = gamma / (weights @ weights), (count - gamma) / error
        values.append(
            width / 2 * np.log(alpha)
            + count / 2 * np.log(beta / (2 * np.pi))
            - 0.5 * np.log(alpha + beta * squares).sum()
            - 0.5 * (beta * error + alpha * weights @ weights)
        )
    return float(np.mean(values) / count)


def saturated(features: np.ndarray, labels: np.ndarray) -> float:
    return h_score(features, labels, regularized=False, permutations=19).value


if __name__ == "__main__":
    main(tyro.cli(Distances))
