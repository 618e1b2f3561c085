"""``flaxtransfer probe``: accuracy of a linear probe on each segment of a network."""

from __future__ import annotations

from rich.console import Console

from flaxtransfer.analysis.profile import probe_profile
from flaxtransfer.classifier import transfer
from flaxtransfer.commands.job import load_weights, split
from flaxtransfer.commands.subcommands import Probe
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source
from flaxtransfer.data.splits import subsample
from flaxtransfer.features.extract import segment_features


def probe(options: Probe, console: Console) -> None:
    """Runs ``flaxtransfer probe``."""
    data = options.data
    checkpoint = load_weights(options.weights)
    source = open_source(
        data.name,
        download=data.download,
        skip_corrupt=data.skip_corrupt,
        bands=checkpoint.config.bands,
    )
    training = split(source, data.name, options.split).train
    positions = subsample(training, options.most_images, source.labels())
    classes = len(source.class_names)
    network = transfer(checkpoint, classes=classes)
    batches = eval_batches(source, positions, network.preprocessing)
    features, labels = segment_features(network, batches)
    profile = probe_profile(features, labels, kind=options.kind, classes=classes)
    console.print(
        f"{data.name}: {len(positions)} training images, {classes} classes; {checkpoint!r}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(str(profile), highlight=False)
    if options.out is not None:
        from flaxtransfer.report.figures import plot_profile

        plot_profile(profile, options.out)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)
