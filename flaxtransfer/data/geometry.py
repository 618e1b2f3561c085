"""Image geometry: resize, crop, affine map.

Functions on one uint8 image ``[height, width, channels]``, resampled by Pillow. ``transforms``
makes pipeline steps of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flaxtransfer.paths import suggest
from flaxtransfer.weights.preprocessing import INTERPOLATIONS

if TYPE_CHECKING:
    from PIL import Image


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


def center_offset(length: int, size: int, processor: str = "torchvision") -> int:
    """Start of a centered window of ``size``.

    torchvision and timm round half a pixel to even, Hugging Face rounds it down.

    >>> center_offset(427, 100), center_offset(427, 100, "huggingface")
    (164, 163)
    """
    return (length - size) // 2 if processor == "huggingface" else round((length - size) / 2)


@dataclass(frozen=True)
class Window:
    """The size that an image is resized to, and the corner of the crop in it, in px."""

    height: int
    width: int
    top: int
    left: int


def window(
    image: np.ndarray,
    size: int,
    resize: int,
    crop_mode: str = "center",
    processor: str = "torchvision",
) -> Window:
    """Where the evaluation crop of an image lies; the words are those of ``Preprocessing``.

    >>> window(np.zeros((300, 400, 3)), 128, 150)
    Window(height=150, width=200, top=11, left=36)
    >>> window(np.zeros((300, 400, 3)), 128, 150, "squash")
    Window(height=150, width=150, top=11, left=11)
    """
    height, width = resized_shape(image.shape[0], image.shape[1], resize)
    if crop_mode == "squash":
        height = width = resize
    top, left = (center_offset(side, size, processor) for side in (height, width))
    return Window(height, width, top, left)


def resize_crop(
    image: np.ndarray,
    size: int,
    resize: int,
    interpolation: str,
    crop_mode: str = "center",
    processor: str = "torchvision",
) -> np.ndarray:
    """Resizes an image to ``resize`` px (antialiased), then crops the center.

    Args:
        image: uint8 ``[height, width, channels]``.
        size: side of the result in px.
        resize: what the shortest side is resized to, in px; with "squash" both sides.
        interpolation: of the resizing.
        crop_mode: "center" or "squash".
        processor: "torchvision" or "huggingface".

    Returns:
        uint8 ``[size, size, channels]``.

    >>> resize_crop(np.zeros((8, 8, 1), np.uint8), 48, 48, "bilinear").shape
    (48, 48, 1)
    """
    check_image(image)
    found = window(image, size, resize, crop_mode, processor)
    right, bottom = found.left + size, found.top + size
    if image.shape[:2] == (found.height, found.width):
        return image[found.top : bottom, found.left : right]
    if processor == "huggingface" and interpolation != "nearest":
        whole = _resized_once_rounded(image, found.width, found.height, interpolation)
        return whole[found.top : bottom, found.left : right]
    shape, box = (found.width, found.height), (found.left, found.top, right, bottom)
    method = resampling(interpolation)
    return _apply_by_band(image, lambda p: p.resize(shape, method).crop(box))


def _resized_once_rounded(
    image: np.ndarray, width: int, height: int, interpolation: str
) -> np.ndarray:
    """Resizes the width, then the height, and rounds at the end alone.

    Hugging Face's processors resize with torch or with Pillow. Both round in between, with other
    weights, and end up to two levels apart; this is within one level of each.
    """
    from PIL import Image

    method = resampling(interpolation)
    bands = []
    for band in np.moveaxis(image.astype(np.float32), -1, 0):
        wide = Image.fromarray(np.ascontiguousarray(band)).resize((width, len(band)), method)
        # The overshoot of bicubic kernels is cut off in between, as theirs is.
        clipped = Image.fromarray(np.clip(np.asarray(wide), 0, 255))
        bands.append(np.asarray(clipped.resize((width, height), method)))
    pixels: np.ndarray = np.clip(np.rint(np.stack(bands, axis=-1)), 0, 255).astype(np.uint8)
    return pixels


def resize_box(
    image: np.ndarray, box: tuple[int, int, int, int], size: int, interpolation: str
) -> np.ndarray:
    """Crops the box (left, top, right, bottom) and resizes it to ``size`` x ``size``.

    It crops first: Pillow's own ``resize(box=...)`` lets pixels from outside the box bleed in.
    """
    check_image(image)
    left, top, right, bottom = box
    method = resampling(interpolation)
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
    crop_mode: str = "center",
    processor: str = "torchvision",
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
        crop_mode: see ``resize_crop``.
        processor: see ``resize_crop``.

    Returns:
        uint8 ``[size, size, channels]``.

    >>> affine(np.eye(2, dtype=np.uint8)[..., None], size=2, resize=2, degrees=90)[..., 0].tolist()
    [[0, 1], [1, 0]]
    """
    from PIL import Image

    check_image(image)
    found = window(image, size, resize, crop_mode, processor)
    height, width, top, left = found.height, found.width, found.top, found.left
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
    method = resampling(interpolation)
    mapping = method if single_pass else Image.Resampling.BILINEAR

    def apply(picture: Image.Image) -> Image.Image:
        if not single_pass:
            picture = picture.resize((width, height), method)
        color = fill if picture.mode == "L" else (fill,) * 3
        return picture.transform(
            (size, size), Image.Transform.AFFINE, matrix, mapping, fillcolor=color
        )

    return _apply_by_band(image, apply)


def resampling(name: str) -> Image.Resampling:
    """Pillow's value of an interpolation; ValueError unless it is one of ``INTERPOLATIONS``."""
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
