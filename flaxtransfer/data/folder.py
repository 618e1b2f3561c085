"""Image folders.

``open_folder`` opens a folder with one sub-folder per class, or folders train, val and test of
such; ``open_unlabeled_folder`` opens the images at any depth, whatever the sub-folders mean.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from flaxtransfer.data.decode import (
    HEAD_BYTES,
    decode_bands,
    decoder_of,
    is_image,
    not_an_image,
    read_picture,
)
from flaxtransfer.data.scans import Asked, Levels, MissingExtra, Picture
from flaxtransfer.data.source import Example, UnlabeledImages, position
from flaxtransfer.data.splits import Splits
from flaxtransfer.paths import listing

_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Of file names that say "image". What another suffix means is read off the first bytes."""

_MOST_TO_OPEN = 2000
"""Files of a data set that are all opened when it is listed, which takes a moment. In a larger one
the suffixes above are believed until an image is decoded, and another suffix if so many of its
files are images: to open 200,000 takes seconds on a local disk and many minutes on a network's."""

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What the parts of a split are called, and which part that is."""


def part_named(text: str) -> str | None:
    """The part of a split that a word names: "train", "val" or "test"; None for other words.

    >>> part_named("Validation"), part_named("fold1")
    ('val', None)
    """
    return _SPLIT_NAMES.get(text.lower())


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Images of a folder, decoded when they are read; made by ``open_folder``.

    ``splits`` is the split that the data come with, if they do, and ``notes`` say what was assumed.
    """

    root: Path
    class_names: tuple[str, ...]
    files: tuple[str, ...]  # relative to root, with "/"; "x.dcm#2" is the second frame of x.dcm
    targets: np.ndarray = field(repr=False)
    skipped: tuple[str, ...] = ()  # "file: reason"
    min_side: int | None = None
    bands: int = 3
    splits: Splits | None = None
    notes: tuple[str, ...] = ()
    frames: Mapping[str, tuple[str, int]] = field(default_factory=dict, repr=False)
    scans: bool = False  # whether files say whose they are
    levels: Levels | None = None
    origin: str = ""  # what it was opened by, where it is not a folder of this machine

    @property
    def address(self) -> str:
        """What ``open_source`` opens it by."""
        return self.origin or f"folder:{self.root.absolute()}"

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self.files))
        path, frame = self._place(index)
        image = decode_bands(
            path,
            name=os.path.join(self.root, self.files[index]),
            bands=self.bands,
            min_side=self.min_side,
            levels=self.levels,
            frame=frame,
        )
        label = self.targets[index]
        return {"image": image, "label": int(label) if label.ndim == 0 else label.copy()}

    def _place(self, index: int) -> tuple[Path, int]:
        name = self.files[index]
        file, frame = self.frames.get(name, (name, 0))
        return self.root / file, frame

    def picture(self, index: SupportsIndex, /, *, measured: bool = False) -> Picture | None:
        """The image as its file holds it; None for one of 8 bits if only ``measured`` are asked."""
        path, frame = self._place(position(index, len(self.files)))
        return read_picture(path, Asked(str(path), self.bands, self.min_side, frame, measured))

    def with_levels(self, levels: Levels) -> FolderSource:
        """The same images with this black and white for those of more than 8 bits."""
        return replace(self, levels=levels)

    def groups(self) -> Sequence[str] | None:
        """What each example belongs to, as digests: patient, else study, else file.

        None where no file says whose it is; otherwise the beginning of each is read.
        """
        return self._groups if self.scans else None

    @functools.cached_property
    def _groups(self) -> Sequence[str]:
        """Kept, because split, record, baseline and advice ask for them one after the other."""

        def whose(file: str) -> str | None:
            path = self.root / file
            decoder = decoder_of(_head(path))
            return None if decoder is None or decoder.group is None else decoder.group(path, file)

        places = [self.frames.get(name, (name, 0))[0] for name in self.files]
        files = list(dict.fromkeys(places))
        with ThreadPoolExecutor(4) as pool:
            found = dict(zip(files, pool.map(whose, files), strict=True))
        own = {file: group or _digest(file.encode()) for file, group in found.items()}
        return [own[file] for file in places]

    def content(self, index: SupportsIndex, /) -> bytes:
        """The bytes that the image is decoded from, for digests: the file, and how it is read."""
        index = position(index, len(self.files))
        path, frame = self._place(index)
        how = f"{self.min_side}" if self.bands == 3 else f"{self.min_side}, {self.bands} bands"
        if self.files[index] not in self.frames:
            return f"{how}\0".encode() + path.read_bytes()
        state = path.stat()
        whole = _digest_of_file(path, state.st_size, state.st_mtime_ns)
        return f"{how}, frame {frame} of {whole}".encode()

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]``, or float32 ``[examples, outputs]`` of a manifest."""
        return self.targets.copy()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@functools.lru_cache(maxsize=16)
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    """Of a file of many frames, which is read once for all of them while it does not change."""
    del size, changed
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_folder(
    path: str | os.PathLike[str],
    *,
    skip_corrupt: bool = False,
    min_side: int | None = None,
    bands: int = 3,
    partial: bool = False,
) -> FolderSource:
    """Opens a folder with one sub-folder per class, ``path/<class>/**/<image>``.

    Folders that are called train, val and test (or training, valid, validation, dev, testing) and
    hold such folders are the parts of a split, ``path/<part>/<class>/**/<image>``: the source then
    has it as ``splits``. Classes are those of all parts together.

    The classes are the sub-folders in natural order (``img2`` before ``img10``). The images of a
    class are its files at any depth, in the same order, so that the numbering depends on the names
    alone. Hidden files and folders (a leading dot) are ignored.

    A file that is not an image, such as a stray ``Thumbs.db``, is found now and not in the middle
    of an epoch: the first bytes of every file are read. With more than 2000 files those whose
    names end like an image's (.png, .jpg, ...) are not opened, nor those with another suffix if
    2000 of that suffix, evenly spread, are images, which makes listing as fast as the file system.
    Such a file that is none is named when it is decoded, or now with ``skip_corrupt``.

    Args:
        path: the folder; ``~`` is expanded.
        skip_corrupt: leave out files that are not an image or cannot be decoded, and list them in
            ``skipped`` with the reason. It decodes every file once.
        min_side: see ``open_source``.
        bands: channels of the images; see ``decode_bands``.
        partial: allow one class alone, and leave out classes without an image; to evaluate on
            whatever there is.

    Returns:
        The source; images are uint8, and RGB as ``decode`` converts them where bands is 3.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no class folders, only one, empty ones, images outside of them, files
            that are not an image, or parts of a split without one to train on, or with classes
            that are not trained.
    """
    if min_side is not None and min_side < 1:
        raise ValueError(f"min_side must be >= 1 px, got {min_side}")
    root = _checked_root(path, bands)
    folders = _class_folders(root, partial)
    names = sorted(set(folders.values()), key=natural_key)
    odd: list[str] = []
    parts = [_files_below(root / folder, odd, f"{folder}/") for folder in folders]
    files = list(chain.from_iterable(parts))
    labels = [names.index(name) for name in folders.values()]
    targets = np.repeat(np.array(labels, np.int64), [len(part) for part in parts])
    scans: dict[str, int] = {}
    skipped = unreadable_files(root, files, odd, skip_corrupt, min_side, bands, scans)
    if skipped:
        kept = [i for i, file in enumerate(files) if file not in skipped]
        files, targets = [files[i] for i in kept], targets[kept]
    counts = np.bincount(targets, minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty and not (partial and files):
        raise ValueError(
            f"{root}: no {'readable ' if skipped else ''}image in the class folder(s) "
            f"{empty}; add images or remove the folder(s)"
            + (f" (left out: {listing(skipped.values())})" if skipped else "")
        )
    if empty:
        names = [name for name, count in zip(names, counts, strict=True) if count]
        targets = (np.cumsum(counts > 0) - 1)[targets]
    if scans:
        targets = np.repeat(targets, [scans.get(file, 1) for file in files])
    examples, frames = with_frames(files, scans)
    splits: Splits | None = None
    notes: tuple[str, ...] = ()
    if any(folder != name for folder, name in folders.items()):
        splits = _split_of_folders(examples)
        if not partial:
            check_trained(splits, targets, names, str(root))
        notes = (
            f"{root} holds a split: {part_counts(splits)} images",
            *unseen(splits, targets, names),
        )
    return FolderSource(
        root=root,
        class_names=tuple(names),
        files=tuple(examples),
        targets=targets.astype(np.int64),
        skipped=tuple(skipped.values()),
        min_side=min_side,
        bands=bands,
        splits=splits,
        notes=notes,
        frames=frames,
        scans=bool(scans),
    )


def _split_of_folders(files: Sequence[str]) -> Splits:
    part_of = np.array([_SPLIT_NAMES[file[: file.index("/")].lower()] for file in files])
    return Splits.of(*(np.flatnonzero(part_of == part) for part in ("train", "val", "test")))


def part_counts(splits: Splits) -> str:
    """How many examples are in which part, in words."""
    pairs = zip(splits._fields, splits, strict=True)
    return ", ".join(f"{len(part)} {name}" for name, part in pairs if len(part))


def check_trained(splits: Splits, targets: np.ndarray, names: Sequence[str], where: str) -> None:
    """Refuses a split that comes with the data and trains on too little.

    Raises:
        ValueError: no training example, or classes without one.
    """
    if not len(splits.train):
        raise ValueError(f"{where} must have images to train on, got {part_counts(splits)}")
    used = targets[np.concatenate(splits[:3])]
    if lost := np.setdiff1d(used, targets[splits.train]).tolist():
        raise ValueError(
            f"{where}: each class must be among the training images, got "
            f"{listing(repr(names[c]) for c in lost)} for validation or test alone"
        )


def unseen(splits: Splits, targets: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    """Says which classes are trained, but not validated or not tested."""
    for part, use in (("val", "validated"), ("test", "tested")):
        found = targets[getattr(splits, part)]
        lost = np.setdiff1d(targets[splits.train], found).tolist()
        if len(found) and lost:
            yield f"not {use}, for want of images: {listing(repr(names[c]) for c in lost)}"


def with_frames(
    files: Sequence[str], scans: Mapping[str, int]
) -> tuple[list[str], dict[str, tuple[str, int]]]:
    """The names of all examples, and file and frame of those that share a file."""
    several = {file: count for file, count in scans.items() if count > 1}
    if not several:
        return list(files), {}
    names: list[str] = []
    frames: dict[str, tuple[str, int]] = {}
    for file in files:
        own = {f"{file}#{frame + 1}": (file, frame) for frame in range(several.get(file, 0))}
        names += own or [file]
        frames |= own
    return names, frames


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
    odd: list[str] = []
    files = _files_below(root, odd)
    scans: dict[str, int] = {}
    skipped = unreadable_files(root, files, odd, skip_corrupt, None, bands, scans)
    files = [file for file in files if file not in skipped] if skipped else files
    if not files:
        raise ValueError(f"{root}: there is no image in this folder or below it")
    reasons = tuple(skipped.values())
    names, frames = with_frames(files, scans)
    labels = np.zeros(len(names), np.int64)
    source = FolderSource(
        root, ("?",), tuple(names), labels, reasons, bands=bands, frames=frames, scans=bool(scans)
    )
    return UnlabeledImages(source, tuple(names), reasons)


def _checked_root(path: str | os.PathLike[str], bands: int) -> Path:
    if bands < 1:
        raise ValueError(f"bands must be >= 1, got {bands}")
    if not os.fspath(path):
        raise ValueError("'folder:' needs a path, as in 'folder:scans'")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(_missing_folder(root))
    return root


_NUMBER = re.compile("0*([0-9]+)")


def natural_key(name: str) -> str:
    """Sort key for natural order: numbers inside names count by their value.

    It is one text, because texts are compared many times faster than lists of parts.

    >>> sorted(["img10", "img2", "a"], key=natural_key)
    ['a', 'img2', 'img10']
    """
    # No name holds "\0", which ends a text before any character. After it comes "\0" for the end
    # of the name, and "\1" for a number, of which fewer digits are less. The name itself decides
    # between those that are alike, such as "1" and "01".
    return f"{_NUMBER.sub(_ranked, name)}\0\0{name}"


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted by ``natural_key``.

    Of a large folder nearly all names are one word with a number, for which no key is made.

    >>> in_natural_order(["img10.png", "img2.png", "img1.png"])
    ['img1.png', 'img2.png', 'img10.png']
    """
    found = sorted(names)
    if not found:
        return found
    first, last = found[0], found[-1]
    ending = re.sub(r".*[0-9]", "", first, flags=re.DOTALL)
    # What the first and the last have in common, all have; a digit belongs to the number.
    same = [*map(str.__eq__, first, last), False].index(False)
    begins = re.sub(r"[0-9]+$", "", first[:same])
    # Of all names at once, because a loop over them takes as long as the keys. No name has a "\0".
    between = f"{ending}\0{begins}"
    whole = "\0".join([ending, *found, begins])
    numbers = whole.replace(between, "\0")
    digits = numbers.replace("\0", "")
    alike = whole.count(between) == len(found) + 1 and "\0\0" not in numbers
    if not (alike and digits.isascii() and digits.isdecimal()):
        return sorted(found, key=natural_key)
    zeros_lead = numbers.count("\x000") > numbers.count("\x000\0")
    if zeros_lead and len(set(map(len, found))) > 1:
        return sorted(found, key=natural_key)
    found.sort(key=len)  # It is stable.
    return found


def _ranked(number: re.Match[str]) -> str:
    digits = number[1]
    return f"\0\1{chr(len(digits))}{digits}"


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


def _class_folders(root: Path, partial: bool) -> dict[str, str]:
    """The folders of images below the root, each with the name of its class."""
    names = _folders(root)
    layout = f"the layout must be {root}/<class>/<image>"
    parts = {name: part_named(name) for name in names}
    # Classes may be called so, too; then there are images in them.
    if None not in parts.values() and any(_only_folders(root / name) for name in names):
        twice = [name for name, part in parts.items() if list(parts.values()).count(part) > 1]
        if twice:
            raise ValueError(f"{root}: two folders are the same part of a split: {listing(twice)}")
        folders = {f"{part}/{name}": name for part in names for name in _folders(root / part)}
        names = sorted(set(folders.values()), key=natural_key)
    else:
        folders = {name: name for name in names}
    if len(names) == 1 and not partial:
        raise ValueError(
            f"{root} has one class folder, {names[0]!r}; a classifier needs at least 2 ({layout})"
        )
    return folders


def _folders(root: Path) -> list[str]:
    """The folders in a folder that should hold nothing else, in natural order."""
    with os.scandir(root) as entries:
        visible = [entry for entry in entries if _visible(entry.name)]
    names = sorted((entry.name for entry in visible if entry.is_dir()), key=natural_key)
    others = [entry.name for entry in visible if entry.is_file()]
    loose = _images(root, others)
    layout = f"the layout must be {root}/<class>/<image>"
    if not names:
        found = f"only images: {listing(loose)}" if loose else "nothing that could be a class"
        raise ValueError(f"{root} has no class folders ({found}); {layout}")
    if loose:
        raise ValueError(f"{root}: images outside the class folders: {listing(loose)}; {layout}")
    return names


def _images(root: Path, names: Sequence[str]) -> list[str]:
    """The images among files, in natural order."""
    believed = len(names) > _MOST_TO_OPEN
    found = (
        n for n in names if (believed and _suffix(n) in _SUFFIXES) or is_image(_head(root / n))
    )
    return sorted(found, key=natural_key)


def _only_folders(folder: Path) -> bool:
    """Whether in a folder there are folders and nothing else."""
    with os.scandir(folder) as entries:
        inside = [entry.is_dir() for entry in entries if _visible(entry.name)]
    return bool(inside) and all(inside)


def _files_below(folder: Path, odd: list[str], prefix: str = "") -> list[str]:
    """Files at any depth, by their paths below the folder; links to folders are not followed.

    Each begins with the prefix. Those that are no regular files, such as named pipes, are put into
    ``odd`` as well.
    """
    return in_natural_order(_walk(os.fspath(folder), prefix, odd))


def _walk(folder: str, prefix: str, odd: list[str]) -> Iterator[str]:
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_file():
                yield prefix + name
            elif not entry.is_dir():
                odd.append(prefix + name)
                yield prefix + name
            elif not entry.is_symlink():
                below.append(name)
    for name in below:
        yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", odd)


def _suffix(file: str) -> str:
    suffix = os.path.splitext(file)[1].lower()
    return "" if suffix[1:].isdecimal() else suffix  # "scan.0001" and "scan.0002" are of one kind.


def _doubtful(files: Sequence[str], odd: Collection[str]) -> tuple[list[str], list[str]]:
    """The files to open of a large data set, and those that are believed if these are images."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        # Most need no copy in lower case.
        if not (file.endswith(_SUFFIXES) or file.lower().endswith(_SUFFIXES)):
            kinds.setdefault(_suffix(file), []).append(file)
    chosen, others = list(odd), []
    for kind in kinds.values():
        every = -(-len(kind) // _MOST_TO_OPEN)
        chosen += kind[::every]
        others += [file for i, file in enumerate(kind) if i % every]
    return list(dict.fromkeys(chosen)), others


def _head(path: str | os.PathLike[str]) -> bytes:
    """The first bytes of a file.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which might give its bytes to nobody
            else, or make the reader wait for ever.
    """
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(None, "it is no regular file", os.fspath(path))
        return os.read(opened, HEAD_BYTES)
    finally:
        os.close(opened)


def unreadable_files(
    root: Path,
    files: Sequence[str],
    odd: Collection[str],
    skip_corrupt: bool,
    min_side: int | None,
    bands: int,
    scans: dict[str, int],
) -> dict[str, str]:
    """``{file: "file: reason"}`` for those to skip; with ``skip_corrupt`` every file is decoded.

    Puts into ``scans`` which files say how many examples they are and whose, and how many. In a
    large folder, one that is not opened is a single example, unless one of its suffix is not.

    Raises:
        ValueError: files that are not an image, unless ``skip_corrupt``; formats whose library is
            not installed.
    """

    def reason(file: str) -> str | None:
        try:
            decoder = decoder_of(_head(os.path.join(root, file)))
            if decoder is None:
                return not_an_image(file)
            if decoder.frames is not None:
                scans[file] = decoder.frames(root / file, file)
            if skip_corrupt:
                # Of several frames the last one, which a file that was cut off lacks, shows most.
                for frame in {0, scans.get(file, 1) - 1}:
                    read_picture(root / file, Asked(file, bands, min_side or 1, frame))
        except MissingExtra:
            raise
        except ValueError as error:
            return str(error)
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror})"
        return None

    def look(files: Sequence[str]) -> dict[str, str]:
        with ThreadPoolExecutor(4) as pool:
            reasons = pool.map(reason, files)
            return {file: text for file, text in zip(files, reasons, strict=True) if text}

    others: Sequence[str] = ()
    if len(files) > _MOST_TO_OPEN and not skip_corrupt:
        files, others = _doubtful(files, odd)
    found = look(files) if files else {}
    suspect = {_suffix(file) for file in found}
    suspect |= {_suffix(file) for file, count in scans.items() if count > 1}
    if others and suspect:
        found |= look([file for file in others if _suffix(file) in suspect])
    if found and not skip_corrupt:
        raise ValueError(
            f"{root}: {listing(found.values(), most=5)}; remove them, or leave them out with "
            "skip_corrupt=True (--skip-corrupt)"
        )
    return found
