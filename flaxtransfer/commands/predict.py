"""``flaxtransfer predict``: what a finished run says about image files."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import numpy as np
import tyro
from rich.console import Console

from flaxtransfer.commands.job import image_bands
from flaxtransfer.commands.options import training_options
from flaxtransfer.data.band_files import decode_bands
from flaxtransfer.data.decode import ImageError
from flaxtransfer.data.transforms import evaluation_transform
from flaxtransfer.models import resnet
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.training.step import forward
from flaxtransfer.weights import Checkpoint, load


@dataclass(frozen=True)
class Predict:
    """Print one prediction an image, with its probability.

    Args:
      run: the run folder.
      images: image files.
      format: "jsonl" (one object a line) or "csv".
      top: how many classes to list, the likeliest first.
      batch_size: images at a time.
      skip_corrupt: leave out unreadable images, with a note, instead of stopping.
    """

    run: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[Path, ...]]
    format: Literal["jsonl", "csv"] = "jsonl"
    top: int = 1
    batch_size: int = 64
    skip_corrupt: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def predict(options: Predict, console: Console) -> None:
    """Runs ``flaxtransfer predict``; predictions go to standard output, notes to ``console``."""
    if not options.images:
        raise ValueError("no image was given: flaxtransfer predict <run> <image> [<image> ...]")
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such image: {', '.join(missing)}")
    checkpoint = load(weights_of(options.run))
    write = {"jsonl": _write_json_lines, "csv": _write_csv}[options.format]
    rows = _rows(options, checkpoint, console)
    write(rows, min(max(options.top, 1), checkpoint.config.classes), sys.stdout)


def _rows(options: Predict, checkpoint: Checkpoint, console: Console) -> Iterator[dict[str, Any]]:
    names = checkpoint.class_names or tuple(map(str, range(checkpoint.config.classes)))
    bands = image_bands(training_options(options.run), checkpoint)
    transform = evaluation_transform(checkpoint.preprocessing, channels=checkpoint.config.bands)
    run = forward(resnet(checkpoint.config), checkpoint.preprocessing)
    random = np.random.default_rng(0)  # evaluation draws nothing from it
    for first in range(0, len(options.images), options.batch_size):
        paths, images = [], []
        for path in options.images[first : first + options.batch_size]:
            try:
                images.append(transform(decode_bands(path, name=str(path), bands=bands), random))
            except ImageError as error:
                if not options.skip_corrupt:
                    raise
                console.print(f"left out: {error}", highlight=False)
            else:
                paths.append(path)
        if not paths:
            continue
        # Always the same shape, so that the network is compiled once.
        padding = (
            options.batch_size - len(images) if len(options.images) > options.batch_size else 0
        )
        batch = np.stack(images + [images[0]] * padding)
        logits = np.asarray(run(checkpoint.variables, batch))[: len(paths)]
        for path, probability in zip(paths, _softmax(logits), strict=True):
            order = np.argsort(-probability, kind="stable")
            ranked = [(names[i], float(probability[i])) for i in order]
            yield {"image": str(path), "ranked": ranked}


def _write_json_lines(rows: Iterator[dict[str, Any]], top: int, file: TextIO) -> None:
    for row in rows:
        label, probability = row["ranked"][0]
        line = {"image": row["image"], "label": label, "probability": round(probability, 6)}
        if top > 1:
            line["top"] = {name: round(p, 6) for name, p in row["ranked"][:top]}
        print(json.dumps(line), file=file, flush=True)


def _write_csv(rows: Iterator[dict[str, Any]], top: int, file: TextIO) -> None:
    writer = csv.writer(file)
    suffixes = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    header = [f"{column}{suffix}" for suffix in suffixes for column in ("label", "probability")]
    writer.writerow(["image", *header])
    for row in rows:
        cells: list[Any] = [row["image"]]
        for label, probability in row["ranked"][:top]:
            cells += [label, f"{probability:.6f}"]
        writer.writerow(cells)


def _softmax(logits: np.ndarray) -> Sequence[np.ndarray]:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
