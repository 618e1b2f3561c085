"""Read zip archives and ``.npz`` archives from untrusted sources.

Archives are opened in memory, with a bound on their unpacked size, and are never unpacked to disk.
NumPy arrays are read without unpickling.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from flaxtransfer.paths import shortened, visible

__all__ = [
    "FOUND",
    "as_file",
    "check",
    "members",
    "most",
    "names",
    "opened",
    "read",
    "read_npz",
    "stated",
    "stored",
]


_RATIO, _SPARE = 50, 1 << 26
"""Weights hardly compress, but zeros do; a zip bomb expands more than a thousandfold."""

_PIECE = 1 << 20
"""Bytes unpacked at a time: zipfile, asked for all, unpacks more than the entry states."""

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
"""What torch, numpy and Keras write; zipfile cannot unpack the others piece by piece."""


FOUND = "found by the reader: "
"""How the keys of metadata begin under which a reader keeps what it has found itself."""


def stated(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata that a file may state: without keys of what readers find.

    >>> stated({"format": "pt", FOUND + "class names": "[]"})
    {'format': 'pt'}
    """
    return {key: text for key, text in metadata.items() if not key.startswith(FOUND)}


def most(size: int) -> int:
    """Maximum number of bytes of the arrays in a file with ``size`` bytes.

    >>> most(0)
    67108864
    """
    return _RATIO * size + _SPARE


class _View(io.RawIOBase):
    """Bytes as a file, without a copy of them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.place = memoryview(data), 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer from the current position; returns the number of bytes."""
        piece = self.data[self.place : self.place + len(buffer)]
        buffer[: len(piece)] = piece
        self.place += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position, and returns it."""
        start = (0, self.place, len(self.data))[whence]
        if start + offset < 0:
            raise OSError("the position must be in the file")
        self.place = start + offset
        return self.place

    def tell(self) -> int:
        """The position."""
        return self.place


class _Bounded(io.BufferedReader):
    """A buffered file that makes no room for more than it holds, whatever size is asked for."""

    def __init__(self, data: bytes | memoryview) -> None:
        super().__init__(_View(data))
        self.length = len(data)

    def read(self, size: int | None = -1) -> bytes:
        """At most so many bytes from the current position; all of them for -1 and None."""
        left = max(self.length - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


def as_file(data: bytes | memoryview) -> BinaryIO:
    """Bytes as a file to read, without a copy of them.

    >>> file = as_file(b"weights")
    >>> file.read(2), file.read(2**62), file.read()
    (b'we', b'ights', b'')
    """
    return _Bounded(data)


@contextmanager
def opened(data: bytes | memoryview) -> Iterator[zipfile.ZipFile]:
    """Opens and checks an archive, to read its files one by one.

    Args:
        data: the bytes of the archive.

    Raises:
        ValueError: an incomplete archive, one that would unpack to far more than weights do, or
            names that occur twice or lead out of a folder; also for errors inside the block.
    """
    try:
        with zipfile.ZipFile(as_file(data)) as archive:
            _check(archive, len(data))
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        # RuntimeError: an archive with a password, or an unknown compression.
        reason = shortened(visible(str(error)), 200)
        raise ValueError(f"incomplete or damaged zip archive: {reason}") from error


def members(data: bytes | memoryview) -> dict[str, bytes]:
    """The content of every file in an archive, by name.

    Raises:
        ValueError: as ``opened``.
    """
    with opened(data) as archive:
        return {name: read(archive, name) for name in _files(archive)}


def read(archive: zipfile.ZipFile, name: str) -> bytes:
    """The content of one file in an opened archive, no longer than its entry states.

    ``_check`` has bounded what the entries state; one that lies, and unpacks to more, is found by
    its checksum at the stated size.
    """
    pieces = []
    with archive.open(name) as file:
        while piece := file.read(_PIECE):
            pieces.append(piece)
    return b"".join(pieces)


def stored(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> memoryview | None:
    """The content of a file that is not compressed, in the bytes of its archive, without a copy.

    Returns:
        A part of ``data``, which lives as long as the part; None for a compressed file.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        return None
    # The file's own header, behind which its name and extras are. `archive.open`, which checks as
    # much, takes as long for each of hundreds of files as their checksums.
    at = entry.header_offset
    mark, flags, named, more = _HEADER.unpack(data[at : at + _HEADER.size])
    encoded = bytes(data[at + _HEADER.size : at + _HEADER.size + named])
    own = encoded.decode("utf-8" if flags & 0x800 else "cp437")
    if mark != b"PK\3\4" or flags & 0x61 or own != entry.orig_filename:
        raise zipfile.BadZipFile(f"the header of the file {name!r} is not that of the archive")
    start = at + _HEADER.size + named + more
    found = memoryview(data)[start : start + entry.file_size]
    if len(found) != entry.file_size:
        raise EOFError(f"the file {name!r} ends early")
    if entry.CRC is not None and zlib.crc32(found) != entry.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {name!r}")
    return found


_HEADER = struct.Struct("<4s2xH18xHH")
"""The mark, the flags, and the lengths of name and extras in the header of a file."""


def names(data: bytes | memoryview) -> list[str]:
    """The names of the files in an archive, in order.

    Raises:
        ValueError: as ``opened``.
    """
    with opened(data) as archive:
        return _files(archive)


def check(data: bytes | memoryview) -> None:
    """Checks an archive that another program will read.

    Raises:
        ValueError: as ``opened``.
    """
    names(data)


def _files(archive: zipfile.ZipFile) -> list[str]:
    return [entry.filename for entry in archive.infolist() if not entry.is_dir()]


def _check(archive: zipfile.ZipFile, size: int) -> None:
    if not all(archive.namelist()):  # `is_dir` of Python 3.11 fails for it
        raise ValueError("every file in the archive must have a name")
    if foreign := [e for e in archive.infolist() if e.compress_type not in _METHODS]:
        raise ValueError(
            f"its files must be stored or deflated, got compression method "
            f"{foreign[0].compress_type} for {foreign[0].filename[:80]!r}"
        )
    unfolded = sum(entry.file_size for entry in archive.infolist() if not entry.is_dir())
    if unfolded > most(size):
        raise ValueError(
            f"it would unpack from {size:,} to {unfolded:,} bytes, which arrays never do"
        )
    found = _files(archive)
    if len(set(found)) != len(found):
        raise ValueError("it holds two files with the same name")
    for name in found:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"it holds a file whose name leads out of the archive: {shortened(repr(name))}"
            )


def read_npz(data: bytes | memoryview) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Reads the bytes of an ``.npz`` file: arrays, no metadata and no notes.

    Raises:
        ValueError: a damaged archive, or arrays of Python objects, which would require unpickling.

    >>> file = io.BytesIO()
    >>> np.savez(file, **{"resnet/head/conv2d/bias": np.zeros(2)})
    >>> list(read_npz(file.getvalue())[0])
    ['resnet/head/conv2d/bias']
    """
    arrays = {}
    for name, content in members(data).items():
        try:
            arrays[name.removesuffix(".npy")] = _array(content)
        except Exception as error:
            # The exception of numpy for a damaged header depends on the damaged byte.
            reason = shortened(visible(str(error)), 200)
            raise ValueError(
                f"{shortened(repr(name))} in it is not a valid array: {reason}"
            ) from error
    return arrays, {}, []


def _array(content: bytes) -> np.ndarray:
    """The array; its header is compared with its bytes before allocation."""
    file = io.BytesIO(content)
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, by_columns, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, by_columns, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"the version of numpy's format must be 1 or 2, got {version}")
    if dtype.hasobject or dtype.fields or dtype.subdtype:
        raise ValueError(f"the dtype must be numeric, got {_plain(dtype)}")
    held, expected = len(content) - file.tell(), math.prod(shape) * dtype.itemsize
    if held != expected or min(shape, default=1) < 0:
        raise ValueError(f"its header states {expected:,} bytes, got {held:,}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if by_columns else "C")


def _plain(dtype: np.dtype) -> str:
    return re.sub(r"\s+", " ", str(dtype))[:80]
