"""Weight formats: one table row per naming, and the properties that a table cannot state."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.naming import huggingface, keras, key_map, native, timm, torchvision
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["FORMATS", "Format", "detect_naming"]


Arrays = Mapping[str, np.ndarray]


def _unchanged(arrays: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    return dict(arrays), []


@dataclasses.dataclass(frozen=True)
class Format:
    """The file format of one project.

    Args:
        table: returns the key map for a file with these keys.
        prepare: returns the file's arrays with the keys of the table, and notes on changes
            (training state omitted, biases folded). It also runs for files of other formats, and
            must return them unchanged.
        implied: sets the fields of the configuration that the format implies and no leaf shows.
        preprocessing: of a network if none is recorded; None if ImageNet's is assumed.
        variants: whether its files have networks that differ in what no leaf shows.
    """

    table: Callable[[Collection[str]], key_map.Table]
    prepare: Callable[[Arrays], tuple[dict[str, np.ndarray], list[str]]] = _unchanged
    implied: Callable[[ResNetConfig], ResNetConfig] = lambda config: config
    preprocessing: Callable[[ResNetConfig], Preprocessing | None] = lambda config: None
    variants: bool = False


FORMATS: dict[str, Format] = {
    "torchvision": Format(lambda keys: torchvision.TABLE, prepare=timm.narrowed, variants=True),
    "timm": Format(timm.table_of, prepare=timm.narrowed, variants=True),
    "timm-v2": Format(timm.v2_table_of, implied=timm.with_big_transfer, variants=True),
    "huggingface": Format(lambda keys: huggingface.TABLE, variants=True),
    "huggingface-flax": Format(
        lambda keys: huggingface.FLAX, prepare=huggingface.in_flax, variants=True
    ),
    "bit": Format(
        lambda keys: timm.BIT_TABLE,
        prepare=timm.unnumbered,
        implied=timm.with_standardized_weights,
        preprocessing=lambda config: timm.BIT_PREPROCESSING,
    ),
    "keras": Format(
        keras.table,
        prepare=keras.prepared,
        implied=keras.first_version,
        preprocessing=lambda config: keras.TF if config.preactivation else keras.CAFFE,
    ),
    "keras-hub": Format(keras.hub_table, prepare=keras.prepared),
    "flaxtransfer": Format(lambda keys: native.TABLE, prepare=native.prepared),
}


def detect_naming(arrays: Arrays) -> str:
    """The format that matches most keys; the first of equal ones."""
    return max(FORMATS, key=lambda name: _matches(FORMATS[name], arrays))


def _matches(format: Format, arrays: Arrays) -> int:
    try:
        prepared, _ = format.prepare(arrays)
    except ValueError:
        return -1
    table = format.table(prepared)
    found = (key_map.leaf_of(table, key, array.shape) for key, array in prepared.items())
    leaves = {leaf for leaf, _ in filter(None, found)}
    # A scale without statistics belongs to a GroupNorm, whatever its key.
    lonely = [leaf for leaf in leaves if _statistic_of(leaf) not in {None, *leaves}]
    return len(leaves) - len(lonely)


def _statistic_of(leaf: str) -> str | None:
    """The mean that belongs to a BatchNorm's scale; None for other leaves."""
    if not leaf.endswith("/scale") or "/gn" in leaf:
        return None
    return leaf.replace("params/", "batch_stats/").removesuffix("scale") + "mean"
