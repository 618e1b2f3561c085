"""``flaxtransfer diagnose``: which kind of shift target images have, compared with a run's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from flaxtransfer.adapt.scores import ModelOutputs, model_outputs
from flaxtransfer.classifier import Classifier
from flaxtransfer.commands.job import (
    kept_validation,
    levels_note,
    print_notes,
    run_bands,
    run_data,
    trained_network,
)
from flaxtransfer.commands.subcommands import Diagnose
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_unlabeled
from flaxtransfer.data.source import Source, UnlabeledImages
from flaxtransfer.data.splits import subsample
from flaxtransfer.files import atomic_write, check_regular, refuse_link, write_file
from flaxtransfer.paths import listing, suggest
from flaxtransfer.report.pages import print_report
from flaxtransfer.shift.diagnosis import diagnose as diagnose_arrays
from flaxtransfer.shift.report import ShiftReport
from flaxtransfer.task import for_classes

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"

MOST_CSV_BYTES = 1 << 26
"""Of a file of labels: a million images have half of it, and few labels are enough."""


def diagnose(options: Diagnose, console: Console) -> None:
    """Runs ``flaxtransfer diagnose``."""
    network = trained_network(options.run)
    for_classes(network.task, "a diagnosis of label shift")
    names = network.class_names or tuple(map(str, range(network.model.config.classes)))
    target = open_unlabeled(
        options.target,
        skip_corrupt=options.reading.skip_corrupt,
        bands=run_bands(options.run, network),
        image_column=options.image_column,
    )
    print_notes(target, console)
    labeled = _few_labels(options.target_labels, target, names)
    chosen = _chosen(len(target.source), labeled[0], options)
    if note := levels_note(target.source, chosen, network):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    source, found = _samples(network, (target.source, chosen), options, console)
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
    if options.out is None:
        refuse_link(out.parent)
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
    """Writes the report as a folder, atomically: JSON, an HTML page and its pictures."""
    from flaxtransfer.report.pages import render_html
    from flaxtransfer.report.shift_figures import render_figures

    pictures = render_figures(report, source.features, source.labels, found.features)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as folder:
        folder.mkdir()
        for name, (_, png) in pictures.items():
            write_file(folder / f"{name}.png", png)
        write_file(folder / REPORT_FILE, (json.dumps(report.to_json(), indent=2) + "\n").encode())
        page = render_html(report, dict(pictures.values()), source=str(run), target=target)
        write_file(folder / PAGE_FILE, page.encode())


def _samples(
    network: Classifier,
    target: tuple[Source, np.ndarray],
    options: Diagnose,
    console: Console,
) -> tuple[ModelOutputs, ModelOutputs]:
    """Network outputs for the validation and test images of the run, and for the target."""
    found = _evidence(network, *target, options)
    try:
        source, parts = run_data(options.run, skip_corrupt=options.reading.skip_corrupt)
        if tuple(source.class_names) != network.class_names:
            raise ValueError("their classes are not those of the run")
    except (FileNotFoundError, ValueError) as error:
        kept = kept_validation(options.run)
        rows = subsample(np.arange(len(kept.labels)), options.most_images, kept.labels)
        console.print(
            f"the images of the run cannot be read ({error}): its saved validation examples are "
            "used instead\n",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        # In the precision of the run's features, so that rounding is not a difference.
        rounded = found.features.astype(kept.features.dtype).astype(np.float32)
        own = ModelOutputs(
            kept.logits[rows], kept.features[rows].astype(np.float32), kept.labels[rows]
        )
        return own, ModelOutputs(found.logits, rounded, found.labels)
    positions = np.sort(np.concatenate([parts.val, parts.test]))
    if not len(positions):
        raise ValueError(
            f"the run in {options.run} has no validation or test images; train it with "
            "--val-fraction or --test-fraction"
        )
    chosen = subsample(positions, options.most_images, source.labels())
    return _evidence(network, source, chosen, options), found


def _evidence(
    network: Classifier, source: Source, chosen: np.ndarray, options: Diagnose
) -> ModelOutputs:
    batches = eval_batches(
        source, chosen, network.preprocessing, batch_size=options.reading.batch_size
    )
    return model_outputs(network, batches)


def _chosen(count: int, labeled: np.ndarray, options: Diagnose) -> np.ndarray:
    """Positions of the target images to use, labeled ones included."""
    if count <= options.most_images:
        return np.arange(count)
    others = np.setdiff1d(np.arange(count), labeled)
    rest = subsample(others, max(0, options.most_images - len(labeled)))
    return np.sort(np.concatenate([labeled, rest]))


def _few_labels(
    path: Path | None, target: UnlabeledImages, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and classes of the images in a CSV file."""
    if path is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    check_regular(path)
    size = path.stat().st_size
    if size > MOST_CSV_BYTES:
        raise ValueError(f"{path} must have at most {MOST_CSV_BYTES:,} bytes, got {size:,}")
    # Names of files may be bytes that are not UTF-8, here as there.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            rows = csv.DictReader(file)
            headings = [heading.strip() for heading in rows.fieldnames or ()]
            if missing := [name for name in ("image", "label") if name not in headings]:
                raise ValueError(
                    f"{path} has no column {' and no column '.join(missing)}; its columns are "
                    f"{listing(headings) or 'none'}"
                )
            rows.fieldnames = headings
            given = [((row["image"] or "").strip(), (row["label"] or "").strip()) for row in rows]
        except csv.Error as error:
            raise ValueError(f"{path} is not a readable CSV file ({error})") from error
    if not given:
        raise ValueError(f"{path} has no rows below its headings")
    place = {name: number for number, name in enumerate(names)}
    unknown = sorted({label for _, label in given if label not in place})
    if unknown:
        listed = ", ".join(f"{each!r}{suggest(each, names)}" for each in unknown[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(f"{path}: no class {listed}{more}; the run has {listing(names)}")
    try:
        positions = target.positions([image for image, _ in given])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return positions, np.array([place[label] for _, label in given], np.int64)


def _file_name(target: str) -> str:
    last = target.rstrip("/").split("/")[-1].split(":")[-1]
    return "".join(c if c.isalnum() or c in "-." else "_" for c in last) or "target"
