"""``flaxtransfer probe``: what each depth of a network already knows about a set of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from flaxtransfer.analysis.profile import probe_profile
from flaxtransfer.classifier import transfer
from flaxtransfer.commands.job import split
from flaxtransfer.commands.options import Train
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source
from flaxtransfer.data.splits import subsample
from flaxtransfer.features.extract import segment_features
from flaxtransfer.weights.loading import load


@dataclass(frozen=True)
class Probe:
    """Print what a linear probe on each segment of a network reaches, without any training.

    Only the training images are looked at; the images that `train` would test on with the same
    options are left alone. Example: flaxtransfer probe --data folder:scans --weights resnet50.pth

    Args:
      data: "digits", "folder:<path>" (one sub-folder a class) or "tfds:<name>[/config][:split]".
      weights: "builtin", a file of a ResNet, a folder with one, hf://organization/name, or https://.
      format: naming of the weights, where it is not to be read off.
      sensor: whose bands the weights take, where their name does not say it: sentinel2_all, ...
      model: architecture that the weights must be of; by default whatever they are.
      labels_per_class: use so many labels of each class, 0 for all; by default 5 for the digits
        and all for other data.
      kind: of probe: "ridge", each image left out once in closed form, or "logistic" with folds.
      most_images: look at no more than so many of them.
      seed: of the choice of labels.
      skip_corrupt: leave out unreadable images instead of stopping.
      out: also draw the curve into this file, such as probe.png.
    """

    data: str = "digits"
    weights: str = "builtin"
    format: str | None = None
    sensor: str | None = None
    model: str | None = None
    labels_per_class: int | None = None
    kind: Literal["ridge", "logistic"] = "ridge"
    most_images: int = 5000
    seed: int = 0
    skip_corrupt: bool = False
    out: Path | None = None


def probe(options: Probe, console: Console) -> None:
    """Runs ``flaxtransfer probe``."""
    if options.most_images < 3:
        raise ValueError(f"--most-images is 3 or more, not {options.most_images}")
    shared = Train(data=options.data, labels_per_class=options.labels_per_class, seed=options.seed)
    shared.check()
    checkpoint = load(
        options.weights, model=options.model, format=options.format, sensor=options.sensor
    )
    source = open_source(
        options.data, skip_corrupt=options.skip_corrupt, bands=checkpoint.config.bands
    )
    positions = subsample(split(source, shared).train, options.most_images, source.labels())
    classes = len(source.class_names)
    model, variables, _ = transfer(checkpoint, classes=classes)
    batches = eval_batches(source, positions, checkpoint.preprocessing)
    features, labels = segment_features(model, variables, batches, checkpoint.preprocessing)
    profile = probe_profile(features, labels, kind=options.kind, classes=classes)
    console.print(
        f"{options.data}: {len(positions)} training images, {classes} classes; {checkpoint!r}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(profile), highlight=False)
    if options.out is not None:
        from flaxtransfer.report.figures import draw_profile

        draw_profile(profile, options.out)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)
