"""Input adapters: what stands between an image of n bands and a stem that was trained on RGB.

An adapter is a 1×1 convolution without bias, or tone curves, and sees images that are normalized
already. What is learned lies in the path ``adapter`` of a model's parameters; where it starts is a
kernel ``[1, 1, bands, 3]``, made by ``luminance`` or ``by_wavelength`` of ``band_kernels``, or by
``least_squares`` of ``band_components``.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flaxtransfer.models.band_init import checked_stem, luminance
from flaxtransfer.models.config import Adapter
from flaxtransfer.types import Params

__all__ = ["Adapter", "apply", "fold", "init", "shapes"]


def shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by its name.

    >>> shapes(Adapter(bands=2, kind="curves"))
    {'kernel': (1, 1, 2, 3), 'curves': (2, 9, 3)}
    """
    found: dict[str, tuple[int, ...]] = {"kernel": (1, 1, adapter.bands, 3)}
    if adapter.kind == "curves":
        found["curves"] = (adapter.bands, adapter.knots, 3)
    return found


def init(adapter: Adapter, kernel: Any = None, *, dtype: Any = jnp.float32) -> Params:
    """The adapter's first parameters.

    Args:
      adapter: which.
      kernel: ``[1, 1, bands, 3]`` to start from; ``luminance(adapter.bands)`` when left out.
      dtype: of the parameters.

    Returns:
      ``{"kernel": [1, 1, bands, 3]}``, and for "curves" zeros ``{"curves": [bands, knots, 3]}``.

    Raises:
      ValueError: a kernel of another number of bands, or one that is not finite.

    >>> {name: leaf.shape for name, leaf in init(Adapter(bands=2, kind="curves")).items()}
    {'kernel': (1, 1, 2, 3), 'curves': (2, 9, 3)}
    """
    start = luminance(adapter.bands) if kernel is None else np.asarray(kernel)
    _check_kernel(start.shape, adapter)
    if not np.isfinite(start).all():
        raise ValueError("the kernel to start from has values that are not finite")
    params = {"kernel": jnp.asarray(start, dtype)}
    if adapter.kind == "curves":
        params["curves"] = jnp.zeros(shapes(adapter)["curves"], dtype)
    return params


def apply(adapter: Adapter, params: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """What the stem gets to see.

    Args:
      adapter: static where this is jitted.
      params: as ``init`` returns them.
      images: normalized, of a floating dtype, ``[batch, height, width, bands]``.

    Returns:
      ``[batch, height, width, 3]``, of the images' dtype.

    Raises:
      ValueError: images of another number of bands, parameters of another adapter.
      TypeError: images of integers, which are not normalized yet.

    >>> gray = jnp.array([-1.0, 2.0]).reshape(1, 1, 2, 1)
    >>> adapter = Adapter(bands=1)
    >>> apply(adapter, init(adapter), gray)[0, 0].tolist()
    [[-1.0, -1.0, -1.0], [2.0, 2.0, 2.0]]
    """
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images are {images.dtype}; an adapter takes normalized floats")
    if images.ndim != 4 or images.shape[-1] != adapter.bands:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, the adapter takes [batch, height, width, "
            f"{adapter.bands}]" + _fitting(images.shape)
        )
    _check_params(params, adapter)
    kernel = params["kernel"].astype(images.dtype)[0, 0]
    # So few products cost nothing, and at a lower precision replicated gray would not be gray.
    linear = jnp.einsum("bhwn,nr->bhwr", images, kernel, precision=lax.Precision.HIGHEST)
    if adapter.kind == "linear":
        return linear
    return linear + _bend(adapter, params["curves"], images).astype(images.dtype)


def fold(kernel: Any, stem_kernel: jax.Array) -> jax.Array:
    """A linear adapter and the stem behind it as one convolution of the bands.

    The adapter has no bias and its window is one pixel, so that it sends the zeros that a
    convolution pads with to zeros: the folded stem is the same function, borders included.

    Args:
      kernel: ``[1, 1, bands, 3]``, or the parameters of a linear adapter that hold it.
      stem_kernel: ``[kernel height, kernel width, 3, filters]``.

    Returns:
      ``[kernel height, kernel width, bands, filters]``, of the stem's dtype.

    Raises:
      ValueError: tone curves, which no kernel can hold; kernels of another shape.

    >>> fold(jnp.ones((1, 1, 2, 3)), jnp.ones((7, 7, 3, 64))).shape
    (7, 7, 2, 64)
    """
    if isinstance(kernel, Mapping):
        if "curves" in kernel:
            raise ValueError(
                "an adapter of kind 'curves' is not linear and folds into no kernel; keep it in "
                "front of the stem, or train one of kind 'linear'"
            )
        if set(kernel) != {"kernel"}:
            raise ValueError(
                "a linear adapter has the parameters kernel, not "
                + (", ".join(sorted(map(str, kernel))) or "none")
            )
        kernel = kernel["kernel"]
    stem = checked_stem(stem_kernel)
    kernel = jnp.asarray(kernel, stem.dtype)
    if kernel.ndim != 4 or kernel.shape[:2] != (1, 1) or kernel.shape[3] != 3:
        raise ValueError(
            f"the adapter's kernel has shape {tuple(kernel.shape)}, wanted [1, 1, bands, 3]"
        )
    return jnp.einsum("nr,hwrc->hwnc", kernel[0, 0], stem, precision=lax.Precision.HIGHEST)


def _bend(adapter: Adapter, curves: jax.Array, images: jax.Array) -> jax.Array:
    """The curves' part of the output, in float32 or more."""
    dtype = jnp.promote_types(images.dtype, jnp.float32)
    low, high = adapter.span

    def position(pixels: jax.Array) -> jax.Array:
        # In half precision the knots would be as coarse as the curve is fine.
        inside = jnp.clip(pixels.astype(dtype), low, high)
        return (inside - low) * ((adapter.knots - 1) / (high - low))

    def hat(knot: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.maximum(0, 1 - jnp.abs(where - knot))

    # Hats of all knots at once are as many copies of the images, and the gradient keeps them: for
    # 13 bands of 16 × 224 px 770 MB, against 112 MB one after the other, in the same time.
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
    wanted = set(shapes(adapter))
    if set(params) != wanted:
        raise ValueError(
            f"a {adapter.kind!r} adapter has the parameters {', '.join(sorted(wanted))}, not "
            f"{', '.join(sorted(map(str, params))) or 'none'}"
        )
    _check_kernel(params["kernel"].shape, adapter)
    if "curves" in wanted:
        curves = shapes(adapter)["curves"]
        if tuple(params["curves"].shape) != curves:
            raise ValueError(
                f"the curves have shape {tuple(params['curves'].shape)}, those of {adapter} "
                f"{curves}"
            )


def _check_kernel(shape: tuple[int, ...], adapter: Adapter) -> None:
    if tuple(shape) != (1, 1, adapter.bands, 3):
        raise ValueError(
            f"the kernel has shape {tuple(shape)}, the adapter's is (1, 1, {adapter.bands}, 3): "
            "one center wavelength, or one column of patches, for each band of the image"
        )


def _fitting(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return "; one image becomes a batch by images[None]"
    if len(shape) == 4 and shape[-1] >= 1:
        return f"; these would be for Adapter(bands={shape[-1]})"
    return ""
