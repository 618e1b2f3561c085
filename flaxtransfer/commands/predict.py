"""``flaxtransfer predict``: predictions of a finished run, adjusted for prevalence if asked.

Predictions of a run for images in which classes are differently common than in training.

``flaxtransfer predict``: what a finished run says about image files.
"""

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
from flaxtransfer.data.decode import ImageError, decode_bands
from flaxtransfer.data.transforms import evaluation_transform
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import suggest
from flaxtransfer.shift.calibration import Calibration, calibrate
from flaxtransfer.shift.prior_correction import adjust_prior, correct_prior
from flaxtransfer.training.run_folder import validation_of, weights_of
from flaxtransfer.training.step import forward_with_features
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.pretrained import Pretrained

__all__ = ["Known", "Predict", "adjusted", "given_prior", "known_of", "predict"]


_FEWEST_VALIDATION = 5
"""Validation examples a class, on average: with fewer, not even a temperature is known."""


@dataclass(frozen=True, eq=False)
class Known:
    """What a finished run knows of its validation examples.

    Args:
      calibration: of its network, fitted on them.
      features: float [examples, channels], what its head saw of them; None where the run is older
        than runs that keep them.
    """

    calibration: Calibration
    features: np.ndarray | None


def known_of(run: Path) -> Known:
    """The calibration of a finished run's network, on its validation examples, and their features.

    Raises:
      FileNotFoundError: the run keeps none, or has not finished.
      ValueError: they are too few.
    """
    found = validation_of(run)
    count, classes = found.logits.shape
    if count < _FEWEST_VALIDATION * classes:
        raise ValueError(
            f"the run in {run} has {count} validation examples, and a correction of the prior needs"
            f" {_FEWEST_VALIDATION * classes} for its {classes} classes; train with more of them"
        )
    return Known(calibrate(found.logits, found.labels), found.features)


def given_prior(shares: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """Class shares as they are typed; None where none are.

    Args:
      shares: "0.2", "0.8", or "dark=0.2", "bright=0.8".
      names: of the run's classes.

    Raises:
      ValueError: other classes, another number of them, numbers that are no shares.

    >>> given_prior(["bright=0.8", "dark=0.2"], ["dark", "bright"])
    array([0.2, 0.8])
    """
    if not shares:
        return None
    pairs = [share.rpartition("=") for share in shares]
    if any(sign for _, sign, _ in pairs):
        given = {name: value for name, _, value in pairs}
        problems = [f"no class {n!r}{suggest(n, names)}" for n in given if n not in names]
        if missing := [name for name in names if name not in given]:
            problems.append(f"no share for {', '.join(map(repr, missing))}")
        if len(given) < len(pairs):
            problems.append("a class is named twice")
        if problems:
            raise ValueError(f"--prior: {'; '.join(problems)}")
        shares = [given[name] for name in names]
    if len(shares) != len(names):
        raise ValueError(
            f"--prior has {len(shares)} numbers, and the run has {len(names)} classes: "
            + ", ".join(names)
        )
    try:
        found = np.array([float(share) for share in shares])
    except ValueError:
        raise ValueError(f"--prior: shares are numbers, not {' '.join(shares)}") from None
    if not (found >= 0).all() or abs(found.sum() - 1) > 1e-3:
        raise ValueError(
            f"--prior: shares are 0 or more and sum to 1; {' '.join(shares)} sum to "
            f"{found.sum():.6g}"
        )
    return found / found.sum()


def adjusted(
    logits: np.ndarray,
    features: np.ndarray,
    known: Known,
    prior: np.ndarray | None,
    names: Sequence[str],
    console: Console,
) -> np.ndarray:
    """Corrected probabilities ``[images, classes]``; what was done goes to ``console``.

    Args:
      logits: ``[images, classes]``.
      features: ``[images, channels]``, what the head saw of the same images.
      known: of the run.
      prior: class shares; None to estimate them.
      names: of the classes.
      console: for notes.

    Raises:
      ValueError: the prior is to be estimated, and there is a reason against it.
    """
    source = known.calibration
    calibrated = source.apply(logits)
    if prior is not None:
        corrected = adjust_prior(calibrated, prior, source_prior=source.prior)
        lines = [f"prior as given, {_calibrated(source)}"]
        lines += [
            f"{n}: {p:.3f} -> {q:.3f}" for n, p, q in zip(names, source.prior, prior, strict=True)
        ]
    else:
        both = None
        if known.features is not None:
            # In the precision that the run kept, so that rounding is no difference.
            both = known.features, features.astype(known.features.dtype)
        found = correct_prior(logits, source, features=both)
        if not found.adjusted or found.prevalence is None:
            raise ValueError(
                f"the prior is not adjusted: {'; '.join(found.refusals)}; without --adjust-prior "
                "predictions are for classes as common as in the validation examples, and --prior "
                "takes known shares"
            )
        corrected, shares = found.probabilities, found.prevalence
        lines = [f"prior by {shares.method} on {len(logits)} images, {_calibrated(source)}"]
        lines += [
            f"{name}: {p:.3f} -> {q:.3f} ({low:.3f} to {high:.3f} at {shares.level:.0%})"
            for name, p, q, low, high in zip(
                names, shares.source, shares.estimate, shares.low, shares.high, strict=True
            )
        ]
    changed = int((corrected.argmax(1) != calibrated.argmax(1)).sum())
    lines.append(f"{changed} of {len(logits)} predictions changed")
    for line in (*source.notes, *lines):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return corrected


def _calibrated(source: Calibration) -> str:
    method = source.method.replace("_", "-")
    return f"relative to {len(source.labels)} validation examples ({method} calibration)"


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
    options: Predict, checkpoint: Pretrained, console: Console
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
