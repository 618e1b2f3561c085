"""From the options of a training run to network, labels and batches, before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flaxtransfer.classifier import TransferReport, transfer
from flaxtransfer.commands.options import Train
from flaxtransfer.commands.plan import strategy_plan
from flaxtransfer.data.band_statistics import band_patches, band_preprocessing
from flaxtransfer.data.loader import DataLoaders, eval_batches, loaders
from flaxtransfer.data.open import open_source
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import Splits, stratified_split, subsample
from flaxtransfer.data.transforms import flip_keeps_labels, training_transform
from flaxtransfer.models.input_channels import change_input
from flaxtransfer.models.model import Model
from flaxtransfer.paths import flatten
from flaxtransfer.recipes import RECIPES
from flaxtransfer.recipes.measurement import MEASURED, MOST_IMAGES, Measurement, measure
from flaxtransfer.training.evaluation import Evaluation, evaluate
from flaxtransfer.training.plan import Plan
from flaxtransfer.types import Variables
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.pretrained import Pretrained


@dataclass(frozen=True)
class Job:
    """The parts of a training job, made from the options before anything is trained."""

    source: Source
    splits: Splits
    checkpoint: Pretrained
    report: TransferReport
    model: Model
    variables: Variables
    feed: DataLoaders
    plan: Plan
    evidence: Measurement

    def test(self, model: Model, variables: Variables) -> Evaluation:
        """Accuracy and loss on the images that were kept apart."""
        preprocessing = self.feed.preprocessing
        batches = eval_batches(self.source, self.splits.test, preprocessing)
        return evaluate(model, variables, batches, preprocessing)


def prepare(options: Train) -> Job:
    """Opens the data and the weights and puts network, labels and batches together."""
    checkpoint = load(
        options.weights, model=options.model, format=options.format, sensor=options.sensor
    )
    source = open_source(
        options.data,
        download=options.download,
        skip_corrupt=options.skip_corrupt,
        bands=image_bands(options, checkpoint),
    )
    splits = split(source, options)
    classes = len(source.class_names)
    dtype = jnp.bfloat16 if options.compute == "bfloat16" else None
    preprocessing, start = _bands(options, checkpoint, source, splits)
    model, variables, report = transfer(
        checkpoint, classes=classes, head=options.head, seed=options.seed, dtype=dtype, **start
    )
    flip = options.flip == "yes" or (
        options.flip == "auto" and flip_keeps_labels(source.class_names)
    )
    feed = loaders(
        source,
        splits.train,
        splits.val,
        preprocessing,
        batch_size=options.batch_size,
        transform=training_transform(preprocessing, flip=flip, channels=len(preprocessing.mean)),
        seed=options.seed,
        workers=options.workers,
    )
    if options.strategy == "from_scratch":
        variables = model.init(jax.random.key(options.seed))
    evidence = Measurement()
    if options.strategy in MEASURED:
        positions = subsample(splits.train, MOST_IMAGES, source.labels())
        batches = list(
            eval_batches(source, positions, preprocessing, batch_size=options.batch_size)
        )
        evidence = measure(
            options.strategy, model, variables, batches, preprocessing, len(splits.train)
        )
    settings = {**_settings(options, feed), **evidence.settings}
    plan = strategy_plan(options.strategy, variables["params"], settings)
    return Job(source, splits, checkpoint, report, model, variables, feed, plan, evidence)


def image_bands(options: Train, checkpoint: Pretrained) -> int:
    """Channels to read from image files, for training and for whatever comes after it."""
    return checkpoint.config.bands if options.bands is None else options.bands


def _bands(
    options: Train, checkpoint: Pretrained, source: Source, splits: Splits
) -> tuple[Preprocessing, dict[str, Any]]:
    """The preprocessing for the bands at hand, and what `transfer` has to know of them."""
    own, bands = checkpoint.preprocessing, options.bands
    start: dict[str, Any] = {"bands": bands, "adapter": options.adapter}
    start["wavelengths"] = options.wavelengths or None
    if bands is None or options.adapter == "replicate":
        return own, start
    # Before the images are read, so that a typing error costs no time.
    change_input(
        checkpoint.config,
        flatten(checkpoint.variables["params"])[checkpoint.config.first_kernel],
        bands=bands,
        way=options.adapter,
        wavelengths=start["wavelengths"],
        stem_wavelengths=own.wavelengths,
    )
    if bands == checkpoint.config.bands and not options.adapter and not options.wavelengths:
        return own, start
    preprocessing = band_preprocessing(own, source, splits.train, bands)
    if bands > 1 and options.adapter in (None, "linear", "curves") and not options.wavelengths:
        start["patches"] = band_patches(preprocessing, source, splits.train)
    return preprocessing, start


def _settings(options: Train, feed: DataLoaders) -> dict[str, Any]:
    """What of the options is for the strategy; lengths follow the size of the training set."""
    names = (
        "steps",
        "head_steps",
        "fine_tune_steps",
        "head_learning_rate",
        "learning_rate",
        "weight_decay",
        "patience",
    )
    settings = {name: getattr(options, name) for name in names}
    lengths = {
        "head_then_fine_tune": {"head_steps": (100, 3), "fine_tune_steps": (200, 10)},
        "progressive_unfreezing": {"steps": (100, 5)},
    }
    if options.strategy in RECIPES:
        for name, (least, epochs) in lengths.get(options.strategy, {"steps": (300, 10)}).items():
            settings[name] = _steps(settings[name], least, epochs, feed)
    return settings


def split(source: Source, options: Train) -> Splits:
    """The parts of the data that a run trains, validates and tests on."""
    labels_per_class = options.labels_per_class
    if labels_per_class is None:
        labels_per_class = 5 if options.data == "digits" else 0
    return stratified_split(
        source.labels(),
        labels_per_class=labels_per_class or None,
        val_per_class=options.val_per_class or None,
        val_fraction=options.val_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
        class_names=source.class_names,
    )


def _steps(given: int | None, least: int, epochs: int, feed: DataLoaders) -> int:
    return max(least, epochs * feed.steps_per_epoch) if given is None else given
