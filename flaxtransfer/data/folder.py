"""A folder of images with one sub-folder a class."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from flaxtransfer.data.decode import FORMATS, ImageError, decode_bands, is_image
from flaxtransfer.data.source import Example, position

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Images of a folder, decoded when asked for; made by ``open_folder``."""

    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]  # relative to root, with "/"
    targets: np.ndarray = field(repr=False)
    skipped: tuple[str, ...] = ()  # "file: reason"
    min_side: int | None = None
    bands: int = 3

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self.files))
        path = self.root / self.files[index]
        image = decode_bands(path, name=str(path), bands=self.bands, min_side=self.min_side)
        return {"image": image, "label": int(self.targets[index])}

    def content(self, index: SupportsIndex, /) -> bytes:
        """What the image is decoded from, for digests: the file, and how it is read."""
        path = self.root / self.files[position(index, len(self.files))]
        how = f"{self.min_side}" if self.bands == 3 else f"{self.min_side}, {self.bands} bands"
        return f"{how}\0".encode() + path.read_bytes()

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]``."""
        return self.targets.copy()


def open_folder(
    path: str | os.PathLike[str],
    *,
    skip_corrupt: bool = False,
    min_side: int | None = None,
    bands: int = 3,
) -> FolderSource:
    """Opens ``path/<class>/**/<image>``.

    The classes are the sub-folders in natural order (``img2`` before ``img10``), the images of a
    class its files at any depth in the same order, so that the numbering depends on the names
    alone. Hidden files and folders (a leading dot) are ignored. The first bytes of every file are
    looked at, so that a stray ``Thumbs.db`` is met now and not in the middle of an epoch.

    Args:
      path: the folder; ``~`` is expanded.
      skip_corrupt: leave out files that are no image or cannot be decoded, and list them in
        ``skipped`` with the reason. It decodes every file once.
      min_side: see ``open_source``.
      bands: channels of the images; see ``band_files.decode_bands``.

    Returns:
      The source; images are uint8, and RGB as ``decode`` converts them where bands is 3.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it has no class folders, only one, empty ones, images outside of them, files that
        are no image, or it is a folder of splits.
    """
    if min_side is not None and min_side < 1:
        raise ValueError(f"min_side is {min_side}; it is a number of pixels, 1 or more")
    if bands < 1:
        raise ValueError(f"bands is {bands}; it is a number of channels, 1 or more")
    root = Path(path).expanduser()
    if not os.fspath(path):
        raise ValueError("'folder:' needs a path, as in 'folder:scans'")
    if not root.is_dir():
        raise FileNotFoundError(missing_folder(root))
    names = _class_folders(root)
    files = [
        (f"{name}/{file}", label)
        for label, name in enumerate(names)
        for file in files_below(root / name)
    ]
    bad = unreadable(root, [file for file, _ in files], skip_corrupt, min_side, bands)
    if bad and not skip_corrupt:
        raise ValueError(
            f"{root}: {some_of(list(bad.values()))}; remove them, or leave them out with "
            "skip_corrupt=True"
        )
    files = [(file, label) for file, label in files if file not in bad]
    targets = np.array([label for _, label in files], np.int64)
    empty = sorted(set(range(len(names))) - set(targets.tolist()))
    if empty:
        raise ValueError(
            f"{root}: no {'readable ' if bad else ''}image in the class folder(s) "
            f"{[names[label] for label in empty]}; add images or remove the folder(s)"
            + (f" (left out: {some_of(list(bad.values()))})" if bad else "")
        )
    return FolderSource(
        root=root,
        class_names=tuple(names),
        files=tuple(file for file, _ in files),
        targets=targets,
        skipped=tuple(bad.values()),
        min_side=min_side,
        bands=bands,
    )


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sorts numbers inside names by their value.

    >>> sorted(["img10", "img2", "a"], key=natural_key)
    ['a', 'img2', 'img10']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part], name


def missing_folder(root: Path) -> str:
    if root.exists():
        return f"{root} is a file; give the folder that holds one sub-folder a class"
    text = f"there is no folder {root}"
    parent = root.parent
    if parent.is_dir():
        beside = sorted(
            (entry.name for entry in parent.iterdir() if _shown(entry.name) and entry.is_dir()),
            key=natural_key,
        )
        return text + f"; folders in {parent.resolve()}: {some_of(beside) or 'none'}"
    return text + f", nor {parent}"


def _shown(name: str) -> bool:
    return not name.startswith(".")


def _class_folders(root: Path) -> list[str]:
    entries = [entry for entry in root.iterdir() if _shown(entry.name)]
    names = sorted((entry.name for entry in entries if entry.is_dir()), key=natural_key)
    loose = sorted(
        (entry.name for entry in entries if entry.is_file() and is_image(_head(entry))),
        key=natural_key,
    )
    layout = f"wanted {root}/<class>/<image>"
    if not names:
        found = f"only images: {some_of(loose)}" if loose else "nothing that could be a class"
        raise ValueError(f"{root} has no class folders ({found}); {layout}")
    if loose:
        raise ValueError(f"{root}: images outside the class folders: {some_of(loose)}; {layout}")
    inside = [entry for name in names for entry in (root / name).iterdir() if _shown(entry.name)]
    if {name.lower() for name in names} <= _SPLIT_NAMES and inside and all(map(_is_dir, inside)):
        raise ValueError(
            f"{root} holds splits, {names}, not classes; open one of them: "
            f"'folder:{root}/{names[0]}'"
        )
    if len(names) == 1:
        raise ValueError(
            f"{root} has one class folder, {names[0]!r}; a classifier needs two or more ({layout})"
        )
    return names


def _is_dir(entry: Path) -> bool:
    return entry.is_dir()


def files_below(folder: Path) -> list[str]:
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = filter(_shown, folders)
        base = Path(here).relative_to(folder)
        found += [(base / file).as_posix() for file in files if _shown(file)]
    return sorted(found, key=natural_key)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(16)


def unreadable(
    root: Path, files: list[str], decode_all: bool, min_side: int | None, bands: int
) -> dict[str, str]:
    """``{file: "file: reason"}`` for those that are no image or, when asked, do not decode."""

    def reason(file: str) -> str | None:
        try:
            if not is_image(_head(root / file)):
                return f"{file}: not an image in {', '.join(FORMATS)}"
            if decode_all:
                decode_bands(root / file, name=file, bands=bands, min_side=min_side or 1)
        except ImageError as error:
            return str(error)
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(4) as pool:
        reasons = pool.map(reason, files)
        return {file: text for file, text in zip(files, reasons, strict=True) if text is not None}


def some_of(items: Iterable[str], most: int = 5) -> str:
    items = list(items)
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
