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
from scipy.special import softmax

from flaxtransfer.commands.job import image_bands
from flaxtransfer.commands.options import training_options
from flaxtransfer.commands.prior import adjusted, given_prior, known_of
from flaxtransfer.data.band_files import decode_bands
from flaxtransfer.data.decode import ImageError
from flaxtransfer.data.transforms import evaluation_transform
from flaxtransfer.models import resnet
from flaxtransfer.training.run_folder import weights_of
from flaxtransfer.training.step import forward_with_features
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
      adjust_prior: estimate how common each class is among these very images, and correct the
        predictions for it, with probabilities calibrated on the run's validation examples. For
        images of the same kind in which classes are differently common; refused where they look
        like something else, or are too few. They are all read before the first line is written.
      prior: how common each class is, where that is known, in place of the estimate: numbers in
        the order of the run's classes (0.2 0.8), or dark=0.2 bright=0.8; they sum to 1.
    """

    run: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[Path, ...]]
    format: Literal["jsonl", "csv"] = "jsonl"
    top: int = 1
    batch_size: int = 64
    skip_corrupt: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    adjust_prior: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    prior: tuple[str, ...] = ()


def predict(options: Predict, console: Console) -> None:
    """Runs ``flaxtransfer predict``; predictions go to standard output, notes to ``console``."""
    if not options.images:
        raise ValueError("no image was given: flaxtransfer predict <run> <image> [<image> ...]")
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such image: {', '.join(missing)}")
    checkpoint = load(weights_of(options.run))
    names = checkpoint.class_names or tuple(map(str, range(checkpoint.config.classes)))
    write = {"jsonl": _write_json_lines, "csv": _write_csv}[options.format]
    batches: Iterator[tuple[list[Path], np.ndarray]]
    if options.adjust_prior or options.prior:
        # Before any image is read, so that a typing error costs no time.
        known, prior = known_of(options.run), given_prior(options.prior, names)
        parts = list(_outputs(options, checkpoint, console))
        if not parts:
            raise ValueError("none of the images could be read, so there is nothing to predict")
        paths = [path for some, *_ in parts for path in some]
        logits, features = (np.concatenate([part[n] for part in parts]) for n in (1, 2))
        batches = iter([(paths, adjusted(logits, features, known, prior, names, console))])
    else:
        batches = (
            (paths, softmax(logits, axis=-1))
            for paths, logits, _ in _outputs(options, checkpoint, console)
        )
    top = min(max(options.top, 1), checkpoint.config.classes)
    write(_rows(batches, names), top, sys.stdout)


def _rows(
    batches: Iterator[tuple[list[Path], np.ndarray]], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for paths, probabilities in batches:
        for path, probability in zip(paths, probabilities, strict=True):
            order = np.argsort(-probability, kind="stable")
            ranked = [(names[i], float(probability[i])) for i in order]
            yield {"image": str(path), "ranked": ranked}


def _outputs(
    options: Predict, checkpoint: Checkpoint, console: Console
) -> Iterator[tuple[list[Path], np.ndarray, np.ndarray]]:
    """Batch by batch, the images that could be read, their logits, and what the head saw."""
    bands = image_bands(training_options(options.run), checkpoint)
    transform = evaluation_transform(checkpoint.preprocessing, channels=checkpoint.config.bands)
    run = forward_with_features(resnet(checkpoint.config), checkpoint.preprocessing)
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
        logits, features = map(np.asarray, run(checkpoint.variables, batch))
        yield paths, logits[: len(paths)], features[: len(paths)]


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
