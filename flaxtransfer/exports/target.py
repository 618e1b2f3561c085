"""Where an export may go."""

from collections.abc import Collection
from pathlib import Path

__all__ = ["check_file", "check_folder"]


def check_file(target: Path) -> None:
    """Raises unless a file may be written there, before any work is done.

    Raises:
        FileNotFoundError: there is no folder to write into.
        ValueError: there is a folder of that name.
    """
    _check_parent(target)
    if target.is_dir():
        raise ValueError(f"{target} is a folder, and a file is to be written")


def check_folder(target: Path, names: Collection[str]) -> None:
    """Raises unless a folder with files of these names may be written there.

    Raises:
        FileNotFoundError: there is no folder to write into.
        ValueError: a file, or a folder that holds other things.
    """
    _check_parent(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, and a folder is to be written")
    there = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    if foreign := sorted(there.difference(names)):
        raise ValueError(
            f"the folder {target} holds other files ({', '.join(foreign[:5])}); nothing was "
            "written: name a new folder, or an earlier export, which is replaced"
        )


def _check_parent(target: Path) -> None:
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {target.parent} to write {target.name} into")
