"""Image folders.

``open_folder`` opens a folder with one sub-folder per class; ``open_unlabeled_folder`` opens the
images at any depth of a folder, whatever the sub-folders mean.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from flaxtransfer.data.decode import decode_bands, is_image, not_an_image
from flaxtransfer.data.source import Example, UnlabeledImages, position
from flaxtransfer.files import check_regular
from flaxtransfer.paths import listing

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Images of a folder, decoded when they are read; made by ``open_folder``."""

    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]  # relative to root, with "/"
    targets: np.ndarray = field(repr=False)
    skipped: tuple[str, ...] = ()  # "file: reason"
    min_side: int | None = None
    bands: int = 3

    @property
    def address(self) -> str:
        """What ``open_source`` opens it by."""
        return f"folder:{self.root.absolute()}"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self.files))
        path = self.root / self.files[index]
        image = decode_bands(path, name=str(path), bands=self.bands, min_side=self.min_side)
        return {"image": image, "label": int(self.targets[index])}

    def content(self, index: SupportsIndex, /) -> bytes:
        """The bytes that the image is decoded from, for digests: the file, and how it is read."""
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
    """Opens a folder with one sub-folder per class, ``path/<class>/**/<image>``.

    The classes are the sub-folders in natural order (``img2`` before ``img10``). The images of a
    class are its files at any depth, in the same order, so that the numbering depends on the names
    alone. Hidden files and folders (a leading dot) are ignored. The first bytes of every file are
    read, so that a stray ``Thumbs.db`` is found now and not in the middle of an epoch.

    Args:
        path: the folder; ``~`` is expanded.
        skip_corrupt: leave out files that are not an image or cannot be decoded, and list them in
            ``skipped`` with the reason. It decodes every file once.
        min_side: see ``open_source``.
        bands: channels of the images; see ``decode_bands``.

    Returns:
        The source; images are uint8, and RGB as ``decode`` converts them where bands is 3.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, only one, empty ones, images outside of them, files
            that are not an image, or it is a folder of splits.
    """
    if min_side is not None and min_side < 1:
        raise ValueError(f"min_side must be >= 1 px, got {min_side}")
    root = _checked_root(path, bands)
    names = _class_folders(root)
    files = [
        (f"{name}/{file}", label)
        for label, name in enumerate(names)
        for file in _files_below(root / name)
    ]
    skipped = _unreadable_files(root, [file for file, _ in files], skip_corrupt, min_side, bands)
    files = [(file, label) for file, label in files if file not in skipped]
    targets = np.array([label for _, label in files], np.int64)
    empty = sorted(set(range(len(names))) - set(targets.tolist()))
    if empty:
        raise ValueError(
            f"{root}: no {'readable ' if skipped else ''}image in the class folder(s) "
            f"{[names[label] for label in empty]}; add images or remove the folder(s)"
            + (f" (left out: {listing(skipped.values())})" if skipped else "")
        )
    return FolderSource(
        root=root,
        class_names=tuple(names),
        files=tuple(file for file, _ in files),
        targets=targets,
        skipped=tuple(skipped.values()),
        min_side=min_side,
        bands=bands,
    )


def open_unlabeled_folder(
    path: str | os.PathLike[str], *, skip_corrupt: bool = False, bands: int = 3
) -> UnlabeledImages:
    """Opens the images at any depth of a folder, named by their paths below it.

    Args:
        path: the folder; ``~`` is expanded.
        skip_corrupt: as for ``open_folder``.
        bands: as for ``open_folder``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no image in it, or files that are not an image.
    """
    root = _checked_root(path, bands)
    files = _files_below(root)
    skipped = _unreadable_files(root, files, skip_corrupt, None, bands)
    files = [file for file in files if file not in skipped]
    if not files:
        raise ValueError(f"{root}: there is no image in this folder or below it")
    reasons = tuple(skipped.values())
    labels = np.zeros(len(files), np.int64)
    source = FolderSource(root, ("?",), tuple(files), labels, reasons, bands=bands)
    return UnlabeledImages(source, tuple(files), reasons)


def _checked_root(path: str | os.PathLike[str], bands: int) -> Path:
    if bands < 1:
        raise ValueError(f"bands must be >= 1, got {bands}")
    if not os.fspath(path):
        raise ValueError("'folder:' needs a path, as in 'folder:scans'")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(_missing_folder(root))
    return root


def natural_key(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Sort key for natural order: numbers inside names count by their value.

    >>> sorted(["img10", "img2", "a"], key=natural_key)
    ['a', 'img2', 'img10']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part], name


def _missing_folder(root: Path) -> str:
    if root.exists():
        return f"{root} is a file; give the folder that holds the images"
    text = f"there is no folder {root}"
    parent = root.parent
    if parent.is_dir():
        siblings = sorted(
            (entry.name for entry in parent.iterdir() if _visible(entry.name) and entry.is_dir()),
            key=natural_key,
        )
        return text + f"; folders in {parent.resolve()}: {listing(siblings) or 'none'}"
    return text + f", nor {parent}"


def _visible(name: str) -> bool:
    return not name.startswith(".")


def _class_folders(root: Path) -> list[str]:
    entries = [entry for entry in root.iterdir() if _visible(entry.name)]
    names = sorted((entry.name for entry in entries if entry.is_dir()), key=natural_key)
    loose = sorted(
        (entry.name for entry in entries if entry.is_file() and is_image(_head(entry))),
        key=natural_key,
    )
    layout = f"the layout must be {root}/<class>/<image>"
    if not names:
        found = f"only images: {listing(loose)}" if loose else "nothing that could be a class"
        raise ValueError(f"{root} has no class folders ({found}); {layout}")
    if loose:
        raise ValueError(f"{root}: images outside the class folders: {listing(loose)}; {layout}")
    inside = [entry for name in names for entry in (root / name).iterdir() if _visible(entry.name)]
    if {name.lower() for name in names} <= _SPLIT_NAMES and inside and all(map(_is_dir, inside)):
        raise ValueError(
            f"{root} holds splits, {names}, not classes; open one of them: "
            f"'folder:{root}/{names[0]}'"
        )
    if len(names) == 1:
        raise ValueError(
            f"{root} has one class folder, {names[0]!r}; a classifier needs at least 2 ({layout})"
        )
    return names


def _is_dir(entry: Path) -> bool:
    return entry.is_dir()


def _files_below(folder: Path) -> list[str]:
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = filter(_visible, folders)
        base = Path(here).relative_to(folder)
        found += [(base / file).as_posix() for file in files if _visible(file)]
    return sorted(found, key=natural_key)


def _head(path: Path) -> bytes:
    check_regular(path)
    with open(path, "rb") as file:
        return file.read(16)


def _unreadable_files(
    root: Path, files: list[str], skip_corrupt: bool, min_side: int | None, bands: int
) -> dict[str, str]:
    """``{file: "file: reason"}`` for those to skip; with ``skip_corrupt`` every file is decoded.

    Raises:
        ValueError: files that are not an image, unless ``skip_corrupt``.
    """

    def reason(file: str) -> str | None:
        try:
            if not is_image(_head(root / file)):
                return not_an_image(file)
            if skip_corrupt:
                decode_bands(root / file, name=file, bands=bands, min_side=min_side or 1)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
        return None

    with ThreadPoolExecutor(4) as pool:
        reasons = pool.map(reason, files)
        found = {file: text for file, text in zip(files, reasons, strict=True) if text is not None}
    if found and not skip_corrupt:
        raise ValueError(
            f"{root}: {listing(found.values(), most=5)}; remove them, or leave them out with "
            "skip_corrupt=True (--skip-corrupt)"
        )
    return found
