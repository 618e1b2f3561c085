"""TensorFlow Datasets, read without TensorFlow, and the handwritten digits, which are one.

``open_tfds`` opens prepared data sets; they must be in the array_record format, which has random
access. ``open_digits`` prepares scikit-learn's copy of the digits as such a data set: once, without
internet, checked every time it is opened, and read into memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds

from flaxtransfer.data.decode import decode, decode_bands, read_picture
from flaxtransfer.data.scans import Asked, Levels, Picture
from flaxtransfer.data.source import ArraySource, Example, position
from flaxtransfer.files import discard_folder, folder_lock, publish_folder
from flaxtransfer.paths import suggest

_SPEC = re.compile(
    r"(?P<name>\w+)(/(?P<config>[^:/]+))?(:(?P<version>\d+\.\d+\.\d+))?(:(?P<split>.+))?"
)
_INFO = "dataset_info.json"
_BLOCK = 512  # records read at once for their labels


@dataclass(frozen=True, eq=False)
class TfdsSource:
    """Images of a TensorFlow Datasets split, decoded when read; made by ``open_tfds``."""

    name: str
    class_names: tuple[str, ...]
    data: Any  # tfds.core.data_sources.BaseDataSource with undecoded images
    image_key: str
    label_key: str
    channels: Literal[1, 3]
    min_side: int | None = None
    levels: Levels | None = None

    @property
    def address(self) -> str:
        """What ``open_source`` opens it by."""
        return self.name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        index = position(index, len(self.data))
        example = self.data[index]
        image = decode_bands(
            example[self.image_key],
            name=f"example {index} of {self.name}",
            bands=self.channels,
            min_side=self.min_side,
            levels=self.levels,
        )
        return {"image": image, "label": int(example[self.label_key])}

    def picture(self, index: SupportsIndex, /, *, measured: bool = False) -> Picture | None:
        """The image as it is stored; None for one of 8 bits if only ``measured`` are asked."""
        index = position(index, len(self.data))
        name = f"example {index} of {self.name}"
        asked = Asked(name, self.channels, self.min_side, measured=measured)
        return read_picture(self.data[index][self.image_key], asked)

    def with_levels(self, levels: Levels) -> TfdsSource:
        """The same images with this black and white for those of more than 8 bits."""
        return replace(self, levels=levels)

    def content(self, index: SupportsIndex, /) -> bytes:
        """The bytes that the image is decoded from, for digests, and how they are read."""
        example = self.data[position(index, len(self.data))]
        return f"{self.min_side}, {self.channels}\0".encode() + bytes(example[self.image_key])

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]``; reads every record once, decodes none."""
        return self._labels.copy()

    @cached_property
    def _labels(self) -> np.ndarray:
        count = len(self.data)
        found = np.empty(count, np.int64)
        for start in range(0, count, _BLOCK):
            block = range(start, min(start + _BLOCK, count))
            found[block] = [example[self.label_key] for example in self.data.__getitems__(block)]
        if found.min() < 0:
            raise ValueError(
                f"{self.name}: {(found < 0).sum()} of {count} examples have no label "
                f"({self.label_key} is negative, as in test sets whose labels are not published)"
            )
        return found


def open_tfds(
    spec: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
    min_side: int | None = None,
) -> TfdsSource:
    """Opens a TensorFlow Datasets split, ``<name>[/config][:version][:split]``.

    The data set must have been prepared in the array_record format, which allows random access.
    Reading never needs TensorFlow; preparing some data sets does.

    Args:
        spec: for example ``food101``, ``imagenette/160px-v2:train[:80%]``, ``mnist:3.0.1:test``.
            The split defaults to ``train``.
        data_dir: where TensorFlow Datasets keeps prepared data; its own default when left out.
        download: whether to download and prepare a missing data set. Without internet, its retries
            take minutes, so that nothing is downloaded by default.
        min_side: see ``open_source``.

    Returns:
        The source; images are RGB, or gray where the data set declares one channel.

    Raises:
        FileNotFoundError: the data set is not prepared in ``data_dir``.
        ValueError: unknown name, config or split; not array_record; no image or no class label.
        RuntimeError: the download failed.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(
            "a TensorFlow Datasets name must be 'tfds:<name>[/config][:version][:split]', such as "
            f"'tfds:food101:train[:80%]', got 'tfds:{spec}'"
        )
    split = match["split"] or "train"
    full_name = spec.removesuffix(f":{match['split']}") if match["split"] else spec
    builder = _builder(match, full_name, data_dir)
    if not _is_prepared(builder):
        builder = _fetch(builder, match, full_name, data_dir, download)
    _check_format(builder, full_name)
    _check_split(builder, full_name, split)
    image_key, label_key = _keys(builder, full_name)
    return TfdsSource(
        name=f"tfds:{full_name}:{split}",
        class_names=_class_names(builder.info.features[label_key]),
        data=_data(builder, full_name, split, image_key),
        image_key=image_key,
        label_key=label_key,
        channels=1 if builder.info.features[image_key].shape[-1] == 1 else 3,
        min_side=min_side,
    )


def _builder(match: re.Match[str], full_name: str, data_dir: Any, **kwargs: Any) -> Any:
    kwargs |= {"data_dir": None if data_dir is None else os.fspath(data_dir)}
    try:
        return tfds.builder(full_name, **kwargs)
    # Damaged files raise many types of error, and a wrong version raises an AssertionError.
    except Exception as error:
        raise ValueError(
            _open_problem(error, match, full_name, _find_prepared(data_dir))
        ) from error


def _open_problem(
    error: Exception, match: re.Match[str], full_name: str, prepared: list[str]
) -> str:
    from tensorflow_datasets.core.registered import list_imported_builders

    name, config, version = match["name"], match["config"], match["version"]
    text = f"'tfds:{full_name}' cannot be opened: "
    coded, copied = list_imported_builders(), {re.split("[/:]", each)[0] for each in prepared}
    if name not in coded and name not in copied:
        known = sorted({*coded, *copied})
        return (
            f"TensorFlow Datasets knows no data set {name!r}{suggest(name, known)} "
            f"({len(known)} names are known)"
        )
    if name in coded:
        configs = list(tfds.builder_cls(name).builder_configs)
        if config is not None and config not in configs:
            there = f"the configs {configs}{suggest(config, configs)}" if configs else "no configs"
            return text + f"{name} has {there}"
        if isinstance(error, AssertionError) and version is not None:
            makes = tfds.builder_cls(name).VERSION
            text += f"there is no version {version}; the code makes {makes}"
            return text + _prepared_text(prepared)
    return text + f"{type(error).__name__}: {str(error).splitlines()[0]}" + _prepared_text(prepared)


def _find_prepared(data_dir: Any) -> list[str]:
    """The prepared data sets in the data folder, as ``name[/config]:version``."""
    from tensorflow_datasets.core.constants import DATA_DIR

    folder = Path(DATA_DIR if data_dir is None else data_dir).expanduser()
    found = [*folder.glob(f"*/*/{_INFO}"), *folder.glob(f"*/*/*/{_INFO}")]
    parts = [path.parent.relative_to(folder).parts for path in found]
    return sorted(f"{'/'.join(names)}:{version}" for *names, version in parts)


def _is_prepared(builder: Any) -> bool:
    return (Path(builder.data_path) / _INFO).is_file()


def _prepared_text(prepared: list[str]) -> str:
    return f" (prepared here: {', '.join(prepared) or 'none'})"


def _fetch(
    builder: Any, match: re.Match[str], full_name: str, data_dir: Any, download: bool
) -> Any:
    if not download:
        raise FileNotFoundError(
            f"'tfds:{full_name}' is not prepared: there is no data set in {builder.data_path}"
            f"{_prepared_text(_find_prepared(data_dir))}. Prepare it once, where there is "
            "internet, with download=True, or give its folder as cache_dir"
        )
    builder = _builder(match, full_name, data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except Exception as error:
        # Another process has prepared the same data set meanwhile.
        if isinstance(error, FileExistsError) and _is_prepared(builder):
            return _builder(match, full_name, data_dir)
        text = f"'tfds:{full_name}' could not be prepared in {builder.data_path}: "
        if isinstance(error, ModuleNotFoundError) and error.name == "tensorflow":
            text += (
                "the code that prepares this data set uses TensorFlow. Install tensorflow-cpu to "
                "prepare it once with file_format='array_record'; reading does not need it"
            )
        else:
            text += f"{type(error).__name__}: {error}"
        raise RuntimeError(text) from error
    return builder


def _check_format(builder: Any, full_name: str) -> None:
    found = builder.info.file_format
    if found is None or found.value != "array_record":
        raise ValueError(
            f"'tfds:{full_name}' is prepared in {builder.data_path} as "
            f"{found.value if found else 'an unknown format'}, which has no random access (or, for "
            "parquet, loses examples); prepare it in another cache_dir with download=True, which "
            "writes array_record"
        )


def _check_split(builder: Any, full_name: str, split: str) -> None:
    splits = builder.info.splits
    known = f"'tfds:{full_name}' has the splits " + ", ".join(
        f"{name} ({info.num_examples} examples)" for name, info in splits.items()
    )
    for part in split.split("+"):
        name = part.split("[")[0].strip()
        if name not in (*splits, "all"):
            raise ValueError(f"there is no split {name!r}{suggest(name, list(splits))}; {known}")
    try:
        count = splits[split].num_examples
    except (ValueError, KeyError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the split {split!r} cannot be read: {reason}; {known}") from error
    if count < 1:
        raise ValueError(f"the split {split!r} has no examples; {known}")


def _keys(builder: Any, full_name: str) -> tuple[str, str]:
    features = builder.info.features
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    named = builder.info.supervised_keys
    named = named[:2] if named is not None and len(named) >= 2 else ("image", "label")
    found = []
    for name, kind in zip(named, kinds, strict=True):
        fitting = [key for key in features if isinstance(features[key], kind)]
        if name in fitting:
            found.append(name)
        elif len(fitting) == 1:
            found.append(fitting[0])
        else:
            listed = ", ".join(f"{key} ({type(features[key]).__name__})" for key in features)
            raise ValueError(
                f"'tfds:{full_name}' is not an image classification data set: it must have one "
                f"{kind.__name__} feature, got {len(fitting)}; its features: {listed}"
            )
    return found[0], found[1]


def _class_names(feature: Any) -> tuple[str, ...]:
    # A label without names still has a number of classes.
    try:
        return tuple(feature.names)
    except ValueError:
        return tuple(str(label) for label in range(feature.num_classes))


def _data(builder: Any, full_name: str, split: str, image_key: str) -> Any:
    try:
        data = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
        data[0]
    # Missing or truncated record files raise many types of error.
    except Exception as error:
        raise ValueError(
            f"'tfds:{full_name}' in {builder.data_path} is damaged ({type(error).__name__}: "
            f"{error}); delete that folder and prepare it again with download=True"
        ) from error
    return data


class SklearnDigits(tfds.core.GeneratorBasedBuilder):  # type: ignore[misc]  # untyped library
    """1797 handwritten digits of 8 x 8 px, in scikit-learn's order, one split ``train``.

    scikit-learn's pixels count 0 to 16; here they are ``(255 * x + 8) // 16``, that is
    ``255 * x / 16`` rounded half up: 0 stays 0, 8 becomes 128, 16 becomes 255.

    References:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8 x 8 px, from scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            # Example i of the data set is row i of scikit-learn's array.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image
        from sklearn.datasets import load_digits

        table = load_digits()
        images = ((table.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
        for index, (image, label) in enumerate(zip(images, table.target, strict=True)):
            # A Pillow image: an array would be encoded through TensorFlow.
            yield index, {"image": Image.fromarray(image), "label": int(label)}


EXAMPLES = 1797
# Of the digits and labels as prepared; it detects a damaged copy and a change in scikit-learn.
SHA256 = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"
_ATTEMPTS = 5
_PREPARING = ".preparing-"


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Cache folder of prepared data sets: as given, else FLAXTRANSFER_CACHE, else the user's.

    >>> cache_root("/data/prepared").as_posix()
    '/data/prepared'
    """
    chosen = cache_dir or os.environ.get("FLAXTRANSFER_CACHE") or "~/.cache/flaxtransfer"
    return Path(chosen).expanduser()


def open_digits(cache_dir: str | os.PathLike[str] | None = None) -> ArraySource:
    """Opens scikit-learn's handwritten digits, preparing them on first use.

    They are stored as a TensorFlow Datasets data set (array_record, no TensorFlow, no internet)
    in ``<cache>/sklearn_digits/1.0.0``. It is prepared in a temporary folder and renamed into
    place. Of several processes one prepares it and the others wait; what a killed one leaves could
    not be mistaken for the data set, and the next one removes it. A folder that is incomplete or
    whose checksum differs is prepared again.

    Args:
        cache_dir: see ``cache_root``.

    Returns:
        1797 gray images uint8 ``[8, 8, 1]`` in scikit-learn's order, classes ``"0"`` to ``"9"``.
        The pixel rule is that of ``SklearnDigits``.

    Raises:
        OSError: the cache folder cannot be written; the text tells how to choose another.
        ValueError: the prepared examples differ from those that this version knows.
    """
    root = cache_root(cache_dir)
    folder = root / "sklearn_digits" / "1.0.0"
    problem = ""
    for _ in range(_ATTEMPTS):
        try:
            if not folder.exists():
                _prepare(root, folder)
            opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # Another process has found it damaged.
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO).lower()
            raise type(error)(
                error.errno,
                f"the digits cannot be prepared ({reason}); choose a writable folder with "
                "cache_dir or FLAXTRANSFER_CACHE",
                str(root),
            ) from error
        problem = ""
        try:
            images, labels = _read(folder)
            found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
            if found == SHA256:
                names = tuple(str(digit) for digit in range(10))
                return ArraySource(images, labels, names, address="digits")
            problem = f"{len(images)} examples with checksum {found}"
        # Whatever error a damaged folder raises, preparing it again is the fix.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            # Here only if it is damaged; another process may have put a good one there meanwhile.
            if problem:
                discard_folder(folder, opened, root / f".damaged-{uuid.uuid4().hex}")
            os.close(opened)
    raise ValueError(
        f"the digits prepared from scikit-learn in {folder} must be {EXAMPLES} examples with "
        f"checksum {SHA256}, got {problem}"
    )


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    data = tfds.builder_from_directory(folder).as_data_source(
        split="train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    examples = data.__getitems__(range(len(data)))
    images = [
        decode(example["image"], name=f"digit {index}", channels=1)
        for index, example in enumerate(examples)
    ]
    return np.stack(images), np.array([example["label"] for example in examples], np.int64)


def _prepare(root: Path, folder: Path) -> None:
    """Prepares the data set in a temporary folder, and then gives it its name."""
    with folder_lock(folder.parent, wait=True):
        if folder.exists():
            return  # Another process has prepared it meanwhile.
        for left in root.glob(f"{_PREPARING}*"):
            shutil.rmtree(left, ignore_errors=True)
        work = root / f"{_PREPARING}{uuid.uuid4().hex}"
        try:
            # It announces a download that does not happen.
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                builder = SklearnDigits(data_dir=str(work), file_format="array_record")
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
            publish_folder(Path(builder.data_path), folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
