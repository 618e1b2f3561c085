"""Open a data set by its scheme, labeled or not.

What a data set is here: random access to labeled images, and the names of the classes.

Images whose classes nobody has said: to predict, to diagnose, to adapt to.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxtransfer.data.folder import FolderSource, files_below, missing_folder, some_of, unreadable
from flaxtransfer.data.source import ArraySource, Source
from flaxtransfer.paths import suggest

__all__ = ["SCHEMES", "Unlabeled", "open_source", "open_unlabeled"]


SCHEMES = ("digits", "tfds:<name>[/config][:version][:split]", "folder:<path>")


def open_source(
    spec: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    skip_corrupt: bool = False,
    min_side: int | None = None,
    bands: int | None = None,
) -> Source:
    """Opens the data set that ``spec`` names.

    Arrays that are in memory already need no ``spec``: see ``ArraySource``.

    Args:
      spec: ``"digits"`` (scikit-learn's handwritten digits, 8 x 8 px, built on first use),
        ``"tfds:<name>[/config][:version][:split]"`` (a prepared TensorFlow Datasets data set, read
        without TensorFlow; the split may be a slice such as ``train[:80%]`` and is ``train`` when
        left out), or ``"folder:<path>"`` (one sub-folder of images a class).
      cache_dir: where prepared data sets lie, in the layout of TensorFlow Datasets. Default for
        ``digits``: the environment variable FLAXTRANSFER_CACHE, else ``~/.cache/flaxtransfer``;
        for ``tfds:`` that library's own default (TFDS_DATA_DIR, else ``~/tensorflow_datasets``).
      download: whether a ``tfds:`` data set that is not prepared may be fetched from the internet.
      skip_corrupt: for ``folder:``, leave out files that are no image or cannot be decoded, and
        list them in ``source.skipped``; every file is read once to find them.
      min_side: for images from files: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size
        as long as its shorter side keeps this many pixels. It is several times faster, and
        differs slightly from resizing the full image.
      bands: channels to read from the files of a ``folder:``, RGB when left out. Other sources have
        the channels that they have.

    Returns:
      The source.

    Raises:
      ValueError: the spec is not understood, or names something that does not exist.
      FileNotFoundError: the folder or the prepared data set is missing.

    >>> open_source("digit")
    Traceback (most recent call last):
    ...
    ValueError: unknown data source 'digit'; did you mean 'digits'? known: 'digits', ...
    """
    scheme, colon, rest = spec.partition(":")
    if spec == "digits":
        from flaxtransfer.data.digits import open_digits

        return open_digits(cache_dir)
    if scheme == "tfds" and colon:
        from flaxtransfer.data.tfds import open_tfds

        return open_tfds(rest, data_dir=cache_dir, download=download, min_side=min_side)
    if scheme == "folder" and colon:
        from flaxtransfer.data.folder import open_folder

        return open_folder(
            rest, skip_corrupt=skip_corrupt, min_side=min_side, bands=3 if bands is None else bands
        )
    raise ValueError(_unknown(spec, scheme, bool(colon)))


def _unknown(spec: str, scheme: str, has_colon: bool) -> str:
    text = f"unknown data source {spec!r}"
    if scheme == "digits":
        text += ": 'digits' takes nothing after it;"
    elif not has_colon and os.path.isdir(os.path.expanduser(spec)):
        text += f"; it is a folder: write 'folder:{spec}';"
    else:
        text += suggest(scheme, ["digits", "tfds", "folder"]) or ";"
    known = ", ".join(repr(scheme) for scheme in SCHEMES)
    text += f" known: {known}"
    if not has_colon and spec.isidentifier():
        text += f" (a TensorFlow Datasets name is written 'tfds:{spec}')"
    return text


IMAGE_KEYS = ("image", "images")


@dataclass(frozen=True)
class Unlabeled:
    """Images with a name each; labels that the source may have are not to be looked at.

    Args:
      source: the images.
      names: of the images, in their order: paths below the folder, or numbers.
      skipped: what was left out, with the reason.
    """

    source: Source
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def positions(self, names: list[str]) -> np.ndarray:
        """Where the images of these names are, int64.

        Raises:
          ValueError: a name that no image has, or one that is given twice; all are listed.
        """
        place = {name: position for position, name in enumerate(self.names)}
        unknown = [name for name in names if name not in place]
        twice = sorted({name for name in names if names.count(name) > 1})
        if unknown or twice:
            problems = [f"no image is called {some_of(unknown)}"] if unknown else []
            problems += [f"given twice: {some_of(twice)}"] if twice else []
            raise ValueError(f"{'; '.join(problems)}; images are called {some_of(self.names, 3)}")
        return np.array([place[name] for name in names], np.int64)


def open_unlabeled(spec: str, *, skip_corrupt: bool = False, bands: int | None = None) -> Unlabeled:
    """Opens images without regard to classes.

    Args:
      spec: ``"folder:<path>"`` (images at any depth, in class folders or not), ``"npz:<file>"`` (an
        array called "image", uint8 or floats in 0 .. 1, [examples, height, width(, channels)]), or
        what ``open_source`` takes.
      skip_corrupt: leave out files that are no image; they are listed in ``skipped``.
      bands: channels to read from image files, RGB when left out.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: no image in it, files that are no image, no such array.
    """
    scheme, colon, rest = spec.partition(":")
    if scheme == "folder" and colon:
        return _folder(Path(rest).expanduser(), skip_corrupt, 3 if bands is None else bands)
    if scheme == "npz" and colon:
        return _numbered(_arrays(Path(rest).expanduser()))
    return _numbered(open_source(spec, skip_corrupt=skip_corrupt, bands=bands))


def _numbered(source: Source) -> Unlabeled:
    return Unlabeled(source, tuple(map(str, range(len(source)))))


def _folder(root: Path, skip_corrupt: bool, bands: int) -> Unlabeled:
    if not root.is_dir():
        raise FileNotFoundError(missing_folder(root))
    files = files_below(root)
    bad = unreadable(root, files, skip_corrupt, None, bands)
    if bad and not skip_corrupt:
        raise ValueError(f"{root}: {some_of(bad.values())}; remove or skip them")
    files = [file for file in files if file not in bad]
    if not files:
        raise ValueError(f"{root}: there is no image in this folder or below it")
    source = FolderSource(
        root, ("?",), tuple(files), np.zeros(len(files), np.int64), tuple(bad.values()), bands=bands
    )
    return Unlabeled(source, tuple(files), tuple(bad.values()))


def _arrays(path: Path) -> ArraySource:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is not called .npz, as a file of named arrays is")
    try:
        # Nothing in the file is unpickled, so that nothing in it is run.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            key = next((key for key in IMAGE_KEYS if key in file), None)
            if key is None:
                raise ValueError(f"{path} has no array 'image', but {some_of(file.files)}")
            images = file[key]
    except (zipfile.BadZipFile, EOFError, TypeError) as error:
        raise ValueError(f"{path} is not a readable .npz file ({error})") from error
    return ArraySource(images, np.zeros(len(images), np.int64), ("?",))
