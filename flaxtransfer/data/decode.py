"""Image decoding.

Encoded images (files or bytes) to uint8 pixels with one, three or any number of bands. Which
formats there are is one table, ``DECODERS``; a format is recognized by its first bytes.
"""

from __future__ import annotations

import ctypes
import functools
import io
import logging
import math
import os
import re
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from flaxtransfer.data.scans import (
    MOST_PIXELS,
    Asked,
    ImageError,
    Levels,
    Picture,
    dicom_frames,
    dicom_group,
    is_nifti,
    nifti_frames,
    read_dicom,
    read_nifti,
    read_tiff,
    to_pixels,
    whole_range,
)
from flaxtransfer.files import check_regular

if TYPE_CHECKING:
    from PIL import Image


HEAD_BYTES = 512
"""First bytes of a file that tell its format: those of NIfTI end at 348, and may be compressed."""


@dataclass(frozen=True)
class Decoder:
    """One image format.

    Args:
        name: of the format, for errors.
        detect: whether a file with these first bytes claims the format.
        read: the picture of a file. With one and three bands it converts colors, otherwise the file
            must hold that many. It may be None for one of 8 bits where only others are asked for.
        frames: how many examples a file is, by its path and name; None for formats of which the
            first picture is taken.
        group: a digest of what else a file belongs to, such as a patient, likewise; "" if unknown,
            None for formats that do not say.
    """

    name: str
    detect: Callable[[bytes], bool]
    read: Callable[[IO[bytes], Asked], Picture | None]
    frames: Callable[[str | os.PathLike[str], str], int] | None = None
    group: Callable[[str | os.PathLike[str], str], str] | None = None


def is_image(head: bytes) -> bool:
    r"""Whether a file that begins with ``head`` (``HEAD_BYTES`` are enough) claims a known format.

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
      stored in 16 bits becomes dark: ``decode_bands`` takes its levels.
    - 32-bit integer and float images are refused, since their black and white are unknown.
    - DICOM is shown as its own window says; one without a window is refused.
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
    data: bytes | str | os.PathLike[str],
    *,
    name: str,
    bands: int,
    min_side: int | None = None,
    levels: Levels | None = None,
    frame: int = 0,
) -> np.ndarray:
    """Decodes one image with n bands, without any conversion of colors.

    One and three bands are gray and RGB, as ``decode`` makes them from any image. For every other
    number the file must hold exactly that many: as the channels of one picture (gray with alpha for
    2, RGBA or CMYK for 4; alpha is then a band like any other), as the pages of a TIFF (or the
    frames of a GIF or WebP) of one size, or in band or pixel order of a GeoTIFF. A page of more
    than four samples needs the extra ``geo``.

    Args:
        data: the encoded bytes, or the path of a file.
        name: of the image, for errors.
        bands: n.
        min_side: as for ``decode``; used for one and three bands only.
        levels: black and white of measurements; 8 bits stay as they are.
        frame: of a DICOM file, from 0.

    Raises:
        ImageError: the data are not an image, or damaged, or hold another number of bands.

    >>> from PIL import Image
    >>> pages, file = [Image.new("L", (3, 2), 10 * i) for i in range(13)], io.BytesIO()
    >>> pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    >>> decode_bands(file.getvalue(), name="x.tif", bands=13)[0, 0, :3].tolist()
    [0, 10, 20]
    """
    asked = Asked(name, bands, min_side, frame)
    picture = read_picture(data, asked)
    assert picture is not None  # Any picture was asked for.
    return to_pixels(picture, levels, asked)


def read_picture(data: bytes | str | os.PathLike[str], asked: Asked) -> Picture | None:
    """The picture as the file holds it, before anything is made black or white.

    Args:
        data: the encoded bytes, or the path of a file.
        asked: what of it.

    Returns:
        The picture; None for one of 8 bits where only others are asked for.

    Raises:
        ImageError: as ``decode_bands``.

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.fromarray(np.array([[0, 4095]], np.uint16)).save(file, "PNG")
    >>> read_picture(file.getvalue(), Asked("x.png", bands=1)).values.ravel().tolist()
    [0, 4095]
    """
    if not isinstance(data, bytes):
        _check_file(data)
    with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        decoder = decoder_of(head)
        if decoder is not None:
            picture = decoder.read(file, asked)
            eight = picture is not None and picture.values.dtype == np.uint8
            return None if asked.measured and eight else picture
    raise ImageError(not_an_image(asked.name))


def _check_file(path: str | os.PathLike[str]) -> None:
    try:
        check_regular(path)
    except ValueError as error:
        raise ImageError(str(error)) from error


def count_frames(path: str | os.PathLike[str], *, name: str) -> int:
    """How many examples a file is: the frames of DICOM, the slices of NIfTI, 1 for any other.

    Raises:
        ImageError: not an image, or a scan whose header cannot be read.
    """
    _check_file(path)
    with open(path, "rb") as file:
        decoder = decoder_of(file.read(HEAD_BYTES))
    if decoder is None:
        raise ImageError(not_an_image(name))
    return 1 if decoder.frames is None else decoder.frames(path, name)


def decoder_of(head: bytes) -> Decoder | None:
    """The row of the table for a file that begins with ``head``; None for no image."""
    _silence()
    return next((decoder for decoder in DECODERS if decoder.detect(head)), None)


def not_an_image(name: str) -> str:
    """The error text for a file in none of the formats."""
    return f"{name}: not an image in {', '.join(decoder.name for decoder in DECODERS)}"


def _prefix(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


def _pillow(format: str, file: IO[bytes], asked: Asked) -> Picture | None:
    from PIL import Image, UnidentifiedImageError

    name = asked.name
    try:
        with Image.open(file, formats=(format,)) as image:
            _check_size(image, name)
            if asked.measured and image.mode not in _MEASURED:
                return None
            if asked.bands in (1, 3):
                return _color_picture(image, asked)
            return _stacked_pages(image, name, asked.bands)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        hint = "; a page with more than four samples needs the extra geo"
        hint = hint if format == "TIFF" else ""
        raise ImageError(f"{name}: not a readable {format} image{hint}") from error
    # Pillow's parsers raise many types of error on damaged bytes, TypeError included.
    except Exception as error:
        raise ImageError(f"{name}: the image cannot be decoded ({error})") from error


def _tiff(file: IO[bytes], asked: Asked) -> Picture | None:
    _silence_libtiff()
    return read_tiff(file, asked, lambda: _pillow("TIFF", file, asked))


_LIBRARIES = r"(PIL|pydicom|tifffile|nibabel)\."
_LOGGERS = tuple(map(logging.getLogger, ("PIL", "pydicom", "tifffile", "nibabel")))
_IGNORED = ("ignore", None, Warning, re.compile(_LIBRARIES), 0)


def _silence() -> None:
    """Keeps the decoders' logs and warnings of damaged files off the terminal.

    They warn of every damaged tag, and of sizes that are refused only at twice as much; what
    matters is an ``ImageError``. The filter stays: images are decoded in threads, and taking it
    back in one would take it from another.
    """
    if _IGNORED not in warnings.filters:
        warnings.filterwarnings("ignore", module=_LIBRARIES)
    for logger in _LOGGERS:
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)


@functools.cache
def _silence_libtiff() -> None:
    """Keeps the lines off the terminal that libtiff itself writes about damaged files.

    Pillow's wheels bring the library, and have no setting for it. Where it comes from elsewhere,
    its lines remain.
    """
    import PIL

    package = Path(PIL.__file__).parent
    for path in (package.parent / "pillow.libs").glob("libtiff*"):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path))
            for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
                setter.argtypes, setter.restype = [ctypes.c_void_p], ctypes.c_void_p
                setter(None)


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
    # Before TIFF, whose first bytes the preamble of DICOM may hold.
    Decoder(
        "DICOM",
        lambda head: head[128:132] == b"DICM",
        read_dicom,
        frames=dicom_frames,
        group=dicom_group,
    ),
    Decoder("NIfTI", is_nifti, read_nifti, frames=nifti_frames),
    Decoder(
        "TIFF",
        _prefix(b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0"),
        _tiff,
    ),
    Decoder(
        "WEBP",
        lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP",
        functools.partial(_pillow, "WEBP"),
    ),
)
"""All formats. To add one, add a row."""

_ORIENTATION = 0x0112

_MEASURED = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}
"""Modes of one band of more than 8 bits."""

_SEVERAL_BANDS = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def _color_picture(image: Image.Image, asked: Asked) -> Picture:
    deep = _deep_colors(image)
    if asked.min_side is not None:
        _draft(image, asked.min_side)
    image.load()
    clear = image.info.get("transparency")
    image = _upright(image)
    if image.mode in _MEASURED:
        return _measured(np.array(image)[..., None], clear)
    if deep:
        _check_dark(image, asked.name)
    try:
        pixels = _converted(image, asked.bands)
    except ValueError as error:  # a mode that Pillow cannot convert
        raise ImageError(
            f"{asked.name}: {image.mode} pixels cannot be converted ({error})"
        ) from error
    return Picture(pixels)


def _check_dark(image: Image.Image, name: str) -> None:
    """Refuses measurements of 12 bits in 16, of which Pillow leaves 16 gray levels."""
    ends = zip(image.getbands(), image.getextrema(), strict=False)
    if all(isinstance(end, tuple) and end[1] < 16 for band, end in ends if band != "A"):
        raise ImageError(
            f"{name}: its 16-bit colors are all below 4096, and Pillow keeps the upper 8 bits of "
            "each; save it as a TIFF and install the extra geo"
        )


def _deep_colors(image: Image.Image) -> bool:
    """Whether each of several bands has 16 bits, of which Pillow reads 8."""
    if image.mode in _MEASURED:
        return False
    if image.format == "PNG":
        return any("16" in str(tile.args) for tile in image.tile)  # type: ignore[attr-defined]
    bits = getattr(image, "tag_v2", {}).get(258, (8,))
    return bool(max(bits if isinstance(bits, tuple) else (bits,)) > 8)


def _measured(values: np.ndarray, clear: Any = None) -> Picture:
    """Measurements; the value that is transparent in a PNG, where GDAL puts nodata, is none."""
    sixteen = values.dtype.kind == "u" and values.dtype.itemsize == 2
    values = values.astype(np.uint16) if sixteen else values
    if isinstance(clear, int) and (missing := values == clear).any():
        return Picture(np.where(missing, np.float32(np.nan), values.astype(np.float32)))
    return Picture(values, whole_range if sixteen else None)


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


def _converted(image: Image.Image, channels: int) -> np.ndarray:
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    pixels = np.array(image)
    return pixels[..., None] if channels == 1 else pixels


def _stacked_pages(image: Image.Image, name: str, bands: int) -> Picture:
    from PIL import ImageSequence

    pages: list[np.ndarray] = []
    modes: list[str] = []
    for page in ImageSequence.Iterator(image):
        _check_size(page, name)
        deep = _deep_colors(page)
        page.load()
        if deep:
            _check_dark(page, name)
        pages.append(_page_values(_upright(page), name))
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
    if len({page.dtype for page in pages}) > 1:
        raise ImageError(f"{name}: its pages must have the same number of bits")
    values = np.concatenate(pages, axis=2)
    return Picture(values) if values.dtype == np.uint8 else _measured(values)


def _page_values(page: Image.Image, name: str) -> np.ndarray:
    if page.mode in ("1", "L", *_MEASURED):
        return np.asarray(page if page.mode != "1" else page.convert("L"))[..., None]
    if page.mode in _SEVERAL_BANDS:
        return np.asarray(page).reshape(page.height, page.width, _SEVERAL_BANDS[page.mode])
    raise ImageError(
        f"{name}: pixels of mode {page.mode!r} have no fixed bands; save gray pages of 8 or 16 "
        "bits, or gray with alpha, RGBA or CMYK"
    )
