"""Labelled images: sources, splits, transforms and batches.

Names are looked up when they are used, so that importing the package does not import grain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flaxtransfer.data.augmentation import HorizontalFlip as HorizontalFlip
    from flaxtransfer.data.augmentation import Jitter as Jitter
    from flaxtransfer.data.augmentation import RandomAffine as RandomAffine
    from flaxtransfer.data.augmentation import RandomResizedCrop as RandomResizedCrop
    from flaxtransfer.data.cache import cached as cached
    from flaxtransfer.data.contents import digest as digest
    from flaxtransfer.data.decode import ImageError as ImageError
    from flaxtransfer.data.elements import Batch as Batch
    from flaxtransfer.data.folder import FolderSource as FolderSource
    from flaxtransfer.data.normalisation import normalise as normalise
    from flaxtransfer.data.ordering import training_rows as training_rows
    from flaxtransfer.data.pipeline import eval_batches as eval_batches
    from flaxtransfer.data.pipeline import train_batches as train_batches
    from flaxtransfer.data.pipeline import train_dataset as train_dataset
    from flaxtransfer.data.source import ArraySource as ArraySource
    from flaxtransfer.data.source import Example as Example
    from flaxtransfer.data.source import Source as Source
    from flaxtransfer.data.source import open_source as open_source
    from flaxtransfer.data.splits import Splits as Splits
    from flaxtransfer.data.splits import stratified_split as stratified_split
    from flaxtransfer.data.steps import Channels as Channels
    from flaxtransfer.data.steps import Compose as Compose
    from flaxtransfer.data.steps import ResizeCrop as ResizeCrop
    from flaxtransfer.data.steps import Transform as Transform
    from flaxtransfer.data.transforms import evaluation_transform as evaluation_transform
    from flaxtransfer.data.transforms import flip_keeps_labels as flip_keeps_labels
    from flaxtransfer.data.transforms import training_transform as training_transform
    from flaxtransfer.data.views import FixedView as FixedView

_HOME = {
    "augmentation": ("HorizontalFlip", "Jitter", "RandomAffine", "RandomResizedCrop"),
    "cache": ("cached",),
    "decode": ("ImageError",),
    "contents": ("digest",),
    "folder": ("FolderSource",),
    "normalisation": ("normalise",),
    "elements": ("Batch",),
    "pipeline": ("eval_batches", "train_batches", "train_dataset"),
    "source": ("ArraySource", "Example", "Source", "open_source"),
    "splits": ("Splits", "stratified_split"),
    "steps": ("Channels", "Compose", "ResizeCrop", "Transform"),
    "ordering": ("training_rows",),
    "views": ("FixedView",),
    "transforms": ("evaluation_transform", "flip_keeps_labels", "training_transform"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
