"""``flaxtransfer evaluate``, ``predict`` and ``explain``: what a finished run is used for.

``evaluate`` prints its accuracy on its test images, or on others; ``predict`` prints predictions,
corrected for prevalence if asked; ``explain`` draws what they rest on, and whether that can be
trusted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, TextIO, TypeAlias

import jax
import numpy as np
from rich.console import Console

from flaxtransfer.classifier import Classifier
from flaxtransfer.commands.job import (
    kept_validation,
    levels_note,
    local_run,
    print_notes,
    run_bands,
    run_data,
    trained_network,
)
from flaxtransfer.commands.subcommands import Evaluate, Explain, Predict, is_source
from flaxtransfer.data.decode import count_frames, decode_bands
from flaxtransfer.data.folder import FolderSource
from flaxtransfer.data.loader import eval_batches
from flaxtransfer.data.open import open_source, open_unlabeled
from flaxtransfer.data.scans import ImageError, Levels
from flaxtransfer.data.source import (
    Example,
    Source,
    UnlabeledImages,
    task_of_source,
    with_levels,
)
from flaxtransfer.data.splits import groups_of
from flaxtransfer.data.transforms import evaluation_transform
from flaxtransfer.distributed import check_alike, from_all, is_first, several, share
from flaxtransfer.files import atomic_write, write_file
from flaxtransfer.metrics import report
from flaxtransfer.paths import listing, suggest, visible
from flaxtransfer.sharding import make_mesh, map_batches, place_replicated
from flaxtransfer.task import MULTI_LABEL, SINGLE_LABEL, Task, for_classes
from flaxtransfer.training.evaluation import TestTime, forward_averaged
from flaxtransfer.training.evaluation import predict as run_network
from flaxtransfer.training.run_folder import split_of
from flaxtransfer.weights.loading import load
from flaxtransfer.weights.preprocessing import Preprocessing
from flaxtransfer.weights.readers.detect import has_weights_name

if TYPE_CHECKING:
    from flaxtransfer.analysis.saliency import Saliency
    from flaxtransfer.shift.calibration import Calibration

_FEWEST_VALIDATION = 5
"""Validation examples per class, on average, below which no temperature can be fitted."""


def evaluate(options: Evaluate, console: Console) -> None:
    """Runs ``flaxtransfer evaluate``."""
    options = replace(options, run=local_run(options.run))
    network, reading = trained_network(options.run), options.reading
    if options.data is None:
        source, splits = run_data(options.run, skip_corrupt=reading.skip_corrupt)
        name, chosen = split_of(options.run).address, splits.test
        if not len(chosen):
            raise ValueError(
                f"the run in {options.run} has no test images; give others with --data"
            )
    else:
        name = options.data
        bands = run_bands(options.run, network)
        source = open_source(
            name,
            skip_corrupt=reading.skip_corrupt,
            bands=bands,
            partial=True,
            **options.columns.arguments(),
        )
        given = getattr(source, "splits", None)
        tested = given is not None and len(given.test) > 0
        chosen = given.test if given is not None and tested else np.arange(len(source))
    trained = network.class_names or tuple(map(str, range(network.model.config.classes)))
    if network.task is not SINGLE_LABEL or task_of_source(source) is not SINGLE_LABEL:
        columns = match_columns(source, trained, network.task)
        size = reading.batch_size
        batches = eval_batches(columns, chosen, network.preprocessing, batch_size=size)
        told = {"data": name, **_unmatched(source, trained)}
        if note := levels_note(source, chosen, network):
            told["gray_levels"] = note.removeprefix("gray levels: ")
        told |= _measured(network, batches, trained, _groups(source, chosen), options.tta)
        _print_json(told, console)
        return
    matched = match_classes(source, trained)
    labels = matched.labels()[chosen]
    found: dict[str, Any] = {"data": name}
    if options.data is not None and (notes := getattr(source, "notes", ())):
        found |= {"notes": list(notes), "part": "test" if tested else "all"}
    if (labels < 0).any():
        counts = np.bincount(source.labels()[chosen][labels < 0])
        unknown = {source.class_names[i]: int(counts[i]) for i in np.flatnonzero(counts)}
        if not options.skip_unknown_classes:
            raise ValueError(_unknown_text(name, unknown, trained))
        chosen, labels = chosen[labels >= 0], labels[labels >= 0]
        if not len(chosen):
            raise ValueError(f"{_unknown_text(name, unknown, trained)}; nothing is left")
        found["classes_left_out"] = unknown
    if unseen := [each for label, each in enumerate(trained) if label not in labels]:
        found["classes_not_seen"] = unseen
    if note := levels_note(source, chosen, network):
        found["gray_levels"] = note.removeprefix("gray levels: ")
    batches = eval_batches(matched, chosen, network.preprocessing, batch_size=reading.batch_size)
    found |= _measured(network, batches, trained, _groups(source, chosen), options.tta)
    _print_json(found, console)


def _measured(
    network: Classifier,
    batches: Any,
    names: Sequence[str],
    groups: np.ndarray | None,
    tta: TestTime,
) -> dict[str, Any]:
    """The metrics of a set, and the report with intervals and a row for each output."""
    found, task = run_network(network, batches, tta=tta), network.task
    whole = report(task.name, task.probabilities(found.logits), found.labels, names, groups=groups)
    views = {} if tta == "none" else {"tta": tta}
    return {**found.evaluation().to_json(), **views, "report": whole}


def _groups(source: Source, chosen: np.ndarray) -> np.ndarray | None:
    """Which group each example belongs to, for a source that has groups."""
    groups = groups_of(source)
    return None if groups is None else np.unique(np.asarray(groups)[chosen], return_inverse=True)[1]


def _print_json(found: dict[str, Any], console: Console) -> None:
    # In ASCII: the name of a folder may be bytes that are not UTF-8. JSON knows no NaN.
    plain = {k: None if v != v else v for k, v in found.items()}
    console.print_json(json.dumps(plain), ensure_ascii=True)


@dataclass(frozen=True)
class ColumnSource:
    """A source with the labels or targets of a network; made by ``match_columns``."""

    source: Source
    class_names: tuple[str, ...]
    places: tuple[int, ...]
    task: str

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        example = self.source[index]
        return {"image": example["image"], "label": self._taken(np.asarray(example["label"]))}

    def labels(self) -> np.ndarray:
        """All labels, float32 ``[examples, outputs]``; NaN where the source lacks the column."""
        return self._taken(self.source.labels())

    def with_levels(self, levels: Levels) -> ColumnSource:
        """With this black and white for images of more than 8 bits."""
        return replace(self, source=with_levels(self.source, levels))

    def _taken(self, labels: np.ndarray) -> np.ndarray:
        missing = np.full((*labels.shape[:-1], 1), np.nan, np.float32)
        padded = np.concatenate([labels.astype(np.float32), missing], axis=-1)
        return np.asarray(padded[..., list(self.places)])


def match_columns(source: Source, trained: Sequence[str], task: Task) -> ColumnSource:
    """The source with its labels or targets in the order of a network's, matched by name.

    Args:
        source: images with several labels or numbers each.
        trained: outputs of the network, in its order.
        task: of the network.

    Raises:
        ValueError: a source of another task, or none of the network's outputs among its columns.

    >>> from flaxtransfer.data.source import ArraySource
    >>> from flaxtransfer.task import MULTI_LABEL
    >>> images, labels = np.zeros((1, 4, 4), np.uint8), [[1, 0]]
    >>> source = ArraySource(images, labels, ("cat", "dog"), task="multi_label")
    >>> match_columns(source, ("dog", "owl", "cat"), MULTI_LABEL).labels()
    array([[ 0., nan,  1.]], dtype=float32)
    """
    if task_of_source(source).name != task.name:
        raise ValueError(
            f"the data must be for the task of the run, {task.name}, got "
            f"{task_of_source(source).name}"
        )
    names = tuple(source.class_names)
    places = tuple(names.index(name) if name in names else len(names) for name in trained)
    if all(place == len(names) for place in places):
        raise ValueError(
            f"the data must have one of {listing(map(repr, trained), most=10)}, got "
            f"{listing(map(repr, names), most=10)}"
        )
    return ColumnSource(source, tuple(trained), places, task.name)


def _unmatched(source: Source, trained: Sequence[str]) -> dict[str, Any]:
    """What of the data and of the run has no counterpart; empty where all has."""
    left = [name for name in source.class_names if name not in trained]
    unseen = [name for name in trained if name not in source.class_names]
    found = {"columns_left_out": left, "outputs_not_seen": unseen}
    return {name: names for name, names in found.items() if names}


@dataclass(frozen=True)
class MatchedSource:
    """A source with the labels of a network; made by ``match_classes``."""

    source: Source
    class_names: tuple[str, ...]
    table: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex, /) -> Example:
        example = self.source[index]
        return {"image": example["image"], "label": int(self.table[int(example["label"])])}

    def labels(self) -> np.ndarray:
        """All labels, int64 ``[examples]``; -1 where the network lacks the class."""
        return np.asarray(self.table[self.source.labels()])

    def with_levels(self, levels: Levels) -> MatchedSource:
        """With this black and white for images of more than 8 bits."""
        return replace(self, source=with_levels(self.source, levels))


def match_classes(source: Source, trained: Sequence[str]) -> MatchedSource:
    """The source with its labels matched to a network's by the names of the classes.

    The order, the number and the position of the classes do not matter.

    Args:
        source: labeled images.
        trained: classes of the network, in its order.

    >>> from flaxtransfer.data.source import ArraySource
    >>> source = ArraySource(np.zeros((3, 4, 4), np.uint8), [0, 1, 2], ("cat", "newt", "dog"))
    >>> match_classes(source, ("dog", "cat", "owl")).labels()
    array([ 1, -1,  0])
    """
    place = {name: label for label, name in enumerate(trained)}
    table = np.array([place.get(name, -1) for name in source.class_names], np.int64)
    return MatchedSource(source, tuple(trained), table)


def _unknown_text(name: str, unknown: dict[str, int], trained: Sequence[str]) -> str:
    named = (f"{each!r} ({n} images){suggest(each, trained)}" for each, n in unknown.items())
    return (
        f"{name} must have classes of the run ({listing(map(repr, trained), most=10)}), got "
        f"{listing(named)}; rename the folders, or leave them out with --skip-unknown-classes"
    )


@dataclass(frozen=True, eq=False)
class Known:
    """The validation examples of a finished run, as far as a correction needs them.

    Args:
        calibration: calibration of the network, fitted on them.
        features: float ``[examples, channels]``, the inputs of the head.
    """

    calibration: Calibration
    features: np.ndarray


def known_of(run: Path) -> Known:
    """The calibration of a finished run on its validation examples, and their features.

    Raises:
        FileNotFoundError: the run keeps none, or has not finished.
        ValueError: they are too few.
    """
    # Here: nothing else in this file needs scikit-learn and SciPy.
    from flaxtransfer.shift.calibration import calibrate

    found = kept_validation(run)
    count, classes = found.logits.shape
    if count < _FEWEST_VALIDATION * classes:
        raise ValueError(
            f"the run in {run} has {count} validation examples, and a correction of the prior needs"
            f" {_FEWEST_VALIDATION * classes} for its {classes} classes; train with more of them"
        )
    return Known(calibrate(found.logits, found.labels), found.features)


def given_prior(shares: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """The class shares of ``--prior``; None without the option.

    Args:
        shares: "0.2", "0.8", or "dark=0.2", "bright=0.8".
        names: names of the run's classes.

    Raises:
        ValueError: unknown or missing classes, or numbers that are not shares.

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
            f"--prior must have a share for each of the {len(names)} classes "
            f"({', '.join(names)}), got {len(shares)}"
        )
    try:
        found = np.array([float(share) for share in shares])
    except ValueError:
        raise ValueError(f"--prior: shares must be numbers, got {' '.join(shares)}") from None
    if not (found >= 0).all() or abs(found.sum() - 1) > 1e-3:
        raise ValueError(
            f"--prior: shares must be >= 0 and sum to 1, got {' '.join(shares)}, which sum to "
            f"{found.sum():.6g}"
        )
    return np.asarray(found / found.sum())


def adjusted(
    logits: np.ndarray,
    features: np.ndarray,
    known: Known,
    prior: np.ndarray | None,
    names: Sequence[str],
    console: Console,
) -> np.ndarray:
    """Corrected probabilities ``[images, classes]``; a report of it goes to ``console``.

    Args:
        logits: ``[images, classes]``.
        features: ``[images, channels]``, the inputs of the head for the same images.
        known: the validation examples of the run.
        prior: class shares; None estimates them.
        names: names of the classes.
        console: for the report.

    Raises:
        ValueError: the prior cannot be estimated from these images.
    """
    from flaxtransfer.shift.prior_correction import adjust_prior, correct_prior

    source = known.calibration
    calibrated = source.apply(logits)
    if prior is not None:
        corrected = adjust_prior(calibrated, prior, source_prior=source.prior)
        lines = [f"prior as given, {_calibrated(source)}"]
        lines += [
            f"{n}: {p:.3f} -> {q:.3f}" for n, p, q in zip(names, source.prior, prior, strict=True)
        ]
    else:
        # In the precision of the run's features, so that rounding is not a difference.
        both = known.features, features.astype(known.features.dtype)
        found = correct_prior(logits, source, features=both)
        if not found.adjusted or found.prevalence is None:
            raise ValueError(
                f"the prior is not adjusted: {'; '.join(found.refusals)}; without --adjust-prior "
                "predictions assume the class shares of the validation examples, and --prior "
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


def predict(options: Predict, console: Console) -> None:
    """Runs ``flaxtransfer predict``; predictions go to standard output, notes to ``console``."""
    options = replace(options, run=local_run(options.run))
    network = trained_network(options.run)
    options = replace(options, images=tuple(_files(options, console)))
    classes = network.model.config.classes
    names = network.class_names or tuple(map(str, range(classes)))
    write = {"jsonl": _write_json_lines, "csv": _write_csv}[options.format]
    if options.adjust_prior or options.prior:
        for_classes(network.task, "a correction of the prior")
    if network.task is not SINGLE_LABEL:
        if options.top != 1:
            raise ValueError(f"--top must be left out for the task {network.task.name}")
        _predict_columns(options, network, names, console)
        return
    batches: Iterator[tuple[list[str], np.ndarray]]
    if options.adjust_prior or options.prior:
        # Before any image is read, so that a typing error costs no time.
        known, prior = known_of(options.run), given_prior(options.prior, names)
        parts = list(_outputs_of_all(options, network, console, features=True))
        if not parts:
            raise ValueError("none of the images could be read")
        paths = [path for some, *_ in parts for path in some]
        logits, features = (np.concatenate([part[n] for part in parts]) for n in (1, 2))
        batches = iter([(paths, adjusted(logits, features, known, prior, names, console))])
    else:
        batches = (
            (paths, network.task.probabilities(logits))
            for paths, logits, _ in _outputs_of_all(options, network, console)
        )
    top = min(max(options.top, 1), classes)
    with _of_first() as file:
        write(_rows(batches, names), top, file)


@contextmanager
def _of_first() -> Iterator[TextIO]:
    """Standard output, for process 0."""
    if is_first():
        yield sys.stdout
        return
    with open(os.devnull, "w") as nowhere:
        yield nowhere


def _files(options: Predict, console: Console) -> Iterator[Path]:
    """The files to predict on, of data sources too."""
    for image in options.images:
        if not is_source(image):
            yield image
            continue
        skip, column = options.reading.skip_corrupt, options.image_column
        table = str(image).startswith(("csv:", "parquet:"))
        found = open_unlabeled(
            str(image), skip_corrupt=skip, image_column=column if table else None
        )
        print_notes(found, console)
        for reason in found.skipped:
            console.print(f"left out: {reason}", highlight=False, markup=False)
        assert isinstance(found.source, FolderSource)  # of the schemes that ``is_source`` knows
        yield from (found.source.root / name for name in found.names)


def _predict_columns(
    options: Predict, network: Classifier, names: Sequence[str], console: Console
) -> None:
    """Prints a probability for each label of an image, or the value of each target."""
    multi = network.task.name == MULTI_LABEL.name
    with _of_first() as file:
        writer = csv.writer(file)
        if options.format == "csv":
            writer.writerow(["image", *map(cell_text, names)])
        for paths, logits, _ in _outputs_of_all(options, network, console):
            for path, row in zip(paths, network.task.probabilities(logits), strict=True):
                values = dict(zip(names, (float(f"{value:.6g}") for value in row), strict=True))
                if options.format == "csv":
                    writer.writerow([cell_text(str(path)), *values.values()])
                    continue
                line: dict[str, Any] = {"image": str(path)}
                if multi:
                    line["labels"] = [name for name, value in values.items() if value > 0.5]
                line["probabilities" if multi else "values"] = values
                print(json.dumps(line), file=file, flush=True)


def _rows(
    batches: Iterator[tuple[list[str], np.ndarray]], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    for paths, probabilities in batches:
        for path, probability in zip(paths, probabilities, strict=True):
            order = np.argsort(-probability, kind="stable")
            ranked = [(names[i], float(probability[i])) for i in order]
            yield {"image": str(path), "ranked": ranked}


Outputs: TypeAlias = tuple[list[str], np.ndarray, np.ndarray]
"""The images of a batch that could be read, their logits and their features."""


def _outputs_of_all(
    options: Predict, network: Classifier, console: Console, *, features: bool = False
) -> Iterator[Outputs]:
    """The outputs for all images, in their order; each process reads its share of the files.

    Args:
        options: with the images.
        network: of the run.
        console: for what is left out.
        features: whether they are of use; otherwise those of other processes are not sent.
    """
    bands = run_bands(options.run, network)
    labels, files = np.zeros(len(options.images), np.int64), tuple(map(str, options.images))
    source = FolderSource(Path(), ("?",), files, labels, bands=bands)
    if note := levels_note(source, np.arange(len(files)), network):
        console.print(note, highlight=False, markup=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    if not several():
        yield from _outputs(options, network, bands, say)
        return
    number, count = share()
    # By their names: a cache that they were fetched to may lie elsewhere on another machine.
    own_names = json.dumps([path.name for path in options.images])
    check_alike({"images": hashlib.sha256(own_names.encode()).hexdigest()})
    own = np.array_split(np.arange(len(files)), count)[number].tolist()
    left_out: list[str] = []
    mine = replace(options, images=tuple(options.images[i] for i in own))
    parts = list(_outputs(mine, network, bands, left_out.append)) if own else []
    names = [name for some, *_ in parts for name in some]
    empty = np.zeros((0, network.model.config.classes), np.float32)
    arrays = {"logits": np.concatenate([empty, *(logits for _, logits, _ in parts)])}
    if features:
        nothing = np.zeros((0, network.model.config.features), np.float32)
        arrays["features"] = np.concatenate([nothing, *(part for *_, part in parts)])
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **arrays)
    told = [json.loads(text) for text in from_all(json.dumps([names, left_out]).encode())]
    for (some, reasons), data in zip(told, from_all(packed.getvalue()), strict=True):
        for reason in reasons:
            say(reason)
        found = np.load(io.BytesIO(data))
        if some:
            yield some, found["logits"], found["features"] if features else found["logits"][:, :0]


def _outputs(
    options: Predict, network: Classifier, bands: int, say: Callable[[str], None]
) -> Iterator[Outputs]:
    """The outputs for the images of this process, batch by batch, on its own devices."""
    preprocessing = network.preprocessing
    transform = evaluation_transform(preprocessing, channels=len(preprocessing.mean))
    random = np.random.default_rng(0)  # evaluation draws no number from it
    mesh = make_mesh(jax.local_devices())
    run = forward_averaged(network.on(mesh), options.tta)
    variables = place_replicated(network.variables, mesh)
    # One list per batch of images that could be read, filled before the network runs on it.
    readable: list[list[str]] = []
    size = options.reading.batch_size

    def batches() -> Iterator[dict[str, np.ndarray]]:
        images = _read(options, bands, network.preprocessing, say)
        while some := list(itertools.islice(images, size)):
            readable.append([name for name, _ in some])
            # Always the same shape, so that the network is compiled once.
            missing = size - len(some) if len(readable) > 1 else 0
            weight = np.array([1.0] * len(some) + [0.0] * missing, np.float32)
            pixels = [transform(image, random) for _, image in some]
            yield {"image": np.stack(pixels + [pixels[0]] * missing), "weight": weight}

    found = map_batches(lambda images: run(variables, images), batches(), mesh)
    for number, ((logits, features), _) in enumerate(found):
        yield readable[number], logits, features


def _read(
    options: Predict, bands: int, preprocessing: Preprocessing, say: Callable[[str], None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and pixels of each image that can be read; a file of n frames is n images."""
    levels = Levels.of(preprocessing)
    for path in options.images:
        try:
            count = count_frames(path, name=str(path))
            for frame in range(count):
                name = f"{path}#{frame + 1}" if count > 1 else str(path)
                yield name, decode_bands(path, name=name, bands=bands, levels=levels, frame=frame)
        except ImageError as error:
            if not options.reading.skip_corrupt:
                raise
            say(f"left out: {error}")


def _write_json_lines(rows: Iterator[dict[str, Any]], top: int, file: TextIO) -> None:
    for row in rows:
        label, probability = row["ranked"][0]
        line = {"image": row["image"], "label": label, "probability": round(probability, 6)}
        if top > 1:
            line["top"] = {name: round(p, 6) for name, p in row["ranked"][:top]}
        print(json.dumps(line), file=file, flush=True)


def cell_text(text: str) -> str:
    r"""Text as a cell of CSV that neither a spreadsheet runs nor a terminal obeys.

    Spreadsheets run a cell that begins with one of these characters; after an apostrophe it is
    text. A number is no formula and stays one.

    >>> cell_text("=HYPERLINK(A1)"), cell_text("-1"), cell_text("cat"), cell_text("\t=A1")
    ("'=HYPERLINK(A1)", '-1', 'cat', "'\\x09=A1")

    References:
        OWASP, "CSV Injection", 2015-.
    """
    runs = text.startswith(("=", "+", "-", "@", "\t", "\r"))
    shown = visible(text)
    return f"'{shown}" if runs and not _NUMBER.fullmatch(text) else shown


_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


def _write_csv(rows: Iterator[dict[str, Any]], top: int, file: TextIO) -> None:
    writer = csv.writer(file)
    suffixes = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    header = [f"{column}{suffix}" for suffix in suffixes for column in ("label", "probability")]
    writer.writerow(["image", *header])
    for row in rows:
        cells: list[Any] = [cell_text(row["image"])]
        for label, probability in row["ranked"][:top]:
            cells += [cell_text(label), f"{probability:.6f}"]
        writer.writerow(cells)


REPORT_FILE = "explanation.json"

_PER_PAGE = 12
"""Images of a picture."""


def explain(options: Explain, console: Console) -> None:
    """Runs ``flaxtransfer explain``."""
    from flaxtransfer.analysis.map_checks import faithfulness, randomization_test
    from flaxtransfer.analysis.saliency import logits_function, saliency_maps

    network, found, chosen = _opened(options, console)
    for_classes(network.task, "an explanation of predicted classes")
    reading = options.reading
    if note := levels_note(found.source, chosen, network):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    batches = eval_batches(
        found.source, chosen, network.preprocessing, batch_size=reading.batch_size
    )
    images = np.concatenate([batch["image"][batch["weight"] > 0] for batch in batches])
    asked = (network.model, network.variables, images, network.preprocessing)
    maps = saliency_maps(
        *asked, layer=options.layer, method=options.method, batch_size=reading.batch_size
    )
    run = logits_function(
        network.model, network.variables, network.preprocessing, batch_size=reading.batch_size
    )
    faithful = faithfulness(run, images, maps.maps, maps.targets, seed=options.seed)
    sound = randomization_test(*asked, layer=maps.layer, method=maps.method, seed=options.seed)
    for value in (maps, faithful, sound):
        console.print(value)
    verdict = faithful.summary() if sound.passed else f"{faithful.summary()} {sound.summary()}"
    names = [found.names[i] for i in chosen]
    written = {
        "images": names,
        "saliency": maps.to_json(),
        "faithfulness": faithful.to_json(),
        "randomization": sound.to_json(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.out) as folder:
        folder.mkdir()
        for number, png in enumerate(_pages(network, images, maps, names, verdict), start=1):
            write_file(folder / f"page{number}.png", png)
        write_file(folder / REPORT_FILE, (json.dumps(written, indent=2) + "\n").encode())
    console.print(f"written to {options.out}/", highlight=False, soft_wrap=True)


def _opened(options: Explain, console: Console) -> tuple[Classifier, UnlabeledImages, np.ndarray]:
    """The network, images with names, and the positions of those to explain."""
    run, skip = Path(options.source), options.reading.skip_corrupt
    if not has_weights_name(options.source):
        run = local_run(run)  # One in a bucket is fetched.
    if run.is_dir():
        network = trained_network(run)
        bands = run_bands(run, network)
    else:
        checkpoint = load(options.source)
        if checkpoint.no_head:
            raise ValueError(
                f"{options.source} must have a head, whose classes are explained: "
                f"{checkpoint.no_head}"
            )
        network = Classifier.of(checkpoint)
        bands = network.model.config.bands
    if options.data is not None:
        found = open_unlabeled(
            options.data, skip_corrupt=skip, bands=bands, image_column=options.image_column
        )
        print_notes(found, console)
        positions = np.arange(len(found.source))
    else:
        source, parts = run_data(run, skip_corrupt=skip)
        found, positions = UnlabeledImages.numbered(source), parts.test
        if not len(positions):
            raise ValueError(f"the run in {run} has no test images; give others with --data")
    random = np.random.default_rng(options.seed)
    count = min(options.most_images, len(positions))
    return network, found, np.sort(random.choice(positions, count, replace=False))


def _pages(
    network: Classifier, images: np.ndarray, maps: Saliency, names: list[str], verdict: str
) -> list[bytes]:
    """The images with their overlays, as PNG."""
    from flaxtransfer.report.figures import plot_saliency

    classes = network.class_names or tuple(map(str, range(network.model.config.classes)))
    probabilities = network.task.probabilities(maps.logits)
    titles = [
        f"{Path(name).name}: {classes[target]} {row[target]:.0%}"
        for name, target, row in zip(names, maps.targets, probabilities, strict=True)
    ]
    overlays, pages = maps.upsampled(), []
    for first in range(0, len(images), _PER_PAGE):
        part = slice(first, first + _PER_PAGE)
        page = io.BytesIO()
        plot_saliency(page, images[part], overlays[part], titles[part], verdict)
        pages.append(page.getvalue())
    return pages
