"""``flaxtransfer stem``: first-layer filters on images that are not RGB."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from flaxtransfer.analysis.stem import stem_report
from flaxtransfer.commands.subcommands import Stem
from flaxtransfer.paths import flatten
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.weights.loading import load


def stem(options: Stem, console: Console) -> None:
    """Runs ``flaxtransfer stem``."""
    run = Path(options.source)
    checkpoint = load(weights_of(run) if run.is_dir() else options.source, model=options.model)
    params = checkpoint.variables["params"]
    kernel = flatten(params)[checkpoint.config.first_kernel]
    before, after = stem_report(kernel), None
    console.print(before)
    if "adapter" in params:
        after = stem_report(kernel, params["adapter"]["kernel"])
        console.print(after)
        if "curves" in params["adapter"]:
            console.print("only the linear part of the adapter is shown, without its tone curves")
    if options.out is not None:
        from flaxtransfer.report.figures import plot_stem

        plot_stem(options.out, kernel, before, after)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)
