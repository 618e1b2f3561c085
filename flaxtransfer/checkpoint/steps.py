"""A folder of numbered steps, in which a kill at any moment leaves no half step under a number.

A step is a folder whose name is its number. Whatever is on its way in or out has another name,
so that a number always stands for a whole step.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

_NUMBER = re.compile(r"0|[1-9][0-9]*")
# Steps that the writer underneath had not yet put in place, and steps on their way out.
_LEFTOVER = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*|\.deleting)")


def numbered(folder: Path) -> list[int]:
    """The steps in the folder, in ascending order.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("10", "9", "8.damaged", "07"):
    ...     (folder / name).mkdir()
    >>> numbered(folder)
    [9, 10]
    """
    entries = folder.iterdir()
    return sorted(int(p.name) for p in entries if _NUMBER.fullmatch(p.name) and p.is_dir())


def clean(folder: Path) -> None:
    """Removes what a killed writer left half written or half removed."""
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def remove(folder: Path, step: int) -> None:
    """Removes a step."""
    # Renamed first: a kill amid the removal must not leave half a step that looks whole.
    shutil.rmtree((folder / str(step)).rename(folder / f"{step}.deleting"))


def set_aside(folder: Path, step: int) -> Path:
    """Renames a step to ``<step>.damaged`` (or ``.damaged.2`` and so on), and returns that path."""
    target, count = folder / f"{step}.damaged", 1
    while target.exists():
        count += 1
        target = folder / f"{step}.damaged.{count}"
    return (folder / str(step)).rename(target)


def flush(folder: Path, step: int) -> None:
    """Returns when the system has put a step on the disk itself: it outlives a loss of power."""
    place = folder / str(step)
    for path in [*place.rglob("*"), place, folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
