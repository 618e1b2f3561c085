"""``flaxtransfer evaluate``: accuracy of a finished run on its test images, or on others."""

from __future__ import annotations

import json

import numpy as np
from rich.console import Console

from flaxtransfer.commands.job import run_bands, run_data, trained_network
from flaxtransfer.commands.subcommands import Evaluate
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source
from flaxtransfer.data.source import Source
from flaxtransfer.paths import suggest
from flaxtransfer.training.evaluation import evaluate as measure
from flaxtransfer.training.run_folder import split_of


def evaluate(options: Evaluate, console: Console) -> None:
    """Runs ``flaxtransfer evaluate``."""
    network, reading = trained_network(options.run), options.reading
    if options.data is None:
        source, splits = run_data(options.run, skip_corrupt=reading.skip_corrupt)
        name, chosen = split_of(options.run).address, splits.test
        if not len(chosen):
            raise ValueError(
                f"the run in {options.run} has no test images; give others with --data"
            )
    else:
        name = options.data
        bands = run_bands(options.run, network)
        source = open_source(name, skip_corrupt=reading.skip_corrupt, bands=bands)
        chosen = np.arange(len(source))
    _check_classes(source, network.class_names)
    batches = eval_batches(source, chosen, network.preprocessing, batch_size=reading.batch_size)
    result = measure(network, batches)
    # In ASCII: the name of a folder may be bytes that are not UTF-8.
    console.print_json(json.dumps({"data": name, **result.to_json()}), ensure_ascii=True)


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
