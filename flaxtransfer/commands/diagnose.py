"""``flaxtransfer diagnose``: whether the images a run is used on are those it was made for."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.special import log_softmax

from flaxtransfer.adapt.scores import ModelOutputs, model_outputs
from flaxtransfer.commands.job import image_bands, split
from flaxtransfer.commands.options import Train, training_options
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import Unlabeled, open_source, open_unlabeled
from flaxtransfer.data.source import Source
from flaxtransfer.data.splits import subsample
from flaxtransfer.files import atomic_write, write_file
from flaxtransfer.models.registry import resnet
from flaxtransfer.paths import suggest
from flaxtransfer.report.shift_page import print_report
from flaxtransfer.shift.diagnosis import diagnose as diagnose_arrays
from flaxtransfer.shift.report import ShiftReport
from flaxtransfer.training.run_folder import validation_of, weights_of
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.pretrained import Pretrained

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"


@dataclass(frozen=True)
class Diagnose:
    """Say which kind of shift target images have, and what can be done about it.

    The source is what the run kept apart: its validation and test images. Prints the report, and
    writes it as JSON, HTML and pictures. Example:
    flaxtransfer diagnose --run runs/scans --target folder:other_hospital --target-labels few.csv

    Args:
      run: the run folder.
      target: "folder:<path>" (images at any depth), "npz:<file>" (an array "image"), or
        "tfds:<name>[/config][:split]"; labels that it may have are not looked at.
      target_labels: a CSV file with the columns image (path below the folder, or number) and
        label (name of a class), for a few target images drawn at random.
      out: folder for the report; by default diagnosis/<name of the target> in the run.
      level: of the tests, after correction for their number.
      permutations: or simulations, of each test.
      most_images: look at no more than so many of either side.
      seed: of all that is drawn.
      batch_size: images at a time.
      skip_corrupt: leave out unreadable images instead of stopping.
    """

    run: Path
    target: str
    target_labels: Path | None = None
    out: Path | None = None
    level: float = 0.05
    permutations: int = 499
    most_images: int = 5000
    seed: int = 0
    batch_size: int = 256
    skip_corrupt: bool = False


def diagnose(options: Diagnose, console: Console) -> None:
    """Runs ``flaxtransfer diagnose``."""
    if options.most_images < 20:
        raise ValueError(f"--most-images is 20 or more, not {options.most_images}")
    checkpoint = load(weights_of(options.run))
    trained = training_options(options.run)
    names = checkpoint.class_names or tuple(map(str, range(checkpoint.config.classes)))
    target = open_unlabeled(
        options.target, skip_corrupt=options.skip_corrupt, bands=image_bands(trained, checkpoint)
    )
    labeled = _few_labels(options.target_labels, target, names)
    chosen = _chosen(len(target.source), labeled[0], options)
    source, found = _samples(checkpoint, trained, (target.source, chosen), options, console)
    place = {position: row for row, position in enumerate(chosen.tolist())}
    report = diagnose_arrays(
        source.logits,
        source.labels,
        source.features,
        found.logits,
        found.features,
        labeled=([place[i] for i in labeled[0].tolist()], labeled[1]),
        class_names=names,
        level=options.level,
        permutations=options.permutations,
        seed=options.seed,
    )
    out = options.out or options.run / "diagnosis" / _file_name(options.target)
    write_report(out, report, source, found, run=options.run, target=options.target)
    print_report(report, console)
    console.print(f"\nwritten to {out}/", highlight=False, soft_wrap=True)


def write_report(
    out: Path,
    report: ShiftReport,
    source: ModelOutputs,
    found: ModelOutputs,
    *,
    run: Path,
    target: str,
) -> None:
    """A folder that appears whole: JSON, a page, and the pictures on it."""
    from flaxtransfer.report.shift_figures import shift_drawings
    from flaxtransfer.report.shift_page import shift_page

    pictures = shift_drawings(report, source.features, source.labels, found.features)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as folder:
        folder.mkdir()
        for name, (_, png) in pictures.items():
            write_file(folder / f"{name}.png", png)
        write_file(folder / REPORT_FILE, (json.dumps(report.to_json(), indent=2) + "\n").encode())
        page = shift_page(report, dict(pictures.values()), source=str(run), target=target)
        write_file(folder / PAGE_FILE, page.encode())


def _samples(
    checkpoint: Pretrained,
    trained: Train,
    target: tuple[Source, np.ndarray],
    options: Diagnose,
    console: Console,
) -> tuple[ModelOutputs, ModelOutputs]:
    """What the network makes of the images the run kept apart, and of the target's."""
    found = _evidence(checkpoint, *target, options)
    bands = image_bands(trained, checkpoint)
    try:
        source = open_source(trained.data, skip_corrupt=trained.skip_corrupt, bands=bands)
        if source.class_names != checkpoint.class_names:
            raise FileNotFoundError(f"{trained.data} has other classes than the run")
    except FileNotFoundError as error:
        kept = validation_of(options.run)
        rows = subsample(np.arange(len(kept.labels)), options.most_images, kept.labels)
        logits, labels, features = kept.logits[rows], kept.labels[rows], kept.features
        stand = "what it kept of its validation examples stands for them"
        if features is None:
            stand = "log-probabilities of its validation examples stand for their features"
        console.print(
            f"the run's own images are not here ({error}): {stand}\n",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        if features is None:
            return _of_logits(logits, labels), _of_logits(found.logits, found.labels)
        # In the precision that the run kept, so that rounding is no difference.
        rounded = found.features.astype(features.dtype).astype(np.float32)
        own = ModelOutputs(logits, features[rows].astype(np.float32), labels)
        return own, ModelOutputs(found.logits, rounded, found.labels)
    parts = split(source, trained)
    positions = np.sort(np.concatenate([parts.val, parts.test]))
    if not len(positions):
        raise ValueError(
            f"the run in {options.run} kept no image apart; train it with --val-fraction or "
            "--test-fraction"
        )
    chosen = subsample(positions, options.most_images, source.labels())
    return _evidence(checkpoint, source, chosen, options), found


def _of_logits(logits: np.ndarray, labels: np.ndarray) -> ModelOutputs:
    return ModelOutputs(logits, log_softmax(logits, axis=1), labels)


def _evidence(
    checkpoint: Pretrained, source: Source, chosen: np.ndarray, options: Diagnose
) -> ModelOutputs:
    batches = eval_batches(source, chosen, checkpoint.preprocessing, batch_size=options.batch_size)
    model = resnet(checkpoint.config)
    return model_outputs(model, checkpoint.variables, batches, checkpoint.preprocessing)


def _chosen(count: int, labeled: np.ndarray, options: Diagnose) -> np.ndarray:
    """Positions in the target to look at; those with labels among them."""
    if count <= options.most_images:
        return np.arange(count)
    others = np.setdiff1d(np.arange(count), labeled)
    rest = subsample(others, max(0, options.most_images - len(labeled)))
    return np.sort(np.concatenate([labeled, rest]))


def _few_labels(
    path: Path | None, target: Unlabeled, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the images in a CSV file, and their classes."""
    if path is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        headings = [heading.strip() for heading in rows.fieldnames or ()]
        if missing := [name for name in ("image", "label") if name not in headings]:
            raise ValueError(
                f"{path} has no column {' and no column '.join(missing)}; its columns are "
                f"{', '.join(headings) or 'none'}"
            )
        rows.fieldnames = headings
        given = [((row["image"] or "").strip(), (row["label"] or "").strip()) for row in rows]
    if not given:
        raise ValueError(f"{path} has no rows below its headings")
    place = {name: number for number, name in enumerate(names)}
    unknown = sorted({label for _, label in given if label not in place})
    if unknown:
        listed = ", ".join(f"{label!r}{suggest(label, names)}" for label in unknown)
        raise ValueError(f"{path}: no class {listed}; the run has {', '.join(names)}")
    try:
        positions = target.positions([image for image, _ in given])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return positions, np.array([place[label] for _, label in given], np.int64)


def _file_name(target: str) -> str:
    last = target.rstrip("/").split("/")[-1].split(":")[-1]
    return "".join(c if c.isalnum() or c in "-." else "_" for c in last) or "target"
