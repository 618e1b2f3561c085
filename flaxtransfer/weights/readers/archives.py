"""Zip archives and NumPy archives, bounded and read without unpickling.

Zip archives that strangers made: opened in memory, bounded, and never unpacked to a disk.

numpy's archives of named arrays, read without unpickling.
"""

import io
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

import numpy as np
from numpy.lib import format as npy

__all__ = ["check", "members", "most", "names", "opened", "read_npz"]


_RATIO, _SPARE = 50, 1 << 26
"""Weights hardly compress, but heads of zeros do; a zip bomb unfolds a thousandfold and more."""


def most(size: int) -> int:
    """Bytes that the arrays of a file of so many bytes may unfold to.

    >>> most(0)
    67108864
    """
    return _RATIO * size + _SPARE


@contextmanager
def opened(data: bytes) -> Iterator[zipfile.ZipFile]:
    """An archive that was looked at, to read files from one by one.

    Args:
        data: the bytes of the archive.

    Raises:
        ValueError: bytes that are no complete archive, that would unfold to far more than weights
            do, names that occur twice or lead out of a folder; also from within the block.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check(archive, len(data))
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        # RuntimeError is that of an archive with a password, or of an unknown compression.
        raise ValueError(f"no complete zip archive: {error}") from error


def members(data: bytes) -> dict[str, bytes]:
    """The content of every file in an archive, by name.

    Raises:
        ValueError: as `opened`.
    """
    with opened(data) as archive:
        return {name: archive.read(name) for name in _files(archive)}


def names(data: bytes) -> list[str]:
    """The names of the files in an archive, in its order.

    Raises:
        ValueError: as `opened`.
    """
    with opened(data) as archive:
        return _files(archive)


def check(data: bytes) -> None:
    """Looks at an archive that another program will read.

    Raises:
        ValueError: as `opened`.
    """
    names(data)


def _files(archive: zipfile.ZipFile) -> list[str]:
    return [entry.filename for entry in archive.infolist() if not entry.is_dir()]


def _check(archive: zipfile.ZipFile, size: int) -> None:
    if not all(archive.namelist()):  # Python 3.11 cannot even tell whether that is a folder
        raise ValueError("it holds a file without a name")
    unfolded = sum(entry.file_size for entry in archive.infolist() if not entry.is_dir())
    if unfolded > most(size):
        raise ValueError(
            f"it would unfold from {size:,} to {unfolded:,} bytes, which no weights do"
        )
    found = _files(archive)
    if len(set(found)) != len(found):
        raise ValueError("it holds two files of one name")
    for name in found:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it holds a file whose name leads out of it: {name!r}")


def read_npz(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Arrays, no metadata and no notes of a whole file.

    Raises:
        ValueError: bytes that are no such archive, or arrays of Python objects, which would have
            to be unpickled.

    >>> file = io.BytesIO()
    >>> np.savez(file, **{"resnet/head/conv2d/bias": np.zeros(2)})
    >>> list(read(file.getvalue())[0])
    ['resnet/head/conv2d/bias']
    """
    arrays = {}
    for name, content in members(data).items():
        try:
            arrays[name.removesuffix(".npy")] = _array(content)
        except Exception as error:
            # What numpy raises for a damaged header depends on the byte that is wrong.
            raise ValueError(f"{name!r} in it is no array: {error}") from error
    return arrays, {}, []


def _array(content: bytes) -> np.ndarray:
    """The array, whose header is compared with its bytes before anything is allocated."""
    file = io.BytesIO(content)
    version = npy.read_magic(file)
    if version == (1, 0):
        shape, by_columns, dtype = npy.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, by_columns, dtype = npy.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of numpy's format, and weights need 1 or 2")
    if dtype.hasobject or dtype.fields or dtype.subdtype:
        raise ValueError(f"it holds {_plain(dtype)} and weights are numbers")
    held, wanted = len(content) - file.tell(), math.prod(shape) * dtype.itemsize
    if held != wanted or min(shape, default=1) < 0:
        raise ValueError(f"by its header it has {wanted:,} bytes, and there are {held:,}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if by_columns else "C")


def _plain(dtype: np.dtype) -> str:
    return re.sub(r"\s+", " ", str(dtype))[:80]
