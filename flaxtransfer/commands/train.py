"""``flaxtransfer train``: adapts a pre-trained network to a set of images, and tests it.

With ``--folds`` it does so once per fold, each in a run folder of its own below that of the run.
"""

from __future__ import annotations

import csv
import io
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from flaxtransfer.checkpoint.mirror import mirrored
from flaxtransfer.classifier import Classifier
from flaxtransfer.commands.job import (
    Choosing,
    Job,
    balanced,
    frozen_heads,
    prepare,
    print_notes,
    regularized,
    run_data,
    trained_network,
)
from flaxtransfer.commands.options import AUTO, recorded
from flaxtransfer.commands.predict import cell_text
from flaxtransfer.commands.subcommands import Train
from flaxtransfer.data.loader import DataLoaders, eval_batches
from flaxtransfer.data.source import near_duplicates
from flaxtransfer.data.splits import Splits
from flaxtransfer.distributed import check_alone, from_first
from flaxtransfer.files import (
    MANIFEST_FILE,
    atomic_write,
    bucket_address,
    read_json,
    write_file,
    write_json,
)
from flaxtransfer.metrics import shown
from flaxtransfer.paths import listing, visible
from flaxtransfer.recipes.catalog import from_scratch
from flaxtransfer.task import SINGLE_LABEL, Task
from flaxtransfer.training.console import log, read_metrics
from flaxtransfer.training.evaluation import Evaluation, predict
from flaxtransfer.training.loop import FitOptions, FitResult, check_same_run, fit
from flaxtransfer.training.plan import Plan, plan_table
from flaxtransfer.training.prefix_cache import Cache
from flaxtransfer.training.run_folder import CONFIG_FILE, RACE, run_problems, seal_run

Pooled = tuple[np.ndarray, np.ndarray]
"""Features ``[examples, channels]`` of training images, and their labels."""

SUMMARY_FILE = "summary.json"
PICTURE_FILE = "training.png"
FOLDS_FILE = "folds.json"
OUT_OF_FOLD_FILE = "out_of_fold.csv"
SCRATCH = "from_scratch"
"""The run folder of the comparison, within that of the run."""

MOST_IMAGES_FOR_COMPARISON = 1000
"""Largest training set for which ``--compare auto`` also trains from scratch."""


def train(options: Train, console: Console) -> None:
    """Runs ``flaxtransfer train`` and prints its results; the run folder keeps everything.

    With an address of a bucket the run works in a local folder, which is mirrored there.
    """
    if (address := bucket_address(options.run.run)) is not None:
        with mirrored(address, resume=options.run.resume, say=log) as folder:
            train(replace(options, run=replace(options.run, run=folder)), console)
    elif options.job.split.folds is not None and options.job.split.fold is None:
        cross_validate(options, console)
    else:
        train_once(options, console)


def cross_validate(options: Train, console: Console) -> None:
    """Trains and tests once per fold, and writes what each image got when it was tested."""
    split, folder = options.job.split, run_folder(options)
    assert split.folds is not None  # or this is no cross-validation
    check_alone("--folds")
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{folder} holds a run without folds; give a new --run")
    if not options.run.resume and any(folder.glob("fold*")):
        raise ValueError(f"{folder} holds folds; add --resume to go on, or give a new --run")
    rows, places = [], []
    for fold in range(1, split.folds + 1):
        console.print(f"\nfold {fold} of {split.folds}", highlight=False)
        job = replace(options.job, split=replace(split, fold=fold))
        each = replace(options, job=job)
        rows.append(train_once(each, console)["results"][0])
        places.append(run_folder(each))
    count = _write_out_of_fold(folder / OUT_OF_FOLD_FILE, places, options)
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    names = [name for name in names if name != "seconds"]
    found = {name: [row[name] for row in rows] for name in names}
    summary = {
        "data": options.job.data.name,
        "examples": count,
        "folds": rows,
        "mean": {name: float(np.mean(values)) for name, values in found.items()},
        "standard_deviation": {
            name: float(np.std(values, ddof=1)) for name, values in found.items()
        },
    }
    write_json(folder / FOLDS_FILE, summary)
    _print_folds(summary, folder, console)


def _write_out_of_fold(path: Path, places: list[Path], options: Train) -> int:
    """Writes a CSV file with the predictions for each image by the network that never saw it.

    Returns:
        How many images there are.
    """
    lines: dict[int, list[Any]] = {}
    header: list[str] = []
    for fold, place in enumerate(places, start=1):
        network = trained_network(place)
        source, parts = run_data(place, skip_corrupt=options.job.data.skip_corrupt)
        size = options.job.batch.batch_size
        batches = eval_batches(source, parts.test, network.preprocessing, batch_size=size)
        found = predict(network, batches)
        outputs = network.task.probabilities(found.logits)
        files, names = getattr(source, "files", None), source.class_names
        single = found.labels.ndim == 1
        if single:
            header = ["label", "predicted", *(f"probability {name}" for name in names)]
        else:
            header = [f"{what} {name}" for what in ("label", "predicted") for name in names]
        for i, label, output in zip(parts.test.tolist(), found.labels, outputs, strict=True):
            if single:
                cells = [cell_text(names[label]), cell_text(names[int(output.argmax())])]
            else:
                cells = ["" if np.isnan(value) else f"{value:g}" for value in label]
            cells += [f"{value:.6f}" for value in output]
            lines[i] = [cell_text(files[i]) if files else i, fold, *cells]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["image", "fold", *map(cell_text, header)])
    writer.writerows(lines[i] for i in sorted(lines))
    with atomic_write(path) as made:
        write_file(made, text.getvalue().encode())
    return len(lines)


def _print_folds(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Prints the results of each fold, and their mean and standard deviation as the last line."""
    metrics = list(summary["mean"])
    results = Table(title=f"{len(summary['folds'])} folds of {summary['data']}")
    for column in ("fold", "steps", "seconds", "images", *(f"test {name}" for name in metrics)):
        results.add_column(column, justify="right")
    for fold, row in enumerate(summary["folds"], start=1):
        numbers = (f"{row[name]:.3f}" for name in metrics)
        results.add_row(
            str(fold), str(row["steps"]), f"{row['seconds']:.0f}", str(row["examples"]), *numbers
        )
    console.print(results)
    _say(f"predictions for each image: {folder / OUT_OF_FOLD_FILE}", console)
    means = (
        f"{name} {summary['mean'][name]:.4f} ± {summary['standard_deviation'][name]:.4f}"
        for name in metrics
    )
    _say(
        f"test {', '.join(means)} (mean and standard deviation of {len(summary['folds'])} folds; "
        f"each of {summary['examples']} images was tested once)",
        console,
    )


def run_folder(options: Train) -> Path:
    """The folder of the run; of one fold below that of the cross-validation."""
    split = options.job.split
    name = f"{_file_name(options.job.data.name)}-seed{split.seed}"
    name += f"-folds{split.folds}" if split.folds is not None else ""
    folder = options.run.run or Path("runs") / name
    return folder if split.fold is None else folder / f"fold{split.fold}"


def train_once(options: Train, console: Console) -> dict[str, Any]:
    """Trains and tests one network.

    Returns:
        The summary, which the run folder keeps.
    """
    name, folder = options.job.data.name, run_folder(options)
    started = time.monotonic()
    resumed = folder if options.run.resume else None
    choosing = Choosing(folder / RACE, _cache(options), lambda text: _say(text, console))
    new_race = options.job.strategy.strategy == AUTO and not options.run.resume
    if new_race and (folder / RACE).exists():
        raise ValueError(f"{folder} holds a race; add --resume to go on, or give a new --run")
    job = prepare(options.job, options.training.settings(), resumed, choosing)
    if resumed and from_first(lambda: _is_finished(folder)):
        arguments = _arguments(options, job.network, job.plan, job.data, folder)
        for note in check_same_run(**arguments):
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        problems = from_first(lambda: _problems(folder))
        if not problems:
            kept: dict[str, Any] = from_first(lambda: read_json(folder / SUMMARY_FILE))
            print_summary(kept, folder, console)
            return kept
        for problem in problems:
            console.print(
                f"{problem}; it is made again", highlight=False, markup=False, soft_wrap=True
            )
    _print_job(job, name, console)
    alike = _near_duplicates(job)
    _say(alike, console)
    solved = all(phase.only_solves for phase in job.plan.phases)
    # A solved head is judged by the same folds when it is solved, and says so itself.
    frozen = None
    if not solved and job.network.task.name == SINGLE_LABEL.name:
        frozen = job.frozen or frozen_heads(job.network, job.source, job.splits.train)
        _say(frozen.text, console)
    pooled = frozen.pooled if frozen else job.evidence.pooled
    if pooled is not None and len(pooled[1]) < len(job.splits.train):
        pooled = None  # Some of the images were not looked at.
    fitted = _fit(options, job.network, job.plan, job.data, folder, pooled)
    rows = [_row("pre-trained", job.test(fitted.network), fitted, started)]
    for line in (*fitted.notes, *map(str, fitted.audits)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    few = len(job.splits.train) <= MOST_IMAGES_FOR_COMPARISON
    few = few and options.job.strategy.strategy != "from_scratch"
    few = few and options.job.split.folds is None
    few = few and not solved  # It takes no steps, in which the comparison could be trained.
    if options.run.compare == "yes" or (options.run.compare == "auto" and few):
        started = time.monotonic()
        steps = max(300, 10 * job.data.steps_per_epoch) if solved else fitted.steps
        rows.append(_train_from_scratch(options, job, steps, folder, started))
    summary = {
        "data": name,
        "train_images": len(job.splits.train),
        "validation_images": len(job.splits.val),
        "test_images": len(job.splits.test),
        "metric": fitted.network.task.ranking,
        "options": recorded(options),
        "baseline": asdict(frozen.baseline) if frozen and frozen.baseline else None,
        "results": rows,
        "near_duplicates": alike,
        "notes": list(fitted.notes),
    }

    def write() -> None:
        _draw(rows, job.network.task, folder)
        write_json(folder / SUMMARY_FILE, summary)
        seal_run(folder, SUMMARY_FILE, PICTURE_FILE)

    from_first(write)
    print_summary(summary, folder, console)
    return summary


def _is_finished(folder: Path) -> bool:
    return (folder / MANIFEST_FILE).exists() and (folder / SUMMARY_FILE).exists()


def _problems(folder: Path) -> list[str]:
    """What of a finished run and of its comparison is damaged."""
    scratch = folder / SCRATCH
    return run_problems(folder) + (run_problems(scratch) if scratch.exists() else [])


def _draw(rows: list[dict[str, Any]], task: Task, folder: Path) -> None:
    """Draws the training curves of the run and of its comparison into the run folder."""
    from flaxtransfer.report.figures import plot_training

    places = {"pre-trained": folder, "from scratch": folder / SCRATCH}
    curves = {row["start"]: read_metrics(places[row["start"]]) for row in rows}
    tested = {row["start"]: row[task.score_name] for row in rows}
    plot_training(folder / PICTURE_FILE, curves, tested, metric=task.score_name)


def print_summary(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """Prints the table of results, and the metric on the test images as the last line."""
    metric = summary["metric"]
    name = metric.replace("_", " ")
    results = Table(title=f"{summary['train_images']} training images of {summary['data']}")
    for column in ("start", "steps", "seconds", "test loss", f"test {name}"):
        results.add_column(column, justify="left" if column == "start" else "right")
    for row in summary["results"]:
        results.add_row(
            row["start"],
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            "-" if row["loss"] is None else f"{row['loss']:.3f}",
            shown(metric, row[metric]),
        )
    console.print(results)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    if not summary["test_images"]:
        console.print("nothing was tested: the run has no test images (--test-fraction)")
        return
    value = summary["results"][0][metric]
    told = f"{100 * value:.2f} % of" if metric == "accuracy" else f"{shown(metric, value)} on"
    console.print(
        f"test {name}: {told} {summary['test_images']} images that were not trained on",
        highlight=False,
    )


def _train_from_scratch(
    options: Train, job: Job, steps: int, folder: Path, started: float
) -> dict[str, Any]:
    """The same network, images, augmentation and number of steps, from random weights."""
    training = options.training
    key = jax.random.key(options.job.split.seed)
    network = job.network.with_variables(job.network.model.init(key))
    plan = from_scratch(
        network.params,
        steps=steps,
        learning_rate=options.run.scratch_learning_rate,
        weight_decay=1e-2 if training.weight_decay is None else training.weight_decay,
        patience=training.patience,
    )
    plan = balanced(plan, options.job.strategy.balance, network.task)
    plan = regularized(plan, options.job, network.task)
    resume = options.run.resume or from_first((folder / SCRATCH).exists)
    inner = replace(options, run=replace(options.run, resume=resume, profile=None))
    fitted = _fit(inner, network, plan, job.data, folder / SCRATCH)
    return _row("from scratch", job.test(fitted.network), fitted, started)


def _fit(
    options: Train,
    network: Classifier,
    plan: Plan,
    data: DataLoaders,
    folder: Path,
    pooled: Pooled | None = None,
) -> FitResult:
    above = options.run.shard_above_mb
    return fit(
        **_arguments(options, network, plan, data, folder),
        resume=options.run.resume,
        shard_above=None if above is None else 1e6 * above,
        pooled=pooled,
    )


def _arguments(
    options: Train, network: Classifier, plan: Plan, data: DataLoaders, folder: Path
) -> dict[str, Any]:
    """The arguments of ``fit`` that say which run it is."""
    return {
        "network": network,
        "plan": plan,
        "data": data,
        "folder": folder,
        "seed": options.job.split.seed,
        "config": {"options": recorded(options)},
        "options": FitOptions(
            evaluate_every=options.training.evaluate_every,
            tensorboard=options.run.tensorboard,
            profile=options.run.steps_to_trace(),
        ),
        "cache": _cache(options),
    }


def _cache(options: Train) -> Cache:
    cache = options.cache
    return Cache(
        where=cache.where,
        dtype=cache.dtype,
        views=cache.views,
        memory=int(1e9 * cache.memory_gb),
        disk=int(1e9 * cache.disk_gb),
        folder=cache.folder,
    )


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _row(
    start: str, result: Evaluation | None, fitted: FitResult, started: float
) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 1)
    row = {"start": start, "steps": fitted.steps, "seconds": seconds}
    if result is None:
        task = fitted.network.task
        nothing = dict.fromkeys((task.ranking, task.score_name, "loss"))
        return {**row, **nothing, "examples": 0}
    return {**row, **result.to_json()}


def _print_job(job: Job, name: str, console: Console) -> None:
    counts = ", ".join(
        f"{len(part)} {use}" for use, part in zip(Splits._fields, job.splits, strict=True)
    )
    skipped = getattr(job.source, "skipped", ())
    if skipped:
        console.print(f"{len(skipped)} unreadable images were left out", highlight=False)
    print_notes(job.source, console)
    what = _OUTPUTS[job.network.task.name]
    console.print(f"{name}: {len(job.source.class_names)} {what}; {counts}")
    if job.levels:
        console.print(job.levels, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{job.checkpoint!r}", highlight=False)
    if job.ranking:
        _say(job.ranking, console)
    report = job.network.report
    if report is not None and report.input:
        console.print(report.input, highlight=False, soft_wrap=True)
    if report is not None and report.head:
        console.print(f"head: {report.head}", highlight=False, soft_wrap=True, markup=False)
    if job.evidence.text:
        console.print(job.evidence.text, highlight=False, soft_wrap=True)
    console.print(plan_table(job.plan, job.network.params))


_OUTPUTS = {"single_label": "classes", "multi_label": "labels", "regression": "targets"}
"""What the outputs of a network are called, by its task."""

MOST_IMAGES_FOR_DUPLICATES = 5000
"""Each is decoded for it, and compared with all others: some seconds."""


def _near_duplicates(job: Job) -> str:
    """Says which images are in two parts of the split."""
    parts = job.splits[:3]
    count = sum(map(len, parts))
    if count > MOST_IMAGES_FOR_DUPLICATES:
        return (
            f"near-duplicates across the split were not looked for among {count:,} images (more "
            f"than {MOST_IMAGES_FOR_DUPLICATES:,}; ft.data.near_duplicates does)"
        )
    pairs = near_duplicates(job.source, parts)
    if not pairs:
        return "no near-duplicates across the split"
    part_of = {i: name for name, part in zip(Splits._fields, parts, strict=False) for i in part}
    files = getattr(job.source, "files", None)
    texts = (
        " and ".join(f"{files[i] if files else i} ({part_of[i]})" for i in pair) for pair in pairs
    )
    return visible(
        f"{len(pairs)} near-duplicate{'' if len(pairs) == 1 else 's'} across the split, which make "
        f"validation and test easier than they are: {listing(texts, most=5)}"
    )


def _file_name(data: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in data.rstrip("/").split("/")[-1])
