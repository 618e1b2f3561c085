"""Times heads on features against scikit-learn on one thread, taking turns in one process.

    python experiments/benchmarks/probes.py                 # about ten minutes on 2 CPU cores
    python experiments/benchmarks/probes.py --features 256  # seconds

Three tasks: one logistic probe to its optimum, a sweep of strengths over folds (scikit-learn fits
one after another), and ridge at a hundred strengths with exact leave-one-out errors, where
scikit-learn is `RidgeClassifierCV` over the same. scikit-learn gets one thread, with which it is
fastest on few cores; ours has the machine's, or what OPENBLAS_NUM_THREADS and taskset leave it. Our
compilation is not in the turns; it is shown. Figures: experiments/results/probes.md.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import sklearn
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from threadpoolctl import threadpool_limits

from flaxtransfer.features import (
    logistic_path,
    ridge_path,
    standardization,
    stratified_folds,
    sweep_head,
)


@dataclass(frozen=True)
class Probes:
    """Time heads on features against scikit-learn on one thread.

    Args:
      examples: numbers of examples, one comparison each.
      features: of each example, correlated as a network's are.
      classes: of equal size.
      strengths: of a sweep, from 0.01 to 1e5 on standardized features.
      ridge_strengths: of the ridge path, over the same range.
      folds: of a sweep; as many fits as strengths times folds.
      strength: of the single probe.
      tolerance: of scikit-learn; with its own default, 1e-4, it ends at a larger loss than ours.
      tasks: which to run.
      rounds: turns of each, at most.
      seconds: after which no turn of a task begins, except for its first.
      largest_sweep: most examples of a sweep; scikit-learn's takes minutes with 10000.
      seed: of the data.
      json: file for the figures.
    """

    examples: tuple[int, ...] = (1000, 10_000)
    features: int = 2048
    classes: int = 10
    strengths: int = 16
    ridge_strengths: int = 100
    folds: int = 5
    strength: float = 100.0
    tolerance: float = 1e-6
    tasks: tuple[str, ...] = ("probe", "sweep", "ridge")
    rounds: int = 5
    seconds: float = 60.0
    largest_sweep: int = 1000
    seed: int = 0
    json: Path | None = None


def data(options: Probes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardized float32 features, rectified and correlated, and labels that overlap."""
    random = np.random.default_rng(options.seed)
    width = options.features
    labels = np.arange(count) % options.classes
    hidden = random.normal(size=(options.classes, width))[labels] / 2
    hidden = (hidden + random.normal(size=(count, width))) / np.sqrt(1 + np.arange(width))
    features = np.maximum(hidden @ random.normal(size=(width, width)), 0).astype(np.float32)
    return standardization(features)(features), labels


def take_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], options: Probes
) -> tuple[dict[str, Any], Any, Any]:
    """Seconds of both, and what they returned last."""
    start = time.perf_counter()
    ours()
    first = time.perf_counter() - start
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(options.rounds):
        if turn and sum(map(sum, seconds)) > options.seconds:
            break
        start = time.perf_counter()
        mine = ours()
        seconds[0].append(time.perf_counter() - start)
        with threadpool_limits(1), warnings.catch_warnings():
            # That it stops before its tolerance is shown by the loss.
            warnings.simplefilter("ignore", ConvergenceWarning)
            start = time.perf_counter()
            other = theirs()
            seconds[1].append(time.perf_counter() - start)
    figures = {
        "turns": len(seconds[0]),
        "compile_seconds": first - min(seconds[0]),
        "ours_best": min(seconds[0]),
        "ours_median": float(np.median(seconds[0])),
        "theirs_best": min(seconds[1]),
        "theirs_median": float(np.median(seconds[1])),
        "speed_up": min(seconds[1]) / min(seconds[0]),
        "speed_up_median": float(np.median(np.divide(seconds[1], seconds[0]))),
    }
    return figures, mine, other


def objective(kernel: Any, bias: Any, features: Any, labels: Any, strength: float) -> float:
    """Of logistic regression, in float64, divided by the number of examples."""
    kernel = np.asarray(kernel, np.float64)
    logits = features.astype(np.float64) @ kernel + bias
    loss = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return float(loss.mean() + strength / 2 * np.square(kernel).sum() / len(labels))


def probe(options: Probes, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """One fit."""
    peer = LogisticRegression(C=1 / options.strength, tol=options.tolerance, max_iter=10_000)
    figures, path, fit = take_turns(
        lambda: logistic_path(features, labels, options.strength),
        lambda: peer.fit(features, labels),
        options,
    )
    given = (features, labels, options.strength)
    mine = objective(path.kernels[0], path.biases[0], *given)
    other = objective(fit.coef_.T, fit.intercept_, *given)
    return figures | {"quality": f"loss {mine:.7f}, theirs {other:.7f}"}


def sweep(options: Probes, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Strengths times folds, and the refit of the best."""
    strengths = np.logspace(-2, 5, options.strengths)
    fold = stratified_folds(labels, options.folds)

    def theirs() -> tuple[np.ndarray, Any]:
        accuracies = np.empty((len(strengths), options.folds))
        for n, strength in enumerate(strengths):
            peer = LogisticRegression(C=1 / strength, tol=options.tolerance, max_iter=10_000)
            for k in range(options.folds):
                peer.fit(features[fold != k], labels[fold != k])
                accuracies[n, k] = peer.score(features[fold == k], labels[fold == k])
        best = strengths[accuracies.mean(axis=1).argmax()]
        peer = LogisticRegression(C=1 / best, tol=options.tolerance, max_iter=10_000)
        return accuracies, peer.fit(features, labels)

    figures, found, (accuracies, _) = take_turns(
        lambda: sweep_head(
            features,
            labels,
            strengths=strengths.tolist(),
            folds=options.folds,
            standardize=False,
            rule="accuracy",
        ),
        theirs,
        options,
    )
    apart = np.abs(found.accuracies - accuracies).max()
    return figures | {"quality": f"accuracies at most {apart:.4f} apart"}


def ridge(options: Probes, features: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All strengths, with the error of every example left out."""
    strengths = np.logspace(-2, 5, options.ridge_strengths).tolist()
    figures, path, fit = take_turns(
        lambda: ridge_path(features, labels, strengths),
        lambda: RidgeClassifierCV(strengths).fit(features.astype(np.float64), labels),
        options,
    )
    return figures | {"quality": f"error {path.errors.min():.6f}, theirs {-fit.best_score_:.6f}"}


TASKS = {"probe": probe, "sweep": sweep, "ridge": ridge}


def report(rows: list[dict[str, Any]], options: Probes) -> Table:
    """The figures as a table."""
    table = Table(
        title=f"{options.features} features, {options.classes} classes, "
        f"{options.strengths} strengths times {options.folds} folds, {options.ridge_strengths} "
        f"strengths of ridge; best of up to {options.rounds} turns"
    )
    table.add_column("task")
    for heading in (
        "examples",
        "ours s",
        "compile s",
        "scikit-learn s",
        "speed-up",
        "median",
        "turns",
    ):
        table.add_column(heading, justify="right")
    table.add_column("both")
    for row in rows:
        table.add_row(
            row["task"],
            str(row["examples"]),
            f"{row['ours_best']:.3f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['theirs_best']:.3f}",
            f"{row['speed_up']:.1f}",
            f"{row['speed_up_median']:.1f}",
            str(row["turns"]),
            row["quality"],
        )
    return table


def main(options: Probes) -> None:
    """Measures, prints, and writes the figures if asked to."""
    if unknown := [task for task in options.tasks if task not in TASKS]:
        print(f"no tasks {unknown}; there are {sorted(TASKS)}", file=sys.stderr)
        raise SystemExit(2)
    versions = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    rows = []
    for count in options.examples:
        features, labels = data(options, count)
        for task in options.tasks:
            if task == "sweep" and count > options.largest_sweep:
                continue
            rows.append({"task": task, "examples": count, **TASKS[task](options, features, labels)})
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(report(rows, options))
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))
    if options.json is not None:
        asked = dataclasses.asdict(options) | {"json": str(options.json)}
        text = json.dumps({"options": asked, "versions": versions, "figures": rows}, indent=2)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main(tyro.cli(Probes))
