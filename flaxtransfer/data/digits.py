"""Handwritten digits.

scikit-learn's copy of the digits as a TensorFlow Datasets data set: prepared once, without
internet, checked every time it is opened, and read into memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from flaxtransfer.data.source import ArraySource
from flaxtransfer.files import discard_folder, folder_lock, publish_folder


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
# Of the pixels and labels as prepared; it detects a damaged copy and a change in scikit-learn.
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
    import tensorflow_datasets as tfds

    from flaxtransfer.data.decode import decode

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
    import tensorflow_datasets as tfds

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
