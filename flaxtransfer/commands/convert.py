"""``flaxtransfer convert``: a checkpoint as safetensors under torchvision's names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from rich.console import Console

from flaxtransfer.folding import fold_adapter
from flaxtransfer.weights import load, save


@dataclass(frozen=True)
class Convert:
    """Read a checkpoint and write it as safetensors with torchvision's names.

    Args:
      source: a .safetensors or .pth file, a run folder, or "builtin".
      target: the .safetensors file to write.
      dtype: of the numbers in the file.
      adapter: "fold" makes a linear input adapter a part of the stem, so that other programs can
        load the file; "keep" writes it as it is, for this package alone.
    """

    source: tyro.conf.Positional[str]
    target: tyro.conf.Positional[Path]
    dtype: Literal["float32", "float16"] = "float32"
    adapter: Literal["fold", "keep"] = "fold"


def convert(options: Convert, console: Console) -> None:
    """Runs ``flaxtransfer convert``."""
    checkpoint = load(options.source)
    if options.adapter == "fold":
        try:
            checkpoint = fold_adapter(checkpoint)
        except ValueError as error:
            raise ValueError(
                f"{options.source}: {error}; --adapter keep writes it as it is"
            ) from error
    save(options.target, checkpoint, dtype=np.dtype(options.dtype))
    console.print(f"{checkpoint!r} -> {options.target} ({options.dtype})", highlight=False)
