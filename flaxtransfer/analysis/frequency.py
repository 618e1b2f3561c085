"""Frequency response of each segment of a network, by Jacobian-vector products.

A spectrum of kernels beyond the first layer, or of activations, would not tell: strides fold high
frequencies into low ones, and ReLUs mix them. The Jacobian relates every output to the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft

from flaxtransfer.analysis.spectrum import (
    OCTAVE_NAMES,
    OCTAVES,
    channel_axes,
    channel_names,
    checked_images,
    octave_indices,
    table_text,
    windowed_power,
)
from flaxtransfer.models.layers import conv, conv_by_patches
from flaxtransfer.models.model import Model
from flaxtransfer.paths import Variables, listing, suggest
from flaxtransfer.weights.preprocessing import Preprocessing, normalize

__all__ = [
    "FrequencyResponse",
    "StageResponse",
    "filter_transfer",
    "frequency_response",
    "network_inputs",
]

_LEVEL = 10 ** (-3 / 10)
"""Half of the power: -3 dB."""

_LOWEST = -150.0
"""dB that are printed for nothing at all; rounding in float32 ends at about as much."""

_PIXELS = 1 << 18
"""Pixels of a batch of images, unless the caller says otherwise: 5 images of 224 px."""


@dataclass(frozen=True)
class StageResponse:
    """Frequency response of the network up to and including one segment.

    Args:
        segment: its name.
        gains: power gain by octave: mean squared output over mean squared input, for a small
            sinusoid of one frequency, averaged over the frequencies of the octave; None for an
            octave without a frequency.
        errors: standard errors of ``gains`` over the images, in dB; None for a single image.
        band: lowest and highest frequency, in cycles per pixel, around the strongest one, with at
            least half of its gain, in steps of a third of an octave.
        arrives: fraction by octave of what the given images send through, gain times power.
        shares: fraction of the gain by channel, as ("luma", 0.6).
    """

    segment: str
    gains: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    band: tuple[float, float]
    arrives: tuple[float, ...]
    shares: tuple[tuple[str, float], ...]

    @property
    def decibels(self) -> tuple[float | None, ...]:
        """``gains`` in dB relative to the strongest octave."""
        strongest = max(gain for gain in self.gains if gain is not None)
        return tuple(_decibel(gain, strongest) for gain in self.gains)

    @property
    def kind(self) -> str:
        """What was measured: an octave passes if it has at least half of the strongest gain.

        "low-pass" if the coarsest octave passes and the finest does not, "high-pass" in the
        opposite case, "band-pass" if neither does, "flat" if all do, "band-stop" if only both ends
        do.
        """
        passes = [value >= -3 for value in self.decibels if value is not None]
        if all(passes):
            return "flat"
        ends = (passes[0], passes[-1])
        kinds = {(True, False): "low-pass", (False, True): "high-pass", (False, False): "band-pass"}
        return kinds.get(ends, "band-stop")


@dataclass(frozen=True, eq=False)
class FrequencyResponse:
    """Result of ``frequency_response``; it prints as a table.

    Args:
        stages: one per segment, from the input to the output.
        random: the same with random weights; empty if it was not asked for.
        spectrum: float64 ``[segments, channels, height, width]``, the power gain of each frequency
            in the order of ``np.fft.fft2``.
        channels: names of the channels of ``spectrum``.
        power: fraction by octave of the variance of the images, without that of their means.
        images: number of images.
        cotangents: by segment, number per image.
        size: height and width of the network's input in pixels.
        file_scale: cycles per pixel of the files for one cycle per pixel of the network's input;
            None if it is not known.
        notes: remarks, in sentences.
    """

    stages: tuple[StageResponse, ...]
    random: tuple[StageResponse, ...]
    spectrum: np.ndarray
    channels: tuple[str, ...]
    power: tuple[float, ...]
    images: int
    cotangents: Mapping[str, int]
    size: tuple[int, int]
    file_scale: float | None = None
    notes: tuple[str, ...] = ()

    def stage(self, segment: str) -> StageResponse:
        """The response of a segment.

        Raises:
            ValueError: it was not measured.
        """
        names = [stage.segment for stage in self.stages]
        if segment not in names:
            raise ValueError(
                f"segment must be one of {', '.join(names)}, got {segment!r}"
                f"{suggest(segment, names)}"
            )
        return self.stages[names.index(segment)]

    def to_json(self) -> dict[str, Any]:
        """The value as a JSON-able dictionary, without the whole spectrum."""

        def rows(stages: tuple[StageResponse, ...]) -> list[dict[str, Any]]:
            return [
                {
                    "segment": stage.segment,
                    "kind": stage.kind,
                    "decibels": list(stage.decibels),
                    "gains": list(stage.gains),
                    "errors_db": list(stage.errors),
                    "band": list(stage.band),
                    "arrives": list(stage.arrives),
                    "channels": dict(stage.shares),
                }
                for stage in stages
            ]

        return {
            "octaves": list(OCTAVE_NAMES),
            "edges": list(OCTAVES),
            "file_scale": self.file_scale,
            "images": self.images,
            "cotangents": dict(self.cotangents),
            "size": list(self.size),
            "image_power": list(self.power),
            "segments": rows(self.stages),
            "random_weights": rows(self.random),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        octaves = (name.replace("-", "-\n") for name in OCTAVE_NAMES)
        table = Table("", *octaves, "-3 dB band", "", box=None, padding=(0, 1), pad_edge=False)
        for number, column in enumerate(table.columns):
            column.justify = "left" if number in (0, 7) else "right"
            column.no_wrap = True

        def add(title: str, stages: tuple[StageResponse, ...]) -> None:
            table.add_row(title)
            for stage in stages:
                low, high = stage.band
                cells = ("–" if value is None else f"{value:.1f}" for value in stage.decibels)
                table.add_row(f" {stage.segment}", *cells, f"{low:.2f}-{high:.2f}", stage.kind)

        add("response", self.stages)
        if self.random:
            add("random weights", self.random)
        table.add_row("arrives")
        for name, shares in (
            ("images", self.power),
            *((stage.segment, stage.arrives) for stage in self.stages),
        ):
            table.add_row(f" {name}", *(f"{share:.0%}" for share in shares))
        return Group(table, *self._sentences())

    def _sentences(self) -> list[str]:
        counts = sorted(set(self.cotangents.values()))
        of = f"{self.images} images of {self.size[1]} x {self.size[0]} px"
        sentences = [
            f"Octaves and bands in cycles per pixel of the network's input; response in dB of the "
            f"strongest octave; {of}, {listing(map(str, counts))} cotangents each."
        ]
        errors = [e for stage in self.stages for e in stage.errors if e is not None]
        if errors:
            sentences.append(f"Largest standard error over the images: {max(errors):.1f} dB.")
        if len(self.channels) > 1:
            parts = [
                f"{stage.segment} "
                + listing((f"{share:.0%} {name}" for name, share in stage.shares), most=3)
                for stage in self.stages
            ]
            sentences.append(f"Response by channel: {'; '.join(parts)}.")
        if self.file_scale is not None:
            bands = [
                f"{stage.segment} {self.file_scale * stage.band[0]:.3f}-"
                f"{self.file_scale * stage.band[1]:.3f}"
                for stage in self.stages
            ]
            sentences.append(
                f"One cycle per pixel of the network's input is {self.file_scale:.3g} of the "
                f"files: bands there {', '.join(bands)}."
            )
        return [*sentences, *self.notes]


def frequency_response(
    model: Model,
    variables: Variables,
    images: Any,
    preprocessing: Preprocessing | None = None,
    *,
    segments: Sequence[str] | None = None,
    cotangents: int | Mapping[str, Any] = 4,
    random_weights: bool = False,
    shorter_side: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> FrequencyResponse:
    """Which spatial frequencies of an image each segment of a network responds to.

    Late segments cannot tell classes apart by what the first ones do not pass. The response alone
    does not say whether that matters: see ``bottleneck`` for where the classes are.

    For a segment with Jacobian J at an image, and cotangents v of random signs, the mean of
    |FFT(Jᵀ v)|² is the squared length of J e for the wave e of every frequency at once: one forward
    pass and one vector-Jacobian product per segment and cotangent (Hutchinson), where a Fourier
    heat map takes a forward pass per frequency (Yin et al.). It holds for small amplitudes at the
    given images, and says nothing about large ones.

    Args:
        model: the network.
        variables: its parameters and statistics, which are used as they are (running statistics).
        images: ``[images, height, width, bands]``, of the size that the network sees: uint8 with
            ``preprocessing``, or floating and normalized without.
        preprocessing: of the images.
        segments: which to measure; by default all before the pooling. "pool" and "head" have a
            response too.
        cotangents: number of random ones per image and segment; or by segment, arrays ``[number,
            height, width, channels]`` of its output, for the response of chosen units: one with a
            single 1 gives that of one unit, and all of them the exact response of the segment.
        random_weights: whether to measure the same network with random weights too.
        shorter_side: of the image files in pixels, to give frequencies in pixels of the files too.
        batch_size: images at once; by default 5 of 224 px, or as many pixels.
        seed: of cotangents and random weights.

    Returns:
        ``FrequencyResponse``. Gains are for the normalized images, averaged over directions in
        color. The coarsest octave has the mean of the image, frequency 0.

    Raises:
        ValueError: an unknown segment, images of another shape, not finite, or whose pixels no
            segment depends on; cotangents that do not fit.
        TypeError: images of another dtype than ``preprocessing`` asks for.

    >>> import flaxtransfer as ft
    >>> model = ft.resnet(ft.models.ResNetConfig(depths=(1, 1, 1, 1), width=4))
    >>> images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    >>> found = frequency_response(model, model.init(jax.random.key(0)), images, segments=["stem"])
    >>> found.stages[0].segment, found.spectrum.shape
    ('stem', (1, 3, 32, 32))

    References:
        M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines", 1989.
        D. Yin et al., "A Fourier Perspective on Model Robustness in Computer Vision", 2019 (the
        heat map with one forward pass per frequency).
        K. Krishnamachari et al., "Fourier Sensitivity and Regularization of Computer Vision
        Models", 2023 (the spectrum of the input gradient).
    """
    chosen = _chosen(model, segments)
    inputs = network_inputs(images, preprocessing)
    shape = inputs.shape[1:]
    if batch_size is None:
        batch_size = max(1, _PIXELS // math.prod(shape[:2]))
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if shorter_side is not None and (preprocessing is None or not shorter_side > 0):
        raise ValueError(
            f"shorter_side must be > 0 and come with a preprocessing, got {shorter_side}"
        )
    given = _checked_cotangents(model, variables, inputs[:1], chosen, cotangents)
    basis, names = _basis(shape[-1])
    power = windowed_power(np.asarray(inputs, np.float64) @ basis).mean(axis=0)
    measured = []
    if model.convolution is conv:
        model = replace(model, convolution=conv_by_patches)  # Most of the time is compilation.
    everyone = [variables]
    if random_weights:
        drawn = replace(model, zero_head=False, zero_init_residual=False)
        everyone.append(drawn.init(jax.random.key(seed)))
    for each in everyone:
        gains, by_image = _measured(model, each, inputs, chosen, given, batch_size, seed, basis)
        measured.append((gains, _stages(chosen, gains, by_image, power, names)))
    octave = octave_indices(*shape[:2])
    scale = None
    if shorter_side is not None and preprocessing is not None:
        scale = preprocessing.resize / shorter_side
    return FrequencyResponse(
        stages=measured[0][1],
        random=measured[1][1] if random_weights else (),
        spectrum=measured[0][0],
        channels=names,
        power=_shares(power.sum(axis=-1), octave),
        images=len(inputs),
        cotangents={name: _size(given[name]) for name in chosen},
        size=(shape[0], shape[1]),
        file_scale=scale,
        notes=tuple(_notes(octave, scale, random_weights)),
    )


def filter_transfer(kernel: Any, size: tuple[int, int]) -> np.ndarray:
    """Power transfer function of each filter of a linear first layer, exact and free.

    It is what ``frequency_response`` measures of a unit far from the border if nothing but this
    convolution depends on the frequency. A stride does not change it, but folds frequencies above
    half of its rate into lower ones of the output.

    Args:
        kernel: ``[kernel height, kernel width, bands, filters]``.
        size: height and width of the image in pixels, at least those of the kernel.

    Returns:
        Float64 ``[filters, channels, height, width]``, with the channels and the order of
        ``FrequencyResponse.spectrum``.

    Raises:
        ValueError: a kernel of another shape or that is not finite, or an image smaller than it.

    >>> delta = np.ones((1, 1, 1, 1))
    >>> filter_transfer(delta, (4, 4)).ravel().tolist() == [1.0] * 16
    True
    """
    array = np.asarray(kernel, np.float64)
    if array.ndim != 4 or 0 in array.shape or not np.isfinite(array).all():
        raise ValueError(
            "kernel must be finite and [kernel height, kernel width, bands, filters], got shape "
            f"{array.shape}"
        )
    if size[0] < array.shape[0] or size[1] < array.shape[1]:
        raise ValueError(
            f"size must be at least that of the kernel, {array.shape[0]} x {array.shape[1]}, got "
            f"{size[0]} x {size[1]}"
        )
    channels = np.einsum("hwbf,bc->fchw", array, _basis(array.shape[2])[0])
    return np.asarray(np.square(np.abs(scipy.fft.fft2(channels, s=size))))


def network_inputs(images: Any, preprocessing: Preprocessing | None) -> np.ndarray:
    """What enters the network: floating ``[images, height, width, bands]``.

    Args:
        images: uint8 with ``preprocessing``, or floating and normalized without.
        preprocessing: of the images.

    Raises:
        ValueError: images of another shape, or not finite.
        TypeError: images of another dtype.
    """
    checked_images(images)
    array = np.asarray(images)
    if preprocessing is not None:
        return np.asarray(normalize(array, preprocessing.mean, preprocessing.std))
    if array.dtype == np.uint8:
        raise TypeError(
            "images must be floating and normalized, got uint8; give the preprocessing of the "
            "network for them"
        )
    return array


def _chosen(model: Model, segments: Sequence[str] | None) -> tuple[str, ...]:
    known = model.segments
    if segments is None:
        return known[: known.index("pool")]
    if isinstance(segments, str):
        raise ValueError(f"segments must be names, such as ({segments!r},), got {segments!r}")
    if unknown := [f"{name!r}{suggest(name, known)}" for name in segments if name not in known]:
        raise ValueError(f"segments must be of {', '.join(known)}, got {', '.join(unknown)}")
    if not segments:
        raise ValueError(f"segments must be at least one of {', '.join(known)}, got none")
    return tuple(name for name in known if name in segments)


def _basis(bands: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """A complete basis, so that the mean over channels is the mean over bands."""
    if bands <= 3:
        return channel_axes(bands), channel_names(bands)
    return np.eye(bands), tuple(f"band {n}" for n in range(bands))


def _checked_cotangents(
    model: Model,
    variables: Variables,
    image: np.ndarray,
    chosen: tuple[str, ...],
    cotangents: int | Mapping[str, Any],
) -> dict[str, Any]:
    """By segment, the number of random cotangents or the array of given ones."""
    if isinstance(cotangents, int):
        if cotangents < 1 or isinstance(cotangents, bool):
            raise ValueError(f"cotangents must be >= 1, got {cotangents}")
        return dict.fromkeys(chosen, cotangents)
    if missing := [name for name in chosen if name not in cotangents]:
        raise ValueError(f"cotangents must have an array for {', '.join(missing)}")
    found = {}
    for name in chosen:
        following = _following(model, name)

        def run(x: jax.Array, stop: str | None = following) -> jax.Array:
            return model.apply(variables, x, stop=stop)[0]

        shape = jax.eval_shape(run, image).shape[1:]
        array = np.asarray(cotangents[name])
        if array.shape[1:] != shape or not len(array):
            raise ValueError(
                f"cotangents of {name} must be {['number', *shape]}, got {list(array.shape)}"
            )
        lengths = np.linalg.norm(array.reshape(len(array), -1), axis=1)
        if not (np.isfinite(lengths).all() and lengths.all()):
            raise ValueError(f"cotangents of {name} must be finite and none of them all zeros")
        found[name] = array / lengths.reshape(-1, *[1] * len(shape))
    return found


def _size(given: Any) -> int:
    return given if isinstance(given, int) else len(given)


def _following(model: Model, segment: str) -> str | None:
    after = model.segments.index(segment) + 1
    return model.segments[after] if after < len(model.segments) else None


def _measured(
    model: Model,
    variables: Variables,
    inputs: np.ndarray,
    chosen: tuple[str, ...],
    given: Mapping[str, Any],
    batch_size: int,
    seed: int,
    basis: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Gains ``[segments, channels, height, width]``, and ``[images, segments, octaves]``."""
    height, width, bands = inputs.shape[1:]
    octave = octave_indices(height, width, half=True)
    total = np.zeros((len(chosen), bands, height, width // 2 + 1))
    by_image = []
    for number, first in enumerate(range(0, len(inputs), batch_size)):
        part = inputs[first : first + batch_size]
        # The last batch is filled up, so that the network is compiled for one shape.
        missing = batch_size - len(part) if first else 0
        filled = np.concatenate([part, part[:1].repeat(missing, axis=0)]) if missing else part
        random = np.random.default_rng([seed, number])
        pulled = _pulled(model, variables, jnp.asarray(filled), chosen, given, random)
        for index, name in enumerate(chosen):
            power = np.zeros((len(part), bands, *octave.shape))
            for gradient in pulled.pop(name):
                channels = np.moveaxis(np.asarray(gradient)[: len(part)] @ basis, -1, 1)
                power += np.square(np.abs(scipy.fft.rfft2(channels)))
            power /= _size(given[name])
            total[index] += power.sum(axis=0, dtype=np.float64)
            by_image.append(_octave_means(power.mean(axis=1), octave, width))
    shaped = [np.concatenate(by_image[index :: len(chosen)]) for index in range(len(chosen))]
    return _whole(total / len(inputs), width), np.stack(shaped, axis=1)


def _pulled(
    model: Model,
    variables: Variables,
    images: jax.Array,
    chosen: tuple[str, ...],
    given: Mapping[str, Any],
    random: np.random.Generator,
) -> dict[str, list[jax.Array]]:
    """By segment, Jᵀ v at the images: ``[images, height, width, bands]`` per cotangent."""
    x, steps = images, []
    for name in model.segments[: model.segments.index(chosen[-1]) + 1]:
        x, back = _forward(model, name)(variables, x)
        steps.append((name, x.shape, x.dtype, back))
    # From the output to the input, each segment once: it takes the cotangents of those above it,
    # and of its own output.
    waiting: list[tuple[str, jax.Array]] = []
    for name, shape, dtype, back in reversed(steps):
        if name in chosen:
            waiting += [(name, jnp.asarray(v, dtype)) for v in _drawn(given[name], shape, random)]
        waiting = [(owner, _backward(back, cotangent)) for owner, cotangent in waiting]
    found: dict[str, list[jax.Array]] = {name: [] for name in chosen}
    for owner, gradient in waiting:
        found[owner].append(gradient)
    return found


def _drawn(given: Any, shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    """Cotangents of a batch, of length 1 for each image: random signs, or the given units."""
    if isinstance(given, int):
        size = np.float32(1 / math.sqrt(math.prod(shape[1:])))
        for _ in range(given):
            yield np.where(random.integers(0, 2, shape, np.int8), size, -size)
    else:
        for units in given:
            yield np.broadcast_to(units, shape)


@lru_cache(maxsize=64)
def _forward(model: Model, segment: str) -> Callable[..., tuple[jax.Array, Any]]:
    """Compiled: a segment's output, and the function from cotangents of it to those of its input.

    The derivative is that of the input alone: none flows into the parameters.
    """
    following = _following(model, segment)

    @jax.jit
    def run(variables: Variables, x: jax.Array) -> tuple[jax.Array, Any]:
        return jax.vjp(lambda x: model.apply(variables, x, start=segment, stop=following)[0], x)

    return run


@jax.jit
def _backward(back: Any, cotangent: jax.Array) -> jax.Array:
    # A program of its own, and not a loop in one: on CPU, XLA runs a loop's body on one core.
    gradient: jax.Array = back(cotangent)[0]
    return gradient


def _octave_means(power: np.ndarray, octave: np.ndarray, width: int) -> np.ndarray:
    """Mean by octave of ``[images, height, columns of rfft2]``; NaN without a frequency."""
    weight = np.full(octave.shape, 2.0)
    weight[:, 0] = 1
    if width % 2 == 0:
        weight[:, -1] = 1
    means = []
    for index in range(len(OCTAVE_NAMES)):
        inside = np.where(octave == index, weight, 0)
        total = inside.sum()
        means.append(
            (power * inside).sum(axis=(1, 2)) / total if total else np.full(len(power), np.nan)
        )
    return np.stack(means, axis=1)


def _whole(half: np.ndarray, width: int) -> np.ndarray:
    """The columns of ``fft2`` from those of ``rfft2``: a real image has the same power at -f."""
    rows = -np.arange(half.shape[-2])
    mirrored = half[..., rows, :][..., width - np.arange(half.shape[-1], width)]
    return np.concatenate([half, mirrored], axis=-1)


def _stages(
    chosen: tuple[str, ...],
    gains: np.ndarray,
    by_image: np.ndarray,
    power: np.ndarray,
    names: tuple[str, ...],
) -> tuple[StageResponse, ...]:
    octave = octave_indices(*gains.shape[-2:])
    stages = []
    for index, segment in enumerate(chosen):
        own = by_image[:, index]
        mean = own.mean(axis=0)
        overall = float(gains[index].mean())
        if not (math.isfinite(overall) and overall > 0):
            raise ValueError(
                f"{segment} must depend on the pixels of these images with finite derivatives, got "
                f"a mean squared derivative of {overall:.3g}; are weights and images sound?"
            )
        errors: list[float | None] = [None] * len(mean)
        if len(own) > 1:
            spread = own.std(axis=0, ddof=1) / math.sqrt(len(own))
            errors = [_error(e, m) for e, m in zip(spread, mean, strict=True)]
        by_channel = gains[index].mean(axis=(1, 2))
        sent = (gains[index] * np.moveaxis(power, -1, 0)).sum(axis=0)
        stages.append(
            StageResponse(
                segment=segment,
                gains=tuple(None if np.isnan(value) else float(value) for value in mean),
                errors=tuple(errors),
                band=_band(gains[index].mean(axis=0)),
                arrives=_shares(sent, octave),
                shares=tuple(zip(names, (by_channel / by_channel.sum()).tolist(), strict=True)),
            )
        )
    return tuple(stages)


def _band(gain: np.ndarray) -> tuple[float, float]:
    """The frequencies around the strongest third of an octave with at least half of its gain."""
    height, width = gain.shape
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    finest = radius[radius > 0].min()
    # Thirds of octaves up to 1/2, and one bin for the corners beyond.
    edges = 2.0 ** np.arange(-1, math.log2(finest) - 1 / 3, -1 / 3)[::-1]
    bins = np.digitize(radius, edges)
    counts = np.bincount(bins.ravel(), minlength=len(edges) + 1)
    sums = np.bincount(bins.ravel(), gain.ravel(), minlength=len(edges) + 1)
    present = np.flatnonzero(counts)
    means = sums[present] / counts[present]
    passes = means >= _LEVEL * means.max()
    first = last = int(means.argmax())
    while first and passes[first - 1]:
        first -= 1
    while last + 1 < len(means) and passes[last + 1]:
        last += 1
    corners = (0.0, *edges.tolist(), float(radius.max()))
    return corners[present[first]], corners[present[last] + 1]


def _shares(power: np.ndarray, octave: np.ndarray) -> tuple[float, ...]:
    """Fractions by octave; zeros where there is no power at all."""
    sums = np.bincount(octave.ravel(), power.ravel(), minlength=len(OCTAVE_NAMES))
    return tuple((sums / (sums.sum() or 1)).tolist())


def _error(error: float, mean: float) -> float | None:
    """A standard error in dB."""
    return None if not mean > 0 else float(10 / math.log(10) * error / mean)


def _decibel(gain: float | None, strongest: float) -> float | None:
    return None if gain is None else max(_LOWEST, 10 * math.log10(max(gain / strongest, 1e-99)))


def _notes(octave: np.ndarray, scale: float | None, random_weights: bool) -> list[str]:
    missing = [name for n, name in enumerate(OCTAVE_NAMES) if not (octave == n).any()]
    notes = []
    if missing:
        notes.append(f"Images of this size have no frequency at {listing(missing)}.")
    if (octave == 0).sum() == 1:
        notes.append("The coarsest octave is the mean of the image alone.")
    if scale is not None and scale < 1:
        notes.append(
            f"Resizing removes what is finer than {scale / 2:.3g} cycles per pixel of the files."
        )
    if random_weights:
        notes.append("Random weights come with neutral statistics, mean 0 and variance 1.")
    return notes
