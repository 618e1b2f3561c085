"""``flaxtransfer train``: adapts a pre-trained network to a set of images, and tests it."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from flaxtransfer.classifier import Classifier
from flaxtransfer.commands.job import Choosing, Job, balanced, prepare
from flaxtransfer.commands.options import AUTO, recorded
from flaxtransfer.commands.subcommands import Train
from flaxtransfer.data.loader import DataLoaders, eval_batches
from flaxtransfer.data.splits import Splits, subsample
from flaxtransfer.features.class_means import baseline
from flaxtransfer.features.inputs import pooled_features
from flaxtransfer.files import MANIFEST_FILE, read_json, write_json
from flaxtransfer.metrics import shown
from flaxtransfer.recipes.catalog import from_scratch
from flaxtransfer.task import SINGLE_LABEL, Task
from flaxtransfer.training.console import read_metrics
from flaxtransfer.training.evaluation import Evaluation
from flaxtransfer.training.loop import FitOptions, FitResult, check_same_run, fit
from flaxtransfer.training.plan import Plan, plan_table
from flaxtransfer.training.prefix_cache import Cache
from flaxtransfer.training.run_folder import RACE, run_problems, seal_run

Pooled = tuple[np.ndarray, np.ndarray]
"""Features ``[examples, channels]`` of training images, and their labels."""

SUMMARY_FILE = "summary.json"
PICTURE_FILE = "training.png"
SCRATCH = "from_scratch"
"""The run folder of the comparison, within that of the run."""

MOST_IMAGES_FOR_COMPARISON = 1000
"""Largest training set for which ``--compare auto`` also trains from scratch."""

MOST_IMAGES_FOR_BASELINE = 2000
"""Images for the baseline; more of them hardly change its accuracy."""


def train(options: Train, console: Console) -> None:
    """Runs ``flaxtransfer train`` and prints its results; the run folder keeps everything."""
    name, seed = options.job.data.name, options.job.split.seed
    folder = options.run.run or Path("runs") / f"{_file_name(name)}-seed{seed}"
    started = time.monotonic()
    resumed = folder if options.run.resume else None
    choosing = Choosing(folder / RACE, _cache(options), lambda text: _say(text, console))
    if (
        options.job.strategy.strategy == AUTO
        and not options.run.resume
        and (folder / RACE).exists()
    ):
        raise ValueError(f"{folder} holds a race; add --resume to go on, or give a new --run")
    job = prepare(options.job, options.training.settings(), resumed, choosing)
    if resumed and (folder / MANIFEST_FILE).exists() and (folder / SUMMARY_FILE).exists():
        arguments = _arguments(options, job.network, job.plan, job.data, folder)
        for note in check_same_run(**arguments):
            console.print(note, highlight=False, markup=False, soft_wrap=True)
        scratch = folder / SCRATCH
        problems = run_problems(folder)
        problems += run_problems(scratch) if scratch.exists() else []
        if not problems:
            print_summary(read_json(folder / SUMMARY_FILE), folder, console)
            return
        for problem in problems:
            console.print(
                f"{problem}; it is made again", highlight=False, markup=False, soft_wrap=True
            )
    _print_job(job, name, console)
    solved = all(phase.only_solves for phase in job.plan.phases)
    # A solved head is judged by the same folds when it is solved, and says so itself.
    classes = job.network.task.name == SINGLE_LABEL.name
    known = solved or not classes  # The heads of the baseline are for classes.
    baseline, pooled = (None, job.evidence.pooled) if known else _baseline(job, console)
    if pooled is not None and len(pooled[1]) < len(job.splits.train):
        pooled = None  # Some of the images were not looked at.
    fitted = _fit(options, job.network, job.plan, job.data, folder, pooled)
    rows = [_row("pre-trained", job.test(fitted.network), fitted, started)]
    for line in (*fitted.notes, *map(str, fitted.audits)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    few = len(job.splits.train) <= MOST_IMAGES_FOR_COMPARISON
    few = few and options.job.strategy.strategy != "from_scratch"
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
        "baseline": baseline,
        "results": rows,
        "notes": list(fitted.notes),
    }
    _draw(rows, job.network.task, folder)
    write_json(folder / SUMMARY_FILE, summary)
    seal_run(folder, SUMMARY_FILE, PICTURE_FILE)
    print_summary(summary, folder, console)


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
    resume = options.run.resume or (folder / SCRATCH).exists()
    inner = replace(options, run=replace(options.run, resume=resume))
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
    return fit(
        **_arguments(options, network, plan, data, folder),
        resume=options.run.resume,
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
            evaluate_every=options.training.evaluate_every, tensorboard=options.run.tensorboard
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
    what = _OUTPUTS[job.network.task.name]
    console.print(f"{name}: {len(job.source.class_names)} {what}; {counts}")
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


def _baseline(job: Job, console: Console) -> tuple[dict[str, Any] | None, Pooled | None]:
    """Prints the accuracy of heads on frozen features; errors in it do not stop the run.

    Returns:
        The accuracies, and the features they were found on.
    """
    positions = subsample(job.splits.train, MOST_IMAGES_FOR_BASELINE, job.source.labels())
    batches = eval_batches(job.source, positions, job.network.preprocessing)
    try:
        pooled = pooled_features(job.network, batches)
        found = baseline(*pooled, classes=len(job.source.class_names))
    except ValueError as error:
        console.print(f"no baseline on frozen features: {error}", highlight=False)
        return None, None
    console.print(str(found), highlight=False, soft_wrap=True)
    return asdict(found), pooled


def _file_name(data: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in data.rstrip("/").split("/")[-1])
