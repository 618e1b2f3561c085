"""Where checkpoints can lie: in folders of this machine, or mounted on it."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def local(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder, whether or not it is there.

    Raises:
      ValueError: it is an address.

    >>> local("/runs/one")
    PosixPath('/runs/one')
    """
    if "://" in os.fspath(folder):
        raise ValueError(
            f"checkpoints need a local or mounted folder, not the address {folder}; mount the "
            "bucket, or copy the folder when the run is over"
        )
    return Path(folder).expanduser().absolute()


def require(folder: Path) -> None:
    """Refuses a path at which there is no folder.

    Raises:
      OSError: nothing is there, or a file.
    """
    if folder.is_dir():
        return
    number = errno.ENOTDIR if folder.exists() else errno.ENOENT
    raise OSError(number, "there is no folder of checkpoints", str(folder))
