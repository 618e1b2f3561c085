"""Opening a data source by name.

A name is ``scheme:rest``, such as ``"folder:scans"`` or ``"tfds:food101:train"``. Which schemes
there are is one table, ``SCHEMES``; ``open_source``, ``open_unlabeled`` and their errors follow it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flaxtransfer.data.source import ArraySource, Source, UnlabeledImages
from flaxtransfer.files import check_regular
from flaxtransfer.paths import listing, suggest

__all__ = ["SCHEMES", "OpenOptions", "Scheme", "open_source", "open_unlabeled"]


@dataclass(frozen=True)
class OpenOptions:
    """The keyword arguments of ``open_source``; each scheme takes those that concern it."""

    cache_dir: str | os.PathLike[str] | None = None
    download: bool = False
    skip_corrupt: bool = False
    min_side: int | None = None
    bands: int | None = None
    partial: bool = False


@dataclass(frozen=True)
class Scheme:
    """One kind of data source.

    Args:
        form: how its names are written.
        help: what it opens, in a few words.
        labeled: opens it with labels, from what follows the colon; None for a scheme that holds
            images without labels only.
        unlabeled: opens it without regard to labels; None where that is ``labeled`` with the labels
            ignored and positions as names.
    """

    form: str
    help: str
    labeled: Callable[[str, OpenOptions], Source] | None
    unlabeled: Callable[[str, OpenOptions], UnlabeledImages] | None = None

    @property
    def takes_rest(self) -> bool:
        """Whether something follows the scheme's name."""
        return ":" in self.form


def open_source(
    spec: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    skip_corrupt: bool = False,
    min_side: int | None = None,
    bands: int | None = None,
    partial: bool = False,
) -> Source:
    """Opens a labeled data set by name.

    Arrays in memory need no name: see ``ArraySource``.

    Args:
        spec: ``"digits"`` (scikit-learn's handwritten digits, 8 x 8 px, built on first use),
            ``"tfds:<name>[/config][:version][:split]"`` (a prepared TensorFlow Datasets data set,
            read without TensorFlow; the split may be a slice such as ``train[:80%]``; default
            ``train``), or ``"folder:<path>"`` (one sub-folder of images per class).
        cache_dir: where prepared data sets are, in the layout of TensorFlow Datasets. Default for
            ``digits``: the environment variable FLAXTRANSFER_CACHE, else ``~/.cache/flaxtransfer``;
            for ``tfds:`` that library's own default (TFDS_DATA_DIR, else
            ``~/tensorflow_datasets``).
        download: whether a ``tfds:`` data set that is not prepared may be downloaded.
        skip_corrupt: for ``folder:``, leave out files that are not an image or cannot be decoded,
            and list them in ``source.skipped``; every file is read once to find them.
        min_side: for images from files: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size
            as long as its shorter side keeps this many pixels. It is several times faster, and
            differs slightly from resizing the full image.
        bands: channels to read from the files of a ``folder:``; default RGB. Other sources have
            a fixed number of channels.
        partial: for ``folder:``, allow one class alone, and leave out classes without an image; to
            evaluate on whatever there is.

    Returns:
        The source.

    Raises:
        ValueError: the name is not understood, or names something that does not exist.
        FileNotFoundError: the folder or the prepared data set is missing.

    >>> open_source("digit")
    Traceback (most recent call last):
    ...
    ValueError: unknown data source 'digit'; did you mean 'digits'? known: 'digits', ...
    """
    options = OpenOptions(cache_dir, download, skip_corrupt, min_side, bands, partial)
    scheme, rest = _scheme_of(spec, labeled=True)
    if scheme.labeled is None:
        raise ValueError(f"{spec!r} has no labels; {scheme.form!r} is for unlabeled images")
    return scheme.labeled(rest, options)


def open_unlabeled(
    spec: str, *, skip_corrupt: bool = False, bands: int | None = None
) -> UnlabeledImages:
    """Opens images without regard to classes: to predict, to diagnose, to adapt to.

    Args:
        spec: ``"folder:<path>"`` (images at any depth, in class folders or not), ``"npz:<file>"``
            (an array called "image", uint8 or floats in 0 .. 1, ``[examples, height, width(,
            channels)]``), or any other name that ``open_source`` takes.
        skip_corrupt: leave out files that are not an image; they are listed in ``skipped``.
        bands: channels to read from image files; default RGB.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no image in it, files that are not an image, no such array.
    """
    options = OpenOptions(skip_corrupt=skip_corrupt, bands=bands)
    scheme, rest = _scheme_of(spec, labeled=False)
    if scheme.unlabeled is not None:
        return scheme.unlabeled(rest, options)
    assert scheme.labeled is not None  # one of both is there
    return UnlabeledImages.numbered(scheme.labeled(rest, options))


def _digits(rest: str, options: OpenOptions) -> Source:
    from flaxtransfer.data.tfds import open_digits

    return open_digits(options.cache_dir)


def _tfds(rest: str, options: OpenOptions) -> Source:
    from flaxtransfer.data.tfds import open_tfds

    return open_tfds(
        rest,
        data_dir=options.cache_dir,
        download=options.download,
        min_side=options.min_side,
    )


def _folder(rest: str, options: OpenOptions) -> Source:
    from flaxtransfer.data.folder import open_folder

    return open_folder(
        rest,
        skip_corrupt=options.skip_corrupt,
        min_side=options.min_side,
        bands=3 if options.bands is None else options.bands,
        partial=options.partial,
    )


def _unlabeled_folder(rest: str, options: OpenOptions) -> UnlabeledImages:
    from flaxtransfer.data.folder import open_unlabeled_folder

    return open_unlabeled_folder(
        rest,
        skip_corrupt=options.skip_corrupt,
        bands=3 if options.bands is None else options.bands,
    )


_IMAGE_ARRAYS = ("image", "images")


def _npz(rest: str, options: OpenOptions) -> UnlabeledImages:
    from flaxtransfer.weights.readers.archives import read_npz

    path = Path(rest).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    check_regular(path)
    if path.suffix != ".npz":
        raise ValueError(f"the name of a file of arrays must end in .npz, got {path}")
    try:
        arrays, *_ = read_npz(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a readable .npz file ({error})") from error
    images = next((arrays[key] for key in _IMAGE_ARRAYS if key in arrays), None)
    if images is None:
        raise ValueError(f"{path} has no array 'image'; it has {listing(arrays)}")
    return UnlabeledImages.numbered(ArraySource(images, np.zeros(len(images), np.int64), ("?",)))


SCHEMES = {
    "digits": Scheme("digits", "handwritten digits of scikit-learn, 8 x 8 px", _digits),
    "tfds": Scheme(
        "tfds:<name>[/config][:version][:split]",
        "a prepared TensorFlow Datasets data set",
        _tfds,
    ),
    "folder": Scheme(
        "folder:<path>", "images in one sub-folder per class", _folder, _unlabeled_folder
    ),
    "npz": Scheme("npz:<file>", "an array 'image' in a .npz file", None, _npz),
}
"""All schemes. To add one, add a row."""


def _schemes(labeled: bool) -> dict[str, Scheme]:
    return {name: each for name, each in SCHEMES.items() if each.labeled or not labeled}


def _scheme_of(spec: str, *, labeled: bool) -> tuple[Scheme, str]:
    """The scheme of a name, and what follows the colon."""
    name, colon, rest = spec.partition(":")
    scheme = SCHEMES.get(name)
    if scheme is not None and scheme.takes_rest == bool(colon):
        return scheme, rest
    text = f"unknown data source {spec!r}"
    if scheme is not None and not scheme.takes_rest:
        text += f": {name!r} takes nothing after it;"
    elif not colon and os.path.isdir(os.path.expanduser(spec)):
        text += f"; it is a folder: write 'folder:{spec}';"
    else:
        text += suggest(name, _schemes(labeled)) or ";"
    text += f" known: {', '.join(repr(each.form) for each in _schemes(labeled).values())}"
    if not colon and spec.isidentifier() and scheme is None:
        text += f" (a TensorFlow Datasets name is written 'tfds:{spec}')"
    raise ValueError(text)
