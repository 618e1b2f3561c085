"""Handwritten digits as a TensorFlow Datasets builder, made from scikit-learn's copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
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
            # Example i of the data set is row i of scikit-learn's table.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        from PIL import Image
        from sklearn.datasets import load_digits

        table = load_digits()
        images = ((table.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
        for index, (image, label) in enumerate(zip(images, table.target, strict=True)):
            # A Pillow image: an array would be encoded through TensorFlow.
            yield index, {"image": Image.fromarray(image), "label": int(label)}
