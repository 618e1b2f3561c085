"""Saliency: which parts of an image a class is read from, and whether the map can be believed.

A map is a claim. ``faithfulness`` removes what it marks and looks what becomes of the prediction,
beside random blobs; ``randomization_test`` asks whether the map depends on the weights at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
import scipy.special
import scipy.stats

from flaxtransfer.analysis.frequency import network_inputs
from flaxtransfer.analysis.spectrum import checked_images, table_text
from flaxtransfer.models.model import Model
from flaxtransfer.paths import flatten, listing, suggest, unflatten
from flaxtransfer.types import Variables
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "Faithfulness",
    "FaithfulnessRow",
    "PooledHead",
    "RandomizationTest",
    "Saliency",
    "faithfulness",
    "impute",
    "logits_function",
    "randomization_test",
    "saliency_maps",
]

Method = Literal["cam", "grad_cam", "hires_cam"]

_FINE = 7
"""Positions on a side below which a map is too coarse to point at a part: 7 of 224 px."""

_COARSEST_BLOBS = 14
"""Positions on a side of the random control, at most: removing single pixels removes nothing,
for they are filled from their neighbors."""

_FEWEST = 5
"""Images below which nothing is said of the maps."""

_ALIKE = 0.2
"""Rank correlation with the map of random weights from which a map does not depend on them."""

_NOISE = 0.01
"""Deviation of the noise on what is filled in, in units of white."""

_ROWS = 64
"""Images at once, where the caller does not say."""


@dataclass(frozen=True, eq=False)
class PooledHead:
    """A linear head on the global average pool of a segment's output, at any depth.

    Args:
        segment: whose output is pooled.
        kernel: ``[channels, classes]``, for features as they are; a standardization is folded in.
        bias: ``[classes]``.
    """

    segment: str
    kernel: Any
    bias: Any


@dataclass(frozen=True, eq=False)
class Saliency:
    """Result of ``saliency_maps``; it prints as a table.

    Args:
        maps: float32 ``[images, map height, map width]``. Of exact CAM they are signed: what speaks
            against the class is negative.
        targets: int ``[images]``, the class that each map is for.
        logits: float32 ``[images, classes]``.
        layer: the segment at whose output the maps are.
        method: "cam", "grad_cam" or "hires_cam".
        size: height and width of the images in pixels.
        notes: remarks, in sentences.
    """

    maps: np.ndarray
    targets: np.ndarray
    logits: np.ndarray
    layer: str
    method: Method
    size: tuple[int, int]
    notes: tuple[str, ...] = ()

    def upsampled(self) -> np.ndarray:
        """The maps in the size of the images, bilinear: float32 ``[images, height, width]``."""
        return _upsampled(self.maps, self.size)

    def to_json(self) -> dict[str, Any]:
        """The value as a JSON-able dictionary, its maps included."""
        return {
            "layer": self.layer,
            "method": self.method,
            "size": list(self.size),
            "targets": self.targets.tolist(),
            "maps": self.maps.tolist(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("class", "images", "predicted", "where the map is largest, y x")
        for column in table.columns[:3]:
            column.justify = "right"
        places = _peaks(self.upsampled())
        for target in np.unique(self.targets)[:10].tolist():
            own = self.targets == target
            right = int((self.logits[own].argmax(axis=1) == target).sum())
            peaks = (f"{y} {x}" for y, x in places[own].tolist())
            table.add_row(str(target), str(own.sum()), str(right), listing(peaks, most=4))
        height, width = self.maps.shape[1:]
        name = {"cam": "exact CAM", "grad_cam": "Grad-CAM", "hires_cam": "HiResCAM"}[self.method]
        last = f"{name} at {self.layer}: {len(self.maps)} maps of {width} x {height}. Whether they "
        last += "mark what decides is not known before faithfulness() has measured it."
        return Group(table, last, *self.notes)


def saliency_maps(
    model: Model,
    variables: Variables,
    images: Any,
    preprocessing: Preprocessing | None = None,
    *,
    targets: Any = None,
    layer: str | None = None,
    method: Method | None = None,
    head: PooledHead | None = None,
    batch_size: int = _ROWS,
) -> Saliency:
    """Which parts of each image speak for a class.

    "cam" is exact where a linear head follows the pooled map: the mean of the map plus the head's
    bias is the logit. "grad_cam" weights the channels of a map by their mean gradient, "hires_cam"
    multiplies map and gradient position by position; both keep what speaks for the class. At the
    last map all three agree up to a factor and sign. Earlier, neither is right by construction:
    choose by ``faithfulness``. On planted cues Grad-CAM found more of them.

    The gradient is that of the logit by the activations of the layer; nothing is differentiated
    below it, and no parameter.

    Args:
        model: the network.
        variables: its parameters and statistics.
        images: ``[images, height, width, bands]``: uint8 with ``preprocessing``, or floating and
            normalized without.
        preprocessing: of the images.
        targets: int ``[images]``, or one for all; by default the predicted class of each image.
        layer: segment at whose output the map is; by default the deepest with at least 7 x 7
            positions, else the deepest of the largest maps.
        method: by default "cam" where it is exact, else "grad_cam".
        head: a head on the pooled output of a segment, in place of the network's own end.
        batch_size: images at once.

    Returns:
        ``Saliency``.

    Raises:
        ValueError: an unknown or pooled layer, or one above the head; "cam" where it is not exact;
            targets that are no class; images of another shape or not finite.
        TypeError: images of another dtype, targets that are not integers.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4, classes=3))
    >>> variables = model.init(jax.random.key(0))
    >>> images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    >>> found = saliency_maps(model, variables, images, layer="layer4")
    >>> found.method, found.maps.shape, found.upsampled().shape
    ('cam', (2, 1, 1), (2, 32, 32))

    References:
        B. Zhou et al., "Learning Deep Features for Discriminative Localization", 2016 (CAM).
        R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
        Gradient-based Localization", 2017.
        R. L. Draelos, L. Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of
        convolutional neural networks", 2020.
    """
    inputs = network_inputs(images, preprocessing)
    end = _end(model, head)
    sizes = _map_sizes(model, variables, inputs[:1], end)
    notes = []
    if layer is None:
        layer = _default_layer(sizes)
    elif layer not in sizes:
        known = listing(sizes, most=8)
        raise ValueError(f"layer must be one of {known}, got {layer!r}{suggest(layer, sizes)}")
    if min(sizes[layer]) < _FINE:
        notes.append(
            f"Maps of {sizes[layer][1]} x {sizes[layer][0]} are too coarse to point at a part."
        )
    if method is None:
        method = "cam" if layer == end else "grad_cam"
    if method not in get_args(Method):
        raise ValueError(
            f"method must be one of {', '.join(get_args(Method))}, got {method!r}"
            f"{suggest(str(method), get_args(Method))}"
        )
    if method == "cam" and layer != end:
        raise ValueError(
            f"method 'cam' must be at {end}, whose pooled map the head reads, got {layer!r}; "
            "'grad_cam' and 'hires_cam' are for the others"
        )
    kernel, bias = _head_arrays(model, variables, head, end, inputs)
    wanted = _checked_targets(targets, len(inputs), kernel.shape[1])
    run = _mapped(model, end, layer, method, head is None)
    found = _in_batches(
        lambda x, target: run(variables, kernel, bias, x, target), batch_size, inputs, wanted
    )
    maps, logits, chosen = found
    if not np.isfinite(maps).all():
        raise ValueError("saliency must be finite, got NaN or infinity; are the weights sound?")
    if flat := int((np.ptp(maps, axis=(1, 2)) == 0).sum()):
        notes.append(f"{flat} of {len(maps)} maps are constant: they mark nothing.")
    return Saliency(maps, chosen, logits, layer, method, inputs.shape[1:3], tuple(notes))


def logits_function(
    model: Model,
    variables: Variables,
    preprocessing: Preprocessing | None = None,
    *,
    head: PooledHead | None = None,
    batch_size: int = _ROWS,
) -> Callable[[Any], np.ndarray]:
    """The network as a function from images to float32 logits ``[images, classes]``.

    Args:
        model: the network.
        variables: its parameters and statistics.
        preprocessing: of the images, as for ``saliency_maps``.
        head: as for ``saliency_maps``.
        batch_size: images at once.
    """
    end = _end(model, head)

    def run(images: Any) -> np.ndarray:
        inputs = network_inputs(images, preprocessing)
        kernel, bias = _head_arrays(model, variables, head, end, inputs)
        program = _logits(model, end, head is None)
        (found,) = _in_batches(lambda x: (program(variables, kernel, bias, x),), batch_size, inputs)
        return found

    return run


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
    wanted = _checked_targets(targets, count, whole.shape[1])
    wanted = np.where(wanted < 0, whole.argmax(axis=1), wanted)
    random = np.random.default_rng(seed)
    grid = [min(side, _COARSEST_BLOBS) for side in found.shape[1:]]
    scores = [("map", _upsampled(found, size))]
    scores += [
        ("blobs", _upsampled(random.normal(size=(count, *grid)), size)) for _ in range(draws)
    ]
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
    >>> found = randomization_test(model, model.init(jax.random.key(0)), images, layer="layer1")
    >>> [row[0] for row in found.rows]
    ['head', 'layer4', 'layer3', 'layer2', 'layer1', 'stem']

    References:
        J. Adebayo et al., "Sanity Checks for Saliency Maps", 2018.
    """
    asked = {"layer": layer, "method": method}
    original = saliency_maps(model, variables, images, preprocessing, head=head, **asked)  # type: ignore[arg-type]
    drawn = dataclasses.replace(model, zero_head=False, zero_init_residual=False)
    fresh = drawn.init(jax.random.key(seed))
    end = _end(model, head)
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


def _end(model: Model, head: PooledHead | None) -> str:
    """The segment whose pooled output the head reads."""
    known = model.segments[: model.segments.index("pool")]
    if head is None:
        return known[-1]
    if head.segment not in known:
        raise ValueError(
            f"the head's segment must be one of {', '.join(known)}, got {head.segment!r}"
            f"{suggest(head.segment, known)}"
        )
    return head.segment


def _map_sizes(
    model: Model, variables: Variables, image: np.ndarray, end: str
) -> dict[str, tuple[int, int]]:
    """Height and width of the map of each segment up to ``end``."""
    found, x = {}, jax.ShapeDtypeStruct(image.shape, image.dtype)  # type: ignore[no-untyped-call]
    for name in model.segments[: model.segments.index(end) + 1]:
        run = _slice(model, name, name)
        x = jax.eval_shape(run, variables, x)
        found[name] = (x.shape[1], x.shape[2])
    return found


def _default_layer(sizes: Mapping[str, tuple[int, int]]) -> str:
    # An adapter's map is the image itself.
    names = [name for name in sizes if name != "adapter"] or list(sizes)
    fine = [name for name in names if min(sizes[name]) >= _FINE]
    if fine:
        return fine[-1]
    largest = max(min(sizes[name]) for name in names)
    return [name for name in names if min(sizes[name]) == largest][-1]


def _slice(model: Model, first: str | None, last: str) -> Callable[[Variables, Any], jax.Array]:
    """The segments from ``first`` to ``last``, both included."""
    stop = model.segments[model.segments.index(last) + 1]

    def run(variables: Variables, x: Any) -> jax.Array:
        return model.apply(variables, x, start=first, stop=stop)[0]

    return run


def _head_arrays(
    model: Model,
    variables: Variables,
    head: PooledHead | None,
    end: str,
    inputs: np.ndarray,
) -> tuple[Any, Any]:
    """Kernel ``[channels, classes]`` and bias ``[classes]`` of the head."""
    if head is None:
        own = variables["params"][model.layout.head]
        return own["kernel"], own["bias"]
    kernel, bias = np.asarray(head.kernel), np.asarray(head.bias)
    start = jax.ShapeDtypeStruct(inputs[:1].shape, inputs.dtype)  # type: ignore[no-untyped-call]
    channels = jax.eval_shape(_slice(model, None, end), variables, start).shape[-1]
    if kernel.ndim != 2 or kernel.shape[0] != channels or bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"a head on {end} must have a kernel [{channels}, classes] and a bias [classes], got "
            f"{list(kernel.shape)} and {list(bias.shape)}"
        )
    return kernel, bias


@lru_cache(maxsize=32)
def _logits(model: Model, end: str, own: bool) -> Callable[..., jax.Array]:
    """Compiled: the logits of images, by the network's own end or a head on ``end``."""
    below = _slice(model, None, end)

    @jax.jit
    def run(variables: Variables, kernel: Any, bias: Any, x: jax.Array) -> jax.Array:
        return _classified(model, end, own, variables, kernel, bias, below(variables, x))

    return run


def _classified(
    model: Model, end: str, own: bool, variables: Variables, kernel: Any, bias: Any, x: jax.Array
) -> jax.Array:
    if own:
        logits: jax.Array = model.apply(variables, x, start="pool")[0]
        return logits
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    found: jax.Array = jnp.dot(wide.mean((1, 2)), kernel, precision="highest") + bias
    return found


@lru_cache(maxsize=32)
def _mapped(
    model: Model, end: str, layer: str, method: Method, own: bool
) -> Callable[..., tuple[jax.Array, ...]]:
    """Compiled: maps, logits and targets of images; a target of -1 is the predicted class."""
    below = _slice(model, None, layer)
    segments = model.segments
    between = None
    if layer != end:
        between = _slice(model, segments[segments.index(layer) + 1], end)

    @jax.jit
    def run(
        variables: Variables, kernel: Any, bias: Any, x: jax.Array, targets: jax.Array
    ) -> tuple[jax.Array, ...]:
        activations = below(variables, x)

        def above(activations: jax.Array) -> jax.Array:
            last = activations if between is None else between(variables, activations)
            return _classified(model, end, own, variables, kernel, bias, last)

        logits, back = jax.vjp(above, activations)
        chosen = jnp.where(targets < 0, logits.argmax(axis=1), targets)
        wide = activations.astype(logits.dtype)
        if method == "cam":
            weights = jnp.asarray(kernel)[:, chosen]
            maps = jnp.einsum("nhwc,cn->nhw", wide, weights, precision="highest")
            return maps, logits, chosen
        (gradient,) = back(jax.nn.one_hot(chosen, logits.shape[1], dtype=logits.dtype))
        gradient = gradient.astype(logits.dtype)
        if method == "grad_cam":
            gradient = gradient.mean((1, 2), keepdims=True)
        return jax.nn.relu((gradient * wide).sum(axis=-1)), logits, chosen

    return run


def _in_batches(run: Callable[..., Any], size: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """Runs a compiled function over batches of one shape."""
    if size < 1:
        raise ValueError(f"batch_size must be >= 1, got {size}")
    count = len(arrays[0])
    size = min(size, count)
    parts = []
    for first in range(0, count, size):
        batch = [array[first : first + size] for array in arrays]
        missing = size - len(batch[0])
        filled = [np.concatenate([rows, rows[:1].repeat(missing, axis=0)]) for rows in batch]
        parts.append([np.asarray(out)[: len(batch[0])] for out in run(*filled)])
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _checked_targets(targets: Any, count: int, classes: int) -> np.ndarray:
    """Int32 ``[count]``; -1 for the predicted class, where none is given."""
    if targets is None:
        return np.full(count, -1, np.int32)
    array = np.asarray(targets)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"targets must be integers, got {array.dtype}")
    if array.ndim == 0:
        array = np.full(count, array)
    if array.shape != (count,) or array.min() < 0 or array.max() >= classes:
        raise ValueError(
            f"targets must be {count} classes, one per image, from 0 to {classes - 1}, got shape "
            f"{array.shape} from {array.min()} to {array.max()}"
        )
    return array.astype(np.int32)


def _upsampled(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if maps.shape[1] > size[0] or maps.shape[2] > size[1]:
        raise ValueError(
            f"maps must be at most of the size of the images, {size[0]} x {size[1]}, got "
            f"{maps.shape[1]} x {maps.shape[2]}"
        )
    rows, columns = (_interpolation(*pair) for pair in zip(maps.shape[1:], size, strict=True))
    return np.asarray(rows @ maps @ columns.T, np.float32)


def _interpolation(length: int, size: int) -> np.ndarray:
    """Bilinear weights ``[size, length]``: pixels have their centers at halves, borders go on."""
    places = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    distance = np.abs(places[:, None] - np.arange(length))
    return np.asarray(np.maximum(0, 1 - distance))


def _peaks(maps: np.ndarray) -> np.ndarray:
    """Row and column of the largest value of each map: ``[images, 2]``."""
    flat = maps.reshape(len(maps), -1).argmax(axis=1)
    return np.stack(np.unravel_index(flat, maps.shape[1:]), axis=1)


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
