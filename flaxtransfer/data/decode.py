"""Decode image files to pixels, with one, three or any number of bands.

Encoded image files to uint8 pixels: one rule for each color mode, and every error named.

Image files with any number of bands, as far as Pillow reads them.
"""

from __future__ import annotations

import io
import math
import os
import struct
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
_ORIENTATION = 0x0112


class ImageError(ValueError):
    """An image that cannot be read; the text names the file and the reason."""


def is_image(head: bytes) -> bool:
    r"""Whether a file that begins with ``head`` (16 bytes are enough) claims a known format.

    The contents decide, not the extension: cameras and converters mix those up.

    >>> is_image(b"\x89PNG\r\n\x1a\n"), is_image(b"label,path")
    (True, False)
    """
    return head.startswith(
        (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
    ) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP")


def decode(
    data: bytes | str | os.PathLike[str],
    *,
    name: str,
    channels: Literal[1, 3] = 3,
    min_side: int | None = None,
) -> np.ndarray:
    """Decodes one PNG, JPEG, BMP, GIF, TIFF or WebP image.

    - The EXIF orientation is applied: the result stands as a viewer would show it.
    - Palette colors are looked up; CMYK, YCbCr, LAB and 1-bit images are converted by Pillow.
    - Transparency is composed over white, as a viewer would; the colors that lie hidden under
      fully transparent pixels are arbitrary.
    - 16-bit gray is scaled linearly, 0 .. 65535 to 0 .. 255 (``round(x / 257)``). A 12-bit scan
      stored in 16 bits therefore becomes dark: window it before.
    - 32-bit integer and float images are refused, since their black and white are unknown.
    - Of an animation or a multi-page file, the first frame is taken.

    Args:
      data: the encoded bytes, or the path of a file.
      name: what errors call the image.
      channels: 3 for RGB, 1 for gray (luma of ITU-R 601-2).
      min_side: decode a JPEG at the smallest of 1, 1/2, 1/4, 1/8 of its size whose shorter side
        still has this many pixels.

    Returns:
      uint8 ``[height, width, channels]``.

    Raises:
      ImageError: the data are no image, or damaged, or of a kind that is refused.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("L", (3, 2), 200).save(file, "PNG")
    >>> decode(file.getvalue(), name="x.png")[0, 0], decode(file.getvalue(), name="x.png").shape
    (array([200, 200, 200], dtype=uint8), (2, 3, 3))
    """
    image = _load(data, name, min_side)
    try:
        return _pixels(image, name, channels)
    except ImageError:
        raise
    except ValueError as error:  # a mode that Pillow cannot convert
        raise ImageError(f"{name}: {image.mode} pixels cannot be converted ({error})") from error


def _load(data: bytes | str | os.PathLike[str], name: str, min_side: int | None) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        opened = io.BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(opened, formats=FORMATS) as image:
            if min_side is not None:
                _draft(image, min_side)
            image.load()
            return _upright(image)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image in {', '.join(FORMATS)}") from error
    # Pillow's parsers let escape whatever damaged bytes lead them to, TypeError included.
    except Exception as error:
        raise ImageError(f"{name}: the image cannot be decoded ({error})") from error


def _draft(image: Image.Image, min_side: int) -> None:
    factor = min_side / min(image.size)
    if factor < 1:
        image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, struct.error, KeyError, TypeError):
        return image  # a broken EXIF block says nothing about the pixels
    if orientation in range(2, 9):
        return ImageOps.exif_transpose(image)
    return image


def _pixels(image: Image.Image, name: str, channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        gray = ((wide + 128) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], channels, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{name}: {'32-bit integer' if image.mode == 'I' else 'float'} pixels have no fixed "
            "black and white; convert the file to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    wanted = "L" if channels == 1 else "RGB"
    if image.mode != wanted:
        image = image.convert(wanted)
    pixels = np.array(image)
    return pixels[..., None] if channels == 1 else pixels


_GRAY = {"1", "L", "I;16", "I;16L", "I;16B"}
"""Modes of one band whose black and white are known; 16 bits are scaled as ``decode`` does."""

_MANY = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def decode_bands(
    data: bytes | str | os.PathLike[str], *, name: str, bands: int, min_side: int | None = None
) -> np.ndarray:
    """Decodes an image of n bands, without any conversion of colors.

    One and three bands are gray and RGB, as ``decode`` makes them from any image. For every other
    number the file has to hold exactly that many, in one of two ways: as the channels of one
    picture (gray with alpha for 2, RGBA or CMYK for 4; alpha is then a band like any other), or as
    the pages of a TIFF (or the frames of a GIF or WebP) of one gray band each and of one size.
    A TIFF whose single page has more than four samples is not read by Pillow: save its bands as
    pages, or give the images as an ``ArraySource``.

    Args:
      data: the encoded bytes, or the path of a file.
      name: what errors call the image.
      bands: n.
      min_side: as for ``decode``, which uses it for one and three bands.

    Returns:
      uint8 ``[height, width, bands]``; 16 bits are scaled to 8.

    Raises:
      ImageError: the data are no image, or damaged, or hold another number of bands.

    >>> import io
    >>> from PIL import Image
    >>> pages, file = [Image.new("L", (3, 2), 10 * i) for i in range(13)], io.BytesIO()
    >>> pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    >>> decode_bands(file.getvalue(), name="x.tif", bands=13)[0, 0, :3].tolist()
    [0, 10, 20]
    """
    if bands in (1, 3):
        return decode(data, name=name, channels=1 if bands == 1 else 3, min_side=min_side)
    pages, modes = _pages(data, name, bands)
    found = sum(page.shape[2] for page in pages)
    listed = " and ".join(sorted(set(modes)))
    if len({page.shape[:2] for page in pages}) > 1:
        raise ImageError(f"{name}: its {len(pages)} pages are of several sizes")
    if found != bands:
        held = f"{len(pages)} page{'s' if len(pages) > 1 else ''} of {listed}"
        raise ImageError(
            f"{name}: {bands} bands were asked for and the file holds {found} ({held}); give the "
            "bands as pages of one gray band each"
        )
    return np.concatenate(pages, axis=2)


def _pages(
    data: bytes | str | os.PathLike[str], name: str, bands: int
) -> tuple[list[np.ndarray], list[str]]:
    """The first pages, one more than could be needed at most, and their modes."""
    import io

    from PIL import Image, ImageSequence, UnidentifiedImageError

    pages: list[np.ndarray] = []
    modes: list[str] = []
    try:
        opened = io.BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(opened, formats=FORMATS) as image:
            for page in ImageSequence.Iterator(image):
                pages.append(_band_pixels(page, name))
                modes.append(page.mode)
                if len(pages) > bands:
                    break
    except (FileNotFoundError, PermissionError, IsADirectoryError, ImageError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image in {', '.join(FORMATS)}, or one of a kind that Pillow does not "
            "read, such as a TIFF page of more than four samples"
        ) from error
    # Pillow's parsers let escape whatever damaged bytes lead them to.
    except Exception as error:
        raise ImageError(f"{name}: the image cannot be decoded ({error})") from error
    return pages, modes


def _band_pixels(page: Image.Image, name: str) -> np.ndarray:
    if page.mode in _GRAY:
        array = np.asarray(page if page.mode != "1" else page.convert("L"))
        if array.dtype != np.uint8:
            array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return array[..., None]
    if page.mode in _MANY:
        return np.asarray(page).reshape(page.height, page.width, _MANY[page.mode])
    raise ImageError(
        f"{name}: pixels of mode {page.mode!r} have no fixed bands; save gray pages of 8 or 16 "
        "bits, or gray with alpha, RGBA or CMYK"
    )
