"""The namings that files are read in: a table each, and what no table can say."""

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from flaxtransfer.models.config import ResNetConfig
from flaxtransfer.weights.naming import (
    big_transfer,
    huggingface,
    keras,
    key_map,
    native,
    timm,
    torchvision,
)
from flaxtransfer.weights.preprocessing import Preprocessing

__all__ = ["FORMATS", "Format", "detect_naming", "table_for"]


Arrays = Mapping[str, np.ndarray]


def _as_they_are(arrays: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    return dict(arrays), []


@dataclasses.dataclass(frozen=True)
class Format:
    """How one project stores a network.

    Args:
        table: the names, for a file with these keys.
        prepare: the file's arrays as the table names them, and notes on what was done: training
            state left out, biases folded. It runs for files of other formats too, and leaves
            what it does not know as it is.
        implied: what networks of this format are and no leaf shows.
        preprocessing: of such a network where none is recorded; None where ImageNet's is assumed.
    """

    table: Callable[[Collection[str]], key_map.Table]
    prepare: Callable[[Arrays], tuple[dict[str, np.ndarray], list[str]]] = _as_they_are
    implied: Callable[[ResNetConfig], ResNetConfig] = lambda config: config
    preprocessing: Callable[[ResNetConfig], Preprocessing | None] = lambda config: None


FORMATS: dict[str, Format] = {
    "torchvision": Format(lambda keys: torchvision.TABLE, prepare=timm.narrowed),
    "timm": Format(timm.table_of, prepare=timm.narrowed),
    "timm-v2": Format(timm.v2_table_of, implied=timm.with_big_transfer),
    "huggingface": Format(lambda keys: huggingface.TABLE),
    "huggingface-flax": Format(lambda keys: huggingface.FLAX, prepare=huggingface.in_flax),
    "bit": Format(
        lambda keys: big_transfer.TABLE,
        prepare=big_transfer.unnumbered,
        implied=big_transfer.with_standardized_weights,
        preprocessing=lambda config: big_transfer.PREPROCESSING,
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
    """The format whose names most keys follow; the first of those that fit as well."""
    return max(FORMATS, key=lambda name: _known(FORMATS[name], arrays))


def table_for(config: ResNetConfig) -> key_map.Table:
    """The table that a network is written with: torchvision's where it has one, or timm's."""
    return timm.v2_table_for(config) if config.preactivation else timm.table_for(config)


def _known(format: Format, arrays: Arrays) -> int:
    try:
        prepared, _ = format.prepare(arrays)
    except ValueError:
        return -1
    table = format.table(prepared)
    found = (key_map.leaf_of(table, key, array.shape) for key, array in prepared.items())
    leaves = {leaf for leaf, _ in filter(None, found)}
    # A scale without statistics is that of a GroupNorm, whatever the key is called.
    lonely = [leaf for leaf in leaves if _statistic_of(leaf) not in {None, *leaves}]
    return len(leaves) - len(lonely)


def _statistic_of(leaf: str) -> str | None:
    """The mean that stands beside a BatchNorm's scale; None for other leaves."""
    if not leaf.endswith("/scale") or "/gn" in leaf:
        return None
    return leaf.replace("params/", "batch_stats/").removesuffix("scale") + "mean"
