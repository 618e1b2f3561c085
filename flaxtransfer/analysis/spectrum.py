"""Power spectra of images: features by octave and orientation, and the spectral bottleneck.

The spectrum needs no network. A head on it is a reference: where it beats the probes on a network,
the network has lost what the classes are made of.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import scipy.fft
from scipy.sparse import csr_array

from flaxtransfer.metrics import ACCURACY, Draws, Skill, compared
from flaxtransfer.overview import terminal
from flaxtransfer.paths import listing

__all__ = [
    "OCTAVES",
    "OCTAVE_NAMES",
    "Bottleneck",
    "BottleneckRow",
    "SpectralFeatures",
    "bottleneck",
    "channel_axes",
    "channel_names",
    "checked_images",
    "octave_features",
    "octave_indices",
    "spectral_features",
    "table_text",
    "windowed_power",
]

OCTAVES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
"""Edges between octaves in cycles per pixel; an edge belongs to the octave above it."""

OCTAVE_NAMES = ("< 1/32", "1/32-1/16", "1/16-1/8", "1/8-1/4", "> 1/4")
"""The five octaves from coarse to fine; the last one ends at the corner, 0.71 cycles per pixel."""

_ORIENTATIONS = 8

_FLOOR = 1 / (12 * 255**2)
"""Power of rounding to 8 bits. What is below it is not in the picture, and its logarithm would
be noise."""

_PIXELS = 1 << 22
"""Pixels per batch of transforms: 64 MiB in double precision with their spectra."""

_POINTS, _ERRORS = 0.10, 2.0
"""A bottleneck is more than this difference in skill, and this many standard errors."""

_WIDTH = 80
"""Characters per line of ``str(value)``, where there is no terminal."""


@dataclass(frozen=True, eq=False)
class SpectralFeatures:
    """Result of ``spectral_features``; it prints as a table.

    Args:
        values: float64 ``[images, features]``; power in dB (1 is white noise of variance 1), then
            channel means.
        names: of each feature, as "luma > 1/4 22.5°" or "mean of band 0".
        octaves: index of the octave of each feature; -1 for channel means.
        channels: what the powers are of, as "luma".
        size: height and width of the images in pixels.
        mirrored: the values of the images as a mirror shows them, left for right.
        notes: what was left out, in sentences.
    """

    values: np.ndarray
    names: tuple[str, ...]
    octaves: tuple[int, ...]
    channels: tuple[str, ...]
    size: tuple[int, int]
    mirrored: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Names, octaves, and mean and deviation of each feature, as a JSON-able dictionary."""
        return {
            "images": len(self.values),
            "size": list(self.size),
            "channels": list(self.channels),
            "names": list(self.names),
            "octaves": [OCTAVE_NAMES[i] if i >= 0 else None for i in self.octaves],
            "mean": self.values.mean(axis=0).tolist(),
            "deviation": self.values.std(axis=0).tolist(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table("mean power, dB", *OCTAVE_NAMES)
        for column in table.columns[1:]:
            column.justify = "right"
        octaves, mean = np.array(self.octaves), self.values.mean(axis=0)
        for name in self.channels:
            own = np.array([each.startswith(f"{name} ") for each in self.names])
            chosen = [mean[own & (octaves == i)] for i in range(len(OCTAVE_NAMES))]
            table.add_row(name, *(f"{part.mean():.1f}" if part.size else "–" for part in chosen))
        last = f"{len(self.names)} features of {len(self.values)} images of {self.size[1]} x "
        last += f"{self.size[0]} px, octaves in cycles per pixel"
        return Group(table, last, *self.notes)


def spectral_features(images: Any, *, axes: Any = None) -> SpectralFeatures:
    """Log power of each image by octave, orientation and channel, and its channel means.

    About a hundred numbers that no network is needed for. A ridge head on them says how much of
    the classes is in the power spectrum alone: textures, gratings and colors are, shapes are not.

    An octave has eight orientations of 22.5°, centered on horizontal, vertical and the diagonals.
    Cells without a frequency, of small images, are left out. The mean of the image is in no cell.
    A Hann window keeps the jump from the right border to the left one, which a plain transform
    sees as high frequencies, out of them. Each image is by itself: nothing is fitted, so that
    features of training and test images are alike.

    Channels are the first three of the discrete cosine transform over the bands: the mean alone for
    gray, luma and two opponent channels for RGB, and mean, slope and bend for more bands in the
    order of their wavelengths, where it comes close to the principal axes (Ahmed et al.).

    Args:
        images: ``[images, height, width, bands]``, uint8, or floating with white at 1.
        axes: ``[bands, channels]``: channels of your own, such as principal axes.

    Returns:
        ``SpectralFeatures``.

    Raises:
        ValueError: images of another shape, smaller than 4 pixels, none, or not finite; axes of
            another shape.
        TypeError: images of another dtype.

    >>> x = np.arange(32)
    >>> fine = 128 + 100 * np.cos(2 * np.pi * x / 2.5)
    >>> image = np.broadcast_to(fine[None, :, None], (1, 32, 32, 3)).astype(np.uint8)
    >>> found = spectral_features(image)
    >>> found.names[found.values[0].argmax()]
    'luma > 1/4 0°'

    References:
        F. J. Harris, "On the use of windows for harmonic analysis with the discrete Fourier
        transform", 1978.
        N. Ahmed, T. Natarajan, K. R. Rao, "Discrete Cosine Transform", 1974.
        A. Torralba, A. Oliva, "Statistics of natural image categories", 2003 (spectra of
        categories).
    """
    array = checked_images(images, least=4)
    bands = array.shape[-1]
    if axes is None:
        basis, channels = channel_axes(bands), channel_names(bands)
    else:
        basis = np.asarray(axes, np.float64)
        if basis.ndim != 2 or basis.shape[0] != bands or not basis.shape[1]:
            raise ValueError(f"axes must be [{bands} bands, channels], got {basis.shape}")
        if not np.isfinite(basis).all():
            raise ValueError("axes must be finite")
        channels = tuple(f"axis {n}" for n in range(basis.shape[1]))
    height, width = array.shape[1:3]
    cells, weights = _cells(height, width)
    # A mirror turns the sign of one frequency, which for a real image is that of the other one.
    turned = np.roll(weights.reshape(-1, height, width // 2 + 1)[:, ::-1], 1, axis=1)
    both = csr_array(np.concatenate([weights, turned.reshape(weights.shape)]))
    powers, means = [], []
    for part in _batches(array):
        means.append(part.mean(axis=(1, 2)))
        planes = np.ascontiguousarray(np.moveaxis(part @ basis, -1, 1))
        power = _power_of_planes(planes, half=True)
        cell_powers = both @ power.reshape(len(part) * len(channels), -1).T
        powers.append(cell_powers.T.reshape(len(part), len(channels), -1))
    found, mirrored = (
        np.concatenate([part.reshape(len(array), -1), np.concatenate(means)], axis=1)
        for part in np.split(10 * np.log10(np.concatenate(powers) + _FLOOR), 2, axis=-1)
    )
    names = [
        f"{channel} {OCTAVE_NAMES[octave]} {_degrees(orientation)}"
        for channel in channels
        for octave, orientation in cells
    ]
    octaves = [octave for _ in channels for octave, _ in cells]
    return SpectralFeatures(
        found,
        (*names, *(f"mean of band {n}" for n in range(bands))),
        (*octaves, *[-1] * bands),
        channels,
        (height, width),
        mirrored,
        tuple(_notes(cells, bands, channels)),
    )


def octave_features(features: SpectralFeatures) -> dict[str, np.ndarray]:
    """The features of each octave by itself, for a head that says which octave has the classes.

    Args:
        features: from ``spectral_features``.

    Returns:
        Float64 ``[images, features]`` by the name of the octave, from coarse to fine. Channel means
        are in none, and an octave without a frequency is left out.

    >>> images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 1), np.uint8)
    >>> [(name, part.shape[1]) for name, part in octave_features(spectral_features(images)).items()]
    [('1/32-1/16', 4), ('1/16-1/8', 8), ('1/8-1/4', 8), ('> 1/4', 8)]
    """
    octaves = np.array(features.octaves)
    return {
        name: features.values[:, octaves == index]
        for index, name in enumerate(OCTAVE_NAMES)
        if (octaves == index).any()
    }


def octave_indices(height: int, width: int, *, half: bool = False) -> np.ndarray:
    """The octave of every frequency of an image.

    Args:
        height: of the image in pixels.
        width: likewise.
        half: whether only the columns of ``rfft2``.

    Returns:
        Integers ``[height, width]`` in the order of ``fft2``; 0 is coarsest and has the mean.

    >>> octave_indices(8, 8)[0].tolist()
    [0, 3, 4, 4, 4, 4, 4, 3]
    """
    return np.asarray(np.digitize(_radius(height, width, half), OCTAVES))


def channel_axes(bands: int) -> np.ndarray:
    """Orthonormal channels ``[bands, at most 3]``: the first ones of the DCT over the bands.

    >>> channel_axes(3).round(2).T.tolist()
    [[0.58, 0.58, 0.58], [0.71, 0.0, -0.71], [0.41, -0.82, 0.41]]
    """
    places = (2 * np.arange(bands) + 1) / (2 * bands)
    axes = np.cos(math.pi * np.outer(places, np.arange(min(bands, 3))))
    return np.asarray(axes / np.linalg.norm(axes, axis=0))


def channel_names(bands: int) -> tuple[str, ...]:
    """Names of ``channel_axes``."""
    if bands == 3:
        return ("luma", "red-blue", "green-magenta")
    return (("gray",) if bands == 1 else ("mean", "slope", "bend"))[:bands]


def windowed_power(images: np.ndarray, *, half: bool = False) -> np.ndarray:
    """Power spectra under a Hann window; white noise of variance v has power v.

    Args:
        images: ``[images, height, width, channels]``, floating.
        half: whether only the columns of ``rfft2``.

    Returns:
        ``[images, height, width, channels]``; 0 at frequency 0, for the mean is subtracted first.

    >>> ramp = np.linspace(0, 1, 32)[None, None, :, None] * np.ones((1, 32, 1, 1))
    >>> bool(windowed_power(ramp)[0, 0, 8] < 1e-3 * np.abs(np.fft.fft(ramp[0, 0, :, 0])[8]) ** 2)
    True
    """
    return np.moveaxis(_power_of_planes(np.moveaxis(images, -1, 1), half=half), 1, -1)


def _power_of_planes(planes: np.ndarray, *, half: bool) -> np.ndarray:
    """The same of ``[images, channels, height, width]``, which lies in memory as it is read."""
    window = np.outer(*map(_hann, planes.shape[2:]))
    mean = np.einsum("hw,nchw->nc", window, planes) / window.sum()
    transform = scipy.fft.rfft2 if half else scipy.fft.fft2
    found = transform(window * (planes - mean[..., None, None]), axes=(2, 3))
    power = np.square(found.real) + np.square(found.imag)
    return np.asarray(power / np.square(window).sum())


def _hann(length: int) -> np.ndarray:
    # Between the pixels of the ordinary window: no pixel has weight 0.
    return np.asarray(np.sin(math.pi * (np.arange(length) + 0.5) / length) ** 2)


class StageGains(Protocol):
    """What a stage responds with, by octave."""

    @property
    def segment(self) -> str:
        """Its name."""
        ...

    @property
    def decibels(self) -> Sequence[float]:
        """By octave, from coarse to fine."""
        ...


class Response(Protocol):
    """What ``frequency_response`` returns, as far as it is needed here."""

    @property
    def stages(self) -> Sequence[StageGains]:
        """One per segment."""
        ...


@dataclass(frozen=True)
class BottleneckRow:
    """One segment against the reference, on the same examples.

    Args:
        segment: its name.
        skill: of its probe; for classes, accuracy.
        difference: skill of the reference minus that of the probe.
        standard_error: of the difference, paired.
    """

    segment: str
    skill: float
    difference: float
    standard_error: float

    @property
    def lost(self) -> bool:
        """Whether the difference exceeds 10 points and 2 standard errors."""
        return self.difference > _POINTS and self.difference > _ERRORS * self.standard_error


@dataclass(frozen=True)
class Bottleneck:
    """Result of ``bottleneck``; it prints as a table.

    Args:
        examples: number of examples.
        reference: skill of the reference; for classes, accuracy.
        rows: one per segment, from the input to the output.
        octaves: skill of the reference by octave alone; empty if it was not given.
        response: response in dB of the segment of the bottleneck in the octave that carries the
            classes; None without a bottleneck, octaves or a response.
        measure: what the skill is of.
    """

    examples: int
    reference: float
    rows: tuple[BottleneckRow, ...]
    octaves: tuple[tuple[str, float], ...] = ()
    response: float | None = None
    measure: Skill = ACCURACY

    @property
    def segment(self) -> str | None:
        """The first segment from which on the reference is clearly better; None if there is none.

        A stem that knows less than the spectrum is no bottleneck where later layers make it up.
        """
        lost = [row.lost for row in self.rows]
        kept = max((place for place, one in enumerate(lost) if not one), default=-1)
        return self.rows[kept + 1].segment if kept + 1 < len(lost) else None

    @property
    def whole(self) -> bool:
        """Whether the reference is clearly better than every segment."""
        return all(row.lost for row in self.rows)

    @property
    def octave(self) -> str | None:
        """The octave that has most of the classes by itself; None if it was not given."""
        return max(self.octaves, key=lambda pair: pair[1])[0] if self.octaves else None

    def summary(self) -> str:
        """What follows, in sentences."""
        if self.segment is None:
            return (
                "No spectral bottleneck: behind no segment does the reference stay more than "
                f"{_POINTS:.0%} and {_ERRORS:.0f} standard errors above the probes. A weak "
                "reference says nothing more: shape is not in a power spectrum."
            )
        row = next(row for row in self.rows if row.segment == self.segment)
        text_of = self.measure.text
        text = (
            f"Spectral bottleneck at {row.segment}: its probe has {text_of(row.skill)}, the power "
            f"spectrum of the pixels {text_of(self.reference)}. What {row.segment} does not pass, "
            "no later layer can bring back."
        )
        if self.octave is not None:
            best = max(skill for _, skill in self.octaves)
            what = "classes" if self.measure.metric.name == "accuracy" else "labels"
            text += f" The {what} are at {self.octave} cycles per pixel ({text_of(best)} by itself)"
            where = f", where {row.segment} responds with {self.response or 0:.1f} dB"
            text += f"{where if self.response is not None else ''}."
        return text

    def to_json(self) -> dict[str, Any]:
        """The value as a JSON-able dictionary."""
        return {
            "examples": self.examples,
            "reference": self.reference,
            "segment": self.segment,
            "octave": self.octave,
            "response_db": self.response,
            "octaves": dict(self.octaves),
            "metric": self.measure.metric.name,
            "rows": [
                {
                    "segment": row.segment,
                    "skill": row.skill,
                    "difference": row.difference,
                    "standard_error": row.standard_error,
                    "lost": row.lost,
                }
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        return table_text(self)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        text_of = self.measure.text
        table = Table("head on", self.measure.name, "reference - probe, points", "")
        for column in table.columns[1:3]:
            column.justify = "right"
        table.add_row("pixels' spectrum", text_of(self.reference), "", "reference")
        for name, skill in self.octaves:
            table.add_row(f"  {name}", text_of(skill), "", "one octave")
        for row in self.rows:
            table.add_row(
                row.segment,
                text_of(row.skill),
                f"{100 * row.difference:+.1f} ± {100 * row.standard_error:.1f}",
                "bottleneck" if row.segment == self.segment else "",
            )
        return Group(table, self.summary())


def bottleneck(
    reference_correct: Any,
    probe_correct: Mapping[str, Any],
    *,
    octave_correct: Mapping[str, Any] | None = None,
    response: Response | None = None,
    measure: Skill | None = None,
) -> Bottleneck:
    """The first segment of a network at which the classes are worse known than in the pixels.

    All heads are judged on the same held-out examples. The difference at a segment counts if it
    exceeds 10 points and 2 standard errors, of which the examples that only one of the two heads
    gets right are the evidence (McNemar). It is one-sided: a good reference and a bad probe say
    that the network does not pass what the classes are made of; a bad reference says nothing.

    Args:
        reference_correct: booleans ``[examples]``: whether a head on ``spectral_features`` is
            right; or draws of its skill, see ``metrics.Draws``.
        probe_correct: likewise of a head on each segment, from the input to the output.
        octave_correct: likewise of a head on each of ``octave_features``.
        response: of the same network, for the response in the octave with the classes.
        measure: what the skill is of; by default accuracy.

    Raises:
        ValueError: no segment, no example, arrays of other lengths.
        TypeError: arrays that are not boolean.

    >>> right, wrong = np.ones(50, bool), np.zeros(50, bool)
    >>> bottleneck(right, {"first": right, "second": wrong}).segment
    'second'

    References:
        Q. McNemar, "Note on the sampling error of the difference between correlated proportions or
        percentages", 1947.
    """
    if not probe_correct:
        raise ValueError("probe_correct must have at least one segment, got none")
    reference = _checked_correct("reference_correct", reference_correct, None)
    count = reference.examples if isinstance(reference, Draws) else len(reference)
    rows = []
    for name, values in probe_correct.items():
        probe = _checked_correct(f"probe_correct[{name!r}]", values, count)
        rows.append(BottleneckRow(name, _skill(probe), *compared(reference, probe)))
    octaves = tuple(
        (name, _skill(_checked_correct(f"octave_correct[{name!r}]", values, count)))
        for name, values in (octave_correct or {}).items()
    )
    found = Bottleneck(count, _skill(reference), tuple(rows), octaves)
    found = found if measure is None else replace(found, measure=measure)
    if response is None or found.segment is None or found.octave not in OCTAVE_NAMES:
        return found
    index = OCTAVE_NAMES.index(found.octave)
    decibel = {stage.segment: stage.decibels[index] for stage in response.stages}
    return replace(found, response=decibel.get(found.segment))


def checked_images(images: Any, *, least: int = 2) -> np.ndarray:
    """Images as float64 ``[images, height, width, bands]``; uint8 is scaled to 0..1.

    Raises:
        ValueError: another shape, sides below ``least``, no image, or numbers that are not finite.
        TypeError: another dtype.
    """
    array = np.asarray(images)
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"images must be uint8 or floating, got {array.dtype}")
    if array.ndim != 4 or not len(array) or not array.shape[-1]:
        raise ValueError(
            "images must be [images, height, width, bands], at least one, got an array of shape "
            f"{array.shape}; images[..., None] gives gray ones their band"
        )
    if min(array.shape[1:3]) < least:
        raise ValueError(
            f"images must have sides of at least {least} pixels, got {array.shape[1]} x "
            f"{array.shape[2]}"
        )
    if array.dtype == np.uint8:
        return array / 255
    if not np.isfinite(array).all():
        raise ValueError(
            f"images must be finite, got {int((~np.isfinite(array)).sum())} numbers that are not"
        )
    return array.astype(np.float64)


def table_text(value: Any) -> str:
    """A printed value at 80 columns, where there is no terminal."""
    text = io.StringIO()
    terminal(file=text, width=_WIDTH, color_system=None).print(value)
    return text.getvalue().rstrip()


def _skill(judged: np.ndarray | Draws) -> float:
    return judged.value if isinstance(judged, Draws) else float(judged.mean())


def _checked_correct(name: str, values: Any, count: int | None) -> np.ndarray | Draws:
    if isinstance(values, Draws):
        if count is not None and values.examples != count:
            raise ValueError(f"{name} must be of {count} examples, got {values.examples}")
        return values
    array = np.asarray(values)
    if array.dtype != bool:
        raise TypeError(f"{name} must be booleans, whether a head is right, got {array.dtype}")
    if array.ndim != 1 or not len(array) or (count is not None and len(array) != count):
        wanted = "at least one" if count is None else f"{count}, those of the reference"
        raise ValueError(f"{name} must be [examples], {wanted}, got shape {array.shape}")
    return array


def _frequencies(height: int, width: int, half: bool) -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequency in cycles per pixel, to be broadcast."""
    across = np.fft.rfftfreq(width) if half else np.fft.fftfreq(width)
    return np.fft.fftfreq(height)[:, None], across[None, :]


def _radius(height: int, width: int, half: bool = False) -> np.ndarray:
    return np.asarray(np.hypot(*_frequencies(height, width, half)))


def _cells(height: int, width: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Octave and orientation of each cell, and its weights ``[cells, frequencies of rfft2]``."""
    vertical, horizontal = _frequencies(height, width, True)
    turn = np.arctan2(vertical, horizontal) / math.pi * _ORIENTATIONS
    cell = octave_indices(height, width, half=True) * _ORIENTATIONS
    cell = cell + np.rint(turn).astype(int) % _ORIENTATIONS
    # A column of rfft2 stands for two of fft2, but for the first one and that of Nyquist.
    twice = np.full(cell.shape, 2.0)
    twice[:, 0] = 1
    if width % 2 == 0:
        twice[:, -1] = 1
    twice[0, 0] = 0
    present = np.unique(cell[twice > 0])
    weights = np.stack([np.where(cell == index, twice, 0).ravel() for index in present])
    weights /= weights.sum(axis=1, keepdims=True)
    return [divmod(int(index), _ORIENTATIONS) for index in present], weights


def _degrees(orientation: int) -> str:
    """Of the wave, not of its stripes: 0 varies from left to right."""
    return f"{180 / _ORIENTATIONS * orientation:g}°"


def _batches(array: np.ndarray) -> Iterator[np.ndarray]:
    count = max(1, _PIXELS // math.prod(array.shape[1:]))
    for first in range(0, len(array), count):
        yield array[first : first + count]


def _notes(cells: list[tuple[int, int]], bands: int, channels: tuple[str, ...]) -> Iterator[str]:
    empty = [
        name for n, name in enumerate(OCTAVE_NAMES) if n not in {octave for octave, _ in cells}
    ]
    if empty:
        yield f"Images of this size have no frequency at {listing(empty)} but their mean."
    if bands > len(channels):
        yield f"Of {bands} bands, {listing(channels)} across their order; others are left out."
