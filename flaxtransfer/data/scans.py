"""Pictures of more than 8 bits: gray levels, DICOM, NIfTI and GeoTIFF.

A ``Picture`` holds what a file measures, ``Levels`` says which measurements are black and white,
and ``to_pixels`` makes uint8 of both. The readers need the extras ``dicom``, ``nifti`` and ``geo``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import logging
import math
import os
import re
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np

from flaxtransfer.paths import listing, shortened
from flaxtransfer.weights.preprocessing import Preprocessing

MOST_PIXELS = 50_000_000
"""Of an image, by its header: while transparency is composed over white, four pictures of four
bytes per pixel exist, 800 MB. A PNG of 20 kB may state 169 million pixels."""

MOST_BYTES = 4 * MOST_PIXELS
"""Of an image with all its bands, decoded, by its header: a TIFF of 0.4 MB may state 400 MB."""


class ImageError(ValueError):
    """An image that cannot be decoded; the text names the file and the reason."""


class MissingExtra(ImageError):
    """An image whose format needs a library that is not installed, as all others of it do."""


@dataclass(frozen=True)
class Asked:
    """What a decoder is asked for.

    Args:
        name: of the image, for errors.
        bands: channels; one and three are gray and RGB, every other number is taken as it is.
        min_side: see ``decode``.
        frame: of a file of several pictures, from 0; only DICOM and NIfTI have more than one.
        measured: whether a picture of 8 bits is of no interest: then None is returned for it.
    """

    name: str
    bands: int = 3
    min_side: int | None = None
    frame: int = 0
    measured: bool = False


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture as its file holds it.

    Args:
        values: ``[height, width, bands]``. uint8 are pixels, and final; every other dtype is
            measurements, NaN where there are none.
        own: how the file itself makes pixels of its values; None where it does not say.
        window: whether ``own`` is a window chosen for this file.
        inverted: whether the lowest value is white.
        names: of the bands; () if unknown.
        wavelengths: of the bands in nm; () if unknown.
    """

    values: np.ndarray
    own: Callable[[np.ndarray], np.ndarray] | None = None
    window: bool = False
    inverted: bool = False
    names: tuple[str, ...] = ()
    wavelengths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Levels:
    """The measurements that become black and white, for pictures of more than 8 bits.

    They are one fact of a data set, not of each picture: the same measurement is the same gray in
    all of them. A ``Preprocessing`` carries them with the weights.

    Args:
        black: of each band; () where each file has a window of its own.
        white: likewise; above black.
        names: of the bands; () if unknown.
        wavelengths: of the bands in nm; () if unknown.
        note: what was found, in one line.

    >>> Levels.of_window(40, 400, 1)
    Levels(black=(-160.0,), white=(239.0,), names=(), wavelengths=(), note='')
    """

    black: tuple[float, ...]
    white: tuple[float, ...]
    names: tuple[str, ...] = ()
    wavelengths: tuple[float, ...] = ()
    note: str = field(default="", compare=False)

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Levels | None:
        """The levels that belong to weights; None where they were trained on 8 bits."""
        p = preprocessing
        return cls(p.black, p.white, p.bands, p.wavelengths) if p.black else None

    @classmethod
    def of_window(cls, center: float, width: float, bands: int) -> Levels:
        """The levels of a window.

        Raises:
            ValueError: the width is not above 1.

        References:
            DICOM Standard, PS3.3, C.11.2.1.2.1: the linear function.
        """
        if not width > 1:
            raise ValueError(f"the width of a window must be > 1, got {width:g}")
        low = center - 0.5 - (width - 1) / 2
        return cls((low,) * bands, (low + width - 1,) * bands)

    def into(self, preprocessing: Preprocessing) -> Preprocessing:
        """The preprocessing with these levels, and the names of the bands where it has none."""
        count = len(preprocessing.mean)
        if not self.black:
            return preprocessing
        ends = (self.black, self.white)
        black, white = (each * count if len(each) == 1 else each for each in ends)
        names = self.names if len(self.names) == count else ()
        nm = self.wavelengths if len(self.wavelengths) == count else ()
        return replace(
            preprocessing,
            black=black,
            white=white,
            bands=preprocessing.bands or names,
            wavelengths=preprocessing.wavelengths or nm,
        )


def to_pixels(picture: Picture, levels: Levels | None, asked: Asked) -> np.ndarray:
    """uint8 pixels ``[height, width, bands]`` of a picture.

    8 bits stay as they are. Measurements become ``round(255 * (x - black) / (white - black))``,
    clipped, and black where there are none. Without levels a file's own window holds, or the whole
    range of 16-bit gray.

    Args:
        picture: from a decoder.
        levels: of the data set or the weights; None where none were measured.
        asked: what the decoder was asked for.

    Raises:
        ImageError: nothing says what is black and white, or bands in another order than the levels.

    >>> picture = Picture(np.array([[[0], [1000], [4095]]], np.uint16))
    >>> to_pixels(picture, Levels((0,), (4000,)), Asked("x", bands=1)).ravel().tolist()
    [0, 64, 255]
    """
    values = picture.values
    if values.dtype == np.uint8:
        return _as_many(values, asked.bands)
    if levels is not None:
        _check_names(picture.names, levels.names, asked.name)
        pixels = _scaled(values, levels)
    elif picture.own is not None:
        pixels = picture.own(values)
    else:
        low, high = _range(values)
        raise ImageError(
            f"{asked.name}: {values.dtype} pixels ({low:g} .. {high:g}) have no fixed black and "
            "white, and none were measured on training images; train with such images or with "
            "--window, or convert the file to 8 bits"
        )
    if picture.inverted:
        pixels = 255 - pixels
    if values.dtype.kind == "f":
        pixels[np.isnan(values)] = 0
    return _as_many(pixels, asked.bands)


def _as_many(pixels: np.ndarray, bands: int) -> np.ndarray:
    gray = pixels.shape[2] == 1 and bands == 3
    return np.repeat(pixels, 3, axis=2) if gray else pixels


def _range(values: np.ndarray) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    return (float(known.min()), float(known.max())) if known.size else (math.nan, math.nan)


def _scaled(values: np.ndarray, levels: Levels) -> np.ndarray:
    ends = {*zip(levels.black, levels.white, strict=True)}
    if len(ends) == 1:
        return between(values, *ends.pop())
    if values.shape[2] == 1:
        values = np.broadcast_to(values, (*values.shape[:2], len(levels.black)))
    bands = zip(np.moveaxis(values, 2, 0), levels.black, levels.white, strict=True)
    return np.stack([between(*band) for band in bands], axis=2)


def between(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8 from 0 at black to 255 at white, clipped and rounded; NaN becomes 0.

    >>> between(np.array([-5, 0, 25, 100, 200]), 0, 100).tolist()
    [0, 0, 64, 255, 255]
    """
    if values.dtype == np.uint16 and values.size > 2**16:
        return _table(black, white).take(values)
    flat, pixels = values.reshape(-1), np.empty(values.size, np.uint8)
    # In pieces, for float64 takes eight times the memory of the result.
    for start in range(0, len(flat), _PIECE):
        scaled = (flat[start : start + _PIECE] - np.float64(black)) * (255 / (white - black))
        scaled = np.nan_to_num(scaled, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
        pixels[start : start + _PIECE] = np.rint(np.clip(scaled, 0, 255))
    return pixels.reshape(values.shape)


@functools.lru_cache(maxsize=64)
def _table(black: float, white: float) -> np.ndarray:
    """The pixel of every value of 16 bits, kept for the next image: levels are those of a set."""
    return between(np.arange(2**16), black, white)


_PIECE = 2**20


def _check_names(found: Sequence[str], wanted: Sequence[str], name: str) -> None:
    """Refuses bands that are called alike and stand elsewhere; other schemes cannot be compared."""
    here, there = ([_plain_name(each) for each in names] for names in (found, wanted))
    if any(each in there and there.index(each) != i for i, each in enumerate(here)):
        raise ImageError(
            f"{name}: its bands must be {listing(wanted, most=13)}, got {listing(found, most=13)}"
        )


def _plain_name(text: str) -> str:
    """A band's name as it is compared: "B01" and "b1" are one."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", text.casefold())


@contextlib.contextmanager
def _extra(extra: str, name: str) -> Iterator[None]:
    """Names the extra where a library cannot be imported.

    Raises:
        MissingExtra: see above.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{name}: this file needs the extra {extra}: pip install 'flaxtransfer[{extra}]' "
            f"({error})"
        ) from error


# DICOM

_IMPORT = threading.Lock()

_PICTURE_TAGS = """
    Rows Columns SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored
    PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit NumberOfFrames Modality
    FloatPixelPaddingValue FloatPixelPaddingRangeLimit
    DoubleFloatPixelPaddingValue DoubleFloatPixelPaddingRangeLimit
    RescaleSlope RescaleIntercept ModalityLUTSequence
    VOILUTSequence WindowCenter WindowWidth VOILUTFunction
    RedPaletteColorLookupTableDescriptor RedPaletteColorLookupTableData
    GreenPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableData
    BluePaletteColorLookupTableDescriptor BluePaletteColorLookupTableData
    SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
"""
"""All that is read of a header for a picture: no name and no birth date ever is."""


def _pydicom(name: str) -> Any:
    """The library, which says nothing of damage; an error is raised of it."""
    with _IMPORT, _extra("dicom", name):
        # gdcm asks for a module of Python 2, and would take any folder called "dl" for it.
        hidden = "dl" not in sys.modules
        if hidden:
            sys.modules["dl"] = None  # type: ignore[assignment]
        try:
            import pydicom
            import pydicom.pixels
        finally:
            if hidden:
                del sys.modules["dl"]
    logger = logging.getLogger("pydicom")
    if logger.level in (logging.NOTSET, logging.WARNING):  # As pydicom itself sets it.
        logger.setLevel(logging.CRITICAL)
    if (gdcm := sys.modules.get("gdcm")) is not None:
        for kind in ("Error", "Warning", "Debug"):
            getattr(gdcm.Trace, f"{kind}Off")()
    return pydicom


_DEFLATED = b"1.2.840.10008.1.2.1.99"

_MOST_META = 2**16
"""Bytes of what stands before a data set, and says whether it is deflated."""


@contextlib.contextmanager
def _inflated(path: str | os.PathLike[str] | IO[bytes], name: str) -> Iterator[IO[bytes]]:
    """A DICOM file at its start; a deflated data set is inflated, to a size that fits.

    pydicom would inflate it to whatever size, and finds no picture in it.

    Raises:
        ImageError: deflated data that are damaged or too large.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(path, str | os.PathLike):
            file: IO[bytes] = stack.enter_context(open(path, "rb"))
        else:
            file = path
        file.seek(0)
        head = file.read(_MOST_META)
        file.seek(0)
        # The first element says how long the meta information is.
        known = head[132:140] == b"\x02\x00\x00\x00UL\x04\x00"
        end = 144 + int.from_bytes(head[140:144], "little") if known else len(head)
        if _DEFLATED not in head[:end]:
            yield file
            return
        file.seek(end)
        unzip = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unzip.decompress(file.read(MOST_BYTES), MOST_BYTES)
        except zlib.error as error:
            raise ImageError(f"{name}: the DICOM file cannot be inflated ({error})") from error
        if not unzip.eof:
            raise ImageError(
                f"{name}: a deflated DICOM file must be whole and inflate to at most "
                f"{MOST_BYTES:,} bytes, got {len(data):,} and no end"
            )
        plain = _DEFLATED.removesuffix(b".99").ljust(len(_DEFLATED), b"\0")
        yield io.BytesIO(head[:end].replace(_DEFLATED, plain) + data)


def _header(file: IO[bytes], name: str, tags: Sequence[str]) -> Any:
    pydicom = _pydicom(name)
    try:
        file.seek(0)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
        for _ in header:  # Values are read when they are looked at.
            pass
        return header
    # Its parser raises many types of error on damaged bytes, and quotes them: they may be a name.
    except Exception as error:
        kind = type(error).__name__
        raise ImageError(f"{name}: the DICOM header cannot be read ({kind})") from error


def _number(header: Any, tag: str, default: int = 0) -> int:
    try:
        return int(header.get(tag) or default)
    except (TypeError, ValueError):
        return -1


def _check_picture(header: Any, name: str) -> None:
    if _number(header, "Rows") < 1:
        what = re.sub("[^A-Z0-9]", "", str(header.get("Modality") or ""))[:16] or "unknown"
        raise ImageError(f"{name}: a DICOM file without a picture (modality {what})")


def dicom_frames(path: str | os.PathLike[str], name: str) -> int:
    """How many pictures a DICOM file states.

    Raises:
        ImageError: no readable header, no picture, or more frames than the file has room for.
    """
    with _inflated(path, name) as file:
        header = _header(file, name, ("Modality", "Rows", "NumberOfFrames"))
        size = file.seek(0, os.SEEK_END)
    _check_picture(header, name)
    frames = _number(header, "NumberOfFrames", 1)
    # In a compressed file 8 bytes stand before each frame.
    if not 1 <= frames <= max(1, size // 8):
        got = f"{frames:,}" if frames > 0 else "none"
        raise ImageError(
            f"{name}: NumberOfFrames must be 1 or more and fit into the file, got {got}"
        )
    return frames


def dicom_group(path: str | os.PathLike[str], name: str) -> str:
    """A digest of whose picture it is: the patient, else the study; "" if neither is stated.

    It keeps an identifier from being read, but not from somebody who can try all identifiers.

    Raises:
        ImageError: no readable header.
    """
    with _inflated(path, name) as file:
        header = _header(file, name, ("PatientID", "StudyInstanceUID"))
    whose = str(header.get("PatientID") or "") or str(header.get("StudyInstanceUID") or "")
    return hashlib.sha256(whose.encode(errors="replace")).hexdigest()[:16] if whose else ""


def read_dicom(file: IO[bytes], asked: Asked) -> Picture | None:
    """Reads one frame of a DICOM file.

    Gray values are those after the modality transform (Hounsfield units for CT); a window or table
    of the file is applied to them where no levels are given. Padding is no measurement. Of several
    windows the first is the file's own.

    References:
        DICOM Standard, PS3.3, C.11.1 and C.11.2: the modality and VOI look-up tables.
    """
    with _inflated(file, asked.name) as plain:
        header = _header(plain, asked.name, _PICTURE_TAGS.split())
        return _checked_picture(plain, header, asked)


def _checked_picture(file: IO[bytes], header: Any, asked: Asked) -> Picture | None:
    try:
        return _dicom_picture(file, header, asked)
    except ImageError:
        raise
    except Exception as error:  # Decoders of three libraries, on damaged bytes.
        text = re.sub(r"b(['\"]).*?\1", "...", _brief(error))
        if "plugins" in text:
            syntax = header.file_meta.get("TransferSyntaxUID")
            raise ImageError(
                f"{asked.name}: {getattr(syntax, 'name', 'unknown')} cannot be decompressed ({text}"
                "); the extra dicom reads most, pylibjpeg-openjpeg HTJ2K, and pylibjpeg-libjpeg, "
                "which is under the GPL, the rest of JPEG"
            ) from error
        raise ImageError(f"{asked.name}: the picture cannot be read ({text})") from error


def _dicom_picture(file: IO[bytes], header: Any, asked: Asked) -> Picture | None:
    rows, columns = (_number(header, tag) for tag in ("Rows", "Columns"))
    bits, stored = (_number(header, tag) for tag in ("BitsAllocated", "BitsStored"))
    _check_picture(header, asked.name)
    check_size(columns, rows, _number(header, "SamplesPerPixel", 1), bits, asked.name)
    color = str(header.get("PhotometricInterpretation", ""))
    part = _of_frame(header, asked.frame)
    window = _window(part) if color.startswith("MONOCHROME") else None
    plain = stored == 8 and window is None and not header.get("PixelRepresentation")
    plain = plain and not part.get("ModalityLUTSequence") and _rescale(part) == (1, 0)
    if asked.measured and (plain or color == "PALETTE COLOR"):
        return None
    processing = _pydicom(asked.name).pixels
    file.seek(0)
    pixels: np.ndarray = processing.pixel_array(file, index=asked.frame)
    if color == "PALETTE COLOR":
        table = processing.apply_color_lut(pixels, header)
        pixels = table if table.dtype == np.uint8 else (table >> 8).astype(np.uint8)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 3:
        return Picture(_colors(pixels, asked), whole_range if pixels.dtype == np.uint16 else None)
    _bands_of(1, asked)
    inverted = color == "MONOCHROME1"
    missing = _padding(header, pixels)
    if plain:
        shown = np.minimum(pixels, 255).astype(np.uint8)  # 8 bits may be stored in 16.
        shown = 255 - shown if inverted else shown
        return Picture(shown if missing is None else np.where(missing, np.uint8(0), shown))
    values = processing.apply_modality_lut(pixels, part)
    # Machines read either order of bytes; 8 bits that are no final pixels are numbers, too.
    values = values.astype(values.dtype.newbyteorder("=") if values.itemsize > 1 else np.int16)
    if missing is not None:
        values = np.where(missing, np.nan, values)
    if values.dtype == np.float64 and bits <= 16:
        values = values.astype(np.float32)
    return Picture(values, window, window is not None, inverted)


def _of_frame(header: Any, frame: int) -> Any:
    """The header with the transforms of one frame, which enhanced files keep in sequences."""
    for groups, index in (
        (header.get("SharedFunctionalGroupsSequence"), 0),
        (header.get("PerFrameFunctionalGroupsSequence"), frame),
    ):
        if groups and index < len(groups):
            for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in groups[index].get(name) or ():
                    header.update(item)
    return header


def _rescale(part: Any) -> tuple[float, float]:
    """Slope and intercept of the modality transform."""
    slope, intercept = part.get("RescaleSlope"), part.get("RescaleIntercept")
    given = slope is not None and intercept is not None
    return (float(slope), float(intercept)) if given else (1.0, 0.0)


def _padding(header: Any, pixels: np.ndarray) -> np.ndarray | None:
    """Where stored values are padding; None for a file that does not say."""
    kind = {"f4": "Float", "f8": "DoubleFloat"}.get(pixels.dtype.str[1:], "")
    first, last = (header.get(f"{kind}PixelPadding{end}") for end in ("Value", "RangeLimit"))
    if first is None:
        return None
    low, high = sorted(float(first if each is None else each) for each in (first, last))
    return np.asarray((pixels >= low) & (pixels <= high))


def _window(part: Any) -> Callable[[np.ndarray], np.ndarray] | None:
    """The table or window of a file, as a function to uint8; None if it has none."""
    if part.get("VOILUTSequence"):
        item = part.VOILUTSequence[0]
        count, first, depth = (int(each) for each in item.LUTDescriptor)
        count = count or 2**16
        data, order = item.LUTData, "<u2" if part.original_encoding[1] else ">u2"
        if depth == 8 and len(data) < 2 * count:
            order = "u1"
        entries = np.frombuffer(data, order) if isinstance(data, bytes) else np.asarray(data)
        if len(entries) < count:
            raise ValueError(f"its VOI table states {count} entries and has {len(entries)}")
        table = between(entries[:count].astype(np.float64), 0, 2**depth - 1)
        return functools.partial(_looked_up, table=table, first=first)
    try:
        center, width = (_first(part[tag].value) for tag in ("WindowCenter", "WindowWidth"))
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    if not (math.isfinite(center) and math.isfinite(width)):
        return None
    kind = str(part.get("VOILUTFunction") or "LINEAR").upper()
    if kind == "SIGMOID" and width > 0:
        # Beyond 50 nothing is left of an exponential, which would overflow at 710.
        slope = -4 / width
        return lambda x: between(1 / (1 + np.exp(np.clip(slope * (x - center), -50, 50))), 0, 1)
    shift, less = (0.0, 0.0) if kind == "LINEAR_EXACT" else (0.5, 1.0)
    low, span = center - shift - (width - less) / 2, width - less
    if span < 0 or kind not in ("LINEAR", "LINEAR_EXACT"):
        return None
    if not span:
        return lambda x: np.where(x > low, 255, 0).astype(np.uint8)
    return lambda x: between(x, low, low + span)


def _looked_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """The entry at or below each value, of a table that starts with that of ``first``."""
    places = np.floor(np.nan_to_num(values.astype(np.float64)) - first)
    found: np.ndarray = table[np.clip(places, 0, len(table) - 1).astype(int)]
    return found


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])


# NIfTI

_MOST_VOLUME = 2**29
"""Bytes of a volume, which is held in memory while its slices are read."""

_GZIP, _NIFTI_HEADER = b"\x1f\x8b", 544


def is_nifti(head: bytes) -> bool:
    """Whether a file that begins so is a NIfTI volume, compressed or not.

    >>> is_nifti(b"label,path")
    False
    """
    with contextlib.suppress(zlib.error):
        head = _unzipped(head, _NIFTI_HEADER)
    for order in "<>":
        if len(head) >= 56 and struct.unpack_from(f"{order}i", head)[0] == 348:
            magic = head[344:348]  # Not all of it may be there, if it is compressed.
            return (
                b"n+1\0".startswith(magic)
                and 1 <= struct.unpack_from(f"{order}h", head, 40)[0] <= 7
            )
    return head[4:8] == b"n+2\0"


def _unzipped(data: bytes, most: int) -> bytes:
    """The first bytes of a file, decompressed where it is compressed."""
    if not data.startswith(_GZIP):
        return data[:most]
    return zlib.decompressobj(31).decompress(data, most)


def _nifti(name: str) -> Any:
    with _extra("nifti", name):
        import nibabel
    return nibabel


def _nifti_header(head: bytes, name: str) -> tuple[Any, tuple[int, ...], list[int]]:
    """Header, shape of three or four axes, and which axis of the body each of three axes is."""
    library = _nifti(name)
    kind = library.Nifti1Header if head[4:8] != b"n+2\0" else library.Nifti2Header
    try:
        header = kind.from_fileobj(io.BytesIO(head), check=False)
        found = tuple(int(n) for n in header.get_data_shape())
        shape = (*found, 1, 1, 1)[:3] + tuple(n for n in found[3:] if n != 1)
        axes = library.orientations.io_orientation(header.get_best_affine())[:, 0]
        of_body = [0, 1, 2] if np.isnan(axes).any() else [int(axis) for axis in axes]
        dtype = header.get_data_dtype()
    except Exception as error:  # Of many kinds, on damaged bytes.
        raise ImageError(f"{name}: the NIfTI header cannot be read ({_brief(error)})") from error
    if min(shape) < 1 or len(shape) > 4 or dtype.kind not in "iuf":
        raise ImageError(
            f"{name}: a NIfTI volume must have numbers on three axes, or four with bands, got "
            f"{dtype.name} {list(found)}"
        )
    size = math.prod(shape) * dtype.itemsize
    if size > _MOST_VOLUME:
        raise ImageError(
            f"{name}: a NIfTI volume must have at most {_MOST_VOLUME:,} bytes, got {size:,}"
        )
    return header, shape, of_body


def nifti_frames(path: str | os.PathLike[str], name: str) -> int:
    """How many slices across the body a NIfTI file states, from the feet to the head.

    Raises:
        ImageError: no readable header.
    """
    with open(path, "rb") as file:
        head = _unzipped(file.read(2**16), _NIFTI_HEADER)
    _, shape, of_body = _nifti_header(head, name)
    return shape[of_body.index(2)]


def read_nifti(file: IO[bytes], asked: Asked) -> Picture | None:
    """Reads one slice of a NIfTI volume, across the body, as a radiologist sees it.

    The volume is turned to the closest of the standard orientations. The first row of a slice is
    the front of the body, and the first column its right side. A fourth axis holds bands. Values
    are scaled as the header says; its display range is used where no levels are given.

    References:
        R. W. Cox et al., "A (Sort of) New Image Data Format Standard: NIfTI-1", 2004.
    """
    key = None
    with contextlib.suppress(OSError):  # Bytes in memory are no file.
        state = os.fstat(file.fileno())
        key = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
    with _VOLUME:
        volume = None if key is None else _LAST.get(key)
        if volume is None:
            volume = _nifti_volume(file, asked)
            _LAST.clear()
            if key is not None:
                _LAST[key] = volume
    values, window, final = volume
    if asked.measured and final:
        return None
    if not asked.frame < values.shape[2]:
        raise ImageError(f"{asked.name}: there are {values.shape[2]} slices, got {asked.frame + 1}")
    piece = values[:, :, asked.frame]
    pixels = np.flip(piece, (0, 1)).swapaxes(0, 1)
    _bands_of(pixels.shape[2], asked)
    return Picture(np.ascontiguousarray(pixels), window, window is not None)


_VOLUME = threading.Lock()
_LAST: dict[Any, tuple[np.ndarray, Callable[[np.ndarray], np.ndarray] | None, bool]] = {}
"""The volume that was read last: its slices are asked for one after the other."""


def _nifti_volume(
    file: IO[bytes], asked: Asked
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray] | None, bool]:
    """Values ``[left to right, back to front, feet to head, bands]``, own window, and whether they
    are pixels of 8 bits.
    """
    library, name = _nifti(asked.name), asked.name
    file.seek(0)
    data = file.read(_MOST_VOLUME)
    try:
        header, shape, _ = _nifti_header(_unzipped(data, _NIFTI_HEADER), name)
        check_size(shape[0], shape[1], 1, header.get_data_dtype().itemsize * 8, name)
        most = int(header.get_data_offset()) + math.prod(shape) * header.get_data_dtype().itemsize
        whole = _unzipped(data, most)
        kind = library.Nifti1Image if len(header.binaryblock) == 348 else library.Nifti2Image
        image = kind.from_bytes(whole)
        values = np.asanyarray(library.as_closest_canonical(image).dataobj)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"{name}: the volume cannot be read ({_brief(error)})") from error
    stored = header.get_data_dtype()
    height, width, slices = (*values.shape, 1, 1, 1)[:3]
    values = values.reshape(height, width, slices, -1)
    if values.dtype == np.float64 and stored.itemsize <= 2:
        values = values.astype(np.float32)
    elif values.dtype.kind in "iu" and values.itemsize > 2:
        values = values.astype(np.float64)
    elif values.dtype == np.int8:
        values = values.astype(np.int16)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    low, high = float(header["cal_min"]), float(header["cal_max"])
    window = functools.partial(between, black=low, white=high) if high > low else None
    return values, window, values.dtype == np.uint8


# TIFF

_NODATA, _METADATA = 42113, 42112  # tags of GDAL

_MOST_PAGES = 10_000


def read_tiff(file: IO[bytes], asked: Asked, plain: Callable[[], Picture | None]) -> Picture | None:
    """Reads a TIFF of more than 8 bits, more than four bands, or with missing pixels.

    Bands may lie one after the other, pixel by pixel, or in pages. Overviews are left out. Pixels
    that equal the file's nodata value, or are masked, are no measurement. Scale and offset of GDAL
    are applied.

    Args:
        file: at its start.
        asked: see there.
        plain: reads what any other program reads alike: 8 bits, and everything without the extra.

    Raises:
        ImageError: too large, damaged, or with another number of bands.
    """
    try:
        import tifffile
    except ModuleNotFoundError:
        return plain()
    try:
        with tifffile.TiffFile(file) as tiff:
            first = tiff.pages.first
            if not (
                first.bitspersample > 8
                or first.samplesperpixel > 4
                or _NODATA in first.tags
                or asked.bands not in (1, 3)
            ):
                file.seek(0)
                return plain()
            if asked.measured and first.dtype == np.uint8:
                return None
            return _tiff_picture(tiff, asked)
    except ImageError:
        raise
    # Its parser raises many types of error on damaged bytes, and decoders some of their own.
    except Exception as error:
        if "imagecodecs" in str(error):
            with _extra("geo", asked.name):
                import imagecodecs  # noqa: F401
        raise ImageError(f"{asked.name}: the image cannot be decoded ({_brief(error)})") from error


def _tiff_picture(tiff: Any, asked: Asked) -> Picture:
    pages, masks = _pages(tiff, asked)
    first = pages[0]
    for page in (*pages, *masks):
        width, height = page.imagewidth, page.imagelength
        tile = max(1, page.tilewidth) * max(1, page.tilelength) if page.is_tiled else 0
        bits = page.bitspersample
        check_size(width, height, page.samplesperpixel * len(pages), bits, asked.name, tile)
    if first.dtype is None or first.dtype.kind not in "biuf":
        raise ImageError(f"{asked.name}: {first.dtype or 'unknown'} pixels are not supported")
    if len({(page.imagewidth, page.imagelength) for page in pages}) > 1:
        raise ImageError(f"{asked.name}: its {len(pages)} pages differ in size")
    _check_colors(first, asked)
    values = np.concatenate([_samples(page) for page in pages], axis=2)
    if values.dtype == bool:
        values = values.astype(np.uint8) * (1 if first.photometric == _PALETTE else 255)
    elif first.bitspersample < 8:
        values = values.astype(np.int16)
    missing = _missing(first, masks, values)
    if first.photometric == _PALETTE and asked.bands in (1, 3):
        return _palette_picture(first, values[..., 0], missing, asked)
    items = _items(first)
    values, changed = _rescaled(values, items)
    own = None
    inverted = first.photometric == 0
    if inverted and values.dtype == np.uint8:
        values, inverted = 255 - values, False
    if values.dtype == np.uint8:
        values = np.where(missing, np.uint8(0), values) if missing is not None else values
    elif missing is not None:
        exact = np.float32 if values.dtype.itemsize <= 2 else np.float64
        values = np.where(missing, np.nan, values.astype(exact))
    if values.dtype == np.uint16 and not changed:
        own = whole_range
    turned = _upright(values, first.tags.valueof(274, 1))
    names = _named(items, "DESCRIPTION", values.shape[2])
    nm = _wavelengths(items, values.shape[2])
    if asked.bands == 1 and values.shape[2] == 3:
        names, nm = (), ()
    return Picture(_colors(turned, asked), own, False, inverted, names, nm)


_PALETTE, _YCBCR = 3, 6
_LAB = {8: "CIELAB", 9: "ICCLAB", 10: "ITULAB", 32845: "LogLuv"}
"""Codes of what the samples of a TIFF are, other than gray, RGB or bands."""


def _check_colors(first: Any, asked: Asked) -> None:
    """Refuses colors that neither are RGB nor become so when they are decoded."""
    kind = _LAB.get(first.photometric)
    if first.photometric == _YCBCR and first.compression not in (6, 7):  # JPEG
        kind = "YCbCr"
    if kind and asked.bands in (1, 3):
        raise ImageError(f"{asked.name}: its colors must be RGB or gray, got {kind}; convert it")


def _palette_picture(
    first: Any, index: np.ndarray, missing: np.ndarray | None, asked: Asked
) -> Picture:
    """The colors of a palette, of which the upper 8 bits are taken, as Pillow does."""
    pixels = np.moveaxis((first.colormap >> 8).astype(np.uint8)[:, index], 0, 2)
    if missing is not None:
        pixels = np.where(missing, np.uint8(0), pixels)
    turned = _upright(pixels, first.tags.valueof(274, 1))
    return Picture(_colors(turned, asked))


def whole_range(values: np.ndarray) -> np.ndarray:
    """16-bit gray of photographs: 0 .. 65535 to 0 .. 255, ``round(x / 257)``.

    >>> whole_range(np.array([0, 128, 129, 65535], np.uint16)).tolist()
    [0, 0, 1, 255]
    """
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _pages(tiff: Any, asked: Asked) -> tuple[list[Any], list[Any]]:
    """The pages that hold the bands, and masks; of one or three bands the first page alone."""
    pages: list[Any] = []
    masks: list[Any] = []
    for page in itertools.islice(tiff.pages, _MOST_PAGES):
        if page.subfiletype & 4:
            masks.append(page)
        elif not page.is_reduced and (not pages or asked.bands not in (1, 3)):
            pages.append(page)
        if len(pages) > asked.bands:  # Already one too many.
            break
    found = sum(page.samplesperpixel for page in pages)
    alpha = any(extra in (1, 2) for extra in pages[0].extrasamples)
    _bands_of(found, asked, f"{len(pages)} page{'s' * (len(pages) > 1)}", alpha=alpha)
    return pages, masks


def _samples(page: Any) -> np.ndarray:
    """``[height, width, bands]`` of one page."""
    values = page.asarray().reshape(page.shape)
    axes = page.axes.replace("Z", "").replace("T", "")
    if values.ndim == 2:
        return np.asarray(values[..., None])
    return np.asarray(np.moveaxis(values, 0, 2) if axes == "SYX" else values)


def _missing(first: Any, masks: Sequence[Any], values: np.ndarray) -> np.ndarray | None:
    """Where a TIFF has no measurement, bool like the values; None where it has them all."""
    found = np.zeros(values.shape, bool)
    with contextlib.suppress(ValueError, OverflowError):
        nodata = float(str(first.tags.valueof(_NODATA, "nan")).strip(" \0") or "nan")
        if values.dtype.kind == "f":
            # A float32 holds the nearest number to what the text says, or infinity.
            with np.errstate(over="ignore"):
                found |= values == values.dtype.type(nodata)
        elif math.isfinite(nodata):
            found |= values == nodata
    for mask in masks:
        if (mask.imagelength, mask.imagewidth) == values.shape[:2]:
            found |= _samples(mask)[..., :1] == 0
    return found if found.any() else None


def _items(first: Any) -> list[Any]:
    """The entries of GDAL's metadata; none where they cannot be read."""
    text = str(first.tags.valueof(_METADATA, ""))
    # Entities may unfold to any size, and GDAL writes none.
    if not text or len(text) > 2**20 or "<!" in text:
        return []
    try:
        return list(ElementTree.fromstring(text.strip("\0")).iter("Item"))
    except ElementTree.ParseError:
        return []


def _texts(items: Sequence[Any], name: str, bands: int) -> tuple[str, ...]:
    """The entry of this name of each band; "" for a band without one."""
    found = {
        each.get("sample"): (each.text or "").strip()
        for each in items
        if (each.get("name") or "").upper() == name and each.get("sample") is not None
    }
    return tuple(found.get(str(band), "") for band in range(bands))


def _named(items: Sequence[Any], name: str, bands: int) -> tuple[str, ...]:
    """The entries of this name, one for each band; () unless there is one for each."""
    texts = _texts(items, name, bands)
    return texts if all(texts) and (name != "DESCRIPTION" or len(set(texts)) == bands) else ()


def _wavelengths(items: Sequence[Any], bands: int) -> tuple[float, ...]:
    """Centers of the bands in nm; () where the file does not state them."""
    try:
        micro = [float(text) for text in _named(items, "CENTRAL_WAVELENGTH_UM", bands)]
        plain = [float(text) for text in _named(items, "WAVELENGTH", bands)]
    except ValueError:
        return ()
    units = "".join(_named(items, "WAVELENGTH_UNITS", bands)).lower()
    found = [1000 * each for each in micro] or [
        each * (1000 if "micro" in units else 1) for each in plain
    ]
    return tuple(round(nm, 6) for nm in found) if all(nm >= 100 for nm in found) else ()


def _rescaled(values: np.ndarray, items: Sequence[Any]) -> tuple[np.ndarray, bool]:
    """Values in the unit of the file: times scale, plus offset."""
    bands = values.shape[2]
    try:
        # GDAL leaves out what is 1 or 0.
        scale = [float(text or 1) for text in _texts(items, "SCALE", bands)]
        offset = [float(text or 0) for text in _texts(items, "OFFSET", bands)]
    except ValueError:
        return values, False
    if not all(map(math.isfinite, (*scale, *offset))) or not all(scale):
        return values, False
    if set(scale) == {1.0} and not any(offset):
        return values, False
    return (values * np.array(scale) + np.array(offset)).astype(np.float32), True


_ORIENTATIONS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


def _upright(values: np.ndarray, orientation: Any) -> np.ndarray:
    turn = _ORIENTATIONS.get(orientation)
    return values if turn is None else turn(values)


# What the readers share


def check_size(width: int, height: int, bands: int, bits: int, name: str, tile: int = 0) -> None:
    """Refuses by the header, before a pixel is decoded.

    Args:
        width: in px.
        height: in px.
        bands: samples of a pixel.
        bits: of a sample.
        name: of the image, for errors.
        tile: px of a tile, which may be larger than the image.

    Raises:
        ImageError: see above.
    """
    pixels = max(width * height, tile)
    if pixels > MOST_PIXELS:
        raise ImageError(
            f"{name}: an image must have at most {MOST_PIXELS:,} px, got {width:,} x {height:,} px"
            + (f" in tiles of {tile:,} px" if tile == pixels else "")
            + "; make it smaller"
        )
    if (size := pixels * bands * max(bits, 8) // 8) > MOST_BYTES:
        raise ImageError(
            f"{name}: an image must have at most {MOST_BYTES:,} bytes when it is decoded, got "
            f"{size:,} ({width:,} x {height:,} px, {bands} bands of {bits} bits); cut it into tiles"
        )


def _bands_of(found: int, asked: Asked, held: str = "", *, alpha: bool = False) -> None:
    """Refuses another number of bands than was asked for."""
    if found == asked.bands or (found in (1, 3) and asked.bands in (1, 3)):
        return
    raise ImageError(
        f"{asked.name}: {asked.bands} bands were asked for and the file holds {found}"
        + (f" ({held}{', the last is alpha' if alpha else ''})" if held else "")
        + f"; {'transfer with bands=' + str(found) + ' (--bands ' + str(found) + ')'}"
        + ", or give files with the same bands"
    )


_LUMA = (0.299, 0.587, 0.114)


def _colors(values: np.ndarray, asked: Asked) -> np.ndarray:
    """Color as gray where one band is asked for (luma of ITU-R 601-2)."""
    _bands_of(values.shape[2], asked)
    if asked.bands == 1 and values.shape[2] == 3:
        gray: np.ndarray = (values @ np.array(_LUMA))[..., None]
        return np.rint(gray).astype(np.uint8) if values.dtype == np.uint8 else gray
    return values


def _brief(error: BaseException) -> str:
    """An error of a library in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return shortened(text, 200)
