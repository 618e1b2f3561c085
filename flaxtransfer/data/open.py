"""Opening a data source by name.

A name is ``scheme:rest``, such as ``"folder:scans"`` or ``"tfds:food101:train"``. Which schemes
there are is one table, ``SCHEMES``; ``open_source``, ``open_unlabeled`` and their errors follow it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flaxtransfer.data.source import ArraySource, Source, UnlabeledImages
from flaxtransfer.files import bucket_address, check_regular
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
    image_column: str | None = None
    label_column: str | Sequence[str] | None = None
    split_column: str | None = None
    group_column: str | None = None
    label_separator: str | None = None
    ignore_label: str | None = None
    task: str | None = None

    def columns(self) -> dict[str, Any]:
        """What was said about the columns of a manifest, by the names of its ``Columns``."""
        label = self.label_column
        given = {
            "image": self.image_column,
            "label": (label,)
            if isinstance(label, str)
            else None
            if label is None
            else tuple(label),
            "split": self.split_column,
            "group": self.group_column,
            "separator": self.label_separator,
            "ignore": self.ignore_label,
            "task": self.task,
        }
        return {name: value for name, value in given.items() if value is not None and value != ()}


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
        columns: whether it has columns, which the options name.
    """

    form: str
    help: str
    labeled: Callable[[str, OpenOptions], Source] | None
    unlabeled: Callable[[str, OpenOptions], UnlabeledImages] | None = None
    columns: bool = False

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
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    label_separator: str | None = None,
    ignore_label: str | None = None,
    task: str | None = None,
) -> Source:
    """Opens a labeled data set by name.

    Arrays in memory need no name: see ``ArraySource``.

    Args:
        spec: ``"digits"`` (scikit-learn's handwritten digits, 8 x 8 px, built on first use),
            ``"tfds:<name>[/config][:version][:split]"`` (a prepared TensorFlow Datasets data set,
            read without TensorFlow; the split may be a slice such as ``train[:80%]``; default
            ``train``), ``"hf:<name or folder>[:config][:split]"`` (a Hugging Face data set in its
            cache, or a folder that ``save_to_disk`` wrote; extra ``hf``), ``"folder:<path>"`` (one
            sub-folder of images per class, or folders train, val and test of such),
            ``"csv:<path>"`` or ``"parquet:<path>"`` (a row per image); ``"gs://bucket/scans"`` is
            such a folder in a bucket, and ``csv:gs://...`` such a table: all files of its folder
            are fetched to the cache, and compared there the next time.
        cache_dir: where prepared data sets are, in the layout of the library that prepared them.
            Default for ``digits`` and buckets: the environment variable FLAXTRANSFER_CACHE, else
            ``~/.cache/flaxtransfer``; for ``tfds:`` and ``hf:`` that library's own default
            (TFDS_DATA_DIR, else ``~/tensorflow_datasets``; HF_DATASETS_CACHE).
        download: whether a ``tfds:`` or ``hf:`` data set that is not there may be downloaded.
        skip_corrupt: for files and ``hf:``, leave out those that are missing, not an image or
            cannot be decoded, and list them in ``source.skipped``; every one is read once to find
            them.
        min_side: for images from files: a large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size
            as long as its shorter side keeps this many pixels. It is several times faster, and
            differs slightly from resizing the full image.
        bands: channels to read from image files; default RGB. Other sources have a fixed number
            of channels.
        partial: for files, allow one class alone, and leave out classes without an image; to
            evaluate on whatever there is.
        image_column: for ``csv:`` and ``parquet:``, the column of the paths, relative to the file
            or absolute, or a pattern such as ``"images/{id}.png"``; for ``hf:``, the column of the
            images. These six are guessed where they are left out; ``source.notes`` say what was.
        label_column: the column of the labels, or one column per output.
        split_column: the column with train, val or test, which gives ``source.splits``; "none" for
            no such column, and for ``hf:`` to take its own splits as one set.
        group_column: the column of what must stay in one part of a split, such as patients, which
            gives ``source.groups()``; "none" for no such column.
        label_separator: between several labels of an image in one column; default ``|``, and "" for
            one label with that character in its name.
        ignore_label: the value that means "no label"; such rows are left out.
        task: "single_label", "multi_label" or "regression", where the values do not show it.

    Returns:
        The source.

    Raises:
        ValueError: the name is not understood, or names something that does not exist; a table
            with columns or rows that cannot be used.
        FileNotFoundError: the folder, the file or the prepared data set is missing.

    >>> open_source("digit")
    Traceback (most recent call last):
    ...
    ValueError: unknown data source 'digit'; did you mean 'digits'? known: 'digits', ...
    """
    options = OpenOptions(
        cache_dir=cache_dir,
        download=download,
        skip_corrupt=skip_corrupt,
        min_side=min_side,
        bands=bands,
        partial=partial,
        image_column=image_column,
        label_column=label_column,
        split_column=split_column,
        group_column=group_column,
        label_separator=label_separator,
        ignore_label=ignore_label,
        task=task,
    )
    scheme, rest = _scheme_of(spec, labeled=True)
    _check_columns(scheme, options)
    if scheme.labeled is None:
        raise ValueError(f"{spec!r} has no labels; {scheme.form!r} is for unlabeled images")
    return scheme.labeled(rest, options)


def open_unlabeled(
    spec: str,
    *,
    skip_corrupt: bool = False,
    bands: int | None = None,
    image_column: str | None = None,
) -> UnlabeledImages:
    """Opens images without regard to classes: to predict, to diagnose, to adapt to.

    Args:
        spec: ``"folder:<path>"`` (images at any depth, in class folders or not), ``"npz:<file>"``
            (an array called "image", uint8 or floats in 0 .. 1, ``[examples, height, width(,
            channels)]``), or any other name that ``open_source`` takes; of a ``csv:`` or
            ``parquet:`` and of ``hf:`` only the images are read.
        skip_corrupt: leave out files that are not an image; they are listed in ``skipped``.
        bands: channels to read from image files; default RGB.
        image_column: as for ``open_source``.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: no image in it, files that are not an image, no such array.
    """
    options = OpenOptions(skip_corrupt=skip_corrupt, bands=bands, image_column=image_column)
    scheme, rest = _scheme_of(spec, labeled=False)
    _check_columns(scheme, options)
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


def _hub(rest: str, options: OpenOptions) -> Source:
    from flaxtransfer.data.hub import open_hub
    from flaxtransfer.data.manifest import Columns

    return open_hub(
        rest,
        Columns(**options.columns()),
        cache_dir=options.cache_dir,
        download=options.download,
        skip_corrupt=options.skip_corrupt,
        min_side=options.min_side,
        bands=3 if options.bands is None else options.bands,
        partial=options.partial,
    )


def _unlabeled_hub(rest: str, options: OpenOptions) -> UnlabeledImages:
    from flaxtransfer.data.hub import open_hub
    from flaxtransfer.data.manifest import Columns

    source = open_hub(
        rest,
        Columns(image=options.image_column),
        skip_corrupt=options.skip_corrupt,
        bands=3 if options.bands is None else options.bands,
        labeled=False,
    )
    names = tuple(map(str, source.rows.tolist()))
    return UnlabeledImages(source, names, source.skipped, source.notes)


def _folder(rest: str, options: OpenOptions) -> Source:
    from flaxtransfer.data.folder import open_folder

    place, address, notes = _local(rest, options)
    found = open_folder(
        place,
        skip_corrupt=options.skip_corrupt,
        min_side=options.min_side,
        bands=3 if options.bands is None else options.bands,
        partial=options.partial,
    )
    return replace(found, origin=f"folder:{address}" if address else "", notes=notes + found.notes)


def _unlabeled_folder(rest: str, options: OpenOptions) -> UnlabeledImages:
    from flaxtransfer.data.folder import open_unlabeled_folder

    place, _, notes = _local(rest, options)
    found = open_unlabeled_folder(
        place,
        skip_corrupt=options.skip_corrupt,
        bands=3 if options.bands is None else options.bands,
    )
    return replace(found, notes=notes + found.notes)


def _in_bucket(
    opened: Callable[[str, OpenOptions], Any],
) -> Callable[[str, OpenOptions], Any]:
    """A folder by its address alone: what follows "gs:" is that without the scheme."""
    return lambda rest, options: opened(f"gs:{rest}", options)


def _local(
    rest: str, options: OpenOptions, *, table: bool = False
) -> tuple[str, str, tuple[str, ...]]:
    """The path of a folder or table on this machine; from a bucket it is fetched first.

    Args:
        rest: a path, or an address of a bucket.
        options: whose cache takes what is fetched.
        table: whether it is a file; all of its folder is fetched, where its images are.

    Returns:
        The path, the address or "", and what was fetched.
    """
    address = bucket_address(rest)
    if address is None:
        return rest, "", ()
    from flaxtransfer.checkpoint.mirror import cached_folder, fetch_tree
    from flaxtransfer.weights.locations import cache_folder

    fetched, _, name = address.rpartition("/") if table else (address, "", "")
    cache = cache_folder() if options.cache_dir is None else Path(options.cache_dir)
    folder = cached_folder(fetched, cache / "buckets")
    note = fetch_tree(fetched, folder)
    return str(folder / name) if table else str(folder), address, (note,)


def _manifest(kind: str) -> Callable[[str, OpenOptions], Source]:
    def opened(rest: str, options: OpenOptions) -> Source:
        from flaxtransfer.data.manifest import Columns, open_manifest

        place, address, notes = _local(rest, options, table=True)
        found = open_manifest(
            place,
            kind,
            Columns(**options.columns()),
            skip_corrupt=options.skip_corrupt,
            min_side=options.min_side,
            bands=3 if options.bands is None else options.bands,
            partial=options.partial,
        )
        origin = f"{kind}:{address}" if address else ""
        return replace(found, origin=origin, notes=notes + found.notes)

    return opened


def _unlabeled_manifest(kind: str) -> Callable[[str, OpenOptions], UnlabeledImages]:
    def opened(rest: str, options: OpenOptions) -> UnlabeledImages:
        from flaxtransfer.data.manifest import open_unlabeled_manifest

        place, _, notes = _local(rest, options, table=True)
        found = open_unlabeled_manifest(
            place,
            kind,
            options.image_column,
            skip_corrupt=options.skip_corrupt,
            bands=3 if options.bands is None else options.bands,
        )
        return replace(found, notes=notes + found.notes)

    return opened


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
    "hf": Scheme(
        "hf:<name or folder>[:config][:split]",
        "a Hugging Face data set in its cache, or saved to a folder",
        _hub,
        _unlabeled_hub,
        columns=True,
    ),
    "folder": Scheme(
        "folder:<path>", "images in one sub-folder per class", _folder, _unlabeled_folder
    ),
    **{
        kind: Scheme(
            f"{kind}:<path>",
            f"a {text} file with one row per image",
            _manifest(kind),
            _unlabeled_manifest(kind),
            columns=True,
        )
        for kind, text in (("csv", "CSV"), ("parquet", "Parquet"))
    },
    "gs": Scheme(
        "gs://<bucket>/<path>",
        "such a folder in a bucket of Cloud Storage (extra gcs)",
        _in_bucket(_folder),
        _in_bucket(_unlabeled_folder),
    ),
    "npz": Scheme("npz:<file>", "an array 'image' in a .npz file", None, _npz),
}
"""All schemes. To add one, add a row."""


def _schemes(labeled: bool) -> dict[str, Scheme]:
    return {name: each for name, each in SCHEMES.items() if each.labeled or not labeled}


def _check_columns(scheme: Scheme, options: OpenOptions) -> None:
    """Refuses options that nothing would read."""
    if scheme.columns or not options.columns():
        return
    given = [name for name in _COLUMN_OPTIONS if getattr(options, name) not in (None, (), [])]
    forms = listing(repr(each.form) for each in SCHEMES.values() if each.columns)
    raise ValueError(f"{listing(given)} must be given for {forms} only, got {scheme.form!r}")


_COLUMN_OPTIONS = (
    "image_column",
    "label_column",
    "split_column",
    "group_column",
    "label_separator",
    "ignore_label",
    "task",
)


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
