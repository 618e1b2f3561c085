"""``flaxtransfer convert``: a checkpoint for this package or another program."""

from __future__ import annotations

import numpy as np
from rich.console import Console

from flaxtransfer.commands.job import load_weights
from flaxtransfer.commands.subcommands import Convert
from flaxtransfer.weights.exports.exporting import export
from flaxtransfer.weights.pretrained import fold_adapter


def convert(options: Convert, console: Console) -> None:
    """Runs ``flaxtransfer convert``."""
    checkpoint = load_weights(options.source, options)
    plain = options.to in (None, "safetensors") and options.target.suffix == ".safetensors"
    if plain and options.adapter == "fold":
        try:
            checkpoint = fold_adapter(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{options.source}: {error}; --adapter keep writes it as it is"
            ) from error
    written = export(checkpoint, options.target, to=options.to, dtype=np.dtype(options.dtype))
    console.print(f"{checkpoint!r}\n{written}", highlight=False, soft_wrap=True)
