"""Input adapters: how a network for RGB images takes images with n bands.

``change_input`` either puts an adapter in front of the stem or changes the stem's kernel, and
returns the new configuration with the affected leaves.

An adapter is a 1×1 convolution without bias, optionally with tone curves, and takes normalized
images. Its parameters are at the path ``adapter`` of a model's parameters. The initial kernel
``[1, 1, bands, 3]`` comes from ``luminance``, ``by_wavelength`` or ``least_squares`` in
``models.band_init``, times the gain of each channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxtransfer.models.band_init import (
    RGB_CENTERS_NM,
    RGB_CORRELATION,
    RGB_DEVIATIONS,
    average_kernels,
    by_wavelength,
    channel_gains,
    checked_stem,
    common_scale,
    least_squares,
    luminance,
    repeat_kernels,
    sum_kernels,
)
from flaxtransfer.models.config import METHODS, Adapter, Method, ResNetConfig
from flaxtransfer.paths import Params, suggest

__all__ = ["Adapter", "InputChange", "apply", "change_input", "fold", "init", "shapes"]


def shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by name.

    >>> shapes(Adapter(bands=2, kind="curves"))
    {'kernel': (1, 1, 2, 3), 'curves': (2, 9, 3)}
    """
    found: dict[str, tuple[int, ...]] = {"kernel": (1, 1, adapter.bands, 3)}
    if adapter.kind == "curves":
        found["curves"] = (adapter.bands, adapter.knots, 3)
    return found


def init(adapter: Adapter, kernel: Any = None, *, dtype: Any = jnp.float32) -> Params:
    """Initializes the parameters of an adapter.

    Args:
        adapter: the configuration.
        kernel: initial kernel ``[1, 1, bands, 3]``; ``luminance(adapter.bands)`` by default.
        dtype: of the parameters.

    Returns:
        ``{"kernel": [1, 1, bands, 3]}``, and for "curves" zeros ``{"curves": [bands, knots, 3]}``.

    Raises:
        ValueError: a kernel for another number of bands, or one that is not finite.

    >>> {name: leaf.shape for name, leaf in init(Adapter(bands=2, kind="curves")).items()}
    {'kernel': (1, 1, 2, 3), 'curves': (2, 9, 3)}
    """
    start = luminance(adapter.bands) if kernel is None else np.asarray(kernel)
    _check_kernel(start.shape, adapter)
    if not np.isfinite(start).all():
        raise ValueError("kernel must be finite, got NaN or infinite values")
    params = {"kernel": jnp.asarray(start, dtype)}
    if adapter.kind == "curves":
        params["curves"] = jnp.zeros(shapes(adapter)["curves"], dtype)
    return params


def apply(adapter: Adapter, params: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """Applies an adapter: the input of the stem.

    Args:
        adapter: the configuration; static under ``jit``.
        params: as returned by ``init``.
        images: normalized, floating, ``[batch, height, width, bands]``.

    Returns:
        ``[batch, height, width, 3]``, of the images' dtype.

    Raises:
        ValueError: images with another number of bands, or parameters of another adapter.
        TypeError: integer images, which are not normalized.

    >>> gray = jnp.array([-1.0, 2.0]).reshape(1, 1, 2, 1)
    >>> adapter = Adapter(bands=1)
    >>> apply(adapter, init(adapter), gray)[0, 0].tolist()
    [[-1.0, -1.0, -1.0], [2.0, 2.0, 2.0]]
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be normalized and floating, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != adapter.bands:
        raise ValueError(
            f"images must have shape [batch, height, width, {adapter.bands}], got "
            f"{tuple(images.shape)}{_fitting(images.shape)}"
        )
    _check_params(params, adapter)
    kernel = params["kernel"].astype(images.dtype)[0, 0]
    # The cost is negligible, and at a lower precision replicated gray would not stay gray.
    linear = jnp.einsum("bhwn,nr->bhwr", images, kernel, precision=lax.Precision.HIGHEST)
    if adapter.kind == "linear":
        return linear
    return linear + _bend(adapter, params["curves"], images).astype(images.dtype)


def fold(kernel: Any, stem_kernel: jax.Array) -> jax.Array:
    """Folds a linear adapter into the stem: one convolution of the bands.

    The adapter has no bias and its window is one pixel, so it maps the zeros of the padding to
    zeros: the folded stem is the same function, including at the borders.

    Args:
        kernel: ``[1, 1, bands, 3]``, or the parameters of a linear adapter.
        stem_kernel: ``[kernel height, kernel width, 3, filters]``.

    Returns:
        ``[kernel height, kernel width, bands, filters]``, of the stem's dtype.

    Raises:
        ValueError: an adapter with tone curves, which is not linear, or kernels of another shape.

    >>> fold(jnp.ones((1, 1, 2, 3)), jnp.ones((7, 7, 3, 64))).shape
    (7, 7, 2, 64)
    """
    if isinstance(kernel, Mapping):
        if "curves" in kernel:
            raise ValueError(
                "an adapter of kind 'curves' is not linear and cannot be folded into a kernel; "
                "keep "
                "it in front of the stem, or train one of kind 'linear'"
            )
        if set(kernel) != {"kernel"}:
            raise ValueError(
                "a linear adapter must have the parameters kernel, got "
                + (", ".join(sorted(map(str, kernel))) or "none")
            )
        kernel = kernel["kernel"]
    stem = checked_stem(stem_kernel)
    kernel = jnp.asarray(kernel, stem.dtype)
    if kernel.ndim != 4 or kernel.shape[:2] != (1, 1) or kernel.shape[3] != 3:
        raise ValueError(
            f"the adapter's kernel must have shape [1, 1, bands, 3], got {tuple(kernel.shape)}"
        )
    return jnp.einsum("nr,hwrc->hwnc", kernel[0, 0], stem, precision=lax.Precision.HIGHEST)


def _bend(adapter: Adapter, curves: jax.Array, images: jax.Array) -> jax.Array:
    """The output of the tone curves, in float32 or wider."""
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    low, high = adapter.span

    def position(pixels: jax.Array) -> jax.Array:
        # Half precision is too coarse for the positions between knots.
        inside = jnp.clip(pixels.astype(dtype), low, high)
        return (inside - low) * ((adapter.knots - 1) / (high - low))

    def hat(knot: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.maximum(0, 1 - jnp.abs(where - knot))

    # All hats at once need one copy of the images per knot, which the gradient keeps: 770 MB for 16
    # images of 224 px with 13 bands, against 112 MB one after the other, in the same time.
    @jax.checkpoint
    def add(total: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        knot, coefficients = row
        height = hat(knot, position(images)) - hat(knot, position(jnp.zeros((), images.dtype)))
        term = jnp.einsum("bhwn,nr->bhwr", height, coefficients, precision=lax.Precision.HIGHEST)
        return total + term, None

    start = jnp.zeros((*images.shape[:-1], 3), dtype)
    rows = (jnp.arange(adapter.knots, dtype=dtype), jnp.swapaxes(curves, 0, 1).astype(dtype))
    return lax.scan(add, start, rows)[0]


def _check_params(params: Mapping[str, Any], adapter: Adapter) -> None:
    expected = set(shapes(adapter))
    if set(params) != expected:
        raise ValueError(
            f"a {adapter.kind!r} adapter must have the parameters {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(map(str, params))) or 'none'}"
        )
    _check_kernel(params["kernel"].shape, adapter)
    if "curves" in expected:
        curves = shapes(adapter)["curves"]
        if tuple(params["curves"].shape) != curves:
            raise ValueError(
                f"the curves of {adapter} must have shape {curves}, got "
                f"{tuple(params['curves'].shape)}"
            )


def _check_kernel(shape: tuple[int, ...], adapter: Adapter) -> None:
    if tuple(shape) != (1, 1, adapter.bands, 3):
        raise ValueError(
            f"the adapter's kernel must have shape (1, 1, {adapter.bands}, 3), got {tuple(shape)}: "
            "give one center wavelength, or one column of patches, per band of the image"
        )


def _fitting(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "; images[None] makes a batch of one image"
    if len(shape) == 4 and shape[-1] >= 1:
        return f"; Adapter(bands={shape[-1]}) would fit"
    return ""


@dataclass(frozen=True)
class InputChange:
    """How the input of a network changes; the result of ``change_input``.

    Args:
        config: of the network for the new images.
        adapted: leaves of the stem that were computed from the checkpoint's, by path.
        new: leaves of the adapter, by path.
        text: a description for a person; "" if nothing changes.
    """

    config: ResNetConfig
    adapted: Mapping[str, jax.Array]
    new: Mapping[str, jax.Array]
    text: str = ""


def change_input(
    config: ResNetConfig,
    stem_kernel: Any,
    *,
    bands: int | None = None,
    method: Method | Adapter | None = None,
    wavelengths: Sequence[float] | None = None,
    patches: Any = None,
    stem_wavelengths: Sequence[float] = (),
    stem_std: Sequence[float] = (),
) -> InputChange:
    """Changes the input of a network to images with another number of bands.

    "linear" and "curves" put an adapter in front of the stem, which is not changed. "sum",
    "average" and "repeat" change the stem's kernel instead. "replicate" changes no parameter: a
    gray image is copied to three channels. By default, "linear" is used, and nothing is changed if
    the images have as many bands as the network takes.

    An adapter is initialized from the bands' statistics if ``patches`` are given, else from their
    ``wavelengths``, else every channel starts as the mean of all bands.

    Bands come in the scale of ``data.band_preprocessing``: centered, with the contrast of the
    images over the common scale of ``stem_std``. What reaches each channel of the stem then has the
    contrast that replication of a gray image with that preprocessing has, whatever the
    preprocessing; by least squares, it has that of photographs.

    Args:
        config: of the network before the change.
        stem_kernel: ``[height, width, in, filters]``.
        bands: of the images; None changes nothing.
        method: one of the above, or an ``Adapter`` with your own knots and span.
        wavelengths: center of each band in nm.
        patches: ``[patches, bands]`` of normalized training images; see
            ``band_init.least_squares``.
        stem_wavelengths: center of each of the stem's channels in nm, if they are not the red,
            green and blue of photographs.
        stem_std: by which the checkpoint's preprocessing divides each of the stem's channels; ()
            for ImageNet's correlation and equal channels.

    Raises:
        ValueError: numbers of bands that contradict each other, or a method that does not fit the
            images or the network; with the nearest possible one.

    >>> kernel = np.ones((7, 7, 3, 64), np.float32)
    >>> change = change_input(ResNetConfig(), kernel, bands=2)
    >>> change.text
    '2 bands by a linear adapter that starts as the mean of the bands in each channel'
    >>> change_input(ResNetConfig(), kernel, bands=4, method="repeat").config.in_channels
    4
    """
    asked = method is not None or wavelengths is not None or patches is not None
    if isinstance(method, Adapter) and bands is None:
        bands = method.bands
    if bands is None:
        if asked:
            raise ValueError(
                "adapter, wavelengths and patches require bands: give bands=n as well, the number "
                "of channels of the images"
            )
        return InputChange(config, {}, {})
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise ValueError(f"bands must be an integer >= 1, got {bands!r}")
    if bands == config.bands and not asked:
        return InputChange(config, {}, {})
    if config.adapter is not None or config.in_channels != 3:
        holds = "has an adapter" if config.adapter is not None else "has no RGB stem"
        raise ValueError(
            f"the checkpoint {holds} and takes {config.bands} bands; omit adapter, wavelengths and "
            f"patches for images with {config.bands} bands, and start from the original RGB "
            f"checkpoint for {bands} bands"
        )
    kind = "linear" if method is None else method.kind if isinstance(method, Adapter) else method
    if kind not in METHODS:
        raise ValueError(
            f"unknown adapter {kind!r}{suggest(str(kind), METHODS)}; known: {', '.join(METHODS)}"
        )
    _check_bands(bands, kind, method, wavelengths, patches)
    if kind in ("linear", "curves"):
        adapter = method if isinstance(method, Adapter) else _adapter(bands, kind, stem_std)
        kernel = None if wavelengths is None else _by_wavelength(wavelengths, stem_wavelengths)
        return _with_adapter(config, adapter, kernel, patches, stem_std)
    return _without(config, stem_kernel, bands, kind, stem_std)


def _adapter(bands: int, kind: Any, std: Sequence[float]) -> Adapter:
    """The default adapter; its curves span what photographs cover in the scale of the bands."""
    adapter = Adapter(bands, kind)
    if kind == "linear" or not std:
        return adapter
    gain = common_scale(RGB_DEVIATIONS) / common_scale(std)
    low, high = (float(f"{end * gain:.6g}") for end in adapter.span)
    return replace(adapter, span=(low, high))


def _with_adapter(
    config: ResNetConfig,
    adapter: Adapter,
    towards: np.ndarray | None,
    patches: Any,
    std: Sequence[float],
) -> InputChange:
    gains = channel_gains(std)
    if patches is not None:
        photographs = np.divide(RGB_DEVIATIONS, std) if std else np.ones(3)
        kernel = least_squares(
            patches,
            RGB_CORRELATION * np.outer(photographs, photographs),
            towards=None if towards is None else towards * gains,
        )
        start = f"least squares on {len(np.asarray(patches)):,} patches" + (
            " toward the wavelengths" if towards is not None else ""
        )
    elif towards is not None:
        kernel, start = towards * gains, "the wavelengths"
    else:
        kernel = luminance(adapter.bands) * gains
        start = "the mean of the bands in each channel"
    if adapter.bands == 1 and towards is None and patches is None:
        start = "replication"
    verb = "starts as" if towards is None and patches is None else "starts from"
    params = init(adapter, kernel)
    new = {f"params/adapter/{name}": leaf for name, leaf in params.items()}
    what = "a linear adapter" if adapter.kind == "linear" else "an adapter with tone curves"
    text = f"{_bands(adapter.bands)} by {what} that {verb} {start}"
    return InputChange(replace(config, adapter=adapter), {}, new, text)


def _by_wavelength(wavelengths: Sequence[float], channels: Sequence[float]) -> np.ndarray:
    return by_wavelength(wavelengths, channels_nm=tuple(channels) or RGB_CENTERS_NM)


def _without(
    config: ResNetConfig, stem_kernel: Any, bands: int, kind: str, std: Sequence[float]
) -> InputChange:
    if kind == "replicate":
        return InputChange(config, {}, {}, "1 band, replicated to the three channels of the stem")
    scaled = checked_stem(stem_kernel)
    scaled = scaled * channel_gains(std).astype(scaled.dtype)[:, None]
    if kind == "sum":
        kernel, text = sum_kernels(scaled), "the stem's kernel summed over R, G and B"
    elif kind == "average":
        kernel = average_kernels(scaled, bands)
        text = "the stem's kernel averaged over R, G and B"
    else:
        kernel = repeat_kernels(scaled, bands)
        text = "the stem's kernels of R, G and B in turn"
    changed = {f"params/{config.first_kernel}": kernel}
    return InputChange(replace(config, in_channels=bands), changed, {}, f"{_bands(bands)}, {text}")


def _check_bands(
    bands: int,
    kind: str,
    method: object,
    wavelengths: Sequence[float] | None,
    patches: Any,
) -> None:
    problems = []
    if isinstance(method, Adapter) and method.bands != bands:
        problems.append(f"{method} takes {_bands(method.bands)}, but the images have {bands}")
    if kind in ("replicate", "sum") and bands != 1:
        problems.append(
            f"{kind!r} requires one gray band, got {bands} bands; use linear, curves, average or "
            "repeat"
        )
    if wavelengths is not None and len(wavelengths) != bands:
        problems.append(
            f"wavelengths must have one value per band, got {len(wavelengths)} for "
            f"{_bands(bands)}; "
            "give the center of each band in nm, in the order of the image's bands"
        )
    if patches is not None and np.ndim(patches) == 2 and np.shape(patches)[1] != bands:
        problems.append(f"patches must have {_bands(bands)}, got {np.shape(patches)[1]}")
    given = [
        name
        for name, value in (("wavelengths", wavelengths), ("patches", patches))
        if value is not None
    ]
    if given and kind not in ("linear", "curves"):
        problems.append(
            f"{kind!r} does not use {' or '.join(given)}; an adapter (linear or curves) does"
        )
    if problems:
        raise ValueError("; ".join(problems))


def _bands(count: int) -> str:
    return "1 band" if count == 1 else f"{count} bands"
