"""``flaxtransfer explain``: saliency maps over images, and whether they can be trusted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from flaxtransfer.analysis.saliency import (
    Saliency,
    faithfulness,
    logits_function,
    randomization_test,
    saliency_maps,
)
from flaxtransfer.classifier import Classifier
from flaxtransfer.commands.job import run_bands, run_data, trained_network
from flaxtransfer.commands.subcommands import Explain
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_unlabeled
from flaxtransfer.data.source import UnlabeledImages
from flaxtransfer.files import atomic_write, write_file
from flaxtransfer.weights.loading import load

REPORT_FILE = "explanation.json"

_PER_PAGE = 12
"""Images of a picture."""


def explain(options: Explain, console: Console) -> None:
    """Runs ``flaxtransfer explain``."""
    network, found, chosen = _opened(options)
    reading = options.reading
    batches = eval_batches(
        found.source, chosen, network.preprocessing, batch_size=reading.batch_size
    )
    images = np.concatenate([batch["image"][batch["weight"] > 0] for batch in batches])
    asked = (network.model, network.variables, images, network.preprocessing)
    maps = saliency_maps(
        *asked, layer=options.layer, method=options.method, batch_size=reading.batch_size
    )
    run = logits_function(
        network.model, network.variables, network.preprocessing, batch_size=reading.batch_size
    )
    faithful = faithfulness(run, images, maps.maps, maps.targets, seed=options.seed)
    sound = randomization_test(*asked, layer=maps.layer, method=maps.method, seed=options.seed)
    for value in (maps, faithful, sound):
        console.print(value)
    verdict = faithful.summary() if sound.passed else f"{faithful.summary()} {sound.summary()}"
    names = [found.names[i] for i in chosen]
    report = {
        "images": names,
        "saliency": maps.to_json(),
        "faithfulness": faithful.to_json(),
        "randomization": sound.to_json(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.out) as folder:
        folder.mkdir()
        for number, png in enumerate(_pages(network, images, maps, names, verdict), start=1):
            write_file(folder / f"page{number}.png", png)
        write_file(folder / REPORT_FILE, (json.dumps(report, indent=2) + "\n").encode())
    console.print(f"written to {options.out}/", highlight=False, soft_wrap=True)


def _opened(options: Explain) -> tuple[Classifier, UnlabeledImages, np.ndarray]:
    """The network, images with names, and the positions of those to explain."""
    run, skip = Path(options.source), options.reading.skip_corrupt
    if run.is_dir():
        network = trained_network(run)
        bands = run_bands(run, network)
    else:
        checkpoint = load(options.source)
        if checkpoint.no_head:
            raise ValueError(
                f"{options.source} must have a head, whose classes are explained: "
                f"{checkpoint.no_head}"
            )
        network = Classifier.of(checkpoint)
        bands = network.model.config.bands
    if options.data is not None:
        found = open_unlabeled(options.data, skip_corrupt=skip, bands=bands)
        positions = np.arange(len(found.source))
    else:
        source, parts = run_data(run, skip_corrupt=skip)
        found, positions = UnlabeledImages.numbered(source), parts.test
        if not len(positions):
            raise ValueError(f"the run in {run} has no test images; give others with --data")
    random = np.random.default_rng(options.seed)
    count = min(options.most_images, len(positions))
    return network, found, np.sort(random.choice(positions, count, replace=False))


def _pages(
    network: Classifier, images: np.ndarray, maps: Saliency, names: list[str], verdict: str
) -> list[bytes]:
    """The images with their overlays, as PNG."""
    from flaxtransfer.report.figures import plot_saliency

    classes = network.class_names or tuple(map(str, range(network.model.config.classes)))
    probabilities = network.task.probabilities(maps.logits)
    titles = [
        f"{Path(name).name}: {classes[target]} {row[target]:.0%}"
        for name, target, row in zip(names, maps.targets, probabilities, strict=True)
    ]
    overlays, pages = maps.upsampled(), []
    for first in range(0, len(images), _PER_PAGE):
        part = slice(first, first + _PER_PAGE)
        page = io.BytesIO()
        plot_saliency(page, images[part], overlays[part], titles[part], verdict)
        pages.append(page.getvalue())
    return pages
