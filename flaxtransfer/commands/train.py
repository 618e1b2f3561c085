"""``flaxtransfer train``: adapt a pre-trained network to a set of images, and test it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from flaxtransfer.commands.job import Job, prepare
from flaxtransfer.commands.options import Train
from flaxtransfer.data.loader import DataLoaders, eval_batches
from flaxtransfer.data.splits import Splits, subsample
from flaxtransfer.features.class_means import baseline
from flaxtransfer.features.extract import pooled_features
from flaxtransfer.models.model import Model
from flaxtransfer.models.registry import resnet
from flaxtransfer.recipes.catalog import from_scratch
from flaxtransfer.training.evaluation import Evaluation
from flaxtransfer.training.loop import FitOptions, FitResult, fit
from flaxtransfer.training.plan import Plan, plan_table
from flaxtransfer.training.run_folder import write_json
from flaxtransfer.types import Variables

SUMMARY_FILE = "summary.json"

MOST_IMAGES_FOR_COMPARISON = 1000
"""Training sets up to this size are also trained from scratch, where nobody says otherwise."""


MOST_IMAGES_FOR_BASELINE = 2000
"""More images than that do not change what a head on frozen features is roughly worth."""


def train(options: Train, console: Console) -> None:
    """Runs ``flaxtransfer train`` and prints what it found; the run folder keeps everything."""
    options.check()
    folder = options.run or Path("runs") / f"{_file_name(options.data)}-seed{options.seed}"
    if options.resume and (folder / SUMMARY_FILE).exists():
        check_finished(folder, options)
        print_summary(json.loads((folder / SUMMARY_FILE).read_text()), folder, console)
        return
    started = time.monotonic()
    job = prepare(options)
    _print_job(job, options, console)
    baseline = _baseline(job, console)
    fitted = _fit(options, job.model, job.variables, job.plan, job.feed, folder)
    rows = [_row("pre-trained", job.test(job.model, fitted.variables), fitted, started)]
    for line in (*fitted.notes, *map(str, fitted.audits)):
        console.print(line, highlight=False)
    few = len(job.splits.train) <= MOST_IMAGES_FOR_COMPARISON
    few = few and options.strategy != "from_scratch"
    if options.compare == "yes" or (options.compare == "auto" and few):
        started = time.monotonic()
        rows.append(_train_from_scratch(options, job, fitted.steps, folder, started))
    summary = {
        "data": options.data,
        "train_images": len(job.splits.train),
        "validation_images": len(job.splits.val),
        "test_images": len(job.splits.test),
        "options": json.loads(json.dumps(options.identity())),
        "baseline": baseline,
        "results": rows,
    }
    write_json(folder / SUMMARY_FILE, summary)
    print_summary(summary, folder, console)


def check_finished(folder: Path, options: Train) -> None:
    """Refuses to pass off the results of other options as those of these."""
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    wanted = json.loads(json.dumps(options.identity()))
    differences = [
        f"{name} is {summary['options'].get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if summary["options"].get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{folder} belongs to another run: {'; '.join(differences)}; give a new folder"
        )


def print_summary(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """The short table at the end, and the test accuracy as the very last line."""
    results = Table(title=f"{summary['train_images']} training images of {summary['data']}")
    for column in ("start", "steps", "seconds", "test loss", "test accuracy"):
        results.add_column(column, justify="left" if column == "start" else "right")
    for row in summary["results"]:
        results.add_row(
            row["start"],
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            f"{row['loss']:.3f}",
            f"{100 * row['accuracy']:.1f} %",
        )
    console.print(results)
    console.print(f"run folder: {folder}", highlight=False, soft_wrap=True)
    console.print(
        f"test accuracy: {100 * summary['results'][0]['accuracy']:.2f} % of "
        f"{summary['test_images']} images that were not trained on",
        highlight=False,
    )


def _train_from_scratch(
    options: Train, job: Job, steps: int, folder: Path, started: float
) -> dict[str, Any]:
    """The same network, images, augmentation and number of steps, from random weights."""
    model = resnet(job.model.config, dtype=job.model.dtype)
    size = job.feed.preprocessing.size
    image_shape = (size, size, job.model.config.bands)
    variables = model.init(jax.random.key(options.seed), image_shape)
    plan = from_scratch(
        variables["params"],
        steps=steps,
        learning_rate=options.scratch_learning_rate,
        weight_decay=1e-2 if options.weight_decay is None else options.weight_decay,
        patience=options.patience,
    )
    inner = replace(options, resume=options.resume or (folder / "from_scratch").exists())
    fitted = _fit(inner, model, variables, plan, job.feed, folder / "from_scratch")
    return _row("from scratch", job.test(model, fitted.variables), fitted, started)


def _fit(
    options: Train, model: Model, variables: Variables, plan: Plan, feed: DataLoaders, folder: Path
) -> FitResult:
    return fit(
        model,
        variables,
        plan,
        feed,
        folder,
        seed=options.seed,
        config={"options": options.identity()},
        resume=options.resume,
        options=FitOptions(evaluate_every=options.evaluate_every, tensorboard=options.tensorboard),
        cache=options.caching(),
    )


def _row(start: str, result: Evaluation, fitted: FitResult, started: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - started, 1)
    return {"start": start, "steps": fitted.steps, "seconds": seconds, **result.to_json()}


def _print_job(job: Job, options: Train, console: Console) -> None:
    counts = ", ".join(
        f"{len(part)} {name}" for name, part in zip(Splits._fields, job.splits, strict=True)
    )
    skipped = getattr(job.source, "skipped", ())
    if skipped:
        console.print(f"{len(skipped)} unreadable images were left out", highlight=False)
    console.print(f"{options.data}: {len(job.source.class_names)} classes; {counts}")
    console.print(f"{job.checkpoint!r}", highlight=False)
    if job.report.input:
        console.print(job.report.input, highlight=False, soft_wrap=True)
    if job.evidence.text:
        console.print(job.evidence.text, highlight=False, soft_wrap=True)
    console.print(plan_table(job.plan, job.variables["params"]))


def _baseline(job: Job, console: Console) -> dict[str, Any] | None:
    """Prints what heads on frozen features reach; nothing that is wrong there stops a run."""
    preprocessing = job.feed.preprocessing
    positions = subsample(job.splits.train, MOST_IMAGES_FOR_BASELINE, job.source.labels())
    batches = eval_batches(job.source, positions, preprocessing)
    try:
        pooled = pooled_features(job.model, job.variables, batches, preprocessing)
        found = baseline(*pooled, classes=len(job.source.class_names))
    except ValueError as error:
        console.print(f"no baseline on frozen features: {error}", highlight=False)
        return None
    console.print(str(found), highlight=False, soft_wrap=True)
    return asdict(found)


def _file_name(data: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in data.rstrip("/").split("/")[-1])
