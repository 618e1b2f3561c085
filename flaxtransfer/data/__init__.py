"""Labeled images: sources, splits, transforms and batches.

Names are looked up when they are used, so that importing the package does not import grain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flaxtransfer.lazy import attach

if TYPE_CHECKING:
    from flaxtransfer.data.augment import RandAugment as RandAugment
    from flaxtransfer.data.augment import RandomErasing as RandomErasing
    from flaxtransfer.data.augment import TrivialAugment as TrivialAugment
    from flaxtransfer.data.folder import FolderSource as FolderSource
    from flaxtransfer.data.loader import DataLoaders as DataLoaders
    from flaxtransfer.data.loader import IndexedExamples as IndexedExamples
    from flaxtransfer.data.loader import band_patches as band_patches
    from flaxtransfer.data.loader import band_preprocessing as band_preprocessing
    from flaxtransfer.data.loader import cached as cached
    from flaxtransfer.data.loader import eval_batches as eval_batches
    from flaxtransfer.data.loader import loaders as loaders
    from flaxtransfer.data.open import open_source as open_source
    from flaxtransfer.data.open import open_unlabeled as open_unlabeled
    from flaxtransfer.data.pipeline import Batch as Batch
    from flaxtransfer.data.pipeline import FixedView as FixedView
    from flaxtransfer.data.pipeline import batches_in_order as batches_in_order
    from flaxtransfer.data.pipeline import train_batches as train_batches
    from flaxtransfer.data.pipeline import train_dataset as train_dataset
    from flaxtransfer.data.pipeline import training_rows as training_rows
    from flaxtransfer.data.scans import ImageError as ImageError
    from flaxtransfer.data.scans import Levels as Levels
    from flaxtransfer.data.source import ArraySource as ArraySource
    from flaxtransfer.data.source import Example as Example
    from flaxtransfer.data.source import Source as Source
    from flaxtransfer.data.source import digest as digest
    from flaxtransfer.data.source import measure_levels as measure_levels
    from flaxtransfer.data.source import near_duplicates as near_duplicates
    from flaxtransfer.data.source import with_levels as with_levels
    from flaxtransfer.data.splits import Splits as Splits
    from flaxtransfer.data.splits import stratified_folds as stratified_folds
    from flaxtransfer.data.splits import stratified_split as stratified_split
    from flaxtransfer.data.splits import subsample as subsample
    from flaxtransfer.data.transforms import Channels as Channels
    from flaxtransfer.data.transforms import Compose as Compose
    from flaxtransfer.data.transforms import HorizontalFlip as HorizontalFlip
    from flaxtransfer.data.transforms import Jitter as Jitter
    from flaxtransfer.data.transforms import RandomAffine as RandomAffine
    from flaxtransfer.data.transforms import RandomResizedCrop as RandomResizedCrop
    from flaxtransfer.data.transforms import ResizeCrop as ResizeCrop
    from flaxtransfer.data.transforms import Transform as Transform
    from flaxtransfer.data.transforms import evaluation_transform as evaluation_transform
    from flaxtransfer.data.transforms import flip_keeps_labels as flip_keeps_labels
    from flaxtransfer.data.transforms import training_transform as training_transform

__getattr__, __dir__, __all__ = attach(__name__, __file__)
