"""Times maximum-likelihood prevalence against QuaPy's EM, and weighs it on a large target.

    python experiments/benchmarks/prevalence.py                      # a few minutes, 9 GB of memory
    python experiments/benchmarks/prevalence.py --large-examples 0   # seconds

Both get the same float64 posteriors and the same prior, take turns in one process, and use the
machine's threads. QuaPy's EM has no certificate: it gets the tolerance at which it stops as soon as
its gap is small enough, and as many steps as it likes. The large target is measured in a process of
its own: the peak of its resident memory over what it was with the posteriors alone.
Figures: experiments/results/prevalence.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import tyro
from rich.console import Console
from rich.table import Table

from flaxtransfer.shift import likelihood_pass, maximize_likelihood

PEER = "quapy is not installed: python -m pip install quapy==0.2.3, or --no-peer"


@dataclass(frozen=True)
class Prevalence:
    """Time maximum-likelihood prevalence.

    Args:
      examples: of the target that is timed.
      classes: of it.
      separations: distances of the class centers; small ones are hard for EM.
      tolerance: of the certificate, for both.
      rounds: turns of each.
      peer: compare with QuaPy.
      large_examples: of the target whose memory is measured; 0 for none.
      large_classes: of it; posteriors are float32.
      interval: of the large target, None or "asymptotic", which takes minutes.
      seed: of the data.
      json: file for the figures.
      weigh: for the script's own use: measure the large target in this process.
    """

    examples: int = 100_000
    classes: int = 100
    separations: tuple[float, ...] = (1.0,)
    tolerance: float = 1e-6
    rounds: int = 2
    peer: bool = True
    large_examples: int = 1_000_000
    large_classes: int = 1000
    interval: str | None = None
    seed: int = 0
    json: Path | None = None
    weigh: bool = False


def posteriors(
    count: int, classes: int, separation: float, seed: int, dtype: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Exact posteriors of Gaussian classes on a target of other prevalence, and the prior."""
    random = np.random.default_rng(seed)
    centers = separation * random.normal(size=(classes, 20))
    prior = random.dirichlet(np.full(classes, 5.0))
    shares = random.dirichlet(np.full(classes, 1.0))
    found = np.empty((count, classes), dtype)
    for start in range(0, count, 10_000):
        rows = slice(start, min(start + 10_000, count))
        labels = random.choice(classes, size=rows.stop - start, p=shares)
        inputs = centers[labels] + random.normal(size=(len(labels), 20))
        scores = inputs @ centers.T - np.square(centers).sum(1) / 2 + np.log(prior)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        found[rows] = scores / scores.sum(1, keepdims=True)
    return found, prior


def gap(found: np.ndarray, prior: np.ndarray, q: np.ndarray) -> float:
    """The certificate of anybody's estimate."""
    _, sums = likelihood_pass(found, q / prior)
    return float((sums / prior / len(found)).max() - 1)


def peers_tolerance(found: np.ndarray, prior: np.ndarray, tolerance: float) -> tuple[float, int]:
    """What QuaPy's rule has to be told to stop as soon as its gap is small enough, and when."""
    q, before = prior, None
    for number in itertools.count():
        _, sums = likelihood_pass(found, q / prior)
        slopes = sums / prior / len(found)
        moved = np.inf if before is None else float(np.abs(q - before).mean())
        if number > 12 and slopes.max() - 1 <= tolerance:
            return moved * (1 + 1e-6), number
        before, q = q, q * slopes
    raise AssertionError


def compare(options: Prevalence, separation: float) -> dict[str, Any]:
    """Seconds of both on one target."""
    found, prior = posteriors(
        options.examples, options.classes, separation, options.seed, np.float64
    )
    row: dict[str, Any] = {"separation": separation}
    ours = maximize_likelihood(found, prior, tolerance=options.tolerance)
    row |= {"passes": ours.passes, "gap": ours.gap}
    if options.peer:
        from quapy.method.aggregative import EMQ

        EMQ.MAX_ITER = 1_000_000
        row["epsilon"], row["steps"] = peers_tolerance(found, prior, options.tolerance)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(options.rounds):
        start = time.perf_counter()
        maximize_likelihood(found, prior, tolerance=options.tolerance)
        seconds[0].append(time.perf_counter() - start)
        if options.peer:
            start = time.perf_counter()
            q, _ = EMQ.EM(prior, found, epsilon=row["epsilon"])
            seconds[1].append(time.perf_counter() - start)
    row["ours"] = min(seconds[0])
    if options.peer:
        row["their_gap"] = gap(found, prior, q)
        row |= {"theirs": min(seconds[1]), "ratio": min(seconds[1]) / min(seconds[0])}
        row["apart"] = float(np.abs(q - ours.estimate).max())
    return row


def peak() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def weigh(options: Prevalence) -> dict[str, Any]:
    """Memory and seconds of one estimate through the door, on a large target."""
    from flaxtransfer.shift import Calibration, estimate_prevalence

    classes = options.large_classes
    found, prior = posteriors(options.large_examples, classes, 1.0, options.seed, np.float32)
    random = np.random.default_rng(options.seed)
    # A validation whose mean posterior is the prior, as a calibrated one's is.
    labels = random.choice(classes, size=10 * classes, p=prior)
    certain = 0.8 * np.eye(classes)[labels] + 0.2 * prior
    source = Calibration("none", np.ones(classes), np.zeros(classes), certain, labels)
    held = found.nbytes / 1e9
    before = peak()
    start = time.perf_counter()
    estimate = estimate_prevalence(
        found, source, tolerance=options.tolerance, interval=options.interval
    )
    seconds = time.perf_counter() - start
    return {
        "posteriors_gb": held,
        "before_gb": before,
        "peak_gb": peak(),
        "over": (peak() - before) / held,
        "seconds": seconds,
        "gap": estimate.gap,
        "identifiable": estimate.identifiable,
    }


def main(options: Prevalence) -> None:
    """Measures, prints, and writes the figures if asked to."""
    if options.weigh:
        print(json.dumps(weigh(options)))
        return
    versions = {
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    if options.peer:
        try:
            import quapy
        except ImportError:
            raise SystemExit(PEER) from None
        versions["quapy"] = quapy.__version__
    rows = [compare(options, separation) for separation in options.separations]
    table = Table(
        title=f"{options.examples} examples, {options.classes} classes, certificate "
        f"{options.tolerance:.0e}; best of {options.rounds} turns"
    )
    for heading in ("separation", "ours s", "passes", "gap", "QuaPy s", "steps", "its gap"):
        table.add_column(heading, justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("largest difference", justify="right")
    for row in rows:
        peer = ["-"] * 5
        if "theirs" in row:
            peer = [
                f"{row['theirs']:.2f}",
                f"{row['steps']}",
                f"{row['their_gap']:.1e}",
                f"{row['ratio']:.1f}",
                f"{row['apart']:.1e}",
            ]
        own = [f"{row['separation']}", f"{row['ours']:.3f}", f"{row['passes']}"]
        table.add_row(*own, f"{row['gap']:.1e}", *peer)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table)
    large = None
    if options.large_examples:
        asked = [
            *("--large-examples", str(options.large_examples)),
            *("--large-classes", str(options.large_classes)),
            *("--tolerance", str(options.tolerance)),
            *("--seed", str(options.seed)),
            *(() if options.interval is None else ("--interval", options.interval)),
        ]
        done = subprocess.run(
            [sys.executable, __file__, "--weigh", *asked],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        large = json.loads(done.stdout)
        console.print(
            f"{options.large_examples} examples, {options.large_classes} classes, float32: "
            f"{large['seconds']:.1f} s to a gap of {large['gap']:.1e}; posteriors "
            f"{large['posteriors_gb']:.2f} GB, resident {large['before_gb']:.2f} GB before and "
            f"{large['peak_gb']:.2f} GB at the peak, {large['over']:.1%} of the posteriors more"
        )
    console.print(", ".join(f"{name} {value}" for name, value in versions.items()))
    if options.json is not None:
        options_given = dataclasses.asdict(options) | {"json": str(options.json)}
        figures = {"options": options_given, "versions": versions, "figures": rows, "large": large}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Prevalence))
