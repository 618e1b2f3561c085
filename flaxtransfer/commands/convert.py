"""``flaxtransfer convert``: a checkpoint for this package or another program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from flaxtransfer.weights.exports.exporting import export
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.saving import fold_adapter

Layout = Literal["safetensors", "torchvision", "timm", "huggingface", "onnx", "stablehlo"]


@dataclass(frozen=True)
class Convert:
    """Read a checkpoint and write it for this package or another program.

    What was written is read again and its logits compared before it gets its name.

    Args:
      source: a file of weights, a folder with one, a run folder, hf://organization/name, https://
        or "builtin".
      target: the file to write, .safetensors, .onnx or .stablehlo; or the folder for timm and
        huggingface.
      format: naming of the source, where it is not to be read off: torchvision, timm, timm-v2,
        huggingface, huggingface-flax, bit, keras or keras-hub.
      sensor: whose bands the stem takes, where the file's name does not say it: sentinel2_all,
        landsat_tm_toa, ...
      to: what to write, where the target's suffix does not say it.
      dtype: of the numbers in a .safetensors file.
      adapter: "fold" makes a linear input adapter a part of the stem, so that other programs can
        load a .safetensors file; "keep" writes it as it is, for this package alone.
    """

    source: tyro.conf.Positional[str]
    target: tyro.conf.Positional[Path]
    format: str | None = None
    sensor: str | None = None
    to: Layout | None = None
    dtype: Literal["float32", "float16"] = "float32"
    adapter: Literal["fold", "keep"] = "fold"


def convert(options: Convert, console: Console) -> None:
    """Runs ``flaxtransfer convert``."""
    checkpoint = load(options.source, format=options.format, sensor=options.sensor)
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
