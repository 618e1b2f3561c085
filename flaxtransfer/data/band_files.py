"""Image files with any number of bands, as far as Pillow reads them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from flaxtransfer.data.decode import FORMATS, ImageError, decode

if TYPE_CHECKING:
    from PIL import Image

_GRAY = {"1", "L", "I;16", "I;16L", "I;16B"}
"""Modes of one band whose black and white are known; 16 bits are scaled as ``decode`` does."""

_MANY = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}


def decode_bands(
    data: bytes | str | os.PathLike[str], *, name: str, bands: int, min_side: int | None = None
) -> np.ndarray:
    """Decodes an image of n bands, without any conversion of colours.

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
                pages.append(_pixels(page, name))
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


def _pixels(page: Image.Image, name: str) -> np.ndarray:
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
