"""``flaxtransfer evaluate``: accuracy of a finished run on the images it kept apart, or others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from flaxtransfer.commands.job import image_bands, split
from flaxtransfer.commands.options import training_options
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source
from flaxtransfer.data.source import Source
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import suggest
from flaxtransfer.training.evaluation import evaluate as measure
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.weights.loading import load


@dataclass(frozen=True)
class Evaluate:
    """Print accuracy and loss of a finished run as one line of JSON.

    Args:
      run: the run folder.
      data: images to evaluate on; by default the test part of the run's own data.
      batch_size: images at a time.
      skip_corrupt: leave out unreadable images instead of stopping.
    """

    run: tyro.conf.Positional[Path]
    data: str | None = None
    batch_size: int = 256
    skip_corrupt: bool = False


def evaluate(options: Evaluate, console: Console) -> None:
    """Runs ``flaxtransfer evaluate``."""
    checkpoint = load(weights_of(options.run))
    trained = training_options(options.run)
    bands = image_bands(trained, checkpoint)
    source = open_source(
        options.data or trained.data, skip_corrupt=options.skip_corrupt, bands=bands
    )
    _check_classes(source, checkpoint.class_names or ())
    chosen = np.arange(len(source)) if options.data else split(source, trained).test
    batches = eval_batches(source, chosen, checkpoint.preprocessing, batch_size=options.batch_size)
    model = resnet(checkpoint.config)
    result = measure(model, checkpoint.variables, batches, checkpoint.preprocessing)
    console.print_json(json.dumps({"data": options.data or trained.data, **result.to_json()}))


def _check_classes(source: Source, trained: tuple[str, ...]) -> None:
    if tuple(source.class_names) == tuple(trained):
        return
    unknown = [
        f"{name!r}{suggest(name, trained)}" for name in source.class_names if name not in trained
    ]
    raise ValueError(
        f"the data has other classes than the run: {', '.join(map(repr, source.class_names))} "
        f"there, {', '.join(map(repr, trained))} in the run"
        + (f"; unknown to the run: {', '.join(unknown)}" if unknown else "")
    )
