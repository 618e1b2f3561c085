"""``flaxtransfer stem``: what a network's first filters keep of images that are not RGB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from flaxtransfer.analysis.stem import stem_report
from flaxtransfer.paths import flatten
from flaxtransfer.report.figures import stem_picture
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.weights.loading import load


@dataclass(frozen=True)
class Stem:
    """Print how much of each first-layer filter survives replicated gray, and an adapter.

    Filters that compare colors are silent on gray images in three equal channels. For a run with
    an input adapter, what survives it is printed too.

    Args:
      source: "builtin", a .safetensors or .pth file of a ResNet, or a run folder.
      out: also draw the filters and their shares into this file, such as stem.png.
    """

    source: tyro.conf.Positional[str] = "builtin"
    out: Path | None = None


def stem(options: Stem, console: Console) -> None:
    """Runs ``flaxtransfer stem``."""
    run = Path(options.source)
    checkpoint = load(weights_of(run) if run.is_dir() else options.source)
    params = checkpoint.variables["params"]
    kernel = flatten(params)[checkpoint.config.first_kernel]
    before, after = stem_report(kernel), None
    console.print(before)
    if "adapter" in params:
        after = stem_report(kernel, params["adapter"]["kernel"])
        console.print(after)
        if "curves" in params["adapter"]:
            console.print("the adapter's tone curves are left out: only its linear part is shown")
    if options.out is not None:
        stem_picture(options.out, kernel, before, after)
        console.print(f"drawn in {options.out}", highlight=False, soft_wrap=True)
