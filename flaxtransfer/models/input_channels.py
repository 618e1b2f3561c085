"""From a network that takes RGB to one that takes images of n bands: what changes, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import numpy as np

from flaxtransfer.models import adapters
from flaxtransfer.models.band_init import (
    RGB_CENTERS_NM,
    average_kernels,
    by_wavelength,
    least_squares,
    luminance,
    repeat_kernels,
    sum_kernels,
)
from flaxtransfer.models.config import Adapter, ResNetConfig
from flaxtransfer.paths import suggest

__all__ = ["METHODS", "InputChange", "Method", "change_input"]


Method = Literal["linear", "curves", "replicate", "sum", "average", "repeat"]
METHODS = get_args(Method)


@dataclass(frozen=True)
class InputChange:
    """What becomes of a network's input.

    Args:
      config: of the network for the new images.
      adapted: leaves of the stem that were computed from the checkpoint's.
      new: leaves of the adapter.
      text: the same for a person; "" where nothing changes.
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
    way: Method | Adapter | None = None,
    wavelengths: Sequence[float] | None = None,
    patches: Any = None,
    stem_wavelengths: Sequence[float] = (),
) -> InputChange:
    """What has to change in a network so that it takes images of other bands.

    "linear" and "curves" put an adapter before the stem, which stays as it is. "sum" and "average"
    and "repeat" change the stem's kernel instead, and "replicate" changes nothing: a gray image is
    copied to three channels. By default one band or more get a "linear" adapter, and images with
    as many bands as the network takes get none.

    An adapter starts from the bands' own statistics where ``patches`` are given, else from their
    ``wavelengths``, else every channel is the mean of all bands.

    Args:
      config: of the network as it is.
      stem_kernel: ``[height, width, in, filters]``.
      bands: of the images; None changes nothing.
      way: one of the above, or an ``Adapter`` with knots and span of your own.
      wavelengths: center of each band in nm.
      patches: ``[patches, bands]`` of normalized training images; see
        ``band_components.least_squares``.
      stem_wavelengths: center of each of the stem's channels in nm, where they are not the red,
        green and blue of photographs.

    Raises:
      ValueError: numbers of bands that do not fit each other, a way that these images or this
        network cannot go; with the nearest that can be done.

    >>> kernel = np.ones((7, 7, 3, 64), np.float32)
    >>> change = change_input(ResNetConfig(), kernel, bands=2)
    >>> change.text
    '2 bands by a linear adapter that starts as the mean of the bands in each channel'
    >>> change_input(ResNetConfig(), kernel, bands=4, way="repeat").config.in_channels
    4
    """
    asked = way is not None or wavelengths is not None or patches is not None
    if isinstance(way, Adapter) and bands is None:
        bands = way.bands
    if bands is None:
        if asked:
            raise ValueError(
                "an adapter, wavelengths and patches belong to bands: give bands=n as well, the "
                "number of channels of the images"
            )
        return InputChange(config, {}, {})
    if isinstance(bands, bool) or not isinstance(bands, int) or bands < 1:
        raise ValueError(f"bands must be a whole number, 1 or more, not {bands!r}")
    if bands == config.bands and not asked:
        return InputChange(config, {}, {})
    if config.adapter is not None or config.in_channels != 3:
        holds = "has an adapter" if config.adapter is not None else "has no RGB stem"
        raise ValueError(
            f"the checkpoint {holds} and takes {config.bands} bands; leave adapter, wavelengths "
            f"and patches out for images of {config.bands} bands, and for {bands} start from the "
            "RGB checkpoint that it came from"
        )
    kind = "linear" if way is None else way.kind if isinstance(way, Adapter) else way
    if kind not in METHODS:
        raise ValueError(
            f"no adapter {kind!r}{suggest(str(kind), METHODS)}; there are {', '.join(METHODS)}"
        )
    _check_bands(bands, kind, way, wavelengths, patches)
    if kind in ("linear", "curves"):
        adapter = way if isinstance(way, Adapter) else Adapter(bands, kind)
        kernel = None if wavelengths is None else _by_wavelength(wavelengths, stem_wavelengths)
        return _with_adapter(config, adapter, kernel, patches)
    return _without(config, stem_kernel, bands, kind)


def _with_adapter(
    config: ResNetConfig, adapter: Adapter, towards: np.ndarray | None, patches: Any
) -> InputChange:
    if patches is not None:
        kernel = least_squares(patches, towards=towards)
        start = f"least squares on {len(np.asarray(patches)):,} patches" + (
            " toward the wavelengths" if towards is not None else ""
        )
    elif towards is not None:
        kernel, start = towards, "the wavelengths"
    else:
        kernel = luminance(adapter.bands)
        start = "the mean of the bands in each channel"
    if adapter.bands == 1 and towards is None and patches is None:
        start = "replication"
    verb = "starts as" if towards is None and patches is None else "starts from"
    params = adapters.init(adapter, kernel)
    new = {f"params/adapter/{name}": leaf for name, leaf in params.items()}
    what = "a linear adapter" if adapter.kind == "linear" else "an adapter with tone curves"
    text = f"{_bands(adapter.bands)} by {what} that {verb} {start}"
    return InputChange(replace(config, adapter=adapter), {}, new, text)


def _by_wavelength(wavelengths: Sequence[float], channels: Sequence[float]) -> np.ndarray:
    return by_wavelength(wavelengths, channels_nm=tuple(channels) or RGB_CENTERS_NM)


def _without(config: ResNetConfig, stem_kernel: Any, bands: int, kind: str) -> InputChange:
    if kind == "replicate":
        return InputChange(config, {}, {}, "1 band, replicated to the three channels of the stem")
    kernel, text = {
        "sum": lambda: (sum_kernels(stem_kernel), "the stem's kernel summed over R, G and B"),
        "average": lambda: (
            average_kernels(stem_kernel, bands),
            "the stem's kernel averaged over R, G and B",
        ),
        "repeat": lambda: (
            repeat_kernels(stem_kernel, bands),
            "the stem's kernels of R, G and B in turn",
        ),
    }[kind]()
    changed = {f"params/{config.first_kernel}": kernel}
    return InputChange(replace(config, in_channels=bands), changed, {}, f"{_bands(bands)}, {text}")


def _check_bands(
    bands: int,
    kind: str,
    way: object,
    wavelengths: Sequence[float] | None,
    patches: Any,
) -> None:
    problems = []
    if isinstance(way, Adapter) and way.bands != bands:
        problems.append(f"{way} is for {_bands(way.bands)}, and the images have {bands}")
    if kind in ("replicate", "sum") and bands != 1:
        problems.append(
            f"{kind!r} is for one gray band, not {bands}; for more there are linear, curves, "
            "average and repeat"
        )
    if wavelengths is not None and len(wavelengths) != bands:
        problems.append(
            f"{len(wavelengths)} wavelengths for {_bands(bands)}; give the center of each band in "
            "nm, in the order of the image's bands"
        )
    if patches is not None and np.ndim(patches) == 2 and np.shape(patches)[1] != bands:
        problems.append(f"patches of {np.shape(patches)[1]} bands for images of {bands}")
    given = [
        name
        for name, value in (("wavelengths", wavelengths), ("patches", patches))
        if value is not None
    ]
    if given and kind not in ("linear", "curves"):
        problems.append(
            f"{kind!r} takes no {' and no '.join(given)}; an adapter, linear or curves, does"
        )
    if problems:
        raise ValueError("; ".join(problems))


def _bands(count: int) -> str:
    return "1 band" if count == 1 else f"{count} bands"
