"""Zip archives that strangers made: opened in memory, bounded, and never unpacked to a disk."""

import io
import zipfile
import zlib
from pathlib import PurePosixPath

__all__ = ["check", "members"]

_RATIO, _SPARE = 50, 1 << 26
"""Weights hardly compress, but heads of zeros do; a zip bomb unfolds a thousandfold and more."""


def members(data: bytes) -> dict[str, bytes]:
    """The content of every file in an archive, by name.

    Args:
        data: the bytes of the archive.

    Raises:
        ValueError: as `check`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {entry.filename: archive.read(entry) for entry in _checked(archive, len(data))}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        # RuntimeError is that of an archive with a password, or of an unknown compression.
        raise ValueError(f"no complete zip archive: {error}") from error


def check(data: bytes) -> None:
    """Looks at an archive that another program will read.

    Raises:
        ValueError: bytes that are no complete archive, that would unfold to far more than weights
            do, names that occur twice or lead out of a folder.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _checked(archive, len(data))
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"no complete zip archive: {error}") from error


def _checked(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    unfolded = sum(entry.file_size for entry in entries)
    if unfolded > _RATIO * size + _SPARE:
        raise ValueError(
            f"it would unfold from {size:,} to {unfolded:,} bytes, which no weights do"
        )
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        raise ValueError("it holds two files of one name")
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it holds a file whose name leads out of it: {name!r}")
    return entries
