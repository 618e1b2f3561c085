"""Zip archives that strangers made: opened in memory, bounded, and never unpacked to a disk."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath

__all__ = ["check", "members", "most", "names", "opened"]

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
