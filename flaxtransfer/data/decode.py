"""Image decoding.

Encoded images (files or bytes) to uint8 pixels with one, three or any number of bands. Which
formats there are is one table, ``DECODERS``; a format is recognized by its first bytes.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from flaxtransfer.files import check_regular

if TYPE_CHECKING:
    from PIL import Image


MOST_PIXELS = 50_000_000
"""Of an image, by its header: while transparency is composed over white, four pictures of four
bytes per pixel exist, 800 MB. A PNG of 20 kB may state 169 million pixels."""


class ImageError(ValueError):
    """An image that cannot be decoded; the text names the file and the reason."""


@dataclass(frozen=True)
class Decoder:
    """One image format.

    Args:
        name: of the format, for errors.
        detect: whether a file with these first 16 bytes claims the format.
        decode: ``(file, name of the image, bands, min_side) -> uint8 [height, width, bands]``; with
            one and three bands it converts colors, otherwise the file must hold that many.
    """

    name: str
    detect: Callable[[bytes], bool]
    decode: Callable[[IO[bytes], str, int, int | None], np.ndarray]


def is_image(head: bytes) -> bool:
    r"""Whether a file that begins with ``head`` (16 bytes are enough) claims a known format.

    The contents decide, not the extension: cameras and converters mix those up.

    >>> is_image(b"\x89PNG\r\n\x1a\n"), is_image(b"label,path")
    (True, False)
    """
    return any(decoder.detect(head) for decoder in DECODERS)


def decode(
    data: bytes | str | os.PathLike[str],
    *,
    name: str,
    channels: Literal[1, 3] = 3,
    min_side: int | None = None,
) -> np.ndarray:
    """Decodes one image to RGB or gray.

    - The EXIF orientation is applied: the result is upright, as a viewer would show it.
    - Palette colors are looked up; CMYK, YCbCr, LAB and 1-bit images are converted by Pillow.
    - Transparency is composed over white, as a viewer would; the colors under fully transparent
      pixels are arbitrary.
    - 16-bit gray is scaled linearly, 0 .. 65535 to 0 .. 255 (``round(x / 257)``). A 12-bit scan
      stored in 16 bits therefore becomes dark: window it before.
    - 32-bit integer and float images are refused, since their black and white are unknown.
    - Of an animation or a multi-page file, the first frame is taken.

    Args:
        data: the encoded bytes, or the path of a file.
        name: of the image, for errors.
        channels: 3 for RGB, 1 for gray (luma of ITU-R 601-2).
        min_side: decode a JPEG at the smallest of 1, 1/2, 1/4, 1/8 of its size whose shorter side
            still has this many pixels.

    Returns:
        uint8 ``[height, width, channels]``.

    Raises:
        ImageError: the data are not an image, or damaged, or of a kind that is refused.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("L", (3, 2), 200).save(file, "PNG")
    >>> decode(file.getvalue(), name="x.png")[0, 0], decode(file.getvalue(), name="x.png").shape
    (array([200, 200, 200], dtype=uint8), (2, 3, 3))
    """
    return decode_bands(data, name=name, bands=channels, min_side=min_side)


def decode_bands(
    data: bytes | str | os.PathLike[str], *, name: str, bands: int, min_side: int | None = None
) -> np.ndarray:
    """Decodes one image with n bands, without any conversion of colors.

    One and three bands are gray and RGB, as ``decode`` makes them from any image. For every other
    number the file must hold exactly that many, in one of two ways: as the channels of one
    picture (gray with alpha for 2, RGBA or CMYK for 4; alpha is then a band like any other), or as
    the pages of a TIFF (or the frames of a GIF or WebP) of one gray band each and of one size.
    A TIFF whose single page has more than four samples is not read by Pillow: save its bands as
    pages, or give the images as an ``ArraySource``.

    Args:
        data: the encoded bytes, or the path of a file.
        name: of the image, for errors.
        bands: n.
        min_side: as for ``decode``; used for one and three bands only.

    Returns:
        uint8 ``[height, width, bands]``; 16 bits are scaled to 8.

    Raises:
        ImageError: the data are not an image, or damaged, or hold another number of bands.

    >>> from PIL import Image
    >>> pages, file = [Image.new("L", (3, 2), 10 * i) for i in range(13)], io.BytesIO()
    >>> pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    >>> decode_bands(file.getvalue(), name="x.tif", bands=13)[0, 0, :3].tolist()
    [0, 10, 20]
    """
    if not isinstance(data, bytes):
        try:
            check_regular(data)
        except ValueError as error:
            raise ImageError(str(error)) from error
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        head = file.read(16)
        file.seek(0)
        for decoder in DECODERS:
            if decoder.detect(head):
                return decoder.decode(file, name, bands, min_side)
    raise ImageError(not_an_image(name))


def not_an_image(name: str) -> str:
    """The error text for a file in none of the formats."""
    return f"{name}: not an image in {', '.join(decoder.name for decoder in DECODERS)}"


def _prefix(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


def _pillow(
    format: str, file: IO[bytes], name: str, bands: int, min_side: int | None
) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    _silence()
    try:
        with Image.open(file, formats=(format,)) as image:
            _check_size(image, name)
            if bands in (1, 3):
                return _color_pixels(image, name, bands, min_side)
            return _stacked_pages(image, name, bands)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        hint = "; Pillow reads no page with more than four samples" if format == "TIFF" else ""
        raise ImageError(f"{name}: not a readable {format} image{hint}") from error
    # Pillow's parsers raise many types of error on damaged bytes, TypeError included.
    except Exception as error:
        raise ImageError(f"{name}: the image cannot be decoded ({error})") from error


_PILLOW = r"PIL\."
_IGNORED = ("ignore", None, Warning, re.compile(_PILLOW), 0)


def _silence() -> None:
    """Keeps Pillow's log and warnings of damaged files off the terminal.

    It warns of every damaged tag, and of sizes that it refuses only at twice as much; what matters
    is an ``ImageError``. The filter stays: images are decoded in threads, and taking it back in one
    would take it from another.
    """
    if _IGNORED not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW)
    logger = logging.getLogger("PIL")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)


def _check_size(image: Image.Image, name: str) -> None:
    """Refuses by the header, before a pixel is decoded."""
    if image.width * image.height > MOST_PIXELS:
        raise ImageError(
            f"{name}: an image must have at most {MOST_PIXELS:,} px, got {image.width:,} x "
            f"{image.height:,} px; make it smaller"
        )


DECODERS = (
    Decoder("PNG", _prefix(b"\x89PNG\r\n\x1a\n"), functools.partial(_pillow, "PNG")),
    Decoder("JPEG", _prefix(b"\xff\xd8\xff"), functools.partial(_pillow, "JPEG")),
    Decoder("BMP", _prefix(b"BM"), functools.partial(_pillow, "BMP")),
    Decoder("GIF", _prefix(b"GIF87a", b"GIF89a"), functools.partial(_pillow, "GIF")),
    Decoder(
        "TIFF",
        _prefix(b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0"),
        functools.partial(_pillow, "TIFF"),
    ),
    Decoder(
        "WEBP",
        lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP",
        functools.partial(_pillow, "WEBP"),
    ),
)
"""All formats. To add one, add a row."""

_ORIENTATION = 0x0112

_GRAY = {"1", "L", "I;16", "I;16L", "I;16B"}
"""Modes of one band whose black and white are known; 16 bits are scaled as ``decode`` does."""

_SEVERAL_BANDS = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def _color_pixels(image: Image.Image, name: str, channels: int, min_side: int | None) -> np.ndarray:
    if min_side is not None:
        _draft(image, min_side)
    image.load()
    image = _upright(image)
    try:
        return _converted(image, name, channels)
    except ImageError:
        raise
    except ValueError as error:  # a mode that Pillow cannot convert
        raise ImageError(f"{name}: {image.mode} pixels cannot be converted ({error})") from error


def _draft(image: Image.Image, min_side: int) -> None:
    factor = min_side / min(image.size)
    if factor < 1:
        image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError, struct.error, KeyError, TypeError):
        return image  # a broken EXIF block does not affect the pixels
    if orientation in range(2, 9):
        return ImageOps.exif_transpose(image)
    return image


def _converted(image: Image.Image, name: str, channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return np.repeat(_scaled_to_8_bits(np.asarray(image))[..., None], channels, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{name}: {'32-bit integer' if image.mode == 'I' else 'float'} pixels have no fixed "
            "black and white; convert the file to 8 or 16 bits"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    pixels = np.array(image)
    return pixels[..., None] if channels == 1 else pixels


def _scaled_to_8_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _stacked_pages(image: Image.Image, name: str, bands: int) -> np.ndarray:
    from PIL import ImageSequence

    pages: list[np.ndarray] = []
    modes: list[str] = []
    for page in ImageSequence.Iterator(image):
        _check_size(page, name)
        pages.append(_page_pixels(page, name))
        modes.append(page.mode)
        if len(pages) > bands:  # already one too many
            break
    found = sum(page.shape[2] for page in pages)
    if len({page.shape[:2] for page in pages}) > 1:
        raise ImageError(f"{name}: its {len(pages)} pages differ in size")
    if found != bands:
        held = f"{len(pages)} page{'s' if len(pages) > 1 else ''} of "
        held += " and ".join(sorted(set(modes)))
        raise ImageError(
            f"{name}: {bands} bands were asked for and the file holds {found} ({held}); give the "
            "bands as pages of one gray band each"
        )
    return np.concatenate(pages, axis=2)


def _page_pixels(page: Image.Image, name: str) -> np.ndarray:
    if page.mode in _GRAY:
        pixels = np.asarray(page if page.mode != "1" else page.convert("L"))
        return (pixels if pixels.dtype == np.uint8 else _scaled_to_8_bits(pixels))[..., None]
    if page.mode in _SEVERAL_BANDS:
        return np.asarray(page).reshape(page.height, page.width, _SEVERAL_BANDS[page.mode])
    raise ImageError(
        f"{name}: pixels of mode {page.mode!r} have no fixed bands; save gray pages of 8 or 16 "
        "bits, or gray with alpha, RGBA or CMYK"
    )
