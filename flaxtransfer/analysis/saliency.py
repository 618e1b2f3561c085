"""Saliency: which parts of an image a class is read from.

A map is a claim; ``analysis.map_checks`` says whether it can be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from flaxtransfer.analysis.frequency import network_inputs
from flaxtransfer.analysis.spectrum import table_text
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables, listing, suggest
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = [
    "PooledHead",
    "Saliency",
    "checked_targets",
    "end_segment",
    "logits_function",
    "saliency_maps",
    "upsampled",
]

Method = Literal["cam", "grad_cam", "hires_cam"]

_FINE = 7
"""Positions on a side below which a map is too coarse to point at a part: 7 of 224 px."""


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
        return upsampled(self.maps, self.size)

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
    >>> found = saliency_maps(model, variables, images, layer=model.segments[4])
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
    end = end_segment(model, head)
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
    wanted = checked_targets(targets, len(inputs), kernel.shape[1])
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
    end = end_segment(model, head)

    def run(images: Any) -> np.ndarray:
        inputs = network_inputs(images, preprocessing)
        kernel, bias = _head_arrays(model, variables, head, end, inputs)
        program = _logits(model, end, head is None)
        (found,) = _in_batches(lambda x: (program(variables, kernel, bias, x),), batch_size, inputs)
        return found

    return run


def end_segment(model: Model, head: PooledHead | None) -> str:
    """The segment whose pooled output the head reads."""
    known = model.segments[: model.segments.index("pool")]
    if head is None and (reads := model.config.head_reads):
        raise ValueError(
            "maps must be of a head that reads one depth (depth_head, solved_head), got one that "
            f"reads {', '.join((*reads, known[-1]))}"
        )
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


def checked_targets(targets: Any, count: int, classes: int) -> np.ndarray:
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


def upsampled(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
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
