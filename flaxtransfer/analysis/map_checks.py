"""Whether a saliency map can be believed.

A map is a claim. ``faithfulness`` removes what it marks and looks what becomes of the prediction,
beside random blobs; ``randomization_test`` asks whether the map depends on the weights at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import jax
import numpy as np
import scipy.sparse.linalg
import scipy.special
import scipy.stats

from flaxtransfer.analysis.saliency import (
    Method,
    PooledHead,
    checked_targets,
    end_segment,
    saliency_maps,
    upsampled,
)
from flaxtransfer.analysis.spectrum import checked_images, table_text
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables, flatten, unflatten
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "Faithfulness",
    "FaithfulnessRow",
    "RandomizationTest",
    "faithfulness",
    "impute",
    "randomization_test",
]

_COARSEST_BLOBS = 14
"""Positions on a side of the random control, at most: removing single pixels removes nothing,
for they are filled from their neighbors."""

_FEWEST = 5
"""Images below which nothing is said of the maps."""

_ALIKE = 0.2
"""Rank correlation with the map of random weights from which a map does not depend on them."""

_NOISE = 0.01
"""Deviation of the noise on what is filled in, in units of white."""


@dataclass(frozen=True)
class FaithfulnessRow:
    """What becomes of the predictions when a fraction of the pixels is removed.

    Args:
        fraction: of the pixels that is removed.
        order: "most" or "least" important first.
        accuracy: fraction of the images still in the target class, by what chose the pixels: "map",
            "blobs", "edges".
        probability: mean probability of the target class, likewise.
        difference: probability under blobs minus that under the map, paired.
        standard_error: of the difference; infinite for a single image.
    """

    fraction: float
    order: Literal["most", "least"]
    accuracy: Mapping[str, float]
    probability: Mapping[str, float]
    difference: float
    standard_error: float


@dataclass(frozen=True)
class Faithfulness:
    """Result of ``faithfulness``; it prints as a table.

    Args:
        images: number of images.
        accuracy: fraction of the whole images in the target class.
        rows: by fraction and order.
    """

    images: int
    accuracy: float
    rows: tuple[FaithfulnessRow, ...]

    @property
    def better(self) -> bool | None:
        """Whether removing what the maps mark first hurts more than random blobs do.

        By 2 standard errors, at the smallest fraction; None with fewer than 5 images.
        """
        row = self._decisive
        if self.images < _FEWEST:
            return None
        return row.difference > 0 and row.difference > 2 * row.standard_error

    def summary(self) -> str:
        """The verdict in a sentence."""
        row = self._decisive
        figures = (
            f"removing the {row.fraction:.0%} that the maps mark first leaves "
            f"{row.accuracy['map']:.0%} in their class, random blobs {row.accuracy['blobs']:.0%}, "
            f"edges {row.accuracy['edges']:.0%}; the probability falls by "
            f"{100 * row.difference:.1f} points more than by blobs"
        )
        if self.better is None:
            return f"Not decided with {self.images} images, fewer than {_FEWEST}: {figures}."
        figures += f" (± {100 * row.standard_error:.1f})"
        if not self.better:
            return f"These maps do no better than random blobs: {figures}. Do not trust them."
        return f"These maps mark what decides better than random blobs: {figures}."

    def to_json(self) -> dict[str, Any]:
        """The value as a JSON-able dictionary."""
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            "better": self.better,
            "summary": self.summary(),
            "rows": [
                dataclasses.asdict(row)
                | {
                    "standard_error": row.standard_error
                    if math.isfinite(row.standard_error)
                    else None
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("removed", "map", "blobs", "edges", "probability: map", "blobs", "edges")
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(
                f"{row.fraction:.0%}, {row.order}",
                *(f"{row.accuracy[name]:.0%}" for name in ("map", "blobs", "edges")),
                *(f"{row.probability[name]:.2f}" for name in ("map", "blobs", "edges")),
            )
        last = (
            f"{self.images} images, {self.accuracy:.0%} of them in their class when whole. Removed"
        )
        last += " are the most or the least important pixels."
        return Group(table, last, self.summary())

    @property
    def _decisive(self) -> FaithfulnessRow:
        return min((r for r in self.rows if r.order == "most"), key=lambda r: r.fraction)


def faithfulness(
    predict: Callable[[Any], Any],
    images: Any,
    maps: Any,
    targets: Any = None,
    *,
    fractions: Sequence[float] = (0.1, 0.5),
    draws: int = 3,
    seed: int = 0,
) -> Faithfulness:
    """Whether what saliency maps mark decides: deletion, against random blobs and edges.

    The marked fraction of the pixels is removed, and filled from what is around it by ROAD's noisy
    linear imputation, so that neither a gray hole nor its outline gives the class away. Most
    important first is the deletion of evidence. Least important first keeps it: at 0.9 it is the
    insertion of the first tenth.

    The controls are random maps of the same coarseness, for smooth maps score better whatever they
    mark, and the edges of the image.

    Args:
        predict: from images like the given ones to logits ``[images, classes]``; see
            ``logits_function``.
        images: ``[images, height, width, bands]``, uint8 or floating.
        maps: ``[images, map height, map width]``, such as ``Saliency.maps``, of any size up to that
            of the images.
        targets: int ``[images]``: the class that is looked at; by default the predicted one. With
            labels, accuracies are those of the network.
        fractions: of the pixels to remove, each above 0 and below 1.
        draws: of random blobs.
        seed: of blobs and noise.

    Returns:
        ``Faithfulness``, which says so where the maps are no better than random blobs.

    Raises:
        ValueError: arrays that do not fit each other, fractions or draws out of range.

    >>> images = np.zeros((6, 16, 16, 1))
    >>> images[:, 2:6, 2:6] = 1
    >>> def predict(images):  # the class is whether the corner is bright
    ...     bright = 40 * (np.asarray(images)[:, 2:6, 2:6, 0].mean(axis=(1, 2)) - 0.5)
    ...     return np.stack([-bright, bright], axis=1)
    >>> faithfulness(predict, images, images[..., 0]).better
    True

    References:
        Y. Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods",
        2022 (ROAD).
        V. Petsiuk, A. Das, K. Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box
        Models", 2018 (deletion and insertion).
    """
    checked_images(images)
    array = np.asarray(images)
    found = np.asarray(maps, np.float64)
    count, size = len(array), array.shape[1:3]
    if found.ndim != 3 or len(found) != count or not np.isfinite(found).all():
        raise ValueError(
            f"maps must be finite and [{count} images, height, width], got shape {found.shape}"
        )
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(f"fractions must be above 0 and below 1, got {list(fractions)}")
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    whole = _predicted(predict, array)
    wanted = checked_targets(targets, count, whole.shape[1])
    wanted = np.where(wanted < 0, whole.argmax(axis=1), wanted)
    random = np.random.default_rng(seed)
    grid = [min(side, _COARSEST_BLOBS) for side in found.shape[1:]]
    scores = [("map", upsampled(found, size))]
    scores += [("blobs", upsampled(random.normal(size=(count, *grid)), size)) for _ in range(draws)]
    scores.append(("edges", _edges(array)))
    rows = []
    for fraction in fractions:
        for order in ("most", "least"):
            right: dict[str, list[np.ndarray]] = {}
            probable: dict[str, list[np.ndarray]] = {}
            for name, score in scores:
                removed = _removed(score if order == "most" else -score, fraction)
                logits = _predicted(predict, impute(array, removed, seed=seed))
                right.setdefault(name, []).append(logits.argmax(axis=1) == wanted)
                likely = scipy.special.softmax(logits, axis=1)[np.arange(count), wanted]
                probable.setdefault(name, []).append(likely)
            apart = np.mean(probable["blobs"], axis=0) - probable["map"][0]
            error = apart.std(ddof=1) / math.sqrt(count) if count > 1 else math.inf
            rows.append(
                FaithfulnessRow(
                    float(fraction),
                    order,  # type: ignore[arg-type]
                    {name: float(np.mean(values)) for name, values in right.items()},
                    {name: float(np.mean(values)) for name, values in probable.items()},
                    float(apart.mean()),
                    float(error),
                )
            )
    return Faithfulness(count, float((whole.argmax(axis=1) == wanted).mean()), tuple(rows))


def impute(images: Any, removed: Any, *, seed: int = 0) -> np.ndarray:
    """Images with the removed pixels filled from their surroundings: noisy linear imputation.

    Each removed pixel is the weighted mean of its eight neighbors, of which the diagonal ones count
    half; all of them at once, by solving the linear system. Noise of 1 % of white is added there.

    Args:
        images: ``[images, height, width, bands]``, uint8 or floating (white at 1).
        removed: bool ``[images, height, width]``; some pixel of each image must stay.
        seed: of the noise.

    Returns:
        Images like the given ones.

    Raises:
        ValueError: an image of which nothing stays, or arrays that do not fit.

    >>> gray = np.full((1, 8, 8, 1), 0.5)
    >>> hole = np.zeros((1, 8, 8), bool)
    >>> hole[0, 2:6, 2:6] = True
    >>> bool(np.abs(impute(gray, hole) - 0.5).max() < 0.05)
    True
    """
    array, mask = np.asarray(images), np.asarray(removed)
    if mask.dtype != bool or mask.shape != array.shape[:3]:
        raise ValueError(
            f"removed must be booleans {list(array.shape[:3])}, got {mask.dtype} {list(mask.shape)}"
        )
    if mask.all(axis=(1, 2)).any():
        raise ValueError("removed must leave a pixel of every image")
    height, width = mask.shape[1:]
    neighbors, weights = _neighborhood(height, width)
    random = np.random.default_rng(seed)
    whole = array.dtype == np.uint8
    filled = array.astype(np.float64) / (255 if whole else 1)
    for image, gone in zip(filled, mask, strict=True):
        holes = np.flatnonzero(gone)
        if not len(holes):
            continue
        pixels = image.reshape(height * width, -1)
        index = np.full(height * width, -1)
        index[holes] = np.arange(len(holes))
        near, weight = neighbors[holes], weights[holes]
        inside = gone.reshape(-1)[near] & (weight > 0)
        known = np.where(inside, 0, weight)
        right = np.einsum("hn,hnc->hc", known, pixels[near])
        row = np.broadcast_to(np.arange(len(holes))[:, None], near.shape)[inside]
        inner = scipy.sparse.csc_matrix(
            (weight[inside], (row, index[near[inside]])), shape=(len(holes), len(holes))
        )
        solver = scipy.sparse.linalg.splu(scipy.sparse.eye(len(holes), format="csc") - inner)
        pixels[holes] = solver.solve(right) + random.normal(0, _NOISE, right.shape)
    if whole:
        return np.clip(np.rint(filled * 255), 0, 255).astype(np.uint8)
    return filled.astype(array.dtype)


@dataclass(frozen=True)
class RandomizationTest:
    """Result of ``randomization_test``; it prints as a table.

    Args:
        images: number of images.
        rows: ``(what is random, mean rank correlation, standard deviation over the images)``, the
            segments from the output to the input, each together with those before it.
        other_class: mean rank correlation with the map of the second most probable class; None for
            a network with one output.
    """

    images: int
    rows: tuple[tuple[str, float, float], ...]
    other_class: float | None

    @property
    def passed(self) -> bool:
        """Whether the maps of the wholly random network are unlike those of the network."""
        return abs(self.rows[-1][1]) < _ALIKE

    def summary(self) -> str:
        """The verdict in a sentence."""
        correlation = self.rows[-1][1]
        if self.passed:
            return f"The maps depend on the weights: rank correlation {correlation:+.2f}."
        return (
            "The maps hardly depend on the weights, and do no better than those of a random "
            f"network: rank correlation {correlation:+.2f}, {_ALIKE} or more."
        )

    def to_json(self) -> dict[str, Any]:
        """The value as a JSON-able dictionary."""
        return {
            "images": self.images,
            "passed": self.passed,
            "other_class": self.other_class,
            "rows": [
                {"random": name, "correlation": mean, "deviation": deviation}
                for name, mean, deviation in self.rows
            ],
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("random from the output to", "rank correlation", "deviation")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, mean, deviation in self.rows:
            table.add_row(name, f"{mean:+.2f}", f"{deviation:.2f}")
        if self.other_class is not None:
            table.add_row("nothing; second class", f"{self.other_class:+.2f}", "")
        return Group(table, f"{self.images} images.", self.summary())


def randomization_test(
    model: Model,
    variables: Variables,
    images: Any,
    preprocessing: Preprocessing | None = None,
    *,
    layer: str | None = None,
    method: Method | None = None,
    head: PooledHead | None = None,
    seed: int = 0,
) -> RandomizationTest:
    """Whether saliency maps depend on what the network has learned.

    Segments get random weights one after the other, from the output to the input, and the maps for
    the same classes are compared with the original ones. A map that stays alike shows the image,
    or the architecture. Maps are also compared with those of the second most probable class.

    Args:
        model: the network.
        variables: its parameters and statistics.
        images: as for ``saliency_maps``.
        preprocessing: as for ``saliency_maps``.
        layer: as for ``saliency_maps``.
        method: as for ``saliency_maps``.
        head: as for ``saliency_maps``; its kernel is the first to become random.
        seed: of the random weights.

    Returns:
        ``RandomizationTest``.

    Raises:
        ValueError: as for ``saliency_maps``.
        TypeError: as for ``saliency_maps``.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3))
    >>> images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
    >>> found = randomization_test(model, model.init(jax.random.key(0)), images)
    >>> [row[0] for row in found.rows][::5]
    ['head', 'stem']

    References:
        J. Adebayo et al., "Sanity Checks for Saliency Maps", 2018.
    """
    asked = {"layer": layer, "method": method}
    original = saliency_maps(model, variables, images, preprocessing, head=head, **asked)  # type: ignore[arg-type]
    drawn = dataclasses.replace(model, zero_head=False, zero_init_residual=False)
    fresh = drawn.init(jax.random.key(seed))
    end = end_segment(model, head)
    steps = [name for name in model.segments if name not in ("pool", "head")]
    steps = [*steps[: steps.index(end) + 1], "head"][::-1]
    second = None
    if original.logits.shape[1] > 1:
        order = np.argsort(-original.logits, axis=1, kind="stable")
        asked_for = np.where(order[:, 0] == original.targets, order[:, 1], order[:, 0])
        other = saliency_maps(
            model,
            variables,
            images,
            preprocessing,
            head=head,
            targets=asked_for,
            **asked,  # type: ignore[arg-type]
        )
        second = float(_rank_correlations(original.maps, other.maps).mean())
    rows, changed = [], variables
    for name in steps:
        changed = _swapped(model, changed, fresh, name)
        if name == "head" and head is not None:
            kernel = np.asarray(head.kernel)
            draw = np.random.default_rng(seed).normal(0, kernel.std() or 1, kernel.shape)
            head = dataclasses.replace(head, kernel=draw.astype(kernel.dtype))
        other = saliency_maps(
            model,
            changed,
            images,
            preprocessing,
            head=head,
            targets=original.targets,
            **asked,  # type: ignore[arg-type]
        )
        found = _rank_correlations(original.maps, other.maps)
        rows.append((name, float(found.mean()), float(found.std())))
    return RandomizationTest(len(original.maps), tuple(rows), second)


def _predicted(predict: Callable[[Any], Any], images: np.ndarray) -> np.ndarray:
    logits = np.asarray(predict(images), np.float64)
    if logits.ndim != 2 or len(logits) != len(images) or not np.isfinite(logits).all():
        raise ValueError(
            f"predict must return finite logits [{len(images)} images, classes], got shape "
            f"{list(logits.shape)}{'' if np.isfinite(logits).all() else ' with NaN or infinity'}"
        )
    return logits


def _edges(images: np.ndarray) -> np.ndarray:
    """Size of the gradient of the mean band: float64 ``[images, height, width]``."""
    gray = images.astype(np.float64).mean(axis=-1)
    return np.asarray(np.hypot(*np.gradient(gray, axis=(1, 2))))


def _removed(score: np.ndarray, fraction: float) -> np.ndarray:
    """Where the largest scores are: this fraction of each image, at least a pixel."""
    flat = score.reshape(len(score), -1)
    count = min(max(1, round(fraction * flat.shape[1])), flat.shape[1] - 1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :count]
    removed = np.zeros(flat.shape, bool)
    np.put_along_axis(removed, order, True, axis=1)
    return removed.reshape(score.shape)


@lru_cache(maxsize=4)
def _neighborhood(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight neighbors of each pixel, and their weights, which sum to 1: ``[pixels, 8]``."""
    rows, columns = np.indices((height, width)).reshape(2, -1)
    offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    neighbors, weights = [], []
    for y, x in offsets:
        inside = (rows + y >= 0) & (rows + y < height) & (columns + x >= 0) & (columns + x < width)
        near = np.clip(rows + y, 0, height - 1) * width + np.clip(columns + x, 0, width - 1)
        neighbors.append(near)
        weights.append(inside * (1.0 if y and x else 2.0))
    weight = np.stack(weights, axis=1)
    return np.stack(neighbors, axis=1), weight / weight.sum(axis=1, keepdims=True)


def _swapped(model: Model, ours: Variables, theirs: Variables, segment: str) -> Variables:
    """Variables in which one segment has the leaves of the other ones."""
    changed = {}
    for collection in ours:
        leaves, others = flatten(ours[collection]), flatten(theirs[collection])
        changed[collection] = unflatten(
            {
                path: others[path].astype(leaf.dtype)
                if model.layout.segment(path) == segment
                else leaf
                for path, leaf in leaves.items()
            }
        )
    return changed


def _rank_correlations(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Spearman's of each pair of maps; 0 where one is constant, and shares nothing."""
    found = []
    for pair in zip(ours, theirs, strict=True):
        ranks = np.array([scipy.stats.rankdata(values) for values in pair])
        ranks -= ranks.mean(axis=1, keepdims=True)
        lengths = np.linalg.norm(ranks, axis=1)
        found.append(float(ranks[0] @ ranks[1] / lengths.prod()) if lengths.all() else 0.0)
    return np.array(found)
