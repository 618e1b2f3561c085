"""Image geometry: resize, crop, affine map.

Functions on one uint8 image ``[height, width, channels]``, resampled by Pillow. ``transforms``
makes pipeline steps of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from flaxtransfer.paths import suggest

if TYPE_CHECKING:
    from PIL import Image


INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def check_interpolation(name: str) -> None:
    """Raises ValueError unless ``name`` is one of ``INTERPOLATIONS``."""
    if name not in INTERPOLATIONS:
        raise ValueError(
            f"unknown interpolation {name!r}{suggest(name, list(INTERPOLATIONS))}; known: "
            f"{', '.join(INTERPOLATIONS)}"
        )


def check_image(image: np.ndarray) -> None:
    """Raises TypeError unless ``image`` is uint8 ``[height, width, channels]``."""
    dtype, shape = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", ())
    if dtype != np.uint8 or len(shape) != 3 or 0 in shape:
        raise TypeError(
            f"an image must be uint8 [height, width, channels], got {dtype} {list(shape)}"
        )


def resized_shape(height: int, width: int, shortest: int) -> tuple[int, int]:
    """Height and width with the shorter side at ``shortest`` px, the longer one rounded down.

    >>> resized_shape(300, 401, 150)
    (150, 200)
    """
    if height <= width:
        return shortest, int(shortest * width / height)
    return int(shortest * height / width), shortest


def center_offset(length: int, size: int) -> int:
    """Start of a centered window of ``size``; halves round to even, as in torchvision."""
    return round((length - size) / 2)


def resize_crop(image: np.ndarray, size: int, resize: int, interpolation: str) -> np.ndarray:
    """Resizes the shortest side to ``resize`` px (antialiased), then crops the center.

    >>> resize_crop(np.zeros((8, 8, 1), np.uint8), 48, 48, "bilinear").shape
    (48, 48, 1)
    """
    check_image(image)
    height, width = resized_shape(image.shape[0], image.shape[1], resize)
    top, left = center_offset(height, size), center_offset(width, size)
    box = (left, top, left + size, top + size)
    method = _resampling(interpolation)
    return _apply_by_band(image, lambda p: p.resize((width, height), method).crop(box))


def resize_box(
    image: np.ndarray, box: tuple[int, int, int, int], size: int, interpolation: str
) -> np.ndarray:
    """Crops the box (left, top, right, bottom) and resizes it to ``size`` x ``size``.

    It crops first: Pillow's own ``resize(box=...)`` lets pixels from outside the box bleed in.
    """
    check_image(image)
    left, top, right, bottom = box
    method = _resampling(interpolation)
    part = image[top:bottom, left:right]
    return _apply_by_band(part, lambda p: p.resize((size, size), method))


def affine(
    image: np.ndarray,
    *,
    size: int,
    resize: int,
    degrees: float = 0.0,
    shift: tuple[float, float] = (0.0, 0.0),
    scale: float = 1.0,
    shear: float = 0.0,
    interpolation: str = "bilinear",
    fill: int = 0,
) -> np.ndarray:
    """``resize_crop`` followed by an affine map about the center, resampled once where possible.

    An image that is enlarged with bilinear (or nearest) interpolation is resampled once, from its
    own pixels. Otherwise it is first resized, with the antialiased kernel that evaluation uses,
    and then mapped bilinearly.

    Args:
        image: uint8 ``[height, width, channels]``.
        size: side of the result in px.
        resize: what the shortest side is resized to, in px.
        degrees: rotation, counterclockwise.
        shift: to the right and downwards, in px of the result.
        scale: magnification.
        shear: in degrees; the lower half moves to the right.
        interpolation: of the resizing.
        fill: value of pixels that lie outside the image, 0 to 255.

    Returns:
        uint8 ``[size, size, channels]``.

    >>> affine(np.eye(2, dtype=np.uint8)[..., None], size=2, resize=2, degrees=90)[..., 0].tolist()
    [[0, 1], [1, 0]]
    """
    from PIL import Image

    check_image(image)
    height, width = resized_shape(image.shape[0], image.shape[1], resize)
    left, top = center_offset(width, size), center_offset(height, size)
    angle, slant = math.radians(degrees), math.tan(math.radians(shear))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    # Pillow wants the map from a pixel of the result to its origin: the inverse of
    # scale * rotation * shear, about the center of the result.
    xx, xy = cos + slant * -sin, -sin - slant * cos
    yx, yy = sin, cos
    center_x, center_y = size / 2 + shift[0], size / 2 + shift[1]
    from_x = left + size / 2 - xx * center_x - xy * center_y
    from_y = top + size / 2 - yx * center_x - yy * center_y
    across, down = image.shape[1] / width, image.shape[0] / height
    single_pass = interpolation in ("nearest", "bilinear") and across <= 1 and down <= 1
    if not single_pass:
        across = down = 1.0
    matrix = (across * xx, across * xy, across * from_x, down * yx, down * yy, down * from_y)
    method = _resampling(interpolation)
    mapping = method if single_pass else Image.Resampling.BILINEAR

    def apply(picture: Image.Image) -> Image.Image:
        if not single_pass:
            picture = picture.resize((width, height), method)
        color = fill if picture.mode == "L" else (fill,) * 3
        return picture.transform(
            (size, size), Image.Transform.AFFINE, matrix, mapping, fillcolor=color
        )

    return _apply_by_band(image, apply)


def _resampling(name: str) -> Image.Resampling:
    from PIL import Image

    check_interpolation(name)
    return Image.Resampling[name.upper()]


def _apply_by_band(image: np.ndarray, apply: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    from PIL import Image

    # Pillow has images of one and three bands of 8 bits; other numbers are done band by band.
    if image.shape[2] == 3:
        return np.asarray(apply(Image.fromarray(image)))
    bands = [np.asarray(apply(Image.fromarray(image[..., b]))) for b in range(image.shape[2])]
    return np.stack(bands, axis=-1)
